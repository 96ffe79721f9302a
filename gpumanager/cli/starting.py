"""How `gpumanager setup` runs the broker: as a systemd user unit, or in the background; and which
program it finds at the broker's address."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gpumanager.cli.group import fail
from gpumanager.config import Config, users_config_path
from gpumanager.folders import state_folder

if TYPE_CHECKING:
    from gpumanager.client import BrokerClient
    from gpumanager.setup.brokers import RunningBroker, Stranger


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Start:
    """What is going to be done. `told` says it beforehand; `act` does it; afterwards `runs` says
    whether the config's broker should answer, and `then` what is left to do, if anything is.
    `log` is how to see what the broker says, `has_ended` whether it has given up already."""

    told: str
    act: Callable[[], None] = _nothing
    runs: bool = True
    then: str = ""
    log: str = "journalctl --user -u gpumanager"
    has_ended: Callable[[], bool] = lambda: False


def plan(path: Path, config: Config) -> Start:
    """How the broker of the config at `path` will be started. Does nothing yet."""
    from gpumanager.setup.brokers import RunningBroker, occupant
    from gpumanager.setup.userservice import UserService

    there = occupant(config, key())
    user = UserService(os.environ)
    has_unit = user.available
    if has_unit and not user.is_ours():
        return _own_unit(str(user.file), there, path, config)
    if there is None or (_may_be_ours(there, path) and has_unit and user.active):
        return _with_unit(user, path, config) if has_unit else _in_background(path, config)
    if isinstance(there, RunningBroker) and _may_be_ours(there, path):
        told = "the broker runs already; setup will tell it to reload"
        return Start(told, lambda: _reload(config, path))
    return _stepped_around(there, path, config)


def _may_be_ours(there: RunningBroker | Stranger | None, path: Path) -> bool:
    """Whether it is the config's broker, or one that did not tell."""
    from gpumanager.setup.brokers import RunningBroker

    return isinstance(there, RunningBroker) and (not there.told or there.serves(path))


def _stepped_around(there: RunningBroker | Stranger, path: Path, config: Config) -> Start:
    """Somebody else listens there, and is left alone."""
    from gpumanager.setup.brokers import RunningBroker

    if isinstance(there, RunningBroker):
        which = "it was started from another file"
        if there.config_file is None:
            which = "it was started without a config file, and cannot load this one"
        end = f"end it (Ctrl-C where it was started, or: {_command('drain', config)})"
    else:
        which, end = "the broker cannot listen there", "end it"
    told = (
        f"{config.listen} is taken by {there}: {which}. Setup leaves it alone and starts no broker"
    )
    then = (
        f"{end}, then run: gpumanager setup"
        f"{_option(path)}\n    or set another `listen` in {path}, and run the same"
    )
    return Start(told, runs=False, then=then)


def _own_unit(
    file: str, there: RunningBroker | Stranger | None, path: Path, config: Config
) -> Start:
    """The user has a unit of that name, which setup did not write."""
    from gpumanager.setup.brokers import RunningBroker

    told = f"{file} is your own and stays as it is"
    if isinstance(there, RunningBroker) and there.serves(path):
        return Start(
            f"{told}; the running broker will be told to reload", lambda: _reload(config, path)
        )
    then = f"have your unit run: gpumanager serve --config {path}"
    return Start(told, runs=False, then=f"{then}\n    and: systemctl --user restart gpumanager")


def _with_unit(user: Any, path: Path, config: Config) -> Start:
    from gpumanager.setup.systemd import ServiceError

    text = user.text(path, config.drain_timeout)
    how = "unchanged; will be restarted" if user.has(text) else "will be written"

    def install() -> None:
        try:
            user.install(text)
        except ServiceError as error:
            fail(
                f"{error}\n    to run the broker without systemd: gpumanager serve --config {path}"
            )

    return Start(f"{user.file}: {how}; the broker runs now and at every login", install)


def _in_background(path: Path, config: Config) -> Start:
    from gpumanager.setup.userservice import start_in_background

    log = state_folder(os.environ) / "broker.log"
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        try:
            process = start_in_background(path, log)
        except OSError as error:
            fail(
                f"the broker cannot be started in the background: {error}\n"
                f"    start it yourself: gpumanager serve --config {path}"
            )
        started.append(process)
        click.echo(
            f"the broker runs as process {process.pid}; its log: {log}; "
            f"end it: {_command('drain', config)}"
        )

    def has_ended() -> bool:
        return any(process.poll() is not None for process in started)

    told = "this user has no systemd: the broker will run in the background until the next reboot"
    return Start(told, start, log=f"tail {log}", has_ended=has_ended)


def _reload(config: Config, path: Path) -> None:
    from gpumanager.client import BrokerUnavailable

    try:
        told = client(config).post("/v1/reload")
    except BrokerUnavailable as error:
        _not_reloaded(str(error), config, path)
    click.echo(f"reloaded: {json.dumps(told)}")


def _not_reloaded(reason: str, config: Config, path: Path) -> NoReturn:
    fail(
        f"the running broker did not take {path}: {reason}\n"
        f"    after you have corrected that: {_command('reload', config)}\n"
        f"    or restart it: {_command('drain', config)}, then gpumanager setup{_option(path)}"
    )


def again(path: Path) -> str:
    """What goes on with a setup that was not finished."""
    return f"gpumanager setup{_option(path)}"


def client(config: Config) -> BrokerClient:
    """For asking the config's broker."""
    from gpumanager.client import BrokerClient
    from gpumanager.setup.brokers import local_url

    return BrokerClient(local_url(config), key())


def key() -> str | None:
    """The key that a client's environment names."""
    from gpumanager.client import KEY_ENV

    return os.environ.get(KEY_ENV)


def _command(word: str, config: Config) -> str:
    from gpumanager.cli.group import DEFAULT_URL
    from gpumanager.setup.brokers import local_url

    url = local_url(config)
    return f"gpumanager {word}" + ("" if url == DEFAULT_URL else f" --url {url}")


def _option(path: Path) -> str:
    return "" if path == users_config_path(os.environ) else f" --config {path}"
