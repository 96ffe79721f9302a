"""`gpumanager setup`: from a box with AI servers to a running broker."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gpumanager.cli.group import main
from gpumanager.config import Config, ConfigError, parse_config

if TYPE_CHECKING:
    from gpumanager.setup.discovery import Found

START_S = 15.0
PROBES_S = 8.0
"""For the first probe of every consumer."""


@main.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The config to write; by default ~/.config/gpumanager/consumers.yaml.",
)
@click.option("--listen", default="127.0.0.1:8770", show_default=True, help="For a new config.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would be written, and end.")
@click.option("--service/--no-service", default=True, help="Start the broker, now and at login.")
@click.option("--ports", help="Ask these ports only, separated by commas.")
@click.option("--job", "kind", help="Then run a small job of this kind: tts, …")
def setup(
    path: Path | None,
    listen: str,
    yes: bool,
    dry_run: bool,
    service: bool,
    ports: str | None,
    kind: str | None,
) -> None:
    """Find the AI servers on this machine, write a config, and start the broker.

    Shows everything before it does anything, and asks once. Run again, it adds what is new, and
    changes nothing that you have changed.
    """
    from gpumanager.setup.configfile import propose

    path = default_path() if path is None else path.absolute()
    before = path.read_text("utf-8") if path.exists() else ""
    old = _parsed(before, path) if before.strip() else None
    own_port = old.port if old else int(listen.rpartition(":")[2] or 0)
    total_mib, found = _find(ports, own_port)
    try:
        proposal = propose(before, found, listen=listen, total_mib=total_mib)
    except (ConfigError, ValueError) as error:
        _fail(f"{path}: {error}")
    config = parse_config(proposal.after)
    unit = _unit_plan(path, config) if service else None
    for line in proposal.diff(str(path)):
        colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[0]) if line else None
        click.secho(line, fg=colour)
    if not proposal.changed:
        click.echo(f"{path}: nothing to add")
    if unit is not None:
        click.echo(unit.told)
    if dry_run:
        return
    if not yes and (proposal.changed or unit is not None):
        click.confirm("Go ahead?", default=True, abort=True)
    if proposal.changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(proposal.after, "utf-8")
    if unit is not None:
        unit.act()
        _check(config, kind)
    else:
        click.echo(f"start it with: gpumanager serve --config {path}")


def _find(ports: str | None, own_port: int) -> tuple[int | None, list[Found]]:
    """The card's memory in MiB, if it can be measured, and what runs here; says both."""
    from gpumanager.monitoring.memory import GpuUnavailable, open_card
    from gpumanager.setup.discovery import discover

    total_mib, held = None, None
    card = open_card(0)
    try:
        reading = card.read()
        total_mib = reading.total_mib
        click.echo(f"card: {reading.name or 'NVIDIA'}, {total_mib} MiB, {reading.free_mib} free")
        if reading.processes is not None:
            held = {process.pid: process.mib for process in reading.processes}
    except GpuUnavailable as error:
        click.echo(f"card: none to be measured ({error})")
    finally:
        card.close()
    only = None
    if ports is not None:
        try:
            only = [int(port) for port in ports.split(",")]
        except ValueError:
            raise click.UsageError("--ports takes numbers, separated by commas") from None
    found = discover(skip=[own_port], only=only, held_mib=held)
    for each in found:
        runs = f", {each.manager.kind} {each.manager.name}" if each.manager else ""
        holds = "" if each.mib is None else f", holds {each.mib} MiB"
        click.echo(f"found: {each.service.service} on port {each.port}{runs}{holds}")
    if not found:
        click.echo("found: no AI server; start them, and run this again")
    return total_mib, found


class _UnitPlan:
    """How the broker will be started: what to tell first, and then what to do."""

    def __init__(self, told: str, act: Callable[[], None]) -> None:
        self.told = told
        self.act = act


