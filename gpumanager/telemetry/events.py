"""Everything that the broker reports: each event is declared here once, with its name, its fields
and the words it is logged with. The log's line, `/v1/events`, the metrics, the traces and
docs/events.md are made from these declarations.

Fields mean the same in every event; `FIELDS` says what. A field that is None or empty is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

from gpumanager.model import Outcome

Level = Literal["info", "warning", "error"]
Emit = Callable[["Event"], object]
"""Takes what has happened. Never raises."""

FIELDS = {
    "consumer": "the consumer it is about",
    "kind": "what was to be done: a kind of job, or `load`, `unload`, `restore`, `idle-unload`",
    "ticket": "the job's number in the queue",
    "client": "the client: the name of its key where keys are in use, else its address",
    "address": "the client's address",
    "request_id": "the request's `X-Request-Id`",
    "key": "the name of the client's key",
    "path": "the path that was asked for, at most 256 characters of it",
    "traceparent": "the client's `traceparent` (W3C Trace Context)",
    "cold": "its consumer, or its model, was not loaded before",
    "job": "the job's id: the one that the consumer gave it, or an asynchronous job's own",
    "state": "how it ended: `done`, `failed`, `cancelled`, `lost`",
    "jobs": "how many jobs",
    "host": "the host of the job's callback, with its port",
    "told": "`delivered`; `retried`: not yet; `failed`: not, and that is given up",
    "attempt": "which attempt it was, counted from 1",
    "again_ms": "how much later the next one is made",
    "again": "how many of them are run again",
    "lost": "how many of them are lost",
    "status": "the HTTP status of the answer",
    "failure": "the code of the error that ended it",
    "code": "the code of the broker's error",
    "model": "the model that the job named, where the broker knows models apart",
    "urgency": "how urgent the job was: 0 (now) to 7 (background)",
    "requester": "who shares the GPU with others: the name of the key, else the client's address",
    "session": "the conversation that the job belonged to, by `X-Session-Id`",
    "arrived": "when the job came",
    "wait_ms": "time in the queue",
    "prepare_ms": "time until others were unloaded and the consumer was loaded",
    "run_ms": "time that the job ran after that",
    "ms": "how long it took",
    "target": "the consumer that room was made for; the same one, if it was just to be unloaded",
    "method": "the eviction method: `http`, `unit`, `container`, `signal`, `checkpoint`",
    "outcome": "what happened to its memory",
    "mib": "how much memory it released",
    "read_mib": "how much of its files was read from the disk",
    "expected_mib": "how much it was expected to release",
    "taken_by": "the process or consumer that took the memory that it released",
    "reason": "why, in words",
    "models": "the models, by name",
    "target_model": "the model that room was made for, as above",
    "failures": "how many in a row",
    "pause_ms": "how long it is sent no jobs, or is not asked to unload",
    "available_mib": "how much memory the consumer held, plus what was free",
    "needed_mib": "how much memory was taken to be enough",
    "each_mib": "how much more it holds after each of them",
    "grown_mib": "how much more it holds than just after it was loaded",
    "over": "`jobs`: it grows with its jobs; `loads`: more is left after each unload",
    "short_mib": "how much memory is missing, by the figures",
    "how": "`resumed`: the same process; `replaced`: another one",
    "added": "consumers that the config has now",
    "removed": "consumers that it has no more",
    "changed": "consumers with other settings",
    "keys": "other keys that were changed",
    "client_bytes": "bytes that the client sent",
    "consumer_bytes": "bytes that the consumer sent",
    "timeout_ms": "how long running jobs may take to finish",
    "total_mib": "the card's memory",
    "version": "the broker's version",
}
"""What each field says. Names tell the unit: `_ms` (or just `ms`), `_mib` (or just `mib`),
`_bytes`."""

PRIVATE = frozenset(
    {
        "address",
        "client",
        "host",
        "key",
        "path",
        "request_id",
        "requester",
        "session",
        "traceparent",
    }
)
"""Fields that tell who somebody is."""


class Event:
    """Something that happened. `message` is None where the request's own line in the log says it
    already."""

    name: ClassVar[str]
    message: ClassVar[str | None]
    usual_level: ClassVar[Level]
    kept_with: ClassVar[str | None] = None
    """The field without which `/v1/events` does not tell of it: then it is only counted."""

    @property
    def level(self) -> Level:
        """How serious it is."""
        return self.usual_level

    @property
    def fields(self) -> dict[str, Any]:
        """What there is to tell; it can be expressed in JSON."""
        told = {name: each for name, each in vars(self).items() if each is not None and each != ()}
        return {k: list(each) if isinstance(each, tuple) else each for k, each in told.items()}


EVENTS: dict[str, type[Event]] = {}
"""All events by their names."""

E = TypeVar("E", bound=Event)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def declared(name: str, message: str | None, level: Level = "info") -> Callable[[type[E]], type[E]]:
    """Make a class an event, with the class's annotations for its fields."""

    def declare(plain: type[E]) -> type[E]:
        made = dataclass(frozen=True, kw_only=True)(plain)
        made.name, made.message, made.usual_level = name, message, level
        EVENTS[name] = made
        return made

    return declare


