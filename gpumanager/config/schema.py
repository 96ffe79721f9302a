"""The config's shape: names, defaults, units and bounds. config/consumers.yaml is the example;
the text below a key is its description in docs/config.md and in the JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
)

from gpumanager.config import values
from gpumanager.config.calls import (
    LONGEST_S,
    AnyFile,
    AudioPrefix,
    CaFile,
    Call,
    CallbackHost,
    CallMatch,
    ConsumerName,
    ContainerName,
    Done,
    DropIn,
    Duration,
    Expression,
    File,
    Health,
    Host,
    Kind,
    Listen,
    LoadCall,
    Mib,
    Model,
    ModelEntry,
    ModelList,
    OfConsumer,
    Port,
    PortKey,
    Probe,
    Route,
    Seconds,
    Session,
    Settled,
    Slots,
    StopCall,
    UnloadCall,
    Urgency,
    Url,
)
from gpumanager.config.memory import HTTP, EvictionMethod, OutOfMemory
from gpumanager.model import NORMAL, Declared, model_key

KINDS = ("tts", "stt", "llm", "image")
"""The kinds of job that always have a route; `routing` may name others."""


# -- consumers -----------------------------------------------------------------------------------


class Timeouts(Model):
    """How long a job may take."""

    connect: Seconds = 3.0
    """Until the connection is open."""
    first_byte: Seconds = 120.0
    """From then to the first byte of the answer."""
    idle: Seconds = 60.0
    """Between two reads of the answer."""
    total: Seconds = 600.0
    """For the whole job."""

    def without_end(self) -> Self:
        """The same for what is no job."""
        return self.model_copy(update={"total": float(LONGEST_S)})


_Health = Annotated[Health | None, BeforeValidator(values.bare_path_or_none)]
_Load = Annotated[LoadCall | None, BeforeValidator(values.bare_path_or_none)]
_Unload = Annotated[UnloadCall | None, BeforeValidator(values.bare_path_or_none)]
_Probe = Annotated[Probe | None, BeforeValidator(values.bare_path_or_none)]
_Settled = Annotated[Settled | None, BeforeValidator(values.bare_path_or_none)]
_Evict = Annotated[
    tuple[Annotated[EvictionMethod, BeforeValidator(values.bare_method)], ...],
    BeforeValidator(values.listed),
]
_OnDisconnect = Annotated[
    Annotated[Literal["native", "none"], Tag("<word>")] | Annotated[LoadCall, Tag("<call>")],
    Discriminator(lambda value: "<call>" if isinstance(value, Mapping | Call) else "<word>"),
]
_Parallel = Annotated[
    Annotated[Literal["auto"], Tag("<word>")]
    | Annotated[StrictInt, Field(ge=1, le=1000), Tag("<number>")],
    Discriminator(lambda value: "<word>" if value == "auto" else "<number>"),
    BeforeValidator(values.parallel),
]
_Route = Annotated[Route, BeforeValidator(values.bare_path)]
_Routed = Annotated[
    Annotated[OfConsumer, Tag("<name>")]
    | Annotated[tuple[OfConsumer, ...], Field(min_length=1), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list | tuple) else "<name>"),
]
_CallMatch = Annotated[CallMatch, BeforeValidator(values.bare_path)]
_Model = Annotated[ModelEntry, BeforeValidator(values.bare_model)]
_Routes = Annotated[dict[DropIn, _Route], BeforeValidator(values.same_paths)]


MOST_TOLD = 64
"""With `max_parallel: auto`, no more jobs run at once, whatever the server says."""


class ConsumerConfig(Model):
    """One consumer: a server that shares the GPU."""

    url: Url
    """Where it listens; with a path, that path stands before all others."""
    ca_file: CaFile | None = None
    """For an https `url`: a PEM file of the authorities that may sign its certificate; none: those
    of `SSL_CERT_FILE` in the environment, or else the public ones."""
    preset: StrictStr | None = None
    """Fills in the keys for a known server; a key that you set replaces the preset's."""
    model: StrictStr | None = None
    """The name that `{model}` stands for in its calls."""
    health: _Health = None
    """The call that asks whether it is healthy; none: the broker takes it for healthy."""
    probe: _Probe = None
    """The call that asks what it has loaded, and how much memory that holds."""
    session: Session | None = None
    """Opens a session, for servers whose calls need one."""
    paths: dict[Kind, _Route] = Field(default_factory=dict)
    """The path of each kind of job that it serves."""
    routes: _Routes | None = None
    """The routes of OpenAI's, Anthropic's and Ollama's protocols that it serves, each with its own
    path for it; a list stands for the same paths. None: all of them, at the same paths. Beside a
    preset, a mapping adds to the preset's, and a list replaces them."""
    models: tuple[_Model, ...] | None = None
    """The models that it serves; none: those that it lists itself."""
    list_models: ModelList | None = None
    """The call that lists its models; none: a GET of `/v1/models`, as OpenAI has it."""
    request_model: Expression | None = None
    """Finds, in the JSON body of a job, the model that it works with; none: `model`. Where it finds
    no text, what the job needs is the consumer's figure."""
    request_context: Expression | None = None
    """Finds, in the JSON body of a job, the context length that the server has to load its model
    for, in tokens; none: jobs do not say."""
    any_model: StrictBool = False
    """It takes whatever name a client asks for: it answers with the model that it has, or knows
    more names than it lists. A consumer that has a model by its name comes first."""
    gpu_work: tuple[_CallMatch, ...] = ()
    """Of what is called below `/consumers/NAME/`, or on its own port: the calls that are GPU work
    and take their turn, beside its `paths`, `routes` and `done.match`."""
    not_gpu_work: tuple[_CallMatch, ...] = ()
    """And those that are not. What neither names is forwarded at once if it is a GET, HEAD or
    OPTIONS, and takes its turn otherwise."""
    stops: tuple[StopCall, ...] = ()
    """Calls by which a client stops jobs at the consumer: with a key of the role client its own
    only."""
    vram_resident_mib: Mib = 0
    """The memory that it needs while it is loaded and works; with several models, what the largest
    one needs."""
    max_mib: Mib | None = None
    """The most that room is ever made for, whatever its jobs were seen to hold; none: the card."""
    elastic: StrictBool = False
    """It fills the card by design, so what it is seen to hold is not what it needs: only an
    out-of-memory raises that."""
    floor_mib: Mib | None = None
    """The memory it keeps after an unload; none: learned."""
    container: ContainerName | None = None
    """The Docker or Podman container that it runs in, by name or id, so that the broker finds its
    processes on the card; none: the container that `evict` names."""
    vram_managed: StrictBool = False
    """It manages its memory itself; the broker never evicts it."""
    pinned: StrictBool = False
    """It is never evicted to make room."""
    idle_unload: Seconds | None = None
    """It is unloaded after so long without a job; none: never."""
    priority: StrictInt = 0
    """Of two consumers that are equal otherwise, the one with the lower figure is evicted first."""
    urgency: Urgency | None = None
    """The urgency of its jobs that ask for none, nor does their key: 0 (most urgent) to 7
    (background); none: that of their kind."""
    can_coexist_with: tuple[OfConsumer, ...] = ()
    """Consumers that are not evicted to make room for this one."""
    max_parallel: _Parallel = 1
    """How many of its jobs run at the same time, while it has the GPU. `auto`: as many as the
    server says in answer to `slots`, 64 at most, and one until it has said so."""
    slots: Slots | None = None
    """The call that asks the server how many jobs it works on at once, for `max_parallel: auto`."""
    can_run_with: tuple[OfConsumer, ...] = ()
    """Consumers whose jobs may run at the same time as its own, if they name it, too, and both are
    loaded."""
    load: _Load = None
    """The call that is made before a job, if the consumer was unloaded."""
    warm: _Load = None
    """Loads a server that otherwise loads with its first job. It is made for `default_resident`,
    and when an operator loads the consumer."""
    unload: _Unload = None
    """The call that frees its memory."""
    trim: _Load = None
    """The call that has it give back what it holds beyond its models, such as torch's cache, while
    they stay loaded. It is made before another consumer is unloaded, if that may be enough."""
    settled: _Settled = None
    """The call that says when an unload is over."""
    evict: _Evict | None = None
    """The eviction methods, in the order in which they are tried; none: `unload` alone."""
    done: Done | None = None
    """How the broker finds out that a job is over which the consumer answers at once."""
    out_of_memory: OutOfMemory = Field(default=OutOfMemory(), alias="oom")
    """How its answers say that the card's memory ran out."""
    idempotent: StrictBool = False
    """Its jobs may run twice: an asynchronous job that ran when the broker was killed is run again.
    Without it, such a job is `lost`."""
    prefetch: Annotated[tuple[File, ...], BeforeValidator(values.listed)] = ()
    """Files, folders and patterns (`*`, `?`, `**`), such as those of its model's weights. While a
    job of another consumer runs, and a job of this one is the next that needs anything loaded, they
    are read into the host's page cache, so that the load itself is faster; for one load, no more
    than half of the memory that is available."""
    start_ahead: StrictBool = False
    """If the broker has stopped it by `unit` or `container`, it is started while the job before its
    own still runs. Only for a server whose process takes none of the card's memory when it
    starts."""
    ready_timeout: Seconds = 120.0
    """The longest it may take from being started until it is healthy."""
    timeouts: Timeouts = Timeouts()
    """How long its jobs may take."""
    on_disconnect: _OnDisconnect = "native"
    """What happens to a job whose client disconnects, or whose time-out passes. `native`: the
    consumer aborts it when the connection closes; `none`: the consumer works on, and the job holds
    the GPU until it is over; or a call that stops it."""

    def parallel(self, told: int | None) -> int:
        """How many of its jobs run at the same time, if its server said that it works on `told` at
        once, None if it did not say."""
        if self.max_parallel == "auto":
            return min(told or 1, MOST_TOLD)
        return self.max_parallel

    @property
    def declared(self) -> Declared:
        """What is declared of the memory it needs."""
        return Declared(self.vram_resident_mib, self.max_mib, self.elastic)

    @cached_property
    def tells_models_apart(self) -> bool:
        """Whether it says which models are loaded, and can unload one of them alone."""
        told = self.probe is not None and self.probe.items is not None
        unload = self.unload
        alone = unload is not None and unload.for_each is not None and unload.alone
        return told and alone and any(method.http for method in self.eviction_methods)

    def apart(self, model: str | None) -> str | None:
        """The model that is loaded or not by itself: none, where they cannot be told apart."""
        return model if self.tells_models_apart else None

    @cached_property
    def counts_by_model(self) -> bool:
        """Whether what a job needs depends on its model: that can be told apart, or is declared, or
        found in the request."""
        declared = any(each.vram_mib is not None for each in self.models or ())
        return self.tells_models_apart or declared or self.request_model is not None

    def model_entry(self, model: str) -> ModelEntry | None:
        """What the config says of a model, by the name that the consumer has for it."""
        for entry in self.models or ():
            if model_key(entry.served_as or entry.name) == model:
                return entry
        for entry in self.models or ():
            if entry.served_as is None and fnmatchcase(model, entry.name):
                return entry
        return None

    def pins(self, model: str, operator: bool | None) -> bool:
        """Whether one of its models is never to be evicted, by the word of an `operator`, or, if
        that is None, of the config."""
        entry = self.model_entry(model)
        return (entry is not None and entry.pinned) if operator is None else operator

    @property
    def prefetches(self) -> bool:
        """Whether any files are read ahead for it."""
        return bool(self.prefetch) or any(entry.prefetch for entry in self.models or ())

    def files_of(self, model: str | None) -> tuple[str, ...]:
        """The files, folders and patterns that are read before it loads, or one of its models."""
        entry = None if model is None else self.model_entry(model)
        return self.prefetch if entry is None or not entry.prefetch else entry.prefetch

    def declared_for(self, model: str | None) -> Declared | None:
        """What is declared of the memory that a model needs, None if nothing is."""
        if model is None:
            return self.declared
        entry = self.model_entry(model)
        if entry is None or entry.vram_mib is None:
            return None
        return Declared(entry.vram_mib, self.max_mib, self.elastic)

    @property
    def eviction_methods(self) -> tuple[EvictionMethod, ...]:
        """The ways to take its memory back, in the order in which they are tried."""
        if self.evict is not None:
            return self.evict
        return () if self.unload is None else (HTTP,)

    @property
    def container_named(self) -> tuple[str | None, str | None]:
        """The container it runs in, and the engine's socket; None where they are not named."""
        for method in self.evict or ():
            if method.container is not None and self.container in (None, method.container):
                return method.container, method.socket
        return self.container, None

    def serves(self, route: str) -> bool:
        """Whether it serves a drop-in route."""
        return self.routes is None or route in self.routes

    def route_for(self, route: str) -> Route | None:
        """Where a job of a drop-in route goes; None if it does not serve it."""
        return Route(path=route) if self.routes is None else self.routes.get(route)

    def is_gpu_work(self, method: str, path: str) -> bool | None:
        """Whether a call takes its turn; None where nothing says so. `path` is as the client wrote
        it, without a query."""
        if any(each.matches(method, path) for each in self.gpu_work):
            return True
        if any(each.matches(method, path) for each in self.not_gpu_work):
            return False
        if self.done is not None and self.done.matches(method, path):
            return True
        jobs = (*self.paths.values(), *(self.routes or {}).values())
        is_job = any(
            path == each.path.partition("?")[0] and method == (each.method or "POST")
            for each in jobs
        )
        return True if is_job else None

    @cached_property
    def base_url(self) -> str:
        """Scheme, host and port of `url`."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    @cached_property
    def base_path(self) -> str:
        """The path of `url`, without a final slash; usually empty."""
        return urlsplit(self.url).path.rstrip("/")


# -- the whole -----------------------------------------------------------------------------------


class GpuConfig(Model):
    """The card."""

    total_mib: Mib = 0
    """The card's memory where there is no driver; with one, a limit below NVML's figure. 0: what
    NVML says. Where the card's memory is the host's (GB10, Jetson): the GPU's share of it."""
    reserved_mib: Mib = 256
    """Memory that is kept free."""
    device: Annotated[StrictInt | StrictStr, BeforeValidator(values.device)] = 0
    """NVML's index, a UUID (`GPU-…`, `MIG-…`), or `simulated:FILE`."""
    sample_interval: Seconds = 2.0
    """The longest time between two readings of the card."""
    release_timeout: Seconds = 10.0
    """The longest wait until the memory of an unloaded consumer is free; if `settled.timeout` is
    longer, that counts."""


