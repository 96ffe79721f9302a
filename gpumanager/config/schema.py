"""The config's shape: names, defaults, units and bounds. config/consumers.yaml is the example."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote, urlsplit

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
)

from gpumanager.config import expressions

Kind = Literal["tts", "stt", "llm", "image"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# -- single values -------------------------------------------------------------------------------


def _number(value: object) -> object:
    """YAML's ints where a float is meant; booleans and infinities are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
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


def _bare_path(value: object) -> object:
    """A bare string stands for a call's path."""
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, Mapping):
        raise ValueError("must be a path, or a mapping with a path")
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
    as success, empty for any 2xx; `json` is sent as the body."""

    path: Path
    method: Method = "GET"
    json_body: Annotated[Any, AfterValidator(_is_json)] = Field(default=None, alias="json")
    headers: dict[
        Annotated[StrictStr, AfterValidator(_header_name)],
        Annotated[StrictStr, AfterValidator(_header_value)],
    ] = Field(default_factory=dict)
    timeout: Seconds | None = None
    ok: tuple[Status, ...] = ()


class LoadCall(Call):
    """A call that has the consumer do something, as load its model; POST unless it says
    otherwise."""

    method: Method = "POST"


class UnloadCall(Call):
    """A call that has the consumer drop its model; POST unless it says otherwise.

    With `for_each: items` it is made once for each item that the consumer's probe lists, and
    `{item}` in the path and in the strings of `json` stands for the item.
    """

    method: Method = "POST"
    for_each: Literal["items"] | None = None

    def for_item(self, item: str) -> Call:
        """The call for one item: percent-encoded in the path, as it is in `json`."""
        return self.model_copy(
            update={
                "path": self.path.replace("{item}", quote(item, safe="")),
                "json_body": _filled(self.json_body, item),
            }
        )


class Probe(Call):
    """A call whose JSON answer tells what is resident, by JMESPath expressions.

    `loaded` gives a boolean, `resident` a number in `unit`, `items` a list of names for an
    unload made for each, `busy` a boolean: whether it works on something.
    """

    loaded: Expression | None = None
    resident: Expression | None = None
    items: Expression | None = None
    busy: Expression | None = None
    unit: Literal["B", "KiB", "MiB", "GiB"] = "MiB"

    def find_loaded(self, answer: Any) -> Any:
        """What `loaded` gives for `answer`; None if it gives nothing, or does not fit."""
        return expressions.search(self.loaded, answer)

    def find_resident(self, answer: Any) -> Any:
        """What `resident` gives for `answer`, in `unit`; None as above."""
        return expressions.search(self.resident, answer)

    def find_busy(self, answer: Any) -> Any:
        """What `busy` gives for `answer`; None as above."""
        return expressions.search(self.busy, answer)

    def find_items(self, answer: Any) -> Any:
        """What `items` gives for `answer`; None as above."""
        return expressions.search(self.items, answer)


class Route(_Model):
    """Where a kind of job goes. No `method`: the client's own."""

    path: Path
    method: Method | None = None


def _filled(value: Any, item: str) -> Any:
    if isinstance(value, str):
        return value.replace("{item}", item)
    if isinstance(value, list):
        return [_filled(each, item) for each in value]
    if isinstance(value, dict):
        return {key: _filled(each, item) for key, each in value.items()}
    return value


# -- consumers -----------------------------------------------------------------------------------


class Timeouts(_Model):
    """How long a job may take, in seconds: to `connect`; from then to the `first_byte` of the
    answer; `idle` between two reads of its body; `total`."""

    connect: Seconds = 3.0
    first_byte: Seconds = 120.0
    idle: Seconds = 60.0
    total: Seconds = 600.0


_Health = Annotated[Call | None, BeforeValidator(lambda v: v if v is None else _bare_path(v))]
_Load = Annotated[LoadCall | None, BeforeValidator(lambda v: v if v is None else _bare_path(v))]
_Unload = Annotated[UnloadCall | None, BeforeValidator(lambda v: v if v is None else _bare_path(v))]
_Probe = Annotated[Probe | None, BeforeValidator(lambda v: v if v is None else _bare_path(v))]
_OnDisconnect = Annotated[
    Annotated[Literal["native", "none"], Tag("<word>")] | Annotated[LoadCall, Tag("<call>")],
    Discriminator(lambda value: "<call>" if isinstance(value, Mapping | Call) else "<word>"),
]
_Route = Annotated[Route, BeforeValidator(_bare_path)]


class ConsumerConfig(_Model):
    """One service that shares the GPU. `vram_resident_mib` is what it needs to be resident;
    `vram_managed` says that it runs its own LRU and is never evicted; `on_disconnect` whether it
    aborts when its client goes (`native`), works on (`none`), or has to be told by a call."""

    url: Annotated[StrictStr, AfterValidator(_url)]
    preset: StrictStr | None = None
    health: _Health = None
    probe: _Probe = None
    paths: dict[Kind, _Route] = Field(default_factory=dict)
    vram_resident_mib: Mib = 0
    vram_managed: StrictBool = False
    priority: StrictInt = 0
    can_coexist_with: tuple[StrictStr, ...] = ()
    load: _Load = None
    unload: _Unload = None
    timeouts: Timeouts = Timeouts()
    on_disconnect: _OnDisconnect = "native"

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
    NVML's index, a UUID or `simulated:FILE`; `sample_interval` in seconds."""

    total_mib: Mib = 0
    reserved_mib: Mib = 256
    device: Annotated[StrictInt | StrictStr, BeforeValidator(_device)] = 0
    sample_interval: Seconds = 2.0


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


class Config(_Model):
    """The broker. Intervals and `drain_timeout` (for a running job at shutdown) in seconds;
    `allowed_hosts` are names beside the loopback ones that clients on this machine may use."""

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
    allowed_hosts: tuple[Annotated[StrictStr, AfterValidator(_host)], ...] = ()
    log: LogConfig = LogConfig()

    @property
    def host(self) -> str:
        """The host of `listen`, an IPv6 address without its brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of `listen`."""
        return int(self.listen.rpartition(":")[2])
