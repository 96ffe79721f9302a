"""What is wrong with this machine, or will be: checks, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gpumanager.addresses import is_loopback
from gpumanager.client import KEY_ENV
from gpumanager.config import Config
from gpumanager.keys import GUARD_IT
from gpumanager.model import MemoryReading
from gpumanager.setup.brokers import RunningBroker, Stranger
from gpumanager.setup.configfile import KEPT_SHARE, local_port

Level = Literal["good", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result. `remedy` says what to do; empty where all is well."""

    level: Level
    what: str
    remedy: str = ""


def card(reading: MemoryReading | None, reason: str, reserved_mib: int = 0) -> Iterator[Finding]:
    """The driver, and whether it tells whose memory it is. `reason`: why there is no reading;
    `reserved_mib`: what the config keeps free."""
    if reading is None:
        yield Finding(
            "bad",
            f"the card cannot be measured: {reason}",
            "install the NVIDIA driver, or set gpu.total_mib and every vram_resident_mib, so that "
            "the declared figures decide",
        )
        return
    shared = " of the host's memory, which is the card's" if reading.memory == "host" else ""
    size = f"{reading.total_mib} MiB{shared}"
    yield Finding("good", f"{reading.name or 'the card'}: {size}, measured")
    if shared and reserved_mib < reading.total_mib // KEPT_SHARE:
        yield Finding(
            "warning",
            f"the card has no memory of its own: the programs of this machine take from the same, "
            f"and only {reserved_mib} MiB of it are reserved for them",
            f"set gpu.reserved_mib, to {reading.total_mib // KEPT_SHARE} or more",
        )
    if reading.holdings is not None and reading.holdings.reason:
        yield Finding(
            "warning",
            f"the memory of single processes is not known: {reading.holdings.reason}",
            "in a container, run the broker with the host's PID namespace (pid: host); under WSL2 "
            "and MIG only the card's totals are known; on a Jetson the kernel tells root only",
        )
    for process in reading.holdings.foreign if reading.holdings is not None else ():
        yield Finding(
            "warning",
            f"{process.name or 'a process'} (pid {process.pid}) holds {process.mib} MiB and "
            "belongs to no consumer",
            "make it a consumer, or end it",
        )


def brokers(found: Sequence[RunningBroker]) -> Iterator[Finding]:
    """The brokers on this machine: two on one card each think that it is theirs; two on different
    ones, of which a demo's is simulated, are no fault."""
    seen: list[RunningBroker] = []
    sharing: list[RunningBroker] = []
    for each in found:
        if any(each.may_share_card(other) for other in seen):
            sharing.append(each)
        seen.append(each)
    told = ", ".join(f"{each} on port {each.port} ({each.card})" for each in found)
    if sharing:
        ends = " or ".join(f"gpumanager drain --url http://127.0.0.1:{e.port}" for e in sharing)
        yield Finding(
            "warning",
            f"{len(found)} brokers run here, some on the same card: {told}",
            f"two brokers on one card do not know of each other's jobs: end all but one ({ends})",
        )
    elif found:
        count = "1 broker runs" if len(found) == 1 else f"{len(found)} brokers run"
        yield Finding("good", f"{count} here: {told}")


def own_broker(there: RunningBroker | Stranger | None, listen: str, file: str) -> Iterator[Finding]:
    """Who answers where the config at `file` says that its broker listens."""
    if there is None:
        yield Finding(
            "bad",
            f"no broker answers at {listen}",
            "start it: gpumanager serve, or gpumanager setup",
        )
    elif isinstance(there, Stranger):
        yield Finding(
            "bad",
            f"{listen} is taken by {there}, which is no broker",
            f"end it, or set another `listen` in {file}",
        )
    elif not there.told:
        yield Finding(
            "warning",
            f"the broker at {listen} does not show its status",
            f"give a key: --key, or {KEY_ENV}; if it has an older version, restart it",
        )
    elif not there.serves(file):
        yield Finding(
            "bad",
            f"{listen} is taken by {there}, not by the broker of {file}",
            f"end it, or set another `listen` in {file}; then: gpumanager setup",
        )


