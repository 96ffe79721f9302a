"""`gpumanager submit`: jobs whose client does not wait."""

from __future__ import annotations

import json
import mimetypes
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from gpumanager.cli.following import DAY_S, WAIT_S, awaited, look, outcome, timeout_option
from gpumanager.cli.group import asks_broker, fail, main
from gpumanager.cli.words import visible
from gpumanager.client import BrokerClient, BrokerUnavailable, Connection, json_of, refusal

if TYPE_CHECKING:
    from rich.progress import TaskID

MOST_BYTES = 256 * 2**20
ANSWER_S = 60.0
"""A job is on disk when it is answered, and disks can be slow."""

LOOKED_AT = 20
"""Jobs behind the first that are looked at while that one runs: they may overtake it."""

_JSON_TYPE = "application/json"
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([ -~\t]*)")
_IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,240}")


@dataclass(frozen=True, slots=True)
class _Request:
    """What is submitted, as often as it is asked for, under keys that begin with `key`."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    key: str
    count: int

    def key_of(self, number: int) -> str:
        return self.key if self.count == 1 else f"{self.key}-{number}"


def _headers(
    _context: click.Context, _option: click.Parameter, values: Sequence[str]
) -> dict[str, str]:
    found = {}
    for value in values:
        parts = _HEADER.fullmatch(value)
        if parts is None:
            raise click.BadParameter(f"must be 'Name: value' (found {value!r})")
        found[parts[1].title()] = parts[2]
    return found


def _key(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not _IDEMPOTENCY_KEY.fullmatch(value):
        raise click.BadParameter("must be 1 to 240 printable ASCII characters")
    return value


@main.command()
@click.argument("target", metavar="KIND|/PATH")
@click.argument("data", metavar="[@FILE|-|DATA]", required=False)
@click.option("--count", type=click.IntRange(1), default=1, help="Submit it so many times.")
@click.option(
    "--header", "-H", "headers", multiple=True, callback=_headers, help="As 'Name: value'; repeat."
)
@click.option(
    "--urgency", type=click.IntRange(0, 7), help="0 is the most urgent; else the broker's (5)."
)
@click.option(
    "--idempotency-key",
    callback=_key,
    metavar="KEY",
    help="The same KEY and data again is the same job; with --count, KEY-1, KEY-2, …",
)
@click.option("--wait", is_flag=True, help="Wait until they are over; exit code 1 unless all done.")
@timeout_option(DAY_S)
@click.option("--json", "as_json", is_flag=True, help="JSON lines, as where it is no terminal.")
@asks_broker
def submit(
    broker: BrokerClient,
    target: str,
    data: str | None,
    count: int,
    headers: dict[str, str],
    urgency: int | None,
    idempotency_key: str | None,
    wait: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Leave a job with the broker, which runs it when it is its turn, and end.

    KIND is as in /v1/KIND (tts, stt, llm, image); /PATH is any path of GPU work. The data is
    that of a file, of stdin (-), or as it stands there: JSON, unless the file's name or a header
    `Content-Type` says otherwise. Prints the ids, for `jobs`, `result` and `cancel`.
    """
    if urgency is not None:
        headers.setdefault("Priority", f"u={urgency}")
    request = _Request(
        path=target if target.startswith("/") else f"/v1/{quote(target, safe='')}",
        body=_body(data, headers),
        headers=headers,
        key=idempotency_key or uuid.uuid4().hex,
        count=count,
    )
    taken: list[Any] = []
    refused: BrokerUnavailable | None = None
    in_terminal = sys.stdout.isatty() and not as_json
    told: _Told = _Screen(count, wait) if in_terminal else _Lines(wait)
    with told:
        with broker.connected() as connection:
            try:
                for job in _submitted(connection, request):
                    taken.append(job)
                    told.taken(job)
            except BrokerUnavailable as error:
                refused = error
        if wait and refused is None:
            _await(broker, taken, time.monotonic() + timeout, told)
    if refused is not None:
        status = f" ({refused.status})" if refused.status else ""
        many = f"{len(taken)} of {count} jobs were taken, then: " if count > 1 else ""
        fail(f"{many}{refused}{status}")
    if wait:
        if in_terminal:
            click.echo(told.summary())
        sys.exit(0 if told.all_done(count) else 1)


def _body(data: str | None, headers: dict[str, str]) -> bytes:
    """The bytes that are sent; the header `Content-Type` is set, if it is missing. Raises
    BadParameter."""
    if data is None:
        return b""
    name, body = "the data", b""
    if data == "-":
        body = sys.stdin.buffer.read(MOST_BYTES + 1)
    elif data.startswith("@"):
        name = data[1:]
        try:
            with open(name, "rb") as file:
                body = file.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise click.BadParameter(f"{name} cannot be read: {reason}") from None
    else:
        body = data.encode("utf-8", "surrogateescape")
    if len(body) > MOST_BYTES:
        raise click.BadParameter(f"{name} is larger than {MOST_BYTES // 2**20} MiB")
    if "Content-Type" in headers:
        return body
    guessed = mimetypes.guess_type(Path(name).name)[0] if data.startswith("@") else None
    headers["Content-Type"] = guessed or _JSON_TYPE
    if headers["Content-Type"] == _JSON_TYPE:
        try:
            json.loads(body)
        except (ValueError, RecursionError) as error:
            raise click.BadParameter(
                f"{name} is no JSON ({error}); to send it as it is: -H 'Content-Type: text/plain'"
            ) from None
    return body


