"""The group all commands belong to, and what several of them share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click
from pydantic import ValidationError

from gpumanager import __version__
from gpumanager.client import KEY_ENV, BrokerClient, BrokerUnavailable
from gpumanager.config import Config

DEFAULT_URL = "http://127.0.0.1:8770"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpumanager")
def main() -> None:
    """One URL, one queue and one lock in front of the AI services that share a GPU."""


def listen_address(_context: click.Context, _option: click.Parameter, value: str) -> str:
    """An option's value, if a broker can listen there, on a port that others can know."""
    try:
        if Config(listen=value).port == 0:
            raise click.BadParameter("names port 0, which is another one at every start")
    except ValidationError:
        message = f"must be HOST:PORT or [IPV6]:PORT, such as 127.0.0.1:8770 (found {value!r})"
        raise click.BadParameter(message) from None
    return value


def fail(message: str) -> NoReturn:
    """End with this sentence and exit code 1."""
    click.echo(message, err=True)
    sys.exit(1)


key_option = click.option("--key", envvar=KEY_ENV, help=f"An API key; else {KEY_ENV}.")
"""For a command that shows a broker a key."""


def asks_broker(command: Callable[..., Any]) -> Callable[..., Any]:
    """For a command that talks to a running broker: it gets a `broker`, from --url and --key. If
    that cannot be asked, or refuses, the command ends with its reason and exit code 1."""

    @click.option(
        "--url",
        envvar="GPUMANAGER_URL",
        default=DEFAULT_URL,
        show_default=True,
        help="The broker; else GPUMANAGER_URL.",
    )
    @key_option
    @functools.wraps(command)
    def asking(*, url: str, key: str | None, **more: Any) -> Any:
        try:
            return command(broker=BrokerClient(url, key), **more)
        except BrokerUnavailable as error:
            fail(str(error))

    return asking
