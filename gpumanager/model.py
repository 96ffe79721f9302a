"""Plain data that the rooms of the package hand to each other. No behaviour, no locks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal

RELEASE_S = 60.0
"""The longest that memory may take to come back after an unload, for what is decided by it."""

NORMAL, BACKGROUND = 3, 7
"""The urgency of a job of which nothing says another, and of what nobody waits for."""

CONTEXT_MIB = 600
"""What a process may hold of a card with no model loaded; 107 to 555 MiB in the field."""

Outcome = Literal["released", "partial", "leaked", "stolen", "unverified", "gone", "busy"]
"""What became of the memory of a consumer that was unloaded."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request for the GPU.

    `max_wait` is the longest the client is willing to wait in the queue, in seconds; None leaves
    it to the scheduler's own bound. `makes_room` is False for what needs the GPU to itself, but
    no memory of it, as an unload; `runs` for what ends as soon as its consumer is loaded. `key` is
    the name of the API key it came with, where keys are in use. `settings` is the consumer's
    config as of when the job was admitted, for those who prepare it: what a reload changes later
    is for the jobs after it. The queue does not look at it.

    `model` is the model that it works with, where its memory is known by model, and `context` how
    many tokens it wants that loaded with, where it says so. `called` is what it calls its model
    itself, where its consumer tells which models are loaded.

    `urgency` is 0 (now) to 7 (background), as RFC 9218 has it; `requester` is who shares the GPU
    fairly with others: the name of the API key, else the client's address; `session` is the
    conversation that it belongs to, where the client says so.
    """

    consumer: str
    kind: str
    client: str = "-"
    request_id: str = "-"
    max_wait: float | None = None
    makes_room: bool = True
    runs: bool = True
    key: str | None = None
    settings: object = field(default=None, compare=False, repr=False)
    model: str | None = None
    context: int | None = None
    called: str | None = None
    urgency: int = NORMAL
    requester: str = "-"
    session: str | None = None

    @property
    def resident(self) -> str:
        """The name of what it needs on the card: see `resident_name`."""
        return resident_name(self.consumer, self.model)


def resident_name(consumer: str, model: str | None = None) -> str:
    """What is resident on the card by its name: a consumer, or one model of it. A consumer's own
    name has no slash in it."""
    return consumer if model is None else f"{consumer}/{model}"


def model_key(name: str) -> str:
    """A model's name as it is counted by: Ollama lists `name:latest` where clients say `name`."""
    return name.removesuffix(":latest")


def parts_of(resident: str) -> tuple[str, str | None]:
    """The consumer, and the model, if it is one: the reverse of `resident_name`."""
    consumer, slash, model = resident.partition("/")
    return consumer, model if slash else None


@dataclass(frozen=True, slots=True)
class Turn:
    """What is expected of a job's turn, in seconds: until it comes, then unloading others, loading
    its consumer, and running; of a job that runs, what is left of them. `overdue`: the job that
    runs has taken far longer than any that is remembered, so that all of it is a guess. `surely_s`:
    so much of the wait, or of what is left of it if it runs, is no guess: it comes first in any
    case, and takes what was seen before."""

    wait_s: float = 0.0
    evict_s: float = 0.0
    load_s: float = 0.0
    run_s: float = 0.0
    overdue: bool = False
    surely_s: float = 0.0

    @property
    def left_s(self) -> float:
        """From its beginning to its end."""
        return self.evict_s + self.load_s + self.run_s


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """One place in the queue, as an operator sees it.

    `since` is monotonic seconds: of the arrival while `waiting`, of the grant once `running`.
    `position` counts from 1 among those waiting, 0 once running.
    """

    ticket: int
    job: Job
    state: Literal["waiting", "running"]
    since: float
    position: int = 0
    turn: Turn = Turn()


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler's counters, taken in one piece.

    `total_jobs` counts grants since the start; `last_wait_ms` belongs to the latest grant,
    `last_run_ms` to the job that gave the GPU back last. `evictions` counts consumers that
    were unloaded to make room; `longest_overtake` is the most jobs that one was overtaken by, and
    `longest_overtake_s` the longest between the first and the last of those, in seconds.
    """

    queue_depth: int = 0
    in_flight: int = 0
    total_jobs: int = 0
    last_wait_ms: int = 0
    last_run_ms: int = 0
    oldest_queued: datetime | None = None
    evictions: int = 0
    longest_overtake: int = 0
    longest_overtake_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of the card. `name` is empty where it is not known."""

    pid: int
    mib: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Who holds the card's memory, process by process.

    `consumers` has the MiB of each consumer whose process is known (0: it runs, but holds
    nothing); one that is missing there cannot be told apart. `pids` are the processes behind
    each figure. `foreign` are the processes of no consumer. `births` says of every process when it
    was started, in ticks since boot, None where that is not known: a pid alone may be another
    process in the next reading. `reason` is empty if the platform tells figures per process, else
    says why not; then all else is empty.
    """

    consumers: Mapping[str, int] = field(default_factory=dict)
    pids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    foreign: tuple[GpuProcess, ...] = ()
    reason: str = ""
    births: Mapping[int, int | None] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The card's memory in MiB, and what its sensors say: load in percent, power in W beside its
    limit, temperature in degrees Celsius. What the card does not tell is None; `fault` says which
    of the optional fields failed and how. `processes` are those the card knows to hold memory,
    None where it does not tell, for the reason `untold`; `holdings` is what was made of them, None
    if nobody tried. `local_pids`: the numbers of the processes are those of this PID namespace, for
    sure.

    `memory` is `host` where the chip has none of its own: then the figures are those of the host's
    memory, of which all of its programs take, and `on_gpu_mib` is what is held of it for the GPU,
    None where that is not known."""

    total_mib: int
    used_mib: int
    free_mib: int
    name: str | None = None
    utilization_percent: int | None = None
    fault: str | None = None
    processes: tuple[GpuProcess, ...] | None = None
    holdings: Holdings | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    memory: Literal["own", "host"] = "own"
    on_gpu_mib: int | None = None
    untold: str = ""
    local_pids: bool = False

    def measured_mib(self, consumer: str) -> int | None:
        """MiB the consumer's processes hold; None where that cannot be told."""
        return None if self.holdings is None else self.holdings.consumers.get(consumer)