class SchedulerConfig(Model):
    """The queue."""

    kind: Literal["locked", "passthrough"] = "locked"
    """`locked`: one job at a time, in the order of `policy`; `passthrough`: no lock at all."""
    max_queue: Annotated[StrictInt, Field(ge=1, le=10_000)] = 256
    """How many jobs may wait; the next one is refused with 503 `queue_full`."""
    max_wait: Seconds = 600.0
    """The longest time that a job waits; then it is refused with 503 `queue_timeout`."""
    max_queued: Annotated[StrictInt, Field(ge=1, le=10_000)] | None = None
    """How many jobs of one requester, an API key or else a client's address, may be in the queue,
    running ones included; the next one is refused with 503 `queue_full`. None: any number. A key's
    own `max_queued` goes before it."""
    urgency: dict[Kind, Urgency] = Field(default_factory=dict)
    """The urgency, 0 (most urgent) to 7 (background), of jobs by their kind, where neither the
    request nor its key nor the consumer says another; a kind that is missing: 3. `load`, `unload`
    and `mount` (a call below `/consumers/` of a consumer without a kind) are kinds here, too."""
    policy: Literal["fifo", "affinity"] = "fifo"
    """In which order jobs start. `fifo`: as they came. `affinity`: the more urgent first, and what
    is equally urgent by fair share among requesters; jobs for what is loaded may overtake others,
    so that less is unloaded and loaded again."""
    max_overtake: Duration = 30.0
    """With `policy: affinity`, no job is overtaken for longer by jobs whose turn it is not."""
    max_overtaken_by: Annotated[StrictInt, Field(ge=0, le=1000)] = 20
    """With `policy: affinity`, no job is overtaken by more jobs whose turn it is not."""
    hold: Duration = 0.0
    """With `policy: affinity`, a long job of an urgency from 4 to 7 is held back for so long at
    most after a job of a conversation, if the next one of it is about to come, as was learned. 0:
    never."""


