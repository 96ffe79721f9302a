"""The refusal of a job that has no room, for a person to read: what is missing, who holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpumanager.config import Config
from gpumanager.errors import InsufficientVram
from gpumanager.model import ConsumerState, MemoryReading
from gpumanager.residency.census import Census, Look


def refusal(
    config: Config,
    now: Look,
    census: Census,
    states: Mapping[str, ConsumerState],
    reading: MemoryReading | None,
    leaking: Sequence[str],
) -> InsufficientVram:
    """The error for the target of `now`. `leaking` were unloaded for it, and gave nothing back."""
    target, reserved = now.target, config.gpu.reserved_mib
    why = "".join(f"{name} was unloaded, but gave nothing back; " for name in leaking)
    return InsufficientVram(
        f"{why}{target} needs {now.needed_mib} MiB and is "
        f"{now.plan.short_mib or short_mib(now, reserved)} MiB short: "
        f"{now.balance.free_mib} of {now.balance.total_mib} MiB are free, "
        f"{reserved} of them reserved; "
        f"held by {', '.join(_holders(target, census, states, reading)) or 'nobody'}",
        consumer=target,
        retry_after=config.health_interval,
    )


def short_mib(now: Look, reserved_mib: int) -> int:
    """MiB that are missing as things are, without unloading anybody."""
    return now.needed_mib - now.held_mib - (now.balance.free_mib - reserved_mib)


def _holders(
    target: str,
    census: Census,
    states: Mapping[str, ConsumerState],
    reading: MemoryReading | None,
) -> list[str]:
    """Who holds the memory: consumers, then the largest of the others."""
    figures = census.held(states, reading)
    named = {name: each.mib for name, each in figures.items() if each.mib}
    listed = [f"{name} {mib} MiB" for name, mib in sorted(named.items()) if name != target]
    others = census.balance(states, reading).used_mib - sum(named.values())
    holdings = None if reading is None else reading.holdings
    for process in () if holdings is None else holdings.foreign:
        listed.append(f"{process.name or 'process'} (pid {process.pid}) {process.mib} MiB")
        others -= process.mib
    if others > 0:
        listed.append(f"others {others} MiB")
    return listed
