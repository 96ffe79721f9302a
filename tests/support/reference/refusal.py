"""The refusal of a job that has no room, for a person to read: what is missing, who holds it."""

from __future__ import annotations

from collections.abc import Sequence

from gpumanager.errors import InsufficientVram
from tests.support.reference.census import Census, Look


def refusal(now: Look, leaking: Sequence[str]) -> InsufficientVram:
    """The error for the target of `now`. `leaking` were unloaded for it, and gave nothing back."""
    config = now.census.snapshot.config
    target, reserved = now.target, config.gpu.reserved_mib
    why = "".join(f"{name} was unloaded, but gave nothing back; " for name in leaking)
    return InsufficientVram(
        f"{why}{target} needs {now.needed_mib} MiB and is "
        f"{now.plan.short_mib or short_mib(now)} MiB short: "
        f"{now.balance.free_mib} of {now.balance.total_mib} MiB are free, "
        f"{reserved} of them reserved; "
        f"held by {', '.join(_holders(target, now.census)) or 'nobody'}",
        consumer=target,
        retry_after=config.health_interval,
    )


def short_mib(now: Look) -> int:
    """MiB that are missing as things are, without unloading anybody."""
    reserved = now.census.snapshot.config.gpu.reserved_mib
    return now.needed_mib - now.held_mib - (now.balance.free_mib - reserved)


def _holders(target: str, census: Census) -> list[str]:
    """Who holds the memory: consumers, then the largest of the others."""
    figures = census.held()
    named = {name: each.mib for name, each in figures.items() if each.mib}
    listed = [f"{name} {mib} MiB" for name, mib in sorted(named.items()) if name != target]
    others = census.balance().used_mib - sum(named.values())
    reading = census.snapshot.gpu.reading
    holdings = None if reading is None else reading.holdings
    for process in () if holdings is None else holdings.foreign:
        listed.append(f"{process.name or 'process'} (pid {process.pid}) {process.mib} MiB")
        others -= process.mib
    if others > 0:
        listed.append(f"others {others} MiB")
    return listed
