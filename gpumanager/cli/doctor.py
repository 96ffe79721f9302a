"""`gpumanager doctor`: what is wrong with this box."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpumanager.cli.group import key_option, main
from gpumanager.config import (
    Config,
    ConfigError,
    config_path_from_env,
    load_config,
    users_config_path,
)
from gpumanager.keys import KeysError, load_keys

if TYPE_CHECKING:
    from gpumanager.setup.diagnosis import Finding

_SIGNS = {"good": ("✓", "green"), "warning": ("!", "yellow"), "bad": ("✗", "red")}


@main.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False),
    help="The config file; by default the one setup wrote, or that GPUMANAGER_CONFIG names.",
)
@key_option
def doctor(path: str | None, key: str | None) -> None:
    """What is wrong with this box: driver, other brokers, open ports, services that do not
    release. Exit code 1 if anything is bad."""
    file = path or _config_path()
    try:
        config = load_config(file)
        keys = len(load_keys(os.environ, config.auth.keys_file))
    except (ConfigError, KeysError) as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    click.echo(f"config: {file}")
    levels = set()
    for finding in _findings(config, keys, key):
        sign, colour = _SIGNS[finding.level]
        click.secho(f"{sign} {finding.what}", fg=colour)
        if finding.remedy:
            click.echo(f"    → {finding.remedy}")
        levels.add(finding.level)
    sys.exit(1 if "bad" in levels else 0)


def _findings(config: Config, keys: int, key: str | None) -> Iterator[Finding]:
    from gpumanager.clock import SystemClock
    from gpumanager.monitoring.attribution import Attributor
    from gpumanager.monitoring.containers import ContainedConsumers
    from gpumanager.monitoring.memory import GpuMemory, GpuUnavailable, open_card
    from gpumanager.processes import ConsumerProcesses, SystemProcesses
    from gpumanager.setup import diagnosis

    processes, clock = SystemProcesses(), SystemClock()
    consumers = ConsumerProcesses(config, processes)
    contained = ContainedConsumers(config, consumers, processes)
    attributor = Attributor(consumers, contained, processes, clock)
    memory = GpuMemory(open_card(config.gpu.device), clock, attributor)
    try:
        yield from diagnosis.card(memory.read(), "")
    except GpuUnavailable as error:
        yield from diagnosis.card(None, str(error))
    finally:
        memory.close()
    yield from diagnosis.brokers(processes.commands(), config.port)
    yield from diagnosis.exposure(config, keys, processes.listeners())
    status, events = _ask(config, key)
    if status is None:
        yield diagnosis.Finding(
            "bad",
            f"no broker answers at {config.listen}",
            "start it: gpumanager serve, or gpumanager setup",
        )
    yield from diagnosis.consumers(config, status)
    yield from diagnosis.releases(events)


def _ask(config: Config, key: str | None) -> tuple[Any, list[Any]]:
    from gpumanager.client import BrokerClient, BrokerUnavailable

    broker = BrokerClient(f"http://{config.listen}", key)
    try:
        return broker.get("/v1/status"), broker.get("/v1/events")["events"]
    except BrokerUnavailable:
        return None, []


def _config_path() -> str:
    named = config_path_from_env(os.environ)
    made = users_config_path(os.environ)
    return str(made) if not Path(named).exists() and made.exists() else named
