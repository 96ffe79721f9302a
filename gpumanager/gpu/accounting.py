"""How much of the card is free, and who holds how much: as NVML measures it, or, without a
measurement, as the consumers report and the config declares. Pure functions over plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gpumanager.model import ConsumerState, Holdings, MemoryReading


@dataclass(frozen=True, slots=True)
class Balance:
    """The card's memory in MiB and where the figures come from.

    `measured`: the card's own. `ledger`: `gpu.total_mib` less what the consumers report or
    declare. `unknown`: there is neither a measurement nor a configured total, so nothing can be
    decided by memory and all figures are 0.
    """

    source: Literal["measured", "ledger", "unknown"]
    total_mib: int = 0
    used_mib: int = 0
    free_mib: int = 0


def balance(
    reading: MemoryReading | None,
    total_mib: int,
    held_mib: Iterable[int],
    last: MemoryReading | None = None,
) -> Balance:
    """Draw up the balance.

    `reading` is None where the card cannot be measured; `last` is then its latest reading, if there
    ever was one. `total_mib` is the configured total (0: none), which also caps a measured card; of
    the host's memory it caps what is held for the GPU, where that is known.
    `held_mib` is what each consumer is taken to hold.
    """
    if reading is not None:
        total = total_mib or reading.total_mib
        used_mib = reading.used_mib
        if total_mib and reading.memory == "host" and reading.on_gpu_mib is not None:
            used_mib = reading.on_gpu_mib  # what other programs take is not the GPU's share
        free_mib = max(0, min(reading.free_mib, total - used_mib))
        return Balance("measured", total_mib=total, used_mib=used_mib, free_mib=free_mib)
    used = sum(held_mib)
    if last is not None:
        total_mib = total_mib or last.total_mib
        used += sum(each.mib for each in (last.holdings or Holdings()).foreign)
    if not total_mib:
        return Balance("unknown")
    return Balance("ledger", total_mib, used_mib=used, free_mib=max(0, total_mib - used))


@dataclass(frozen=True, slots=True)
class Held:
    """What one consumer holds of the card. `source`: the card's figures for its processes, its own
    report, or the config. `surely_mib` is what it need not allocate again, never more than
    `mib`."""

    mib: int
    surely_mib: int
    source: Literal["measured", "reported", "declared"]


def held(
    name: str,
    state: ConsumerState,
    declared_mib: int,
    reading: MemoryReading | None,
    *,
    last: MemoryReading | None = None,
    keeps_mib: int = 0,
    now: float | None = None,
) -> Held:
    """What a consumer holds, from the best source there is.

    A figure it reported itself is a lower bound while a job since may have loaded more: it is
    credited with that, but taken to hold what it declares. So is one that is only assumed to be
    loaded, which is credited with nothing. One that the broker has unloaded just before `now` is
    credited with no more than it keeps, `keeps_mib`: the rest may be on its way back. One that
    leaks is not credited with what it has leaked: its jobs cannot use that. While the
    card cannot be read, one that is loaded holds what it held in the `last` reading, if that is
    more than it declares, and one that is not what it keeps.
    """
    known = _held(name, state, declared_mib, reading, last)
    if state.loaded and state.growth.leaked_mib:
        known = replace(known, surely_mib=max(0, known.surely_mib - state.growth.leaked_mib))
    if reading is None and last is not None and not state.loaded:
        # What it keeps unloaded shows in no report of its own.
        kept = min(last.measured_mib(name) or 0, keeps_mib)
        known = replace(known, mib=max(known.mib, kept), surely_mib=max(known.surely_mib, kept))
    if now is not None and state.is_releasing(now):
        return replace(known, surely_mib=min(known.surely_mib, keeps_mib))
    return known


def _held(
    name: str,
    state: ConsumerState,
    declared_mib: int,
    reading: MemoryReading | None,
    last: MemoryReading | None,
) -> Held:
    measured = None if reading is None else reading.measured_mib(name)
    if measured is not None:
        return Held(measured, measured, "measured")
    declared = declared_mib if state.loaded else 0
    if state.resident_mib is not None:
        surely = state.resident_mib
        return Held(max(surely, declared) if state.report_outdated else surely, surely, "reported")
    before = None if last is None or not state.loaded else last.measured_mib(name)
    if before is not None and before > declared:
        declared = before
    return Held(declared, 0 if state.assumed is not None else declared, "declared")


def plausible(
    states: Mapping[str, ConsumerState],
    declared_mib: Mapping[str, int],
    reading: MemoryReading | None,
    total_mib: int,
) -> Mapping[str, ConsumerState]:
    """The states without the assumptions that cannot all be true: while what the consumers are
    taken to hold is more than the ledger's total, the oldest assumption is dropped (of those that
    are as old as each other, the first). A consumer at work keeps its own."""
    if reading is not None or not total_mib:
        return states
    holds = {name: held(name, states[name], mib, None).mib for name, mib in declared_mib.items()}
    used = sum(holds.values())
    if used <= total_mib:
        return states
    kept = dict(states)
    for name in sorted(_assumed(states, declared_mib), key=lambda each: states[each].assumed or 0):
        if used <= total_mib:
            break
        kept[name] = replace(states[name], loaded=False, assumed=None)
        used -= holds[name]
    return kept


def disproved(
    states: Mapping[str, ConsumerState], declared_mib: Mapping[str, int], total_mib: int
) -> list[str]:
    """Consumers that cannot be loaded as is assumed of them, since those that surely are would
    leave too little of the ledger's total."""
    if not total_mib:
        return []
    assumed = _assumed(states, declared_mib)
    sure = sum(
        held(name, states[name], mib, None).mib
        for name, mib in declared_mib.items()
        if name not in assumed
    )
    return [name for name in assumed if sure + declared_mib[name] > total_mib]


def _assumed(states: Mapping[str, ConsumerState], declared_mib: Mapping[str, int]) -> list[str]:
    return [
        name
        for name in declared_mib
        if states[name].assumed is not None
        and states[name].resident_mib is None
        and not states[name].active
    ]
