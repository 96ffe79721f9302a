"""The config's shape: names, defaults, units and bounds. config/consumers.yaml is the example."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import quote, urlencode, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)

from gpumanager.config import expressions

Kind = Literal["tts", "stt", "llm", "image"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# -- single values -------------------------------------------------------------------------------


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _number(value: object) -> object:
    """Seconds: YAML's ints where a float is meant, or a number with a unit. Booleans and
    infinities are no numbers."""
    if isinstance(value, str) and (
        found := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(ms|[smhd])", value)
    ):
        return float(found[1]) * _UNITS[found[2]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number of seconds, or one with its unit, such as 90s or 15m")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    return float(value)


def _path(value: str) -> str:
    if not re.fullmatch(r"/[!-~]*", value):
        raise ValueError(
            "must start with '/' and hold printable ASCII only (percent-encode the rest)"
        )
    return value


def _method(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z]{1,16}", value):
        raise ValueError("must be an HTTP method such as POST")
    return value.upper()


def _header_name(value: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", value):
        raise ValueError("a header's name must be letters, digits and '-', such as X-Api-Key")
    if value.lower() in _FRAMING:
        raise ValueError("is set by the broker itself")
    return value


_FRAMING = frozenset({"host", "connection", "content-length", "transfer-encoding"})


def _header_value(value: str) -> str:
    if not re.fullmatch(r"[\t -~\xa0-\xff]*", value) or value != value.strip():
        raise ValueError("must be one line of Latin-1 text, without spaces around it")
    return value


def _url(value: str) -> str:
    allowed = "must be http://HOST[:PORT][/BASE] or https://…, without credentials, query, fragment"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError(allowed) from None
    if (
        not re.fullmatch(r"[!-~]+", value)
        or parts.scheme not in ("http", "https")
        or not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?", parts.netloc)
        or port == 0
        or not _is_hostname(parts.hostname or "")
        or "?" in value
        or "#" in value
    ):
        raise ValueError(allowed)
    return value.rstrip("/")


def _is_hostname(value: str) -> bool:
    """Labels of 1 to 63 characters; an IPv6 address passes, the URL's syntax has seen to it."""
    return ":" in value or (
        len(value) <= 253 and all(0 < len(label) <= 63 for label in value.split("."))
    )


def _listen(value: str) -> str:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|[A-Za-z0-9.-]+):([0-9]{1,5})", value)
    if found is None or int(found[2]) > 65535 or (found[1] and not _is_ipv6(found[1])):
        raise ValueError("must be HOST:PORT or [IPV6]:PORT, with a port of 0 to 65535")
    return value


def _is_ipv6(value: str) -> bool:
    try:
        ipaddress.IPv6Address(value)
    except ValueError:
        return False
    return True


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", value):
        raise ValueError("must be a host name without a port, such as gpu.example.org")
    return value.lower()


def _device(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and re.match(r"(GPU-|MIG-|simulated:).", value):
        return value
    raise ValueError("must be NVML's index (0, 1, …), a UUID (GPU-…, MIG-…), or simulated:FILE")


def _audio_prefix(value: str) -> str:
    _path(value)
    if not value.endswith("/") or len(value) < 3 or "//" in value or re.search(r"[<>%?#]", value):
        raise ValueError("must be a path such as /audio/, starting and ending with '/'")
    if not {".", ".."}.isdisjoint(value.split("/")):
        raise ValueError("must not hold '.' or '..'")
    if value.startswith(("/v1/", "/healthz/")):
        raise ValueError("must not lie under /v1/ or /healthz/, which are the broker's own")
    return value


def _consumer_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError(
            "a consumer's name must be 1 to 64 letters, digits, '.', '_' or '-', "
            "and start with a letter or digit"
        )
    return value


def _host_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) <= 65535 or not _is_hostname(host.strip("[]")):
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:8188")
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    return value


def _unit_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,254}", value):
        raise ValueError("must be the name of a systemd unit, such as comfyui.service")
    return value