def _submitted(connection: Connection, request: _Request) -> Iterator[Any]:
    """The jobs, as the broker takes them. Raises BrokerUnavailable for the first that it does not
    take."""
    for number in range(1, request.count + 1):
        try:
            yield _submit_one(connection, request, number)
        except BrokerUnavailable as error:
            if error.status:
                raise
            yield _submit_one(connection, request, number)  # with its key it cannot become two


def _submit_one(connection: Connection, request: _Request, number: int) -> Any:
    preferred = request.headers.get("Prefer")
    headers = {
        "Accept-Encoding": "identity",  # its answer is kept for whoever comes
        **request.headers,
        "Prefer": f"respond-async, {preferred}" if preferred else "respond-async",
        "Idempotency-Key": request.key_of(number),
    }
    with connection.send(
        "POST",
        request.path,
        timeout=ANSWER_S,
        headers={name: value.encode() for name, value in headers.items()},
        data=request.body,
        stream=True,
        allow_redirects=False,
    ) as answer:
        applied = answer.headers.get("Preference-Applied", "")
        if answer.status_code == 202 and "respond-async" in applied:
            return json_of(connection.url, answer)
        if answer.status_code >= 300:
            raise refusal(connection.url, answer)
        raise BrokerUnavailable(
            f"{request.path} was answered at once: either it is no GPU work, or {connection.url} "
            "keeps no jobs (it has neither `jobs.dir` nor a state file)",
            answer.status_code,
        )


def _await(broker: BrokerClient, jobs: Sequence[Any], until: float, told: _Told) -> None:
    """Tell of each job that is over, until all are, or the time is. Most end in their order, so
    that the first is waited for, and some of the others are looked at meanwhile."""
    pending, turn = {job["id"]: job for job in jobs}, 0
    while pending and time.monotonic() < until:
        first, *others = pending
        job = awaited(broker, first, min(until, time.monotonic() + WAIT_S), seen=pending[first])
        if job["ended"] is not None:
            del pending[first]
            told.over(job)
            continue
        turn = 0 if turn >= len(others) else turn
        for job_id in others[turn : turn + LOOKED_AT]:
            other = look(broker, job_id)
            if other is not None and other["ended"] is not None:
                del pending[job_id]
                told.over(other)
        turn += LOOKED_AT


class _Told(AbstractContextManager["_Told", None]):
    """Tells of jobs: of each once when it is taken, and once when it is over."""

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}

    def taken(self, job: Any) -> None:
        """The broker has it."""
        raise NotImplementedError

    def over(self, job: Any) -> None:
        """It has ended."""
        self.outcomes[job["state"]] = self.outcomes.get(job["state"], 0) + 1

    def all_done(self, count: int) -> bool:
        """Whether so many are done."""
        return self.outcomes.get("done", 0) == count

    def summary(self) -> str:
        """How many ended how."""
        parts = [f"{count} {state}" for state, count in self.outcomes.items()]
        return ", ".join(parts) or "none is over yet"


class _Lines(_Told):
    """JSON, a line for each job: once it is taken, or, with `wait`, once it is over; at the end for
    what is not over."""

    def __init__(self, wait: bool) -> None:
        super().__init__()
        self._wait = wait
        self._left: dict[str, Any] = {}

    def taken(self, job: Any) -> None:
        if self._wait:
            self._left[job["id"]] = job
        else:
            click.echo(json.dumps(job))

    def over(self, job: Any) -> None:
        super().over(job)
        self._left.pop(job["id"], None)
        click.echo(json.dumps(job))

    def __exit__(self, *raised: Any) -> None:
        for job in self._left.values():
            click.echo(json.dumps(job))


class _Screen(_Told):
    """The ids, one a line, above a bar that goes when all is over."""

    def __init__(self, count: int, wait: bool) -> None:
        super().__init__()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        from gpumanager.cli import views

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            console=views.console(),
            auto_refresh=False,
            transient=True,
        )
        self._console = self._progress.console
        self._shown: AbstractContextManager[Any] = (
            self._progress if count > 1 or wait else nullcontext()
        )
        self._count, self._wait, self._number = count, wait, 0
        self._task: TaskID = self._progress.add_task("submitting", total=count)

    def __enter__(self) -> _Screen:
        self._shown.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._shown.__exit__(*raised)

    def taken(self, job: Any) -> None:
        self._number += 1
        self._progress.update(self._task, completed=self._number)
        self._say(job["id"])
        if self._wait and self._number == self._count:
            self._progress.reset(self._task, description="done", total=self._count)
            self._progress.refresh()

    def over(self, job: Any) -> None:
        super().over(job)
        self._progress.advance(self._task)
        if job["state"] != "done":
            self._say(f"{job['id']} {outcome(job)}")
        self._progress.refresh()

    def _say(self, text: str) -> None:
        self._console.print(visible(text), markup=False, soft_wrap=True)
