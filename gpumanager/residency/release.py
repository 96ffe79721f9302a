"""Did the memory come back? Judged by the victim's own drop: a pure function over plain data.

An unload call that answers 200 is no proof; neither is a card with more free memory, which may be
somebody else's doing, nor one with no more, since somebody else may have taken it at once.
"""

from __future__ import annotations

from gpumanager.model import MemoryReading, Outcome
from gpumanager.scheduling.interface import Release

RELEASED_SHARE = 0.9
"""Of what was expected, counts as all of it: figures are rough, and a process that unloads keeps
its CUDA context."""

LEAKED_SHARE = 0.1
"""Less than this of what was expected counts as nothing."""

STOLEN_SHARE = 0.5
"""If less than this of what the victim gave back shows as free, somebody else has it."""

NOISE_MIB = 512
"""As much as the other programs of a machine take and give back meanwhile. Where the victim's own
figures are not known, and the card's memory is the host's, so little proves nothing."""


def judge(name: str, before: MemoryReading, after: MemoryReading, expected_mib: int) -> Release:
    """Compare the card before the unload and now.

    With figures per process the victim's own are compared, and `expected_mib` is only for where
    there are none; without them the card's free memory has to do, and a theft looks like a leak.
    Of the host's memory all programs take: there what is held for the GPU is compared, where the
    kernel tells, and else so little is `unverified`.
    """
    held, holds = before.measured_mib(name), _still_held(name, before, after)
    freed = after.free_mib - before.free_mib
    attributed = held is not None and holds is not None
    given = held - holds if held is not None and holds is not None else _less_on_gpu(before, after)
    drop = freed if given is None else given
    mib = max(0, drop)
    taken_by = ""
    if noise_mib(name, before) > expected_mib > 0:
        outcome: Outcome = "unverified"
    elif drop >= RELEASED_SHARE * expected_mib:
        outcome = "released"
        if given is not None and freed < STOLEN_SHARE * mib:
            outcome, taken_by = "stolen", _who_grew(name, before, after, mib - freed)
    else:
        outcome = "partial" if drop >= LEAKED_SHARE * expected_mib else "leaked"
    return Release(outcome, mib, expected_mib, holds if attributed else None, taken_by)


def noise_mib(name: str, before: MemoryReading) -> int:
    """How much of the memory may come and go without the victim's doing, unnoticed; 0 where what
    it holds is known, or what is held for the GPU, or the card has memory of its own."""
    if before.memory == "own" or before.on_gpu_mib is not None:
        return 0
    return NOISE_MIB if before.measured_mib(name) is None else 0


def _less_on_gpu(before: MemoryReading, after: MemoryReading) -> int | None:
    """How much less of the host's memory is held for the GPU; None where that is not known."""
    if before.memory == "own" or before.on_gpu_mib is None or after.on_gpu_mib is None:
        return None
    return before.on_gpu_mib - after.on_gpu_mib


def _still_held(name: str, before: MemoryReading, after: MemoryReading) -> int | None:
    """What the victim holds now; by its processes of before, where it does not listen any more.
    One of them that was started since is another process under the same pid."""
    holds = after.measured_mib(name)
    if holds is not None or before.holdings is None or after.processes is None:
        return holds
    births = {} if after.holdings is None else after.holdings.births
    pids = [
        pid
        for pid in before.holdings.pids.get(name, ())
        if births.get(pid) in (before.holdings.births.get(pid), None)
    ]
    return sum(process.mib for process in after.processes if process.pid in pids)


def _who_grew(name: str, before: MemoryReading, after: MemoryReading, missing_mib: int) -> str:
    """The holder that grew most meanwhile, and by how much. Of the host's memory any program may
    have taken it."""
    grown = {
        holder: mib - _held_by(before).get(holder, 0)
        for holder, mib in _held_by(after).items()
        if holder != name
    }
    holder = max(grown, key=lambda each: grown[each], default="")
    if before.memory == "host" and grown.get(holder, 0) < STOLEN_SHARE * missing_mib:
        return "other programs of this machine"
    return f"{holder} (+{grown[holder]} MiB)" if grown.get(holder, 0) > 0 else "somebody"


def _held_by(reading: MemoryReading) -> dict[str, int]:
    if reading.holdings is None:
        return {}
    foreign = {f"{each.name} (pid {each.pid})": each.mib for each in reading.holdings.foreign}
    return {**reading.holdings.consumers, **foreign}