class JobsConfig(Model):
    """Asynchronous jobs: those submitted with `Prefer: respond-async`."""

    dir: AnyFile | None = None
    """The folder that keeps them and their results over a restart; none: one in the state
    directory, beside the state file."""
    keep: Seconds = 86_400.0
    """How long a job and its result are kept after its end, and how long one that cannot be run is
    tried again."""
    max_mib: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 4096
    """When requests and results take so much of the disk, new jobs are refused with 507
    `jobs_full`."""
    max_waiting: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 10_000
    """How many may wait; the next one is refused with 503 `queue_full`."""
    callbacks: tuple[CallbackHost, ...] = ()
    """Hosts that a client may name in `X-Callback-Url`, to be told there when its job is over: a
    name or an address, with `:PORT` unless it is 80 for http or 443 for https, or `*.NAME` for all
    names below one. None: no job is taken with an `X-Callback-Url`."""
    callback_secret_file: AnyFile | None = None
    """A file with what callbacks are signed with: `whsec_` and 24 to 64 bytes in base64.
    GPUMANAGER_CALLBACK_SECRET in the environment comes first."""


class AuthConfig(Model):
    """Where API keys are read from, in addition to GPUMANAGER_API_KEYS in the environment. The keys
    themselves are never in the config."""

    keys_file: AnyFile | None = None
    """A file of lines `NAME KEY [max_queued=N] [role=ROLE] [urgency=N] [most_urgent=N]`."""