def _container_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", value):
        raise ValueError("must be the name or id of a container, such as comfyui")
    return value


def _arguments(value: tuple[str, ...]) -> tuple[str, ...]:
    if value and (not value[0] or any("\0" in word for word in value)):
        raise ValueError("must be a program and its arguments, without a shell")
    return value


def _bare_path(value: object) -> object:
    """A bare string stands for a call's path."""
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, Mapping):
        raise ValueError("must be a path, or a mapping with a path")
    return value


def _bare_path_or_none(value: object) -> object:
    return value if value is None else _bare_path(value)


def _bare_expression(value: object) -> object:
    return {"expr": value} if isinstance(value, str) else value


def _bare_rung(value: object) -> object:
    if value == "http":
        return {"http": True}
    if not isinstance(value, Mapping | BaseModel):
        raise ValueError(f"must be http, or have exactly one of {', '.join(_RUNGS[1:])}")
    return value


def _listed(value: object) -> object:
    """A single one stands for a list of it."""
    return value if value is None or isinstance(value, list | tuple) else (value,)


def _file(value: str) -> str:
    if not value.startswith("/") or "\0" in value:
        raise ValueError("must be the absolute path of a file")
    return value


def _is_json(value: object) -> object:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must be a value that JSON can express") from None
    return value


LONGEST_S = 1_000_000
"""More than eleven days: what waits longer is a mistake, and far more no clock can take."""

Seconds = Annotated[float, BeforeValidator(_number), Field(gt=0, le=LONGEST_S)]
Duration = Annotated[float, BeforeValidator(_number), Field(ge=0, le=LONGEST_S)]
Mib = Annotated[StrictInt, Field(ge=0)]
Path = Annotated[StrictStr, AfterValidator(_path)]
Method = Annotated[StrictStr, AfterValidator(_method)]
Expression = Annotated[StrictStr, AfterValidator(expressions.checked)]
Status = Annotated[StrictInt, Field(ge=100, le=599)]


# -- calls ---------------------------------------------------------------------------------------


class Call(_Model):
    """One control call to a consumer. `timeout` in seconds; `ok` lists the statuses that count
    as success, empty for any 2xx, and `expect` has to give true for an answer that counts;
    `json` is sent as the body. `{model}` stands for the consumer's `model`, and in places for
    what is said there, in the path, the values of `query`, and the strings of `json`."""

    path: Path
    method: Method = "GET"
    query: dict[StrictStr, StrictStr | StrictInt | StrictBool] = Field(default_factory=dict)
    expect: Expression | None = None
    json_body: Annotated[Any, AfterValidator(_is_json)] = Field(default=None, alias="json")
    headers: dict[
        Annotated[StrictStr, AfterValidator(_header_name)],
        Annotated[StrictStr, AfterValidator(_header_value)],
    ] = Field(default_factory=dict)
    timeout: Seconds | None = None
    ok: tuple[Status, ...] = ()

    @property
    def target(self) -> str:
        """The path, with the query behind it."""
        if not self.query:
            return self.path
        pairs = {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in self.query.items()
        }
        return self.path + ("&" if "?" in self.path else "?") + urlencode(pairs)

    def filled(self, placeholder: str, value: str) -> Self:
        """The call with `{placeholder}` replaced: percent-encoded in the path, as it is in the
        query, which is encoded later, and in `json`."""
        sign = f"{{{placeholder}}}"
        return self.model_copy(
            update={
                "path": self.path.replace(sign, quote(value, safe="")),
                "query": _filled(self.query, sign, value),
                "json_body": _filled(self.json_body, sign, value),
            }
        )


