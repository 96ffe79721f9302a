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


def judge(name: str, before: MemoryReading, after: MemoryReading, expected_mib: int) -> Release:
    """Compare the card before the unload and now.

    With figures per process the victim's own are compared, and `expected_mib` is only for where
    there are none; without them the card's free memory has to do, and a theft looks like a leak.
    """
    held, holds = before.measured_mib(name), _still_held(name, before, after)
    freed = after.free_mib - before.free_mib
    attributed = held is not None and holds is not None
    drop = held - holds if held is not None and holds is not None else freed
    mib = max(0, drop)
    taken_by = ""
    if drop >= RELEASED_SHARE * expected_mib:
        outcome: Outcome = "released"
        if attributed and freed < STOLEN_SHARE * mib:
            outcome, taken_by = "stolen", _who_grew(name, before, after)
    else:
        outcome = "partial" if drop >= LEAKED_SHARE * expected_mib else "leaked"
    return Release(outcome, mib, expected_mib, holds if attributed else None, taken_by)


def _still_held(name: str, before: MemoryReading, after: MemoryReading) -> int | None:
    """What the victim holds now; by its processes of before, where it does not listen any more."""
    holds = after.measured_mib(name)
    if holds is not None or before.holdings is None or after.processes is None:
        return holds
    pids = before.holdings.pids.get(name, ())
    return sum(process.mib for process in after.processes if process.pid in pids)


def _who_grew(name: str, before: MemoryReading, after: MemoryReading) -> str:
    """The holder that grew most meanwhile, and by how much."""
    grown = {
        holder: mib - _held_by(before).get(holder, 0)
        for holder, mib in _held_by(after).items()
        if holder != name
    }
    holder = max(grown, key=lambda each: grown[each], default="")
    return f"{holder} (+{grown[holder]} MiB)" if grown.get(holder, 0) > 0 else "somebody"


def _held_by(reading: MemoryReading) -> dict[str, int]:
    if reading.holdings is None:
        return {}
    foreign = {f"{each.name} (pid {each.pid})": each.mib for each in reading.holdings.foreign}
    return {**reading.holdings.consumers, **foreign}
