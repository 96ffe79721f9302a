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
    """Whether what the job needs is loaded, or would fit beside what is; and the seconds that
    loading, unloading and running it usually take: as learned of its model, else of its consumer.
    `now` is monotonic seconds."""
    known, usual = snapshot.figures(job.resident), snapshot.figures(job.consumer)
    load_s, unload_s = known.load_s or usual.load_s, known.unload_s or usual.unload_s
    return Prospect(
        loaded=_is_loaded(snapshot, job),
        fits=_fits(snapshot, job, now),
        load_s=RELOAD_S if load_s is None else load_s.mean,
        unload_s=(unload_s or UNLOAD).mean,
        run_s=(known.run_s or usual.run_s or RUN).mean,
    )


def _is_loaded(snapshot: Snapshot, job: Job) -> bool:
    state = snapshot.states[job.consumer]
    if not state.loaded or state.stopped_by is not None:
        return False
    if job.model is None or not snapshot.consumers[job.consumer].tells_models_apart:
        return True
    model = state.model(job.model)
    return model.loaded and (
        job.context is None or model.context is None or job.context <= model.context
    )


def _fits(snapshot: Snapshot, job: Job, now: float) -> bool:
    """Whether it could be loaded without anybody being unloaded."""
    holds, needed = holders(snapshot, now), snapshot.needed(job.resident, job.context)
    balance = left(snapshot, holds, job.consumer)
    own_mib = holds[job.consumer].surely_mib if job.resident == job.consumer else 0
    return balance.source == "unknown" or (
        needed.mib - own_mib <= balance.free_mib - snapshot.config.gpu.reserved_mib
    )
