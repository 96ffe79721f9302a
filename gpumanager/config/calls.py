"""The config's building blocks: kinds of values, calls to consumers, rules made of calls. The
text below a key is its description in docs/config.md and in the JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, urlencode

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)

from gpumanager.config import expressions, values


class Model(BaseModel):
    """What every part of the config is: immutable, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# -- single values -------------------------------------------------------------------------------


def _named(format_: str) -> WithJsonSchema:
    """A text of a kind that editors and docs/config.md call by its name."""
    return WithJsonSchema({"type": "string", "format": format_})


LONGEST_S = 1_000_000
"""More than eleven days: what waits longer is a mistake, and far more no clock can take."""

Seconds = Annotated[float, BeforeValidator(values.number), Field(gt=0, le=LONGEST_S)]
Duration = Annotated[float, BeforeValidator(values.number), Field(ge=0, le=LONGEST_S)]
Port = Annotated[StrictInt, Field(ge=1, le=65535)]
PortKey = Annotated[int, BeforeValidator(values.port), _named("port")]
Mib = Annotated[StrictInt, Field(ge=0)]
Urgency = Annotated[StrictInt, Field(ge=0, le=7)]
Status = Annotated[StrictInt, Field(ge=100, le=599)]
Kind = Annotated[StrictStr, AfterValidator(values.kind), _named("kind")]
DropIn = Annotated[StrictStr, AfterValidator(values.drop_in), _named("route")]
ModelName = Annotated[StrictStr, AfterValidator(values.model_name)]
Url = Annotated[StrictStr, AfterValidator(values.url), _named("uri")]
Path = Annotated[StrictStr, AfterValidator(values.path), _named("path")]
Method = Annotated[StrictStr, AfterValidator(values.method), _named("http-method")]
Expression = Annotated[StrictStr, AfterValidator(expressions.checked), _named("jmespath")]
Pattern = Annotated[StrictStr, AfterValidator(values.pattern), _named("regex")]
File = Annotated[StrictStr, AfterValidator(values.file), _named("absolute-file")]
CaFile = Annotated[StrictStr, AfterValidator(values.certificates), _named("absolute-file")]
AudioPrefix = Annotated[StrictStr, AfterValidator(values.audio_prefix), _named("path")]
AnyFile = Annotated[StrictStr, _named("file")]
HostPort = Annotated[StrictStr, AfterValidator(values.host_port), _named("host-port")]
Listen = Annotated[StrictStr, AfterValidator(values.listen), _named("host-port")]
Host = Annotated[StrictStr, AfterValidator(values.host), _named("hostname")]
CallbackHost = Annotated[StrictStr, AfterValidator(values.callback_host), _named("callback-host")]
UnitName = Annotated[StrictStr, AfterValidator(values.unit_name), _named("systemd-unit")]
ContainerName = Annotated[StrictStr, AfterValidator(values.container_name), _named("container")]
ConsumerName = Annotated[StrictStr, AfterValidator(values.consumer_name), _named("new-name")]
OfConsumer = Annotated[StrictStr, _named("consumer")]
HeaderName = Annotated[StrictStr, AfterValidator(values.header_name)]
HeaderValue = Annotated[StrictStr, AfterValidator(values.header_value)]


# -- calls ---------------------------------------------------------------------------------------