def fields_of(event: type[Event]) -> dict[str, Field[Any]]:
    """The fields of a declared event by their names."""
    return event.__dataclass_fields__  # type: ignore[attr-defined,no-any-return]


# -- jobs and requests ---------------------------------------------------------------------------


@declared("job", None)
class JobEnded(Event):
    """A job that held the GPU is over. Without a `failure` the consumer answered, with `status`.
    `cold`: its consumer, or its model, was not loaded, so that it took the time to load it, too."""

    consumer: str
    model: str | None = None
    kind: str
    ticket: int
    arrived: str | None = None
    urgency: int | None = None
    requester: str | None = None
    session: str | None = None
    client: str
    address: str
    request_id: str
    key: str | None = None
    traceparent: str | None = None
    status: int | None = None
    failure: str | None = None
    wait_ms: float
    prepare_ms: float
    run_ms: float
    cold: bool | None = None
    needed_mib: int | None = None
    total_mib: int | None = None


@declared("refused", None)
class Refused(Event):
    """A request failed: the broker answered it with an error, or its client disconnected before its
    turn. `/v1/events` has those that were for a consumer."""

    code: str
    status: int
    consumer: str | None = None
    client: str
    address: str
    key: str | None = None
    path: str
    request_id: str
    wait_ms: float | None = None

    kept_with = "consumer"  # a scanner must not drive out the rest


@declared("answer_truncated", "answer truncated", "warning")
class AnswerTruncated(Event):
    """An answer broke off after its beginning had been sent."""

    consumer: str | None = None
    request_id: str
    reason: str


@declared("websocket_ended", "websocket ended")
class WebsocketEnded(Event):
    """A WebSocket that went through the broker was closed. Its beginning is a request in the log,
    with status 101. It is logged and counted; `/v1/events` does not have it."""

    consumer: str
    client: str
    address: str
    key: str | None = None
    request_id: str
    ms: int
    client_bytes: int
    consumer_bytes: int
    reason: str

    @property
    def kept(self) -> bool:
        """A page that opens one after the other must not drive out the rest."""
        return False


@declared("still_busy", "still busy", "warning")
class StillBusy(Event):
    """A consumer still worked on a job at its time-out. The next job got the GPU."""

    consumer: str
    job: str | None = None


@declared("cancel_failed", "cancel failed", "warning")
class CancelFailed(Event):
    """A consumer could not be told to stop a job. The job holds the GPU until the consumer has
    finished, or until the job's time-out."""

    consumer: str
    job: str | None = None
    reason: str


@declared("async_job_ended", "asynchronous job ended")
class AsyncJobEnded(Event):
    """An asynchronous job is over. A warning, if it is `lost`: the broker ended while it ran, and
    its consumer's jobs may not be run twice."""

    job: str
    state: Literal["done", "failed", "cancelled", "lost"]
    kind: str
    consumer: str
    key: str | None = None
    status: int | None = None
    failure: str | None = None
    ms: int

    @property
    def level(self) -> Level:
        """By how it ended."""
        return "warning" if self.state == "lost" else "info"


