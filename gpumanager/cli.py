"""The command line. Exit codes: 0 done, 1 failed while running, 2 bad config or usage."""

from __future__ import annotations

import os
import sys

import click

from gpumanager import __version__
from gpumanager.config import Config, ConfigError, config_path_from_env, load_config


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpumanager")
def main() -> None:
    """One URL, one queue and one lock in front of the AI services that share a GPU."""


@main.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False),
    help="The config file; by default the one GPUMANAGER_CONFIG names, else config/consumers.yaml.",
)
def serve(path: str | None) -> None:
    """Serve the broker on the config's `listen` address."""
    config = _load(config_path_from_env(os.environ) if path is None else path)
    from gpumanager.app import serve as serve_config  # `check` needs no server

    sys.exit(serve_config(config))


@main.command()
@click.argument("file", type=click.Path(dir_okay=False))
def check(file: str) -> None:
    """Validate a config FILE: every fault at once, each with its line."""
    config = _load(file)
    click.echo(f"{file}: ok, {len(config.consumers)} consumers, listens on {config.listen}")


@main.command()
@click.option("--listen", default="127.0.0.1:8770", show_default=True, help="HOST:PORT")
def demo(listen: str) -> None:
    """Run the broker in front of a bundled speech service, on a simulated card."""
    from gpumanager.demo.run import run_demo  # only where the demo is wanted

    sys.exit(run_demo(listen))


def _load(path: str) -> Config:
    try:
        return load_config(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