class Call(Model):
    """One call that the broker makes to a consumer. `{model}` in the path, in the values of `query`
    and in the strings of `json` stands for the consumer's `model`."""

    path: Path
    """The path of the call, with a query if it needs one."""
    method: Method = "GET"
    """Its HTTP method."""
    query: dict[StrictStr, StrictStr | StrictInt | StrictBool] = Field(default_factory=dict)
    """Added to the path as a query, percent-encoded."""
    expect: Expression | None = None
    """The call succeeds only if this gives `true` for its answer."""
    json_body: Annotated[Any, AfterValidator(values.is_json)] = Field(default=None, alias="json")
    """Sent as the body, with `Content-Type: application/json`."""
    headers: dict[
        HeaderName,
        HeaderValue,
    ] = Field(default_factory=dict)
    """Headers that are added to the request, for example one with a key of the server."""
    timeout: Seconds | None = None
    """The longest time that it may take; none: 3 for a probe, 120 for a load, 30 for an unload, 10
    for a trim."""
    ok: tuple[Status, ...] = ()
    """The statuses that count as success; empty: any 2xx."""

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
    """The call that asks a consumer whether it is healthy. A bare path stands for a GET of it. It
    has either a `path` or `tcp`."""

    path: Path = "/"
    """Where it goes."""
    tcp: HostPort | None = None
    """Instead of a call: the address where the consumer has to listen."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_them(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and ("path" in value) == ("tcp" in value):
            raise ValueError("must have either a path or tcp")
        return value


class LoadCall(Call):
    """A call that tells the consumer to do something, for example to load its model. A bare path
    stands for a POST to it."""

    method: Method = "POST"
    """Its HTTP method."""


class Session(LoadCall):
    """A call that opens a session with a server whose calls need one. The broker makes it before
    a call that has `{session}` in it."""

    id: Expression
    """Finds the id of the session in the answer."""


class UnloadCall(Call):
    """The call that frees the consumer's memory. A bare path stands for a POST to it. The
    broker makes it only while none of its own jobs runs."""

    method: Method = "POST"
    """Its HTTP method."""
    for_each: Literal["items"] | None = None
    """Makes the call once for each item that the probe lists; `{item}` stands for the item."""
    alone: StrictBool = True
    """Whether one item may be unloaded and the others stay; `false` where they need each other, as
    the parts of a pipeline do."""
    when_busy: Literal["drains", "aborts", "refuses", "unsafe"] = "drains"
    """What the server does if this call comes while it works: it `drains` (finishes its jobs
    first), `aborts` them, `refuses` the call, or may break (`unsafe`). Others may use the server
    directly; if the call would harm their job, the broker waits until the probe's `busy` gives
    false."""

    def for_item(self, item: str) -> Self:
        """The call for one item."""
        return self.filled("item", item)


class Busy(Model):
    """How a server says that it works on something. A bare expression stands for `expr`."""

    expr: Expression
    """Gives `true` while it works."""
    path: Path | None = None
    """The expression is applied to the answer of a GET of this path; none: to the probe's
    answer."""


class Probe(Call):
    """The call whose JSON answer says what the consumer has loaded. A status in `absent` means
    that nothing is loaded. If an expression gives nothing, or a value of the wrong type, that point
    stays unknown."""

    loaded: Expression | None = None
    """Gives whether anything is loaded."""
    resident: Expression | None = None
    """Gives the memory it holds, in `unit`."""
    items: Expression | None = None
    """Gives a list of names: the loaded models, for `unload.for_each`."""
    details: Expression | None = None
    """Gives a list with an object for each loaded model: its `name`, as in `items`, and, as far as
    the server tells, the memory that it holds on the card (`resident`), the memory that it would
    need to be there wholly (`needs`), both in `unit`, and the tokens it was loaded for
    (`context`)."""
    busy: Annotated[Busy | None, BeforeValidator(values.bare_expression)] = None
    """Tells whether it works on something."""
    on_cpu: Expression | None = None
    """Gives a list of the models that run partly on the CPU, because they did not fit."""
    unit: Literal["B", "KiB", "MiB", "GiB"] = "MiB"
    """The unit of `resident`, and of the memory in `details`."""
    absent: tuple[Status, ...] = ()
    """Statuses that say that nothing is loaded."""

    def find_loaded(self, answer: Any) -> Any:
        """What `loaded` gives for `answer`; None if it gives nothing, or does not fit."""
        return expressions.search(self.loaded, answer)

    def find_resident(self, answer: Any) -> Any:
        """What `resident` gives for `answer`, in `unit`; None as above."""
        return expressions.search(self.resident, answer)

    def find_items(self, answer: Any) -> Any:
        """What `items` gives for `answer`; None as above."""
        return expressions.search(self.items, answer)

    def find_details(self, answer: Any) -> Any:
        """What `details` gives for `answer`; None as above."""
        return expressions.search(self.details, answer)

    def find_on_cpu(self, answer: Any) -> Any:
        """What `on_cpu` gives for `answer`; None as above."""
        return expressions.search(self.on_cpu, answer)


class Settled(Call):
    """A call that the broker repeats after an unload until `until` gives true. It does so in
    addition to reading the card, never instead of it."""

    until: Expression
    """Gives `true` once the unload is over."""
    every: Seconds = 0.25
    """The time between two of these calls."""
    timeout: Seconds = 15.0
    """The longest time for all these calls together; also the longest wait until the consumer's
    memory is free, if it is longer than `gpu.release_timeout`."""


class Slots(Call):
    """The call that asks a server how many jobs it works on at once, for `max_parallel: auto`. The
    broker makes it while the consumer is loaded, with one of the probes, never for a job."""

    count: Expression
    """Gives the number in the answer. If it gives none, one job runs at a time."""

    def find_count(self, answer: Any) -> int | None:
        """What `count` gives for `answer`; None if that is no number of jobs."""
        found = expressions.search(self.count, answer)
        if isinstance(found, bool) or not isinstance(found, int | float):
            return None
        return int(found) if 1 <= found < float("inf") else None  # NaN is neither


class Match(Model):
    """Which jobs a `done` rule is for."""

    path: Annotated[tuple[Path, ...], BeforeValidator(values.listed)]
    """Jobs sent to one of these paths."""
    method: Method = "POST"
    """And with this method."""


class CallMatch(Model):
    """Which calls of a consumer's are meant."""

    path: Annotated[tuple[Path, ...], BeforeValidator(values.listed)]
    """Calls of one of these paths; `*` stands for any text, `?` for any character."""
    method: Method | None = None
    """And with this method; none: with any."""

    def matches(self, method: str, path: str) -> bool:
        """Whether a call is meant; its `path` is without a query."""
        return self.method in (None, method) and any(fnmatchcase(path, each) for each in self.path)


