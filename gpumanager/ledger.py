"""How much of the card is free, and who holds how much: as NVML measures it, or, without a
measurement, as the consumers report and the config declares. Pure functions over plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gpumanager.model import ConsumerState, MemoryReading


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


def balance(reading: MemoryReading | None, total_mib: int, held_mib: Iterable[int]) -> Balance:
    """Draw up the balance.

    `reading` is None where the card cannot be measured; `total_mib` is the configured total
    (0: none), which also caps a measured card; `held_mib` is what each consumer is taken to
    hold.
    """
    if reading is not None:
        total = total_mib or reading.total_mib
        return Balance(
            "measured",
            total_mib=total,
            used_mib=reading.used_mib,
            free_mib=max(0, min(reading.free_mib, total - reading.used_mib)),
        )
    if not total_mib:
        return Balance("unknown")
    used = sum(held_mib)
    return Balance("ledger", total_mib, used_mib=used, free_mib=max(0, total_mib - used))


@dataclass(frozen=True, slots=True)
class Held:
    """What one consumer holds of the card. `source`: the card's figures for its processes, its own
    report, or the config. `surely_mib` is what it need not allocate again, never more than
    `mib`."""

    mib: int
    surely_mib: int
    source: Literal["measured", "reported", "declared"]


def held(name: str, state: ConsumerState, declared_mib: int, reading: MemoryReading | None) -> Held:
    """What a consumer holds, from the best source there is.

    A figure it reported itself is a lower bound while a job since may have loaded more: it is
    credited with that, but taken to hold what it declares.
    """
    measured = None if reading is None else reading.measured_mib(name)
    if measured is not None:
        return Held(measured, measured, "measured")
    declared = declared_mib if state.loaded else 0
    if state.resident_mib is None:
        return Held(declared, declared, "declared")
    surely = state.resident_mib
    return Held(max(surely, declared) if state.report_outdated else surely, surely, "reported")