@dataclass(frozen=True, slots=True)
class GpuState:
    """The latest reading, when it was asked for, and what the sampler thinks of it. `err` is empty
    while all is well; while the card cannot be read, `last` is the latest reading of before."""

    reading: MemoryReading | None = None
    sampled_at: float | None = None
    err: str = ""
    last: MemoryReading | None = None


@dataclass(frozen=True, slots=True)
class StoppedBy:
    """How the broker stopped a consumer: by which method of its `evict` (`unit`, `container`,
    `signal`, `checkpoint`). `processes` are those it has to bring back, each with its pid and
    the time it was started, in seconds since the epoch."""

    method: str
    processes: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Declared:
    """What the config says that a consumer needs: `mib`, and never more than `max_mib`. What an
    `elastic` one is seen to hold is not what it needs."""

    mib: int = 0
    max_mib: int | None = None
    elastic: bool = False


@dataclass(frozen=True, slots=True)
class Growth:
    """What becomes of the memory that a consumer holds, loaded and at rest, while it is used.

    `verdict`: `steady`, `grows` (with its use, as caches do, but not on and on), `leaks`, or
    `unknown` as long as too little was seen. A leak goes on `over` the `jobs` since a load, and is
    given back by an unload, or over `loads`: after each unload more is left. `fresh_mib` is what it
    held at rest just after it was loaded; `grown_mib` how much more that is by now, after `jobs`
    jobs. `trims_to_mib` is what a trim is taken to leave: what the last one did, or the lowest that
    it was seen to hold since its load; None if a trim would give nothing. `at` is since when the
    verdict is so, in seconds since the epoch.
    """

    verdict: Literal["unknown", "steady", "grows", "leaks"] = "unknown"
    over: Literal["", "jobs", "loads"] = ""
    fresh_mib: int = 0
    grown_mib: int = 0
    mib_per_job: float = 0.0
    mib_per_load: int = 0
    jobs: int = 0
    trims_to_mib: int | None = None
    at: float | None = None

    @property
    def leaked_mib(self) -> int:
        """What it holds that is of no use to its jobs, and would be back after an unload."""
        if self.verdict != "leaks" or self.over != "jobs":
            return 0
        return min(self.grown_mib, round(self.mib_per_job * self.jobs))

    @property
    def anew(self) -> Growth:
        """As of the next load: what it is known to do, without what it holds."""
        return replace(self, grown_mib=0, jobs=0, trims_to_mib=None)


@dataclass(frozen=True, slots=True)
class ModelState:
    """What the broker knows of one model of a consumer. Times are monotonic seconds.

    `loaded` is only known of a consumer that tells which of its models are; `sure` once it has said
    so, or a job with the model has ended well. `held_mib` is the model's share of what its
    consumer's processes were last seen to hold; `reported_mib` what the consumer itself says of it,
    `needs_mib` what it says that the model would need to be on the card wholly, and `context` the
    number of tokens that it is loaded for, None where that is not told. `active` counts its jobs.
    `unloaded_at` is when it was unloaded, as long as its memory may be on its way back. `pinned` is
    an operator's word on whether it may be evicted, None while the config's counts.
    """

    loaded: bool = False
    sure: bool = False
    held_mib: int = 0
    reported_mib: int | None = None
    needs_mib: int | None = None
    context: int | None = None
    active: int = 0
    total_requests: int = 0
    last_used: float | None = None
    unloaded_at: float | None = None
    pinned: bool | None = None


