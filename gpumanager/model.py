"""Plain data that the rooms of the package hand to each other. No behaviour, no locks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal


@dataclass(frozen=True, slots=True)
class Job:
    """One request for the GPU.

    `max_wait` is the longest the client is willing to wait in line, in seconds; None leaves
    it to the scheduler's own bound.
    """

    consumer: str
    kind: str
    client: str = "-"
    request_id: str = "-"
    max_wait: float | None = None


@dataclass(frozen=True, slots=True)
class LineEntry:
    """One place in the line, as an operator sees it.

    `since` is monotonic seconds: of the arrival while `waiting`, of the grant once `running`.
    `position` counts from 1 among those waiting, 0 once running; `estimate_s` is in how many
    seconds it is expected to be granted.
    """

    ticket: int
    job: Job
    state: Literal["waiting", "running"]
    since: float
    position: int = 0
    estimate_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler's counters, taken in one piece.

    `total_jobs` counts grants since the start; `last_wait_ms` belongs to the latest grant,
    `last_run_ms` to the job that gave the GPU back last. `evictions` counts consumers that
    were unloaded to make room.
    """

    queue_depth: int = 0
    in_flight: int = 0
    total_jobs: int = 0
    last_wait_ms: int = 0
    last_run_ms: int = 0
    oldest_queued: datetime | None = None
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The card's memory in MiB. `name` and `utilization_percent` are None where the card does
    not tell; `fault` says which of them failed and how."""

    total_mib: int
    used_mib: int
    free_mib: int
    name: str | None = None
    utilization_percent: int | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class GpuState:
    """The latest reading and what the sampler thinks of it. `err` is empty while all is well."""

    reading: MemoryReading | None = None
    sampled_at: float | None = None
    err: str = ""


@dataclass(frozen=True, slots=True)
class ConsumerState:
    """What the broker knows of one consumer. Times are monotonic seconds.

    `active` counts its jobs, `busy` the broker's own calls to load or unload it.
    `healthy` is None until the first probe. `resident_mib` is what the consumer itself
    reports, None where it does not. `residency_version` changes with every load, unload, start
    and end of a job, so that a probe that began before cannot overwrite what it did not see.
    """

    loaded: bool
    healthy: bool | None = None
    resident_mib: int | None = None
    active: int = 0
    busy: int = 0
    report_outdated: bool = False
    total_requests: int = 0
    last_used: float | None = None
    last_probe: float | None = None
    last_error: str = ""
    residency_version: int = 0

    def held_mib(self, declared_mib: int) -> int:
        """MiB it is taken to hold: its own figure if it reports one, else the declared one
        while it is loaded; the larger of them while a job since may have loaded more."""
        declared = declared_mib if self.loaded else 0
        if self.resident_mib is None:
            return declared
        return max(self.resident_mib, declared) if self.report_outdated else self.resident_mib

    def credited_mib(self, declared_mib: int) -> int:
        """MiB it surely need not allocate again: as `held_mib`, but the figure it reported, even
        if that may be out of date."""
        if self.resident_mib is not None:
            return self.resident_mib
        return declared_mib if self.loaded else 0


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a consumer said of itself. None where it did not say."""

    loaded: bool | None = None
    resident_mib: int | None = None
