"""`gpumanager connect`: what clients need to use the broker."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

import click

from gpumanager.cli.group import asks_broker, fail, main
from gpumanager.client import BrokerClient

if TYPE_CHECKING:
    from gpumanager.setup.clients import Client, Settings
    from gpumanager.setup.connections import Offered


@main.command()
@click.argument("client", required=False)
@click.option("--model", help="The model to use; by default the first that the broker lists.")
@click.option("--write", is_flag=True, help="Set it in the client's config file; a backup is kept.")
@click.option("--show-key", is_flag=True, help="Print the key that you gave with --key, too.")
@asks_broker
def connect(
    broker: BrokerClient, client: str | None, model: str | None, write: bool, show_key: bool
) -> None:
    """Say what a CLIENT needs to use the running broker, or set it.

    Without CLIENT, lists the clients that it knows. Settings go to stdout, what to know beside
    them to stderr. With --write it changes nothing else in the client's file.
    """
    from gpumanager.setup.clients import CLIENTS
    from gpumanager.setup.connections import offered

    known = {each.name: each for each in CLIENTS}
    if client is not None and client not in known:
        raise click.BadParameter(
            f"is none of {', '.join(known)} (found {client!r}); another program needs the base "
            f"URL {broker.url}/v1 (OpenAI) or {broker.url} (Anthropic, Ollama)",
            param_hint="CLIENT",
        )
    if write and (client is None or show_key):
        raise click.UsageError(
            "--write needs a CLIENT" if client is None else "--write puts no key into a file"
        )
    offer = offered(broker)
    if client is None:
        _list(offer, CLIENTS)
        return
    if show_key:
        offer = replace(offer, shown_key=broker.key)
    chosen = known[client]
    settings = chosen.settings(offer, model, os.environ)
    if not chosen.works_with(offer):
        message = f"no consumer of {broker.url} serves {' or '.join(chosen.needs)}"
        fail(f"{chosen.title} cannot use it: {message}")
    if write:
        _write(chosen, settings)
    else:
        click.echo(settings.text, nl=False)
        click.echo(f"\n{chosen.title}: {settings.where}", err=True)
    for note in settings.notes:
        click.echo(f"- {note}", err=True)


def _list(offer: Offered, clients: tuple[Client, ...]) -> None:
    keys = "wants a key" if offer.needs_key else "no keys"
    click.echo(f"{offer.url} ({keys})")
    kinds = sorted({kind for _, its in offer.models for kind in its})
    for kind in kinds:
        click.echo(f"  {kind}: {', '.join(offer.named(kind))}")
    click.echo()
    for client in clients:
        file = client.settings(offer, None, os.environ).file
        means = f"gpumanager connect {client.name}{' [--write]' if file else ''}"
        missing = "" if client.works_with(offer) else f"  no consumer serves {client.needs[0]}"
        click.echo(f"{client.title:<15} {means}{missing}")


def _write(client: Client, settings: Settings) -> None:
    from gpumanager.setup.merging import CannotMerge, read, write

    if settings.file is None or settings.merged is None:
        click.echo(settings.text, nl=False)
        fail(f"{client.title} has no file to write: set the above in {settings.where}")
    try:
        before = read(settings.file)
        after = settings.merged(before)
    except CannotMerge as error:
        fail(f"{settings.file} {error}; nothing was written. To set by hand:\n\n{settings.text}")
    if after == before:
        click.echo(f"{settings.file}: nothing to change")
        return
    backup = write(settings.file, after, datetime.now())
    # Not the difference itself: the lines beside it may be keys of other servers.
    told = f"; as it was: {backup}; to compare: diff {backup} {settings.file}" if backup else ""
    click.echo(f"{settings.file} is written{told}")