UNUSED = ModelState()


@dataclass(frozen=True, slots=True)
class ConsumerState:
    """What the broker knows of one consumer. Times are monotonic seconds.

    `active` counts its jobs; `cold` says of the latest that it found the consumer not loaded.
    `busy` counts the broker's own calls to load or unload it.
    `assumed` is since when `loaded` is only an assumption, None once a report, a measurement, or a
    job or load of the broker has confirmed it.
    `unloaded_at` is when the broker unloaded or stopped it, or it was seen to have unloaded by
    itself, None if it was loaded since.
    `tells` is True if its probe says whether it is loaded.
    `healthy` is None until the first probe. `resident_mib` is what the consumer itself
    reports, None where it does not; `on_cpu` what it loaded, but not wholly onto the card; `items`
    the models that it says are loaded; `models` what is known of each that was loaded or used.
    `called` is what jobs have called their models since it said so last, and `aliases` the models
    that are meant by names which it does not list; `unplaced` is True if a job whose model is not
    known has begun since then, so that what it has grown by may be of a model that it has not
    listed yet.
    `health_since` is when it last became healthy, unhealthy, or was stopped by the broker.
    `growth` says whether what it holds at rest grows with its jobs.
    `pinned` is an operator's word on whether it may be evicted, None while the config's counts.
    `stopped_by` is set while the broker has stopped it to take its memory back; `quarantine` says
    why it is not asked to release memory now, empty if it is; that lasts until `quarantine_until`,
    or until it holds no more than `quarantine_mib`. `leaks` counts how often in a row it gave
    nothing back. `residency_version` changes
    with every load, unload, start and end of a job, so that a probe that began before cannot
    overwrite what it did not see.
    """

    loaded: bool
    assumed: float | None = None
    unloaded_at: float | None = None
    tells: bool = False
    healthy: bool | None = None
    resident_mib: int | None = None
    active: int = 0
    cold: bool = False
    busy: int = 0
    report_outdated: bool = False
    total_requests: int = 0
    last_used: float | None = None
    last_probe: float | None = None
    last_error: str = ""
    residency_version: int = 0
    on_cpu: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    stopped_by: StoppedBy | None = None
    quarantine: str = ""
    quarantine_until: float = 0.0
    quarantine_mib: int = 0
    leaks: int = 0
    health_since: float | None = None
    pinned: bool | None = None
    growth: Growth = Growth()
    models: Mapping[str, ModelState] = field(default_factory=lambda: MappingProxyType({}))
    called: frozenset[str] = frozenset()
    unplaced: bool = False
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def model(self, name: str) -> ModelState:
        """What is known of one model."""
        return self.models.get(name, UNUSED)

    def has_loaded(self, model: str | None) -> bool:
        """Whether a model is loaded, or, without one, the consumer itself."""
        return self.loaded if model is None else self.model(model).loaded

    @property
    def loaded_models(self) -> tuple[str, ...]:
        """The models that are known to be loaded."""
        return tuple(name for name, each in self.models.items() if each.loaded)

    @property
    def at_work(self) -> str | None:
        """The model that its jobs work with, if it is one."""
        working = [name for name, each in self.models.items() if each.active]
        return working[0] if len(working) == 1 else None

    def is_releasing(self, now: float) -> bool:
        """Whether it was unloaded, by the broker or by itself, so lately that its memory may still
        be on its way back."""
        return self.unloaded_at is not None and now - self.unloaded_at < RELEASE_S

    def is_pinned(self, configured: bool) -> bool:
        """Whether it is never to be evicted, with what the config says."""
        return configured if self.pinned is None else self.pinned


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a consumer says of a model that it has loaded: MiB on the card, MiB that it would need
    to be there wholly, and for how many tokens. None where it does not say."""

    mib: int | None = None
    needs_mib: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a consumer said of itself. None where it did not say; `on_cpu` is empty then. `items`
    are the models that are loaded, None where it does not list them; `details` what it says of
    them."""

    loaded: bool | None = None
    resident_mib: int | None = None
    on_cpu: tuple[str, ...] = ()
    items: tuple[str, ...] | None = None
    details: Mapping[str, LoadedModel] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelListing:
    """The models that a consumer offers, by name, and what it says of each of them. `sizes` are the
    MiB of their weights and `aliases` their other names, both by the names that models are counted
    by, as far as it tells."""

    names: tuple[str, ...]
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Traffic:
    """What the WebSockets of one consumer amount to since the start, in bytes; `now` are open."""

    now: int = 0
    opened: int = 0
    from_client: int = 0
    from_consumer: int = 0
