"""The refusal of a job that has no room, for a person to read: what is missing, who holds it."""

from __future__ import annotations

from collections.abc import Sequence

from gpumanager.errors import InsufficientVram
from gpumanager.model import parts_of
from gpumanager.scheduling.memory import Card, Look


def refusal(now: Look, card: Card, leaking: Sequence[str], retry_after: float) -> InsufficientVram:
    """The error for the target of `now`, to be tried again after so many seconds. `leaking` were
    unloaded for it, and gave nothing back."""
    target, reserved = now.target, card.reserved_mib
    why = "".join(f"{name} was unloaded, but gave nothing back; " for name in leaking)
    return InsufficientVram(
        f"{why}{target} needs {now.needed_mib} MiB and is "
        f"{now.plan.short_mib or short_mib(now, reserved)} MiB short: "
        f"{now.balance.free_mib} of {now.balance.total_mib} MiB are free, "
        f"{reserved} of them reserved; "
        f"held by {', '.join(_holders(target, card)) or 'nobody'}",
        consumer=target,
        retry_after=retry_after,
    )


def short_mib(now: Look, reserved_mib: int) -> int:
    """MiB that are missing as things are, without unloading anybody."""
    return now.needed_mib - now.held_mib - (now.balance.free_mib - reserved_mib)


def _holders(target: str, card: Card) -> list[str]:
    """Who holds the memory: consumers and their models, then the largest of the others."""
    figures = {name: each.resident.held_mib for name, each in card.standings.items()}
    named = {name: mib for name, mib in figures.items() if mib}
    own = (target, parts_of(target)[0])
    listed = [f"{name} {mib} MiB" for name, mib in sorted(named.items()) if name not in own]
    others = card.balance().used_mib - sum(named.values())
    holdings = None if card.reading is None else card.reading.holdings
    for process in () if holdings is None else holdings.foreign:
        listed.append(f"{process.name or 'process'} (pid {process.pid}) {process.mib} MiB")
        others -= process.mib
    if others > 0:
        shared = card.reading is not None and card.reading.memory == "host"
        who = "other programs of this machine" if shared else "others"
        listed.append(f"{who} {others} MiB")
    return listed