def _unit_plan(path: Path, config: Config) -> _UnitPlan | None:
    from gpumanager.setup.userservice import ServiceError, UserService, start_in_background

    user = UserService(os.environ)
    if user.available:
        if not user.is_ours():
            return _UnitPlan(f"{user.file} is your own and stays as it is", lambda: None)
        text = user.text(path, config.drain_timeout)
        same = user.file.exists() and user.file.read_text("utf-8") == text
        told = f"{user.file}: {'unchanged; will be restarted' if same else 'will be written'}"

        def install() -> None:
            try:
                user.install(text)
            except ServiceError as error:
                _fail(str(error))

        return _UnitPlan(told + "; the broker runs now and at every login", install)
    log = _state_folder() / "broker.log"
    if _healthy(config):
        told = "the broker runs already; it will be told to reload"
        return _UnitPlan(told, lambda: _reload(config))

    def background() -> None:
        pid = start_in_background(path, log)
        click.echo(f"the broker runs as process {pid}; its log: {log}; end it: gpumanager drain")

    return _UnitPlan(
        "no systemd for this user: the broker will run in the background until the next reboot",
        background,
    )


def _check(config: Config, kind: str | None) -> None:
    """The broker answers, and each consumer its probe; then a job, if one is wanted."""
    if not _until(lambda: _healthy(config), START_S):
        _fail("the broker did not start; see its log (journalctl --user -u gpumanager)")
    status: Mapping[str, Any] = {}

    def probed() -> bool:
        nonlocal status
        status = _client(config).get("/v1/status")
        return all(
            each["probed"]
            or ((own := config.consumers[each["name"]]).health is None and own.probe is None)
            for each in status["consumers"]
        )

    _until(probed, PROBES_S)
    bad = 0
    for each in status["consumers"]:
        well = each["healthy"] or not each["probed"]
        bad += not well
        how = "well" if each["healthy"] else each.get("last_error", "not probed")
        click.secho(f"{each['name']}: {how}", fg="green" if well else "red")
    url = f"http://{config.listen}"
    click.echo(f"the broker answers at {url}; open it in a browser, or: gpumanager top --url {url}")
    if kind is not None:
        _try_job(config, kind)
    if bad:
        sys.exit(1)


def _try_job(config: Config, kind: str) -> None:
    from gpumanager.setup.discovery import known_services

    name = {str(each): name for each, name in config.routing.items()}.get(kind)
    if name is None:
        _fail(f"no consumer is routed for {kind}")
    job = next(
        (each.job for each in known_services() if name.startswith(each.service) and each.job), None
    )
    if job is None:
        _fail(f"setup knows no small job for {name}; send one of your own")
    began = time.monotonic()
    status, content = _client(config).job(kind, job)
    took = time.monotonic() - began
    click.echo(f"a job of {kind}: {status}, {len(content)} bytes in {took:.1f} s")
    if status >= 400:
        _fail(content[:500].decode(errors="replace"))


def _reload(config: Config) -> None:
    from gpumanager.client import BrokerUnavailable

    try:
        told = _client(config).post("/v1/reload")
    except BrokerUnavailable as error:
        _fail(str(error))
    click.echo(f"reloaded: {json.dumps(told)}")


def _healthy(config: Config) -> bool:
    from gpumanager.client import BrokerUnavailable

    try:
        return bool(_client(config).get("/healthz")["status"] == "ok")
    except (BrokerUnavailable, TypeError, KeyError):
        return False


def _client(config: Config) -> Any:
    from gpumanager.client import KEY_ENV, BrokerClient

    return BrokerClient(f"http://{config.listen}", os.environ.get(KEY_ENV))


def _until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def default_path() -> Path:
    """Where setup writes the config, if nothing else is said."""
    home = Path(os.environ.get("HOME", "/"))
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else home / ".config") / "gpumanager" / "consumers.yaml"


def _state_folder() -> Path:
    home = Path(os.environ.get("HOME", "/"))
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else home / ".local" / "state") / "gpumanager"


def _parsed(text: str, path: Path) -> Config:
    try:
        return parse_config(text, str(path))
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(2)


def _fail(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(1)
