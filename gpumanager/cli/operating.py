"""Commands that ask a running broker to do something, or what it would do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import click

from gpumanager.cli.group import asks_broker, main
from gpumanager.cli.words import named
from gpumanager.client import BrokerClient

_MODEL = click.option(
    "--model", metavar="NAME", help="Only this model of it, where it tells its models apart."
)

_TICKET = re.compile(r"[0-9]{1,18}")
"""An asynchronous job's id is longer."""


@main.command()
@click.argument("kind")
@click.option("--model", metavar="NAME", help="The model that the job names.")
@click.option(
    "--context", type=click.IntRange(1), help="The context length that it asks for, in tokens."
)
@click.option("--json", "as_json", is_flag=True, help="The broker's own answer.")
@asks_broker
def plan(
    broker: BrokerClient, kind: str, model: str | None, context: int | None, as_json: bool
) -> None:
    """Say whether a job of KIND would fit now, and what would be unloaded for it.

    Changes nothing. Exit code 0 if the job could run, 1 if not.
    """
    tokens = {} if context is None else {"context": context}
    answer = broker.get(f"/v1/plan/{quote(kind, safe='')}", **_query(model), **tokens)
    click.echo(json.dumps(answer, indent=2) if as_json else plan_text(answer))
    sys.exit(0 if answer["fits"] else 1)


def plan_text(answer: Mapping[str, Any]) -> str:
    """The answer of `/v1/plan/{kind}` for a person to read."""
    name, needed, held = _who(answer), answer["needed_mib"], answer["held_mib"]
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
        names = [_who(victim) for victim in answer["victims"]]
        wide = max(16, *(len(name) for name in names if len(name) <= 40), 0)
        lines += [
            f"  {name:<{wide}} {victim['mib']:>7} MiB  {victim['why']}"
            for name, victim in zip(names, answer["victims"], strict=True)
        ]
    times = answer["estimate_ms"]
    parts = [f"{what} {times[what] / 1000:.1f} s" for what in ("wait", "evict", "load", "run")]
    lines.append(f"estimated: {', '.join(parts)}")
    if answer["overdue"]:
        lines.append("the running job takes far longer than usual, so this is a guess")
    return "\n".join(lines)


def _who(answer: Mapping[str, Any]) -> str:
    """A consumer, or the model of it, that the broker tells of."""
    return named(answer["consumer"], answer.get("model"))


def _query(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}


@main.command()
@click.argument("names", metavar="TICKET|ID...", nargs=-1, required=True)
@asks_broker
def cancel(broker: BrokerClient, names: tuple[str, ...]) -> None:
    """Take jobs out of the queue, or stop them: by the TICKET that `queue` shows, or the ID that
    `jobs` does. Exit code 1 if one of them was over already."""
    late = False
    for name in names:
        if _TICKET.fullmatch(name):
            broker.delete(f"/v1/queue/{name}")
            click.echo(f"ticket {name} is cancelled")
            continue
        state = broker.delete(f"/v1/jobs/{quote(name, safe='')}")["state"]
        if state in ("done", "failed", "lost"):
            late = True
            click.echo(f"job {name} is over already: {state}")
        else:
            what = "is cancelled" if state == "cancelled" else "is being cancelled"
            click.echo(f"job {name} {what}")
    sys.exit(1 if late else 0)


@main.command()
@click.argument("consumer")
@_MODEL
@asks_broker
def load(broker: BrokerClient, consumer: str, model: str | None) -> None:
    """Make room for a CONSUMER and load it. Waits in the queue like a job."""
    answer = broker.post(f"/v1/consumers/{quote(consumer, safe='')}/load", **_query(model))
    click.echo(f"{named(consumer, model)} is loaded ({answer['ms'] / 1000:.1f} s)")


@main.command()
@click.argument("consumer")
@_MODEL
@asks_broker
def unload(broker: BrokerClient, consumer: str, model: str | None) -> None:
    """Unload a CONSUMER. Waits in the queue like a job. Exit code 1 if no memory was released."""
    answer = broker.post(f"/v1/consumers/{quote(consumer, safe='')}/unload", **_query(model))
    text = f"{named(consumer, model)}: {answer['outcome']}, {answer['mib']} MiB"
    text += f" in {answer['ms'] / 1000:.1f} s"
    click.echo(text + (f", taken by {answer['taken_by']}" if "taken_by" in answer else ""))
    sys.exit(1 if answer["outcome"] in ("leaked", "busy") else 0)


@main.command()
@click.argument("consumer")
@_MODEL
@asks_broker
def pin(broker: BrokerClient, consumer: str, model: str | None) -> None:
    """Never evict a CONSUMER, until it is unpinned or the broker ends."""
    broker.post(f"/v1/consumers/{quote(consumer, safe='')}/pin", **_query(model))
    click.echo(f"{named(consumer, model)} is pinned: it is not evicted")


@main.command()
@click.argument("consumer")
@_MODEL
@asks_broker
def unpin(broker: BrokerClient, consumer: str, model: str | None) -> None:
    """Let a CONSUMER be evicted again, whatever the config says."""
    broker.delete(f"/v1/consumers/{quote(consumer, safe='')}/pin", **_query(model))
    click.echo(f"{named(consumer, model)} is unpinned: it may be evicted")


@main.command()
@click.argument("consumer")
@_MODEL
@asks_broker
def forget(broker: BrokerClient, consumer: str, model: str | None) -> None:
    """Forget what was learned of a CONSUMER: its memory and times. They are learned again."""
    answer = broker.delete(f"/v1/consumers/{quote(consumer, safe='')}/learned", **_query(model))
    needed = answer["needed"]["mib"]
    click.echo(f"{named(consumer, model)}: forgotten; room is made for {needed} MiB from now on")


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
