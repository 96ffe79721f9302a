"""Commands about asynchronous jobs: `jobs` shows them, `result` fetches what one came to."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, get_args

import click

from gpumanager.asyncjobs.model import State
from gpumanager.cli.following import awaited, outcome, path_of, timeout_option
from gpumanager.cli.group import asks_broker, fail, main
from gpumanager.cli.watching import every
from gpumanager.cli.words import visible
from gpumanager.client import Answer, BrokerClient, BrokerUnavailable, Connection

MOST_A_PAGE = 1000
MOST_PAGES = 50
ANSWER_S = 60.0
MOST_SHOWN_BYTES = 64 * 1024
"""Of the answer of a job that failed."""

EXIT_CODES = {"done": 0, "failed": 1, "cancelled": 3, "lost": 4}
NOT_YET = 5


@main.command()
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(get_args(State)),
    help="Only these; repeat.",
)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most.")
@click.option("--watch", is_flag=True, help="Show them again and again, until interrupted.")
@click.option("--interval", type=click.FloatRange(0.2, 60), default=2.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print what the broker says of them.")
@asks_broker
def jobs(
    broker: BrokerClient,
    states: tuple[str, ...],
    limit: int,
    watch: bool,
    interval: float,
    as_json: bool,
) -> None:
    """Show the asynchronous jobs, the newest first: those of your key, where keys are in use."""
    from gpumanager.cli import jobviews, views

    console = views.console()

    def show() -> None:
        found = _latest(broker, limit, states)
        if as_json:
            click.echo(json.dumps({"jobs": found}, indent=None if watch else 2))
        else:
            console.print(jobviews.table(found, time.time(), console.width))

    if not watch:
        show()
    elif as_json or not console.is_terminal:
        for _ in every(interval):
            show()
    else:
        _watch(broker, limit, states, interval)


def _watch(broker: BrokerClient, limit: int, states: Sequence[str], interval: float) -> None:
    """Until `q` or an interrupt; a broker that is away may come back."""
    from rich.live import Live

    from gpumanager.cli import jobviews, views
    from gpumanager.cli.top import keys

    console = views.console()

    def picture() -> Any:
        try:
            found = _latest(broker, limit, states)
        except BrokerUnavailable as error:
            if error.status:
                raise
            return views.gone(str(error))
        return jobviews.table(found, time.time(), console.width, rows=console.height - 2)

    with (
        suppress(KeyboardInterrupt),
        keys() as pressed,
        Live(picture(), console=console, screen=True, auto_refresh=False) as live,
    ):
        while not pressed.ended(interval):
            live.update(picture(), refresh=True)


def _latest(broker: BrokerClient, most: int, states: Sequence[str]) -> list[Any]:
    """The newest jobs, at most so many, of these states, or of any. Raises BrokerUnavailable."""
    found: list[Any] = []
    more: dict[str, int] = {}
    for _ in range(MOST_PAGES):
        wanted = MOST_A_PAGE if states else min(MOST_A_PAGE, most - len(found))
        page = broker.get("/v1/jobs", limit=wanted, **more)
        found += [job for job in page["jobs"] if not states or job["state"] in states]
        if len(found) >= most or "before" not in page:
            break
        more = {"before": page["before"]}
    return found[:most]


@main.command()
@click.argument("job_id", metavar="ID")
@click.option(
    "-o",
    "--output",
    default="-",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="The file for the answer, written whole or not at all; - is stdout, as without -o.",
)
@click.option("-i", "--include", is_flag=True, help="Print its status and headers, on stderr.")
@timeout_option(3600.0)
@asks_broker
def result(broker: BrokerClient, job_id: str, output: str, include: bool, timeout: float) -> None:
    """Fetch the answer of the asynchronous job ID; waits for it, if it is not there yet.

    Exit code 0: done. 1: failed, and the answer is on stderr. 3: cancelled. 4: lost, because the
    broker ended while it ran. 5: not over in time.
    """
    job = _over(broker, job_id, timeout)
    if job["ended"] is None:
        fail(f"job {job_id} is not over after {timeout:g} s: it is {job['state']}", NOT_YET)
    with (
        broker.connected() as connection,
        connection.send(
            "GET",
            f"{path_of(job_id)}/result",
            timeout=ANSWER_S,
            stream=True,
            allow_redirects=False,
        ) as answer,
    ):
        if include:
            click.echo(_head(answer), err=True)
        if job["state"] != "done":
            _tell_failure(connection, job, answer)
        kind = answer.headers.get("Content-Type", "")
        if output != "-":
            size = _write(Path(output), connection.pieces(answer))
            if sys.stderr.isatty():
                click.echo(f"{output}: {size} bytes, {visible(kind) or 'of no type'}", err=True)
            return
        stdout = sys.stdout.buffer
        if stdout.isatty() and not _is_text(kind):
            fail(f"it is {visible(kind) or 'of no type'}, and no text: -o FILE writes it", 2)
        for piece in connection.pieces(answer):
            stdout.write(piece)
        stdout.flush()


def _over(broker: BrokerClient, job_id: str, timeout: float) -> Any:
    """The job, once it is over or the time is; shown meanwhile, on a terminal."""
    until = time.monotonic() + timeout
    if not sys.stderr.isatty():
        return awaited(broker, job_id, until)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from gpumanager.cli import jobviews

    console = Console(stderr=True, highlight=False)
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def tell(job: Any) -> None:
            live.update(Text(jobviews.sentence(job, time.time())), refresh=True)

        return awaited(broker, job_id, until, tell=tell)


def _tell_failure(connection: Connection, job: Any, answer: Answer) -> NoReturn:
    """Say what it came to, on stderr, and end."""
    said = b""
    for piece in connection.pieces(answer):
        said += piece
        if len(said) > MOST_SHOWN_BYTES:
            break
    text = said[:MOST_SHOWN_BYTES].decode("utf-8", "replace").rstrip()
    if text:
        click.echo("\n".join(visible(line) for line in text.splitlines()), err=True)
    fail(f"job {job['id']}: {outcome(job)}", EXIT_CODES[job["state"]])


def _head(answer: Answer) -> str:
    lines = [f"{answer.status_code} {answer.reason or ''}".rstrip()]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    return "\n".join(visible(line) for line in lines) + "\n"


def _is_text(kind: str) -> bool:
    """Whether a terminal can show a body of this type."""
    plain = kind.partition(";")[0].strip().lower()
    return plain.startswith("text/") or plain.endswith(("json", "xml", "yaml"))


def _write(path: Path, pieces: Iterator[bytes]) -> int:
    """Put the bytes into a file, whole or not at all, and say how many; a link stays one, and a
    pipe or device is written to. Raises BrokerUnavailable, and ends if it cannot be written."""
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                return sum(file.write(piece) for piece in pieces)
        draft = target.with_name(f".{target.name[:150]}.{uuid.uuid4().hex[:12]}")
        try:
            with draft.open("xb") as file:
                size = sum(file.write(piece) for piece in pieces)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, draft)
            draft.replace(target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        return size
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror or error}")