def exposure(config: Config, keys: int, listening: Iterable[tuple[str, int]]) -> Iterator[Finding]:
    """Ports that others can reach. `keys`: how many API keys there are."""
    if not keys and not is_loopback(config.host):
        yield Finding(
            "bad",
            f"the broker listens on {config.listen}, for everybody who can reach it, without keys",
            GUARD_IT,
        )
    open_ports = {port for host, port in listening if not is_loopback(host)}
    for name, consumer in config.consumers.items():
        port = local_port(consumer.url)
        if port in open_ports:
            yield Finding(
                "warning",
                f"{name} listens on all addresses at port {port}: others can use it without the "
                "broker's queue",
                f"make it listen on 127.0.0.1, or close port {port} to others",
            )


def consumers(config: Config, status: Mapping[str, Any] | None) -> Iterator[Finding]:
    """How the consumers are, by the running broker; and what their config lacks."""
    for name, consumer in config.consumers.items():
        if not consumer.eviction_methods and not consumer.pinned and not consumer.vram_managed:
            yield Finding(
                "warning",
                f"{name} cannot be unloaded: what it holds is never free for others",
                "give it an unload call, or evict: [{unit: …}], or say pinned: true",
            )
        if consumer.health is None and consumer.probe is None:
            yield Finding(
                "warning",
                f"{name} is never probed: if it is down, only its next job will show it",
                "give it a health call",
            )
    known = (status or {}).get("consumers", ())
    if known and all(each["healthy"] or not each["probed"] for each in known):
        yield Finding("good", f"{len(known)} consumers are healthy")
    for each in known:
        name = each["name"]
        if "quarantine" in each:
            yield Finding(
                "bad",
                f"{name} does not release its memory: {each['quarantine']}",
                "give it another eviction method (unit, container, signal); `gpumanager unload "
                f"{name}` tries again",
            )
        if each["probed"] and not each["healthy"]:
            yield Finding("bad", f"{name} is down: {each.get('last_error', '')}", f"start {name}")
        growth = each.get("growth", {})  # a newer key
        if growth.get("verdict") == "leaks":
            over_loads = growth.get("over") == "loads"
            more = (
                f"after each unload it keeps {growth.get('mib_per_load', 0)} MiB more"
                if over_loads
                else f"{growth.get('mib_per_job', 0)} MiB with each job, {growth['grown_mib']} MiB "
                "so far"
            )
            yield Finding(
                "warning",
                f"{name} leaks memory of the card: {more}",
                f"restart {name}, and give it an eviction method that does, as a unit or container"
                if over_loads
                else f"`gpumanager unload {name}` frees it; look for a newer version of {name}",
            )
        if "on_cpu" in each:
            models = ", ".join(each["on_cpu"])
            yield Finding(
                "warning",
                f"{name} works partly on the CPU: {models}",
                "a smaller model, or a smaller context, fits onto the card",
            )


def unclassified(events: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Calls below mounts of which nobody has said whether they are GPU work."""
    for event in events:
        if event["event"] == "call_unclassified":
            name, call = event["consumer"], f"{event['method']} {event['path']}"
            yield Finding(
                "warning",
                f"{name}: nothing says whether {call} is GPU work; it takes its turn",
                f"name it in the gpu_work or not_gpu_work of {name}",
            )


def releases(events: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Consumers whose unload did not give back what it should have, lately."""
    leaks: dict[str, int] = {}
    for event in events:
        if event["event"] == "evicted" and event["outcome"] == "leaked":
            leaks[event["consumer"]] = leaks.get(event["consumer"], 0) + 1
    for name, count in leaks.items():
        yield Finding(
            "warning",
            f"{name} released no memory {count} times when it was unloaded",
            "look at its log, or give it another eviction method (evict)",
        )
