"""`gpumanager setup`: from a machine with AI servers to a running broker."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import click

from gpumanager.cli import starting, taking
from gpumanager.cli.group import fail, listen_address, main
from gpumanager.config import (
    Config,
    ConfigError,
    parse_config,
    read_config_file,
    users_config_path,
)

if TYPE_CHECKING:
    from gpumanager.model import MemoryReading
    from gpumanager.setup.configfile import Figures, Proposal
    from gpumanager.setup.discovery import Found
    from gpumanager.setup.taking import Place

MOST_UNKNOWN = 12
"""Listeners that are named."""

START_S = 15.0
PROBES_S = 8.0
"""For the first probe of every consumer."""


def _port_list(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> Sequence[int] | None:
    if value is None:
        return None
    try:
        ports = [int(port) for port in value.split(",")]
    except ValueError:
        ports = []
    if not ports or not all(0 < port < 65536 for port in ports):
        message = f"takes ports of 1 to 65535, separated by commas (found {value!r})"
        raise click.BadParameter(message)
    return ports


def _needs(
    _context: click.Context, _option: click.Parameter, values: Sequence[str]
) -> Mapping[str, int]:
    found = {}
    for value in values:
        name, _, mib = value.partition("=")
        if not name or not mib.isascii() or not mib.isdigit():
            message = f"takes NAME=MIB, such as ollama=9000 (found {value!r})"
            raise click.BadParameter(message)
        found[name] = int(mib)
    return found


@main.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The config to write; by default ~/.config/gpumanager/consumers.yaml.",
)
@click.option(
    "--listen",
    default="127.0.0.1:8770",
    show_default=True,
    callback=listen_address,
    help="HOST:PORT, for a new config.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would be written, and end.")
@click.option("--service/--no-service", default=True, help="Start the broker, now and at login.")
@click.option("--ports", callback=_port_list, help="Look at these ports only, separated by commas.")
@click.option("--job", "kind", help="At the end, run a small job of this kind: tts, …")
@click.option(
    "--total-mib",
    type=click.IntRange(min=1),
    help="The card's memory, for a new config without a driver; else you are asked.",
)
@click.option(
    "--vram",
    "needs_mib",
    metavar="NAME=MIB",
    multiple=True,
    callback=_needs,
    help="What a new consumer's largest model needs, without a driver; else you are asked.",
)
@click.option(
    "--take-ports/--no-take-ports",
    default=None,
    help="Listen where clients expect the servers, which move aside; else you are asked.",
)
def setup(
    path: Path | None,
    listen: str,
    yes: bool,
    dry_run: bool,
    service: bool,
    ports: Sequence[int] | None,
    kind: str | None,
    total_mib: int | None,
    needs_mib: Mapping[str, int],
    take_ports: bool | None,
) -> None:
    """Find the AI servers on this machine, write a config, and start the broker.

    Shows everything before it does anything, and asks once. Run again, it adds what is new, and
    changes nothing that you have changed.
    """
    from gpumanager.setup.configfile import CannotAdd, Figures, propose
    from gpumanager.setup.taking import taken

    path = users_config_path(os.environ) if path is None else path.absolute()
    before, old = _there(path)
    reading, found = _find(ports, old or Config(listen=listen))
    measured_mib = None if reading is None else reading.total_mib
    of_host = reading is not None and reading.memory == "host"
    figures = Figures(total_mib or 0, needs_mib)

    def proposed(places: Sequence[Place] = ()) -> Proposal:
        try:
            plain = propose(
                before,
                found,
                listen=listen,
                total_mib=measured_mib,
                of_host=of_host,
                figures=figures,
            )
            return taken(plain, places)
        except CannotAdd as error:
            click.echo(error.by_hand)
            fail(f"{path}: {error}; add by hand what stands above, then: gpumanager reload")
        except ConfigError as error:
            fail(f"{path}: {error}")

    proposal = proposed()
    if unknown := set(needs_mib) - set(proposal.added):
        fail(f"--vram: no new consumer is called {', '.join(sorted(unknown))}")
    asks = taking.may_ask(yes=yes, dry_run=dry_run)
    if measured_mib is None and asks:
        figures = _asked_figures(proposal, figures)
        proposal = proposed()
    places = taking.chosen(proposal, found, take_ports, ask=asks)
    proposal = proposed(places)
    config = proposal.config
    start = starting.plan(path, config) if service else None
    for line in proposal.diff(str(path)):
        colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[0]) if line else None
        click.secho(line, fg=colour)
    if not proposal.changed:
        click.echo(f"{path}: nothing to add")
    _tell(proposal, path, measured=measured_mib is not None)
    moves = taking.planned(config, found, places)
    if start is not None:
        click.echo(start.told)
    if dry_run:
        return
    if not yes and (proposal.changed or moves or start is not None):
        _ask_once()
    if proposal.changed:
        _written(path, proposal.after)
        click.echo(f"{path} is written")
    # Without a broker in its place a server is better off where its clients find it.
    will_run = start is None or start.runs
    if will_run and not taking.moved(moves):
        again = f"gpumanager serve --config {path}" if start is None else starting.again(path)
        click.echo(f"    then, to start the broker: {again}")
        return
    if start is None:
        click.echo(f"start it with: gpumanager serve --config {path}")
        return
    start.act()
    if start.runs:
        _check(config, kind, start)
    if start.then:
        click.echo(f"next: {start.then}")


def _asked_figures(proposal: Proposal, given: Figures) -> Figures:
    """What cannot be measured, as the user says it, for all that is new."""
    from gpumanager.setup.configfile import Figures

    said = dict(given.needs_mib)
    wanted = [name for name in proposal.added if name not in said and not proposal.new[name].mib]
    total_mib = proposal.config.gpu.total_mib or given.total_mib
    if wanted or not total_mib:
        click.echo("There is no driver, so your answers decide what fits; 0 means: not known.")
    if not total_mib and not proposal.before:
        total_mib = click.prompt("The card's memory in MiB", default=0, type=click.IntRange(min=0))
    most = total_mib - proposal.config.gpu.reserved_mib if total_mib else None
    for name in wanted:
        said[name] = click.prompt(
            f"MiB that the largest model of {name} needs",
            default=0,
            type=click.IntRange(min=0, max=most),
        )
    return Figures(total_mib, said)


def _tell(proposal: Proposal, path: Path, *, measured: bool) -> None:
    """What is to know about a proposal beside its text."""
    for name, where in proposal.routes().items():
        click.echo(f"{name}: {where}")
    for each in proposal.ignored:
        click.echo(
            f"not added: {each.service.service} on port {each.port}, because it is in a comment of "
            f"{path}, or in its setup.ignore"
        )
    config = proposal.config
    missing = [name for name, each in config.consumers.items() if not each.vram_resident_mib]
    parts = ["gpu.total_mib"] if not config.gpu.total_mib else []
    parts += [f"vram_resident_mib of {', '.join(missing)}"] if missing else []
    if config.consumers and parts and not measured:
        click.echo(
            f"without a driver {path} has to have {' and '.join(parts)}; until then jobs take "
            "turns, but nothing is unloaded (for new consumers: --total-mib, --vram NAME=MIB)"
        )


def _ask_once() -> None:
    """Ends with exit code 1 unless the answer is yes."""
    try:
        if click.confirm("Go ahead?", default=True):
            return
    except click.Abort:  # Ctrl-C, or nobody there to ask
        click.echo()
    fail("nothing was written or started; to go ahead without a question: gpumanager setup --yes")


def _there(path: Path) -> tuple[str, Config | None]:
    """What stands in the file already, as text and read; nothing of either without one."""
    try:
        if not path.exists():
            return "", None
        before = read_config_file(path)
        if not before.strip():
            return "", None
        old = parse_config(before, str(path))
        return before.decode("utf-8-sig"), old
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror or error}")


def _find(
    only: Sequence[int] | None, config: Config
) -> tuple[MemoryReading | None, Sequence[Found]]:
    """The card, if it can be measured, and what runs here; says both."""
    from gpumanager.gpu.device import GpuUnavailable, open_card
    from gpumanager.host.processes import SystemProcesses
    from gpumanager.setup.discovery import discover
    from gpumanager.setup.taking import held_by_broker

    reading, held = None, None
    card = open_card(0)
    try:
        reading = card.read()
        size = f"{reading.total_mib} MiB" + (" of the host's" if reading.memory == "host" else "")
        click.echo(f"card: {reading.name or 'NVIDIA'}, {size}, {reading.free_mib} free")
        if reading.processes is not None:
            held = {process.pid: process.mib for process in reading.processes}
    except GpuUnavailable as error:
        click.echo(f"card: cannot be measured ({error})")
    finally:
        card.close()
    skip = {config.port, *config.setup.ignore, *held_by_broker(config, SystemProcesses())}
    seen = discover(skip=skip, only=only, held_mib=held)
    found = seen.servers
    for each in found:
        runs = f", {each.manager.kind} {each.manager.name}" if each.manager else ""
        holds = "" if each.mib is None else f", holds {each.mib} MiB"
        click.echo(f"found: {each.service.service} on port {each.port}{runs}{holds}")
    if not found:
        click.echo("found: no AI server; start your servers, and run this again")
    for unknown in seen.unknown[:MOST_UNKNOWN]:
        click.echo(f"not known: {unknown}; if that is an AI server, add it by hand: docs/config.md")
    if len(seen.unknown) > MOST_UNKNOWN:
        click.echo(f"not known: {len(seen.unknown) - MOST_UNKNOWN} more servers that speak HTTP")
    for port in seen.demos:
        click.echo(f"left alone: the speech server of gpumanager's demo, on port {port}")
    for broker in seen.brokers:
        click.echo(f"left alone: {broker}, on port {broker.port}")
    return reading, found


def _check(config: Config, kind: str | None, start: starting.Start) -> None:
    """The broker answers, and each consumer its probe; then a job, if one is wanted."""
    from gpumanager.client import BrokerUnavailable

    if not _until(lambda: _healthy(config) or start.has_ended(), START_S) or start.has_ended():
        fail(f"the broker did not start; its log: {start.log}")
    try:
        bad = _probed(config)
        url = starting.client(config).url
        click.echo(
            f"the broker answers at {url}; open it in a browser, or: gpumanager top --url {url}\n"
            f"what your clients need to use it: gpumanager connect --url {url}"
        )
        if kind is not None:
            _try_job(config, kind)
    except BrokerUnavailable as error:
        fail(f"the broker runs, but: {error}")
    if bad:
        sys.exit(1)


def _probed(config: Config) -> int:
    """Wait for the first probe of every consumer, and say how each is; the number of those that
    are down. Raises BrokerUnavailable."""
    status: Mapping[str, Any] = {}

    def probed() -> bool:
        nonlocal status
        status = starting.client(config).get("/v1/status")
        return all(
            each["probed"]
            or ((own := config.consumers[each["name"]]).health is None and own.probe is None)
            for each in status["consumers"]
        )

    _until(probed, PROBES_S)
    bad = 0
    for each in status["consumers"]:
        healthy = each["healthy"] or not each["probed"]
        bad += not healthy
        how = "healthy" if each["healthy"] else each.get("last_error", "not probed")
        click.secho(f"{each['name']}: {how}", fg="green" if healthy else "red")
    return bad


def _try_job(config: Config, kind: str) -> None:
    from gpumanager.setup.services import known_services

    name = next(iter(config.candidates(kind)), None)
    if name is None:
        fail(f"no consumer is routed for {kind}")
    job = next(
        (each.job for each in known_services() if name.startswith(each.service) and each.job), None
    )
    if job is None:
        fail(f"setup has no small job for {name}; send one of your own")
    began = time.monotonic()
    status, content = starting.client(config).job(kind, job)
    took = time.monotonic() - began
    click.echo(f"a job of {kind}: {status}, {len(content)} bytes in {took:.1f} s")
    if status >= 400:
        fail(content[:500].decode(errors="replace"))


def _healthy(config: Config) -> bool:
    from gpumanager.client import BrokerUnavailable

    try:
        return bool(starting.client(config).get("/healthz")["status"] == "ok")
    except (BrokerUnavailable, TypeError, KeyError):
        return False


def _until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _written(path: Path, text: str) -> None:
    """Put the text in place of what is there, whole or not at all."""
    target = Path(os.path.realpath(path))  # a link stays one
    elsewhere = "name another place: gpumanager setup --config FILE"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        fail(f"{path} cannot be written, no folder {target.parent}: {reason}\n    {elsewhere}")
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else None
        with NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.chmod(file.name, 0o644 if mode is None else mode)
                os.replace(file.name, target)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror or error}\n    {elsewhere}")
