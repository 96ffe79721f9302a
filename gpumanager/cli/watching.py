"""Commands that show what is going on: status, queue, top, events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from gpumanager.cli.group import asks_broker, fail, main
from gpumanager.client import BrokerClient, BrokerUnavailable

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the broker's own answer.")


@main.command()
@_JSON
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until interrupted.")
@asks_broker
def status(broker: BrokerClient, as_json: bool, watch: bool) -> None:
    """Show the card, the consumers and the queue, as tables."""
    from gpumanager.cli import views  # rich, which `serve` does without

    def show() -> None:
        found = broker.get("/v1/status")
        if as_json:
            click.echo(json.dumps(found, indent=None if watch else 2))
        else:
            console = views.console()
            console.print(views.status(found, console.width))

    if not watch:
        show()
        return
    for number in every(2.0):
        if number and not as_json and sys.stdout.isatty():
            click.clear()
        show()


@main.command()
@_JSON
@asks_broker
def queue(broker: BrokerClient, as_json: bool) -> None:
    """Show the queue: the running job, then the waiting ones, each with its ticket."""
    from gpumanager.cli import views

    found = broker.get("/v1/queue")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        console = views.console()
        console.print(views.queue(found["queue"], width=console.width))


@main.command()
@click.option("--once", is_flag=True, help="Show it once, and end.")
@click.option("--interval", type=click.FloatRange(0.2, 60), default=1.0, show_default=True)
@asks_broker
def top(broker: BrokerClient, once: bool, interval: float) -> None:
    """Watch the broker live: memory, the running job, the queue, the latest events.

    It fits the terminal, and says how much it cuts off. `q` ends it.
    """
    from rich.live import Live

    from gpumanager.cli import top as screen
    from gpumanager.cli import views

    console, events = views.console(), screen.LatestEvents(broker)
    live_terminal = console.is_terminal and not once

    def picture() -> Any:
        try:
            latest = events.look()
            found = broker.get("/v1/status")
            return screen.picture(found, latest, broker.url, console, fit=live_terminal)
        except BrokerUnavailable as error:
            if once:
                raise
            return views.gone(str(error))

    if once:
        console.print(picture())
        return
    with (
        suppress(KeyboardInterrupt),
        screen.keys() as keys,
        Live(picture(), console=console, screen=True, auto_refresh=False) as live,
    ):
        while not keys.ended(interval):
            live.update(picture(), refresh=True)


@main.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with new events, until interrupted.")
@click.option(
    "--since", type=click.IntRange(min=0), default=0, help="Only events after this number."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a trace for chrome://tracing or ui.perfetto.dev to this file instead.",
)
@asks_broker
def events(
    broker: BrokerClient, follow: bool, since: int, as_json: bool, trace: Path | None
) -> None:
    """Show what has happened: jobs, evictions, loads, refusals, consumers that went down."""
    from gpumanager.cli import views

    if trace is not None:
        found = broker.get("/v1/trace")
        try:
            trace.write_text(json.dumps(found), encoding="utf-8")
        except OSError as error:
            fail(f"{trace} cannot be written: {error.strerror or error}")
        click.echo(f"{trace}: {len(found['traceEvents'])} entries")
        return
    for event in _stream(lambda number: broker.get("/v1/events", since=number), since, follow):
        click.echo(json.dumps(event) if as_json else views.event_line(event))


def _stream(
    ask: Callable[[int], dict[str, Any]], since: int, follow: bool
) -> Iterator[dict[str, Any]]:
    """Events in their order, each once; with `follow` also those to come, through restarts of
    the broker."""
    boot = None
    for _ in every(1.0):
        try:
            found = ask(since)
        except BrokerUnavailable as error:
            if not follow or boot is None or error.status:
                raise
            continue  # it may come back
        if boot not in (None, found["boot"]):
            found = ask(0)
        boot = found["boot"]
        if found["missed"]:
            yield {"event": "missed", "count": found["missed"]}
        yield from found["events"]
        more = found["last"] > since and len(found["events"]) > 0
        since = found["last"]
        if not follow and not more:
            return


def every(seconds: float) -> Iterator[int]:
    """0, 1, 2, … one each so many seconds, until interrupted."""
    number = 0
    try:
        while True:
            yield number
            number += 1
            time.sleep(seconds)
    except KeyboardInterrupt:
        return
