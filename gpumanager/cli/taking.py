"""How `gpumanager setup` has the broker listen in a server's place: asks, and moves the server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from gpumanager.config import Config

if TYPE_CHECKING:
    from gpumanager.setup.configfile import Proposal
    from gpumanager.setup.discovery import Found
    from gpumanager.setup.moving import Move
    from gpumanager.setup.systemd import Scope, Systemd
    from gpumanager.setup.taking import Place


def chosen(
    proposal: Proposal, found: Sequence[Found], wanted: bool | None, *, ask: bool
) -> list[Place]:
    """The places that the broker takes: all of them if it is `wanted`, those of new consumers that
    the user says yes to if that is None and somebody is there to `ask`."""
    from gpumanager.setup.taking import places

    if wanted is False or (wanted is None and not ask):
        return []
    free = places(proposal, found, all_consumers=wanted is True)
    if wanted:
        return free
    return [
        place
        for place in free
        if click.confirm(
            f"Listen on {place.found.port} in the place of {place.name}, which moves to "
            f"{place.to}, so that its clients need no change?"
        )
    ]


def planned(config: Config, found: Sequence[Found], places: Sequence[Place]) -> list[Move]:
    """How the servers of these places, and those that an earlier run could not move, get out of
    the broker's way; says so."""
    from gpumanager.host.processes import SystemProcesses
    from gpumanager.setup.moving import plan
    from gpumanager.setup.taking import reached_from_outside, unfinished

    table = SystemProcesses()
    listeners = table.listeners()
    mine = {place.found.port for place in places}
    left = [place for place in unfinished(config, found) if place.found.port not in mine]
    moves = []
    for place in (*places, *left):
        move = plan(place.name, place.found, place.to, table, _systemd)
        moves.append(move)
        click.echo(move.told)
        if reached_from_outside(place, config, listeners):
            click.echo(
                f"{place.name}: other machines and containers reach it on {place.found.port} now; "
                f"the broker listens on {config.host} only: for them, set `listen` and keys "
                "(docs/config.md)"
            )
    return moves


def moved(moves: Sequence[Move]) -> bool:
    """Move the servers; whether the broker can listen in the place of all of them. If not, says
    what to type."""
    from gpumanager.setup.moving import listens
    from gpumanager.setup.systemd import ServiceError

    left = []
    for move in moves:
        try:
            if move.act is not None:
                click.echo(f"{move.name}: moves to port {move.to} …")
                move.act()
        except ServiceError as error:
            click.echo(f"{move.name} could not be moved: {error}", err=True)
            left.append(move)  # it comes back where it was, sooner or later
        else:
            if listens(move.port):
                left.append(move)
    for move in left:
        click.echo(f"next: move {move.name} from port {move.port} to port {move.to}:")
        for row in move.by_hand:
            click.echo(f"    {row}")
    return not left


def _systemd(scope: Scope) -> Systemd:
    from gpumanager.setup.systemd import Systemd

    return Systemd(os.environ, scope)


def may_ask(*, yes: bool, dry_run: bool) -> bool:
    """Whether somebody is there to answer."""
    return not (yes or dry_run) and sys.stdin.isatty()
