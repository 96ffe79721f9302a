"""Commands that ask a running broker to do something, or what it would do."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import click

from gpumanager.cli.group import asks_broker, main
from gpumanager.client import BrokerClient


@main.command()
@click.argument("kind")
@click.option("--json", "as_json", is_flag=True, help="The broker's own answer.")
@asks_broker
def plan(broker: BrokerClient, kind: str, as_json: bool) -> None:
    """Say whether a job of KIND would fit now, and what would be unloaded for it.

    Changes nothing. Exit code 0 if the job could run, 1 if not.
    """
    answer = broker.get(f"/v1/plan/{kind}")
    click.echo(json.dumps(answer, indent=2) if as_json else plan_text(answer))
    sys.exit(0 if answer["fits"] else 1)


def plan_text(answer: Mapping[str, Any]) -> str:
    """The answer of `/v1/plan/{kind}` for a person to read."""
    name, needed, held = answer["consumer"], answer["needed_mib"], answer["held_mib"]
    lines = [f"{name} needs {needed} MiB and holds {held}; {answer['free_mib']} MiB are free, "]
    lines[0] += f"{answer['reserved_mib']} of them reserved ({answer['source']})"
    if not answer["fits"]:
        lines.append(
            f"does not fit: {answer['short_mib']} MiB short, even if all others are unloaded that "
            "may be"
        )
    elif answer["fits_now"]:
        lines.append("fits as it is")
    else:
        trims = any(victim.get("method") == "trim" for victim in answer["victims"])  # a newer key
        lines.append("fits after trimming:" if trims else "fits after unloading:")
        lines += [
            f"  {victim['consumer']:<16} {victim['mib']:>7} MiB  {victim['why']}"
            for victim in answer["victims"]
        ]
    times = answer["estimate_ms"]
    parts = [f"{what} {times[what] / 1000:.1f} s" for what in ("wait", "evict", "load", "run")]
    lines.append(f"estimated: {', '.join(parts)}")
    if answer["overdue"]:
        lines.append("the running job takes far longer than usual, so this is a guess")
    return "\n".join(lines)


@main.command()
@click.argument("ticket", type=click.IntRange(min=0))
@asks_broker
def cancel(broker: BrokerClient, ticket: int) -> None:
    """Take the job with this TICKET out of the queue, or stop it. `queue` shows the tickets."""
    broker.delete(f"/v1/queue/{ticket}")
    click.echo(f"ticket {ticket} is cancelled")


@main.command()
@click.argument("consumer")
@asks_broker
def load(broker: BrokerClient, consumer: str) -> None:
    """Make room for a CONSUMER and load it. Waits in the queue like a job."""
    answer = broker.post(f"/v1/consumers/{quote(consumer, safe='')}/load")
    click.echo(f"{consumer} is loaded ({answer['ms'] / 1000:.1f} s)")


@main.command()
@click.argument("consumer")
@asks_broker
def unload(broker: BrokerClient, consumer: str) -> None:
    """Unload a CONSUMER. Waits in the queue like a job. Exit code 1 if no memory was released."""
    answer = broker.post(f"/v1/consumers/{quote(consumer, safe='')}/unload")
    text = f"{consumer}: {answer['outcome']}, {answer['mib']} MiB in {answer['ms'] / 1000:.1f} s"
    click.echo(text + (f", taken by {answer['taken_by']}" if "taken_by" in answer else ""))
    sys.exit(1 if answer["outcome"] in ("leaked", "busy") else 0)


@main.command()
@click.argument("consumer")
@asks_broker
def forget(broker: BrokerClient, consumer: str) -> None:
    """Forget what was learned of a CONSUMER: its memory and times. They are learned again."""
    answer = broker.delete(f"/v1/consumers/{quote(consumer, safe='')}/learned")
    click.echo(f"{consumer}: forgotten; room is made for {answer['needed']['mib']} MiB from now on")


@main.command()
@asks_broker
def drain(broker: BrokerClient) -> None:
    """Tell the broker to refuse new jobs, finish the running one, and end."""
    boot = broker.get("/v1/events", limit=0)["boot"]
    broker.post(f"/v1/drain?boot={boot}")
    click.echo(f"{broker.url} drains")


@main.command()
@asks_broker
def reload(broker: BrokerClient) -> None:
    """Tell the broker to read its config again, and apply what changed. The queue stays."""
    answer = broker.post("/v1/reload")
    told = [f"{what} {', '.join(names)}" for what, names in answer.items() if names]
    click.echo("; ".join(told) or "nothing changed")