@declared("callback_sent", "callback sent")
class CallbackSent(Event):
    """Somebody was told, or was to be told, that an asynchronous job is over (`X-Callback-Url`).
    `retried`: the attempt failed, and another one is made; `failed`: it failed, and none is. Of
    the URL, only the host is told."""

    job: str
    key: str | None = None
    host: str
    told: Literal["delivered", "retried", "failed"]
    attempt: int
    reason: str | None = None
    again_ms: int | None = None

    @property
    def level(self) -> Level:
        """A warning, if nobody was told."""
        return "warning" if self.told == "failed" else "info"


@declared("async_jobs_resumed", "asynchronous jobs resumed")
class AsyncJobsResumed(Event):
    """The broker started with asynchronous jobs of an earlier run that had not ended."""

    jobs: int
    again: int
    lost: int


@declared("async_jobs_swept", "asynchronous jobs swept")
class AsyncJobsSwept(Event):
    """Asynchronous jobs and their results were deleted, as long after their end as `jobs.keep`
    says."""

    jobs: int


@declared("async_jobs_unavailable", "asynchronous jobs unavailable", "error")
class AsyncJobsUnavailable(Event):
    """Asynchronous jobs cannot be kept on disk, or not be read. New ones are refused."""

    reason: str


@declared("out_of_memory", "out of memory", "warning")
class OutOfMemory(Event):
    """A job ran out of the card's memory."""

    consumer: str
    model: str | None = None
    available_mib: int
    needed_mib: int


@declared("out_of_memory_doubted", "out of memory not believed", "warning")
class OutOfMemoryDoubted(Event):
    """A consumer said that a job ran out of memory, but the card had plenty for it: perhaps it was
    another card's memory, or the machine's. Nothing is done about it."""

    consumer: str
    available_mib: int
    needed_mib: int


@declared("out_of_memory_healed", "out of memory healed")
class OutOfMemoryHealed(Event):
    """A job that ran out of memory was run once more, alone on the card, and succeeded."""

    consumer: str


# -- loading and unloading -----------------------------------------------------------------------


@declared("evicted", "evicted")
class Evicted(Event):
    """A consumer, or one model of it, was unloaded, or stopped, to make room. A warning, if its
    memory `leaked` or was `stolen`."""

    consumer: str
    model: str | None = None
    target: str
    target_model: str | None = None
    method: str
    outcome: Outcome
    mib: int
    expected_mib: int
    ms: int
    taken_by: str | None = None

    @property
    def level(self) -> Level:
        """By what happened to the memory."""
        return "warning" if self.outcome in ("leaked", "stolen") else "info"


@declared("trimmed", "trimmed")
class Trimmed(Event):
    """A consumer gave back what it could while it stays loaded, to make room. `leaked` says here
    only that it had next to nothing to give."""

    consumer: str
    target: str
    outcome: Outcome
    mib: int
    expected_mib: int
    ms: int


@declared("trim_failed", "trim failed", "warning")
class TrimFailed(Event):
    """A consumer could not be asked to give back what it can while it stays loaded. Another one is,
    or one is unloaded."""

    consumer: str
    target: str
    reason: str


@declared("eviction_failed", "eviction failed", "warning")
class EvictionFailed(Event):
    """A consumer could not be unloaded by one of its eviction methods. The next is tried."""

    consumer: str
    target: str
    method: str
    reason: str


@declared("quarantined", "quarantined", "warning")
class Quarantined(Event):
    """A consumer released no memory by any of its eviction methods. For a while it is not unloaded
    to make room."""

    consumer: str
    reason: str
    pause_ms: int


@declared("eviction_skipped", "eviction skipped")
class EvictionSkipped(Event):
    """A consumer was not unloaded, because it works on somebody else's job; another one is."""

    consumer: str
    target: str


@declared("leaking", "consumer leaks", "warning")
class Leaking(Event):
    """A consumer holds more and more of the card's memory, and does not level off as a cache would:
    more with each of its jobs, or left behind after each unload. An unload, or a restart, frees
    it."""

    consumer: str
    over: Literal["jobs", "loads"]
    each_mib: int
    grown_mib: int


@declared("loaded_meanwhile", "loaded again meanwhile")
class LoadedMeanwhile(Event):
    """Somebody else loaded a consumer, or a model of it, again just after its unload; the broker
    unloads it again."""

    consumer: str
    model: str | None = None


@declared("tried_anyway", "tried all the same")
class TriedAnyway(Event):
    """A job is tried, although its consumer, or its model, does not fit by the figures, which may
    be wrong."""

    consumer: str
    model: str | None = None
    needed_mib: int
    short_mib: int