class Health(Call):
    """The call that asks a consumer how it is; or, for one that has none, `tcp`: HOST:PORT where
    it has to listen."""

    path: Path = "/"
    tcp: Annotated[StrictStr, AfterValidator(_host_port)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_of_them(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and ("path" in value) == ("tcp" in value):
            raise ValueError("must have either a path or tcp")
        return value


class LoadCall(Call):
    """A call that has the consumer do something, as load its model; POST unless it says
    otherwise."""

    method: Method = "POST"


class Session(LoadCall):
    """A call that opens a session; `id` finds the session's id in its answer. It is made before a
    call in which `{session}` stands for that id."""

    id: Expression


class UnloadCall(Call):
    """A call that has the consumer drop its model; POST unless it says otherwise.

    With `for_each: items` it is made once for each item that the consumer's probe lists, and
    `{item}` stands for the item. `when_busy` says what the server does if it is asked in the
    middle of a job: it `drains` it first, `aborts` it, `refuses`, or may break (`unsafe`). The
    broker never asks during one of its own jobs, but others may use the server directly: where
    the job would suffer it waits until the probe's `busy` says no.
    """

    method: Method = "POST"
    for_each: Literal["items"] | None = None
    when_busy: Literal["drains", "aborts", "refuses", "unsafe"] = "drains"

    def for_item(self, item: str) -> Self:
        """The call for one item."""
        return self.filled("item", item)


class Busy(_Model):
    """Whether a server works on something: `expr` gives true or false, for the answer of the
    probe, or of a GET of `path` if that is set."""

    expr: Expression
    path: Path | None = None


class Probe(Call):
    """A call whose JSON answer tells what is resident, by JMESPath expressions.

    `loaded` gives a boolean, `resident` a number in `unit`, `items` a list of names for an
    unload made for each, `busy` a boolean: whether it works on something; `on_cpu` a list of
    what was loaded, but not wholly onto the card. A status in `absent` says that nothing is
    loaded.
    """

    loaded: Expression | None = None
    resident: Expression | None = None
    items: Expression | None = None
    busy: Annotated[Busy | None, BeforeValidator(_bare_expression)] = None
    on_cpu: Expression | None = None
    unit: Literal["B", "KiB", "MiB", "GiB"] = "MiB"
    absent: tuple[Status, ...] = ()

    def find_loaded(self, answer: Any) -> Any:
        """What `loaded` gives for `answer`; None if it gives nothing, or does not fit."""
        return expressions.search(self.loaded, answer)

    def find_resident(self, answer: Any) -> Any:
        """What `resident` gives for `answer`, in `unit`; None as above."""
        return expressions.search(self.resident, answer)

    def find_items(self, answer: Any) -> Any:
        """What `items` gives for `answer`; None as above."""
        return expressions.search(self.items, answer)

    def find_on_cpu(self, answer: Any) -> Any:
        """What `on_cpu` gives for `answer`; None as above."""
        return expressions.search(self.on_cpu, answer)


class Settled(Call):
    """A call that is repeated `every` so many seconds after an unload, for at most `timeout`,
    until `until` gives true. It is asked beside the card, never instead of it: `timeout` is also
    what the consumer's memory is given to show as free, if it is longer than
    `gpu.release_timeout`."""

    until: Expression
    every: Seconds = 0.25
    timeout: Seconds = 15.0


class Match(_Model):
    """Which jobs a `done` rule is for: those sent to one of the `path`s, with `method`."""

    path: Annotated[tuple[Path, ...], BeforeValidator(_listed)]
    method: Method = "POST"


class Poll(Call):
    """A call repeated `every` so many seconds."""

    every: Seconds = 0.5


class Lost(Call):
    """A call whose answer lists, by the expression `listed`, the ids that are still in work."""

    listed: Expression


class Done(_Model):
    """When a job that is answered at once, and worked on afterwards, is over.

    `id` finds its id in the answer; `poll` is asked until `until` gives true, with `{id}` for the
    id. Where `lost` is set, a job that is in neither, seen twice, has ended too. `cancel` are the
    calls that stop it. It counts as over after `timeout` seconds at the latest; by default the
    consumer's total.
    """

    match: Match
    id: Expression
    poll: Annotated[Poll, BeforeValidator(_bare_path)]
    until: Expression
    lost: Lost | None = None
    cancel: Annotated[tuple[LoadCall, ...], BeforeValidator(_listed)] = ()
    timeout: Seconds | None = None

    def matches(self, method: str, path: str) -> bool:
        """Whether the rule is for a job sent to `path` with `method`."""
        return method == self.match.method and path in self.match.path


class Route(_Model):
    """Where a kind of job goes. No `method`: the client's own."""

    path: Path
    method: Method | None = None


def _filled(value: Any, sign: str, with_: str) -> Any:
    if isinstance(value, str):
        return value.replace(sign, with_)
    if isinstance(value, list):
        return [_filled(each, sign, with_) for each in value]
    if isinstance(value, dict):
        return {key: _filled(each, sign, with_) for key, each in value.items()}
    return value


# -- taking memory back --------------------------------------------------------------------------

_RUNGS = ("http", "unit", "container", "signal", "checkpoint")
_BELONGS = {"scope": "unit", "socket": "container", "start": "signal"}


class Rung(_Model):
    """One way to have a consumer give back the card's memory; `evict` lists them in the order in
    which they are tried. Exactly one of:

    - `http`: its `unload` call.
    - `unit`: its systemd unit is stopped (`scope`: the user's or the system's manager).
    - `container`: its container is stopped, through Docker's or Podman's `socket`.
    - `signal`: its process group gets the signal, and KILL after `grace` seconds. It is started
      again with `start`, a program and its arguments, if that is set; else whoever supervises
      it has to.
    - `checkpoint`: the driver takes its memory to the host's, and brings it back.

    `grace` in seconds: what the consumer is given to end; for `checkpoint` the longest that each
    of its steps may take.
    """

    http: Literal[True] | None = None
    unit: Annotated[StrictStr, AfterValidator(_unit_name)] | None = None
    scope: Literal["user", "system"] = "user"
    container: Annotated[StrictStr, AfterValidator(_container_name)] | None = None
    socket: Annotated[StrictStr, AfterValidator(_file)] | None = None
    signal: Literal["TERM", "INT", "QUIT"] | None = None
    start: Annotated[tuple[StrictStr, ...], AfterValidator(_arguments)] = ()
    checkpoint: Literal[True] | None = None
    grace: Seconds = 10.0

    @model_validator(mode="before")
    @classmethod
    def _exactly_one(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        chosen = [name for name in _RUNGS if value.get(name) is not None]
        if len(chosen) != 1:
            raise ValueError(f"must be http, or have exactly one of {', '.join(_RUNGS[1:])}")
        for key, rung in _BELONGS.items():
            if key in value and chosen != [rung]:
                raise ValueError(f"'{key}' belongs to {rung}")
        return value

    @property
    def name(self) -> str:
        """`http`, `unit`, `container`, `signal` or `checkpoint`."""
        return next(name for name in _RUNGS if getattr(self, name) is not None)


HTTP = Rung(http=True)

_OUT_OF_MEMORY = (
    r"(CUDA|HIP|GPU|VRAM|device)\b.{0,80}\bout of (device )?memory",
    r"\bOutOfMemoryError\b",
    r"out of memory.{0,80}\b(CUDA|HIP|GPU|VRAM|device)\b",
    r"\b(CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|hipErrorOutOfMemory)\b",
    r"\bCU(BLAS|DNN|SPARSE)_STATUS_ALLOC_FAILED\b",
    r"\b(cuda|hip)Malloc\w* failed",
    r"Allocation on device",
    r"unable to allocate (CUDA|ROCm|backend) ?\w* ?buffer",
    r"(not enough|insufficient) (GPU memory|VRAM)\b",
)


class OutOfMemory(_Model):
    """How a consumer's answer says that the card's memory ran out: one of the statuses, and one
    of the patterns (regular expressions, whatever the case) in its body. Such a job is run once
    more, after room was made; `retry: false` only learns from it."""

    status: tuple[Status, ...] = (400, 500, 502, 503, 507)
    patterns: tuple[Annotated[StrictStr, AfterValidator(_pattern)], ...] = _OUT_OF_MEMORY
    retry: StrictBool = True

    def said_in(self, body: bytes) -> bool:
        """Whether the text of an answer says so."""
        return any(pattern.search(body) for pattern in self._compiled)

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[bytes], ...]:
        return tuple(re.compile(each.encode(), re.IGNORECASE) for each in self.patterns)


# -- consumers -----------------------------------------------------------------------------------


class Timeouts(_Model):
    """How long a job may take, in seconds: to `connect`; from then to the `first_byte` of the
    answer; `idle` between two reads of its body; `total`."""

    connect: Seconds = 3.0
    first_byte: Seconds = 120.0
    idle: Seconds = 60.0
    total: Seconds = 600.0


_Health = Annotated[Health | None, BeforeValidator(_bare_path_or_none)]
_Load = Annotated[LoadCall | None, BeforeValidator(_bare_path_or_none)]
_Unload = Annotated[UnloadCall | None, BeforeValidator(_bare_path_or_none)]
_Probe = Annotated[Probe | None, BeforeValidator(_bare_path_or_none)]
_Settled = Annotated[Settled | None, BeforeValidator(_bare_path_or_none)]
_Evict = Annotated[
    tuple[Annotated[Rung, BeforeValidator(_bare_rung)], ...], BeforeValidator(_listed)
]
_OnDisconnect = Annotated[
    Annotated[Literal["native", "none"], Tag("<word>")] | Annotated[LoadCall, Tag("<call>")],
    Discriminator(lambda value: "<call>" if isinstance(value, Mapping | Call) else "<word>"),
]
_Route = Annotated[Route, BeforeValidator(_bare_path)]


class ConsumerConfig(_Model):
    """One service that shares the GPU.

    `session` opens a session with a server whose calls want one.

    `vram_resident_mib` is what it needs to be resident, `floor_mib` what it keeps after an unload.
    `vram_managed` says that it runs its own LRU and is never evicted; `pinned` that it is not to
    be, though it could. `load` is made before a job, if it was unloaded; `warm` only when it is
    to be loaded without one, for a server that loads with its first job. `evict` are the ways to
    take its memory back, by default its `unload` call alone. `on_disconnect` says whether it
    aborts when its client goes (`native`), works on (`none`), or has to be told by a call.
    `idle_unload`: unloaded after so many seconds without a job. `ready_timeout`: the seconds it
    may take from being started until its health is good. `container` is the name or id of the
    Docker or Podman container it runs in: it tells whose a process on the card is where that
    cannot be seen otherwise; by default the one that `evict` names.
    """

    url: Annotated[StrictStr, AfterValidator(_url)]
    preset: StrictStr | None = None
    model: StrictStr | None = None
    health: _Health = None
    probe: _Probe = None
    session: Session | None = None
    paths: dict[Kind, _Route] = Field(default_factory=dict)
    vram_resident_mib: Mib = 0
    floor_mib: Mib | None = None
    container: Annotated[StrictStr, AfterValidator(_container_name)] | None = None
    vram_managed: StrictBool = False
    pinned: StrictBool = False
    idle_unload: Seconds | None = None
    priority: StrictInt = 0
    can_coexist_with: tuple[StrictStr, ...] = ()
    load: _Load = None
    warm: _Load = None
    unload: _Unload = None
    settled: _Settled = None
    evict: _Evict | None = None
    done: Done | None = None
    out_of_memory: OutOfMemory = Field(default=OutOfMemory(), alias="oom")
    ready_timeout: Seconds = 120.0
    timeouts: Timeouts = Timeouts()
    on_disconnect: _OnDisconnect = "native"

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The ways to take its memory back, in the order in which they are tried."""
        if self.evict is not None:
            return self.evict
        return () if self.unload is None else (HTTP,)

    @property
    def container_named(self) -> tuple[str | None, str | None]:
        """The container it runs in, and the engine's socket; None where they are not named."""
        for rung in self.evict or ():
            if rung.container is not None and self.container in (None, rung.container):
                return rung.container, rung.socket
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


class GpuConfig(_Model):
    """The card. `total_mib` 0: ask NVML; `reserved_mib` is promised to nobody; `device` is
    NVML's index, a UUID or `simulated:FILE`; `sample_interval` in seconds; `release_timeout` the
    longest wait, in seconds, for unloaded memory to show as free; a consumer whose `settled`
    call has a longer `timeout` is given that."""

    total_mib: Mib = 0
    reserved_mib: Mib = 256
    device: Annotated[StrictInt | StrictStr, BeforeValidator(_device)] = 0
    sample_interval: Seconds = 2.0
    release_timeout: Seconds = 10.0


class SchedulerConfig(_Model):
    """The line. `max_queue` requests may wait, each for `max_wait` seconds."""

    kind: Literal["locked", "passthrough"] = "locked"
    max_queue: Annotated[StrictInt, Field(ge=1, le=10_000)] = 256
    max_wait: Seconds = 600.0


class AuthConfig(_Model):
    """Where API keys are read from, beside the environment's GPUMANAGER_API_KEYS. The keys
    themselves never stand in the config."""

    keys_file: StrictStr | None = None


class LogConfig(_Model):
    """Logs on stderr."""

    format: Literal["logfmt", "json"] = "logfmt"
    level: Literal["debug", "info", "warning", "error"] = "info"


class EventsConfig(_Model):
    """What has happened. `file` (absolute) gets it as JSON lines, and is rotated at `max_mib`,
    `keep_files` old ones kept; none: the latest are only in memory."""

    file: Annotated[StrictStr, AfterValidator(_file)] | None = None
    max_mib: Annotated[StrictInt, Field(ge=1, le=10_000)] = 16
    keep_files: Annotated[StrictInt, Field(ge=0, le=100)] = 3


class Config(_Model):
    """The broker. Intervals and `drain_timeout` (for a running job at shutdown) in seconds;
    `eviction` is how victims are chosen whom the queue does not want: least recently used, or by
    what their reload costs.
    `default_resident` are loaded again after `restore_after` seconds of quiet. `state_file` holds
    what was learned; none: a file in the user's state directory. `allowed_hosts` are names beside
    the loopback ones that clients on this machine may use."""

    listen: Annotated[StrictStr, AfterValidator(_listen)] = "127.0.0.1:8770"
    audio_proxy: StrictStr | None = None
    audio_path_prefix: Annotated[StrictStr, AfterValidator(_audio_prefix)] = "/audio/"
    gpu: GpuConfig = GpuConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    health_interval: Seconds = 5.0
    drain_timeout: Duration = 30.0
    max_body_mib: Annotated[StrictInt, Field(ge=1)] = 1024
    max_header_kib: Annotated[StrictInt, Field(ge=1, le=1024)] = 64
    routing: dict[Kind, StrictStr] = Field(default_factory=dict)
    consumers: dict[Annotated[StrictStr, AfterValidator(_consumer_name)], ConsumerConfig] = Field(
        default_factory=dict
    )
    auth: AuthConfig = AuthConfig()
    eviction: Literal["lru", "cost"] = "lru"
    default_resident: tuple[StrictStr, ...] = ()
    restore_after: Seconds = 60.0
    state_file: StrictStr | None = None
    allowed_hosts: tuple[Annotated[StrictStr, AfterValidator(_host)], ...] = ()
    log: LogConfig = LogConfig()
    events: EventsConfig = EventsConfig()

    @property
    def host(self) -> str:
        """The host of `listen`, an IPv6 address without its brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of `listen`."""
        return int(self.listen.rpartition(":")[2])