class LogConfig(Model):
    """Logs on stderr."""

    format: Literal["logfmt", "json"] = "logfmt"
    """The format of a line."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""


class EventsConfig(Model):
    """What has happened: jobs, evictions, failures."""

    file: File | None = None
    """A file to which the broker adds every event as a line of JSON; none: only the latest events
    are kept, in memory."""
    max_mib: Annotated[StrictInt, Field(ge=1, le=10_000)] = 16
    """The file is rotated at this size."""
    keep_files: Annotated[StrictInt, Field(ge=0, le=100)] = 3
    """How many rotated files are kept."""


class SetupConfig(Model):
    """What `gpumanager setup` does not do here."""

    ignore: tuple[Port, ...] = ()
    """Ports of servers that it does not ask, and does not add."""


class Config(Model):
    """The broker."""

    listen: Listen = "127.0.0.1:8770"
    """The address it serves on."""
    audio_proxy: OfConsumer | None = None
    """The consumer whose rendered audio is fetched through the broker."""
    audio_path_prefix: AudioPrefix = "/audio/"
    """Requests below it go to `audio_proxy`, outside the lock."""
    gpu: GpuConfig = GpuConfig()
    """The card."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """The queue."""
    health_interval: Seconds = 5.0
    """The time between two probes of a consumer."""
    drain_timeout: Duration = 30.0
    """How long a running job may go on at shutdown."""
    max_body_mib: Annotated[StrictInt, Field(ge=1)] = 1024
    """A larger request body is refused with 413."""
    max_header_kib: Annotated[StrictInt, Field(ge=1, le=1024)] = 64
    """Larger request headers are refused with 431."""
    max_websockets: Annotated[StrictInt, Field(ge=0, le=5000)] = 256
    """How many WebSockets may be open to consumers at a time; the next one is refused with 503
    `queue_full`. 0: none."""
    routing: dict[Kind, _Routed] = Field(default_factory=dict)
    """The consumer of each kind of job; of several, the one that has the model that a job names,
    else the first. Beside `tts`, `stt`, `llm` and `image` a kind may have any lower-case name:
    `embed`, `rerank`, `video`."""
    ports: dict[PortKey, OfConsumer] = Field(default_factory=dict)
    """Ports that the broker listens on in a consumer's place, at the host of `listen`: the root of
    such a port is the consumer's root."""
    consumers: dict[ConsumerName, ConsumerConfig] = Field(default_factory=dict)
    """The consumers, by name."""
    jobs: JobsConfig = JobsConfig()
    """Asynchronous jobs."""
    auth: AuthConfig = AuthConfig()
    """API keys."""
    eviction: Literal["lru", "cost"] = "lru"
    """Which consumer is evicted first, of those that no job in the queue needs: `lru`, the least
    recently used one; `cost`, the one that is fastest to load again."""
    default_resident: tuple[OfConsumer, ...] = ()
    """Consumers that are loaded again when no job has come for `restore_after`."""
    restore_after: Seconds = 60.0
    """How long there has to be no job before `default_resident` is loaded again."""
    state_file: AnyFile | None = None
    """The file that keeps what was learned over a restart; none: one in the user's state
    directory."""
    allowed_hosts: tuple[Host, ...] = ()
    """Host names, beside the loopback ones, that clients on this machine may use for the broker."""
    log: LogConfig = LogConfig()
    """Logs."""
    events: EventsConfig = EventsConfig()
    """Events."""
    setup: SetupConfig = SetupConfig()
    """Settings of `gpumanager setup`."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens: `listen`, and its `ports` at the same host."""
        host = self.listen.rpartition(":")[0]
        return (self.listen, *(f"{host}:{port}" for port in self.ports))

    def candidates(self, kind: str) -> tuple[str, ...]:
        """The consumers that jobs of this kind may go to; the first is the default."""
        routed = self.routing.get(kind, ())
        return (routed,) if isinstance(routed, str) else routed

    def urgency_of(self, kind: str, consumer: ConsumerConfig | None = None) -> int:
        """The urgency of a job of this kind that asks for none itself; of `consumer`, if it is to
        work on it."""
        own = None if consumer is None else consumer.urgency
        return self.scheduler.urgency.get(kind, NORMAL) if own is None else own

    @property
    def host(self) -> str:
        """The host of `listen`, an IPv6 address without its brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of `listen`."""
        return int(self.listen.rpartition(":")[2])