class StopCall(CallMatch):
    """Calls that stop jobs at the consumer. Where API keys are in use, a key with the role client
    may stop its own jobs only."""

    ids: Expression
    """Finds in the call's body the id, or the list of ids, of the jobs that it stops. If it finds
    none, the call stops whatever the consumer works on."""
    all: Expression | None = None
    """Gives `true` for a body that stops all jobs, whatever ids it names."""

    def jobs(self, body: Any) -> list[str] | None:
        """The ids of the jobs that a call with this body stops; None: whatever there is."""
        found = expressions.search(self.ids, body)
        listed = found if isinstance(found, list) else [found]
        ids = [each for each in listed if isinstance(each, str)]
        if not ids or len(ids) < len(listed) or expressions.search(self.all, body):
            return None
        return ids


class Poll(Call):
    """A call that the broker repeats."""

    every: Seconds = 0.5
    """The longest time between two of these calls."""


class Lost(Call):
    """A call whose answer lists the jobs that the consumer still has."""

    listed: Expression
    """Gives the list of ids that are still worked on."""


class Done(Model):
    """When a job is over that the consumer answers at once and works on afterwards."""

    match: Match
    """Which jobs it is for."""
    id: Expression
    """Finds the job's id in the first answer; `{id}` stands for it below."""
    poll: Annotated[Poll, BeforeValidator(values.bare_path)]
    """Asks for the state of the job."""
    until: Expression
    """Gives `true` for the answer of `poll` once the job is over."""
    lost: Lost | None = None
    """A job also counts as over if neither `poll` nor this call knows it, twice in a row."""
    cancel: Annotated[tuple[LoadCall, ...], BeforeValidator(values.listed)] = ()
    """The calls that stop the job."""
    timeout: Seconds | None = None
    """After this the job counts as over; none: the consumer's `timeouts.total`."""
    failure: Expression | None = None
    """Gives, for the answer of `poll`, the consumer's own words for why the job failed; `null` if
    it went well. Nothing else of that answer is searched for an out-of-memory."""

    def find_failure(self, answer: Any) -> Any:
        """What `failure` gives for `answer`; None if it gives nothing, or does not fit."""
        return expressions.search(self.failure, answer)

    def matches(self, method: str, path: str) -> bool:
        """Whether the rule is for a job sent to `path` with `method`."""
        return method == self.match.method and path in self.match.path


class Route(Model):
    """Where a job of this kind goes. A bare path stands for `path`."""

    path: Path
    """The consumer's path for it."""
    method: Method | None = None
    """The method; none: the client's own."""


class ModelEntry(Model):
    """A model that the consumer serves. A bare name stands for `name`."""

    name: ModelName
    """The name that clients use; with `*`, `?` or `[…]`, every name that matches."""
    served_as: ModelName | None = None
    """The name that the consumer is given instead; none: the client's."""
    vram_mib: Mib | None = None
    """The memory that it needs. None: it is learned; until then, the consumer's
    `vram_resident_mib` counts."""
    pinned: StrictBool = False
    """It is never evicted to make room, where the consumer can unload one model alone."""
    prefetch: Annotated[tuple[File, ...], BeforeValidator(values.listed)] = ()
    """Its files, for the consumer's `prefetch`; empty: the consumer's own."""


class ModelList(Call):
    """The call whose answer lists the models that a consumer offers."""

    items: Expression
    """Gives the list of their names."""
    details: Expression | None = None
    """Gives a list with an object for each model: its `name`, as in `items`, and, as far as the
    server tells, how large its weights are (`size`, in `unit`), which is the first guess of what it
    needs, and its other names (`aliases`)."""
    unit: Literal["B", "KiB", "MiB", "GiB"] = "B"
    """The unit of the `size` in `details`."""


def _filled(value: Any, sign: str, with_: str) -> Any:
    if isinstance(value, str):
        return value.replace(sign, with_)
    if isinstance(value, list):
        return [_filled(each, sign, with_) for each in value]
    if isinstance(value, dict):
        return {key: _filled(each, sign, with_) for key, each in value.items()}
    return value