@declared("loaded", "loaded")
class Loaded(Event):
    """A consumer, or one model of it, was loaded for a job, or because it was asked for."""

    consumer: str
    model: str | None = None
    ms: int


@declared("load_given_up", "load given up")
class LoadGivenUp(Event):
    """The clients of all jobs left that a consumer, or one model of it, was being loaded for: the
    load was ended, and what was loaded so far was unloaded."""

    consumer: str
    model: str | None = None


@declared("resumed", "resumed")
class Resumed(Event):
    """A consumer that the broker had stopped was started again."""

    consumer: str
    ms: int


@declared("started_ahead", "started ahead")
class StartedAhead(Event):
    """A consumer that the broker had stopped was started while the job before its own still ran
    (`start_ahead`)."""

    consumer: str
    ms: int


@declared("prefetched", "prefetched")
class Prefetched(Event):
    """Files of a consumer whose job is the next to need anything loaded were read into the host's
    page cache (`prefetch`), while another job ran."""

    consumer: str
    model: str | None = None
    read_mib: int
    ms: int


@declared("housekeeping_failed", "housekeeping failed", "warning")
class HousekeepingFailed(Event):
    """While no job waited, an idle consumer could not be unloaded, or one of `default_resident`
    could not be loaded again."""

    consumer: str
    kind: str
    reason: str


# -- consumers and the card ----------------------------------------------------------------------


@declared("healthy", "consumer healthy")
class Healthy(Event):
    """A consumer answers its probe, for the first time or again."""

    consumer: str


@declared("unhealthy", "consumer unhealthy", "warning")
class Unhealthy(Event):
    """A consumer does not answer its probe as it should. Its jobs are refused until it does."""

    consumer: str
    reason: str


@declared("came_back", "back by itself")
class CameBack(Event):
    """Somebody else resumed or replaced a consumer that the broker had stopped by a checkpoint."""

    consumer: str
    how: Literal["resumed", "replaced"]


@declared("breaker_open", "breaker open", "warning")
class BreakerOpen(Event):
    """A consumer failed several jobs in a row. Its jobs are refused for a while, then one is let
    through."""

    consumer: str
    failures: int
    pause_ms: int
    reason: str | None = None


@declared("breaker_closed", "breaker closed")
class BreakerClosed(Event):
    """A consumer answered a job again after its breaker had opened."""

    consumer: str


@declared("on_cpu", "partly on the CPU", "warning")
class OnCpu(Event):
    """A consumer runs models partly on the CPU, because they did not fit when they were loaded."""

    consumer: str
    models: str


@declared("gpu_unavailable", "gpu unavailable", "warning")
class GpuUnavailable(Event):
    """The card cannot be measured any more, or only in part."""

    reason: str


@declared("gpu_available", "gpu available")
class GpuAvailable(Event):
    """The card can be measured again."""


@declared("call_unclassified", "call unclassified")
class CallUnclassified(Event):
    """A client made a call of a consumer's of which the config does not say whether it is GPU work.
    It took its turn. Told once for each."""

    consumer: str
    method: str
    path: str


# -- the broker and its operator -----------------------------------------------------------------


@declared("started", "started")
class Started(Event):
    """The broker started: the first event of a run."""

    version: str


@declared("draining", "draining")
class Draining(Event):
    """The broker shuts down: it refuses new jobs, and finishes those that run."""

    timeout_ms: int


@declared("config_reloaded", "config reloaded")
class ConfigReloaded(Event):
    """The config was read again and applied."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


@declared("config_not_reloaded", "config not reloaded", "error")
class ConfigNotReloaded(Event):
    """The config was read again after a SIGHUP, and not applied."""

    reason: str


@declared("pinned", "pinned")
class Pinned(Event):
    """An operator pinned a consumer, or one model of it: that is not unloaded."""

    consumer: str
    model: str | None = None


@declared("unpinned", "unpinned")
class Unpinned(Event):
    """An operator unpinned a consumer, or one model of it."""

    consumer: str
    model: str | None = None


@declared("forgotten", "forgotten")
class Forgotten(Event):
    """An operator deleted what the broker had learned of a consumer, or of one model of it."""

    consumer: str
    model: str | None = None
