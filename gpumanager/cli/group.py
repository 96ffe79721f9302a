"""The group all commands belong to, and what several of them share."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import urlsplit

import click
from pydantic import ValidationError

from gpumanager import __version__
from gpumanager.client import KEY_ENV, BrokerClient, BrokerUnavailable
from gpumanager.config import CONFIG_ENV, Config, config_path_from_env, users_config_path

DEFAULT_URL = "http://127.0.0.1:8770"

config_option = click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False),
    help="The config file; by default the one that GPUMANAGER_CONFIG names, else "
    "config/consumers.yaml, else the one that setup wrote.",
)
"""For a command about a config; its value is for `config_file`."""

_VISIBLE = re.compile(r"[!-~]+")


class _Commands(click.Group):
    """The commands. What the system refuses one of them, such as a full disk for its output, is
    told in a sentence."""

    def main(self, *arguments: Any, **more: Any) -> Any:
        try:
            return super().main(*arguments, **more)
        except OSError as error:  # not a pipe whose reader has enough: click ends quietly there
            fail(f"gpumanager: {error}")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpumanager")
def main() -> None:
    """One URL, one queue and one lock in front of the AI services that share a GPU."""


def listen_address(_context: click.Context, _option: click.Parameter, value: str) -> str:
    """An option's value, if a broker can listen there, on a port that others can know."""
    try:
        if Config(listen=value).port == 0:
            raise click.BadParameter("has port 0, which would be another port at every start")
    except ValidationError:
        message = f"must be HOST:PORT or [IPV6]:PORT, such as 127.0.0.1:8770 (found {value!r})"
        raise click.BadParameter(message) from None
    return value


def config_file(path: str | None) -> str:
    """The config that a command is about: the one it was told, else the one there is. Ends with
    exit code 2 if there is none."""
    if path is not None:
        return path
    found = config_path_from_env(os.environ)
    if not os.environ.get(CONFIG_ENV) and not os.path.exists(found):
        fail(
            f"there is no config, neither {found} here nor {users_config_path(os.environ)}\n"
            f"    to make one: gpumanager setup; to name yours: --config FILE, or {CONFIG_ENV}",
            2,
        )
    return found


def fail(message: str, code: int = 1) -> NoReturn:
    """End with this sentence and this exit code."""
    click.echo(message, err=True)
    sys.exit(code)


def _broker_url(_context: click.Context, _option: click.Parameter, value: str) -> str:
    message = f"must be a URL such as {DEFAULT_URL} (found {value!r})"
    try:
        parts = urlsplit(value)
        host = (parts.hostname or "").encode("idna")
        good = parts.scheme in ("http", "https") and host and parts.port != 0
    except ValueError:  # no number for a port, an open bracket, a name that cannot be one
        good = False
    if not good or parts.query or parts.fragment or parts.username is not None:
        raise click.BadParameter(message)
    return value


def _visible_key(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> str | None:
    if value is not None and not _VISIBLE.fullmatch(value):
        raise click.BadParameter("a key has visible ASCII characters only, no blanks")
    return value


key_option = click.option(
    "--key", envvar=KEY_ENV, callback=_visible_key, help=f"An API key; else {KEY_ENV}."
)
"""For a command that shows a broker a key."""


def asks_broker(command: Callable[..., Any]) -> Callable[..., Any]:
    """For a command that talks to a running broker: it gets a `broker`, from --url and --key. If
    that cannot be asked, or refuses, the command ends with its reason and exit code 1."""

    @click.option(
        "--url",
        envvar="GPUMANAGER_URL",
        default=DEFAULT_URL,
        show_default=True,
        callback=_broker_url,
        help="The broker's URL; else GPUMANAGER_URL.",
    )
    @key_option
    @functools.wraps(command)
    def asking(*, url: str, key: str | None, **more: Any) -> Any:
        try:
            return command(broker=BrokerClient(url, key), **more)
        except BrokerUnavailable as error:
            fail(str(error))
        except (KeyError, TypeError, AttributeError) as error:
            # Another program whose answers are JSON, or a broker of another version.
            fail(
                f"{url} answered in an unexpected way ({error!r}): is it a gpumanager, and of "
                f"version {__version__}?"
            )

    return asking
