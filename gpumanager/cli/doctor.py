"""`gpumanager doctor`: what is wrong with this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from gpumanager.cli.group import config_file, config_option, key_option, main
from gpumanager.config import CONFIG_ENV, Config, ConfigError, load_config
from gpumanager.keys import KeysError, load_keys

if TYPE_CHECKING:
    from gpumanager.setup.diagnosis import Finding

_SIGNS = {"good": ("✓", "green"), "warning": ("!", "yellow"), "bad": ("✗", "red")}


@main.command()
@config_option
@key_option
def doctor(path: str | None, key: str | None) -> None:
    """Say what is wrong with this machine: the driver, other brokers, open ports, consumers that do
    not release memory. Without --config it checks the running broker. Exit code 1 if anything is
    bad."""
    file = config_file(path)
    try:
        config = load_config(file)
        if path is None and (other := _of_running_broker(config, file, key)) is not None:
            file, config = other, load_config(other)
        keys = len(load_keys(os.environ, config.auth.keys_file))
    except (ConfigError, KeysError) as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    click.echo(f"config: {file}")
    levels = set()
    for finding in _findings(config, file, keys, key):
        sign, colour = _SIGNS[finding.level]
        click.secho(f"{sign} {finding.what}", fg=colour)
        if finding.remedy:
            click.echo(f"    → {finding.remedy}")
        levels.add(finding.level)
    sys.exit(1 if "bad" in levels else 0)


def _of_running_broker(config: Config, file: str, key: str | None) -> str | None:
    """The config that the broker at this config's address was started from, where that is another
    one: nobody has said which is meant, and that one is in use."""
    from gpumanager.setup.brokers import RunningBroker, occupant

    if os.environ.get(CONFIG_ENV):
        return None
    there = occupant(config, key)
    if not isinstance(there, RunningBroker) or there.config_file is None or there.serves(file):
        return None
    return there.config_file if os.path.exists(there.config_file) else None


def _findings(config: Config, file: str, keys: int, key: str | None) -> Iterator[Finding]:
    from gpumanager.clock import SystemClock
    from gpumanager.gpu.attribution import Attributor
    from gpumanager.gpu.containers import ContainedConsumers
    from gpumanager.gpu.device import GpuMemory, GpuUnavailable, open_card
    from gpumanager.host.processes import ConsumerProcesses, SystemProcesses
    from gpumanager.setup import diagnosis
    from gpumanager.setup.brokers import occupant, running

    processes, clock = SystemProcesses(), SystemClock()
    consumers = ConsumerProcesses(config, processes)
    contained = ContainedConsumers(config, consumers, processes)
    attributor = Attributor(consumers, contained, processes, clock)
    memory = GpuMemory(open_card(config.gpu.device), clock, attributor)
    try:
        yield from diagnosis.card(memory.read(), "", config.gpu.reserved_mib)
    except GpuUnavailable as error:
        yield from diagnosis.card(None, str(error))
    finally:
        memory.close()
    yield from diagnosis.brokers(running(processes, config.port, key))
    yield from diagnosis.exposure(config, keys, processes.listeners())
    yield from diagnosis.own_broker(occupant(config, key, processes), config.listen, file)
    status, events = _ask(config, key, file)
    yield from diagnosis.consumers(config, status)
    yield from diagnosis.unclassified(events)
    yield from diagnosis.releases(events)


def _ask(config: Config, key: str | None, file: str) -> tuple[Any, list[Any]]:
    """The status and the events of the config's broker; nothing if it is not that, or refuses."""
    from gpumanager.client import BrokerClient, BrokerUnavailable
    from gpumanager.setup.brokers import local_url

    broker = BrokerClient(local_url(config), key)
    try:
        status = broker.get("/v1/status")
        own = status.get("config_file")
        if own is None or os.path.realpath(own) != os.path.realpath(file):
            return None, []
        return status, broker.get("/v1/events")["events"]
    except (BrokerUnavailable, AttributeError, KeyError, TypeError):
        return None, []
