"""The config's shape: names, defaults, units and bounds. config/consumers.yaml is the example;
the text below a key is its description in docs/config.md and in the JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal, get_args
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
    HTTP,
    AnyFile,
    AudioPrefix,
    CaFile,
    Call,
    ConsumerName,
    ContainerName,
    Done,
    Duration,
    EvictionMethod,
    File,
    Health,
    Host,
    Listen,
    LoadCall,
    Mib,
    Model,
    OfConsumer,
    OutOfMemory,
    Probe,
    Route,
    Seconds,
    Session,
    Settled,
    UnloadCall,
    Url,
)
from gpumanager.footprint import Declared

Kind = Literal["tts", "stt", "llm", "image"]
KINDS: tuple[Kind, ...] = get_args(Kind)


# -- consumers -----------------------------------------------------------------------------------


class Timeouts(Model):
    """How long a job may take."""

    connect: Seconds = 3.0
    """Until the connection stands."""
    first_byte: Seconds = 120.0
    """From then to the first byte of the answer."""
    idle: Seconds = 60.0
    """Between two reads of the answer."""
    total: Seconds = 600.0
    """For all of it."""


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
_Route = Annotated[Route, BeforeValidator(values.bare_path)]


class ConsumerConfig(Model):
    """One consumer: a server that shares the GPU."""

    url: Url
    """Where it listens; with a path, that path stands before all others."""
    ca_file: CaFile | None = None
    """The certificates that its own must be signed by, in PEM, where `url` is https; none: those of
    `SSL_CERT_FILE` in the environment, or else of the public authorities."""
    preset: StrictStr | None = None
    """Fills in what is known of a server of this kind; any key that is set wins."""
    model: StrictStr | None = None
    """The name that `{model}` stands for in its calls."""
    health: _Health = None
    """Asks whether it is healthy; none: it is taken to be, and is never refused for it."""
    probe: _Probe = None
    """Asks what it has loaded, and how much memory that holds."""
    session: Session | None = None
    """Opens a session, for servers whose calls want one."""
    paths: dict[Kind, _Route] = Field(default_factory=dict)
    """The path of each kind of job that it serves."""
    vram_resident_mib: Mib = 0
    """The memory it needs to be loaded and to work."""
    max_mib: Mib | None = None
    """The most that room is ever made for, whatever its jobs were seen to hold; none: the card."""
    elastic: StrictBool = False
    """It fills the card by design, so what it is seen to hold is not what it needs: only an
    out-of-memory raises that."""
    floor_mib: Mib | None = None
    """The memory it keeps after an unload; none: learned."""
    container: ContainerName | None = None
    """The Docker or Podman container it runs in, by name or id: tells whose a process on the
    card is; none: the one that `evict` names."""
    vram_managed: StrictBool = False
    """It manages its memory itself; the broker never evicts it."""
    pinned: StrictBool = False
    """Never evicted to make room, though it could be."""
    idle_unload: Seconds | None = None
    """Unloaded after so long without a job; none: never."""
    priority: StrictInt = 0
    """Of two that could go, the one with the lower figure is evicted first."""
    can_coexist_with: tuple[OfConsumer, ...] = ()
    """Consumers that are not evicted to make room for this one."""
    load: _Load = None
    """Made before a job, if the consumer is not loaded."""
    warm: _Load = None
    """Loads a server that would load with its first job; made to restore it, and when an
    operator has it loaded."""
    unload: _Unload = None
    """Frees its memory."""
    settled: _Settled = None
    """Tells that an unload is over."""
    evict: _Evict | None = None
    """The eviction methods, in the order in which they are tried; none: `unload` alone."""
    done: Done | None = None
    """When a job that it answers at once is over."""
    out_of_memory: OutOfMemory = Field(default=OutOfMemory(), alias="oom")
    """How it says that the card's memory ran out."""
    ready_timeout: Seconds = 120.0
    """The longest it may take from being started until it is healthy."""
    timeouts: Timeouts = Timeouts()
    """How long its jobs may take."""
    on_disconnect: _OnDisconnect = "native"
    """What becomes of a job whose client leaves, or whose time-out passes: `native`, it aborts when
    the connection closes; `none`, it works on, and the GPU stays held; or a call that stops it."""

    @property
    def declared(self) -> Declared:
        """What is declared of the memory it needs."""
        return Declared(self.vram_resident_mib, self.max_mib, self.elastic)

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
    """Caps the card's memory; without a driver it is all that is known of it. 0: as NVML says."""
    reserved_mib: Mib = 256
    """Memory that is promised to nobody."""
    device: Annotated[StrictInt | StrictStr, BeforeValidator(values.device)] = 0
    """NVML's index, a UUID (`GPU-…`, `MIG-…`), or `simulated:FILE`."""
    sample_interval: Seconds = 2.0
    """The longest time between two readings of the card."""
    release_timeout: Seconds = 10.0
    """The longest wait for the memory of an unloaded consumer to show as free; a longer
    `settled.timeout` counts."""


