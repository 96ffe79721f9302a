"""How much of the card is free: as NVML measures it, or, without a measurement, as the declared
figures add up. Pure functions over plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gpumanager.model import MemoryReading


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
