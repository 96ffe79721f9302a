"""What a job would find on the card, by what is known already: for the policy that weighs whether
others go first. A pure function over one snapshot, asked under the queue's lock."""

from __future__ import annotations

from gpumanager.consumers.snapshot import Snapshot
from gpumanager.gpu.inventory import holders, left
from gpumanager.model import Job
from gpumanager.residency.census import RELOAD_S
from gpumanager.scheduling.estimate import RUN, UNLOAD
from gpumanager.scheduling.policy import Prospect


def prospect(snapshot: Snapshot, job: Job, now: float) -> Prospect:
    """Whether what the job needs is loaded, or fits beside what is; and the seconds that loading,
    unloading and running it usually take. `now` is monotonic seconds."""
    name = job.consumer
    state, known = snapshot.states[name], snapshot.figures(name)
    return Prospect(
        in_place=state.stopped_by is None and (state.loaded or _fits(snapshot, name, now)),
        load_s=RELOAD_S if known.load_s is None else known.load_s.mean,
        unload_s=(UNLOAD if known.unload_s is None else known.unload_s).mean,
        run_s=(RUN if known.run_s is None else known.run_s).mean,
    )


def _fits(snapshot: Snapshot, name: str, now: float) -> bool:
    """Whether it could be loaded without anybody being unloaded."""
    holds = holders(snapshot, now)
    balance = left(snapshot, holds, name)
    missing_mib = snapshot.needed(name).mib - holds[name].surely_mib
    return balance.source == "unknown" or (
        missing_mib <= balance.free_mib - snapshot.config.gpu.reserved_mib
    )