class SchedulerConfig(Model):
    """The queue."""

    kind: Literal["locked", "passthrough"] = "locked"
    """`locked`: one job at a time, in order of arrival; `passthrough`: no lock at all."""
    max_queue: Annotated[StrictInt, Field(ge=1, le=10_000)] = 256
    """So many jobs may wait; the next one is refused with 503 `queue_full`."""
    max_wait: Seconds = 600.0
    """The longest a job waits; then 503 `queue_timeout`."""


class AuthConfig(Model):
    """Where API keys are read from, beside the environment's GPUMANAGER_API_KEYS. The keys
    themselves never stand in the config."""

    keys_file: AnyFile | None = None
    """A file of lines `NAME KEY [max_queued=N] [role=ROLE]`."""


class LogConfig(Model):
    """Logs on stderr."""

    format: Literal["logfmt", "json"] = "logfmt"
    """Of a line."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""


class EventsConfig(Model):
    """What has happened: jobs, evictions, failures."""

    file: File | None = None
    """Gets every event as a line of JSON; none: the latest are kept in memory only."""
    max_mib: Annotated[StrictInt, Field(ge=1, le=10_000)] = 16
    """The file is rotated at this size."""
    keep_files: Annotated[StrictInt, Field(ge=0, le=100)] = 3
    """So many rotated ones are kept."""


class SetupConfig(Model):
    """What `gpumanager setup` does not do here."""

    ignore: tuple[Annotated[StrictInt, Field(ge=1, le=65535)], ...] = ()
    """Ports of servers that it neither asks nor adds."""


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
    """What a running job is given at shutdown."""
    max_body_mib: Annotated[StrictInt, Field(ge=1)] = 1024
    """A larger request body is refused with 413."""
    max_header_kib: Annotated[StrictInt, Field(ge=1, le=1024)] = 64
    """Larger request headers are refused with 431."""
    routing: dict[Kind, OfConsumer] = Field(default_factory=dict)
    """The consumer of each kind of job."""
    consumers: dict[ConsumerName, ConsumerConfig] = Field(default_factory=dict)
    """The consumers, by name."""
    auth: AuthConfig = AuthConfig()
    """API keys."""
    eviction: Literal["lru", "cost"] = "lru"
    """Who is evicted first, of those that the queue does not need sooner: `lru`, the least recently
    used; `cost`, the one whose reload costs least."""
    default_resident: tuple[OfConsumer, ...] = ()
    """Consumers that are loaded again in quiet times."""
    restore_after: Seconds = 60.0
    """So long without a job is a quiet time."""
    state_file: AnyFile | None = None
    """Keeps what was learned over a restart; none: a file in the user's state directory."""
    allowed_hosts: tuple[Host, ...] = ()
    """Names beside the loopback ones that clients on this machine may call the broker by."""
    log: LogConfig = LogConfig()
    """Logs."""
    events: EventsConfig = EventsConfig()
    """Events."""
    setup: SetupConfig = SetupConfig()
    """For `gpumanager setup`."""

    @property
    def host(self) -> str:
        """The host of `listen`, an IPv6 address without its brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of `listen`."""
        return int(self.listen.rpartition(":")[2])
