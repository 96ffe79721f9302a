"""Commands about a broker of one's own: serve, check, schema, demo, completion."""

from __future__ import annotations

import json
import os
import sys
from functools import partial

import click

from gpumanager.cli.group import config_file, config_option, listen_address, main
from gpumanager.config import Config, ConfigError, load_config
from gpumanager.keys import GUARD_IT, KeysError, load_callback_secret, load_keys, unguarded


@main.command()
@config_option
def serve(path: str | None) -> None:
    """Run the broker on the config's `listen` address."""
    path = config_file(path)
    config = _load(path)
    from gpumanager.serving import serve as serve_config  # `check` needs no server

    sys.exit(serve_config(config, partial(load_config, path), path))


@main.command()
@click.argument("file", type=click.Path(dir_okay=False), required=False)
def check(file: str | None) -> None:
    """Check a config: prints every fault at once, each with its line. Without FILE it checks the
    config that `serve` would use."""
    file = config_file(file)
    config = _load(file)
    try:
        keys = load_keys(os.environ, config.auth.keys_file)
        jobs = config.jobs
        load_callback_secret(os.environ, jobs.callback_secret_file, wanted=bool(jobs.callbacks))
    except KeysError as error:
        click.echo(f"{file}: the keys cannot be read: {error}", err=True)
        sys.exit(2)
    if unguarded(config.host, keys):
        click.echo(
            f"{file}: warning: it listens on {config.listen}, for everybody who can reach it, and "
            f"there are no keys; {GUARD_IT}",
            err=True,
        )
    click.echo(f"{file}: ok, {len(config.consumers)} consumers, listens on {config.listen}")


@main.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    from gpumanager.config.jsonschema import config_schema

    click.echo(json.dumps(config_schema(), indent=2))


@main.command()
@click.option(
    "--listen",
    default="127.0.0.1:8770",
    show_default=True,
    callback=listen_address,
    help="HOST:PORT",
)
def demo(listen: str) -> None:
    """Run the broker in front of a bundled speech server, on a simulated card."""
    from gpumanager.demo.run import run_demo  # only where the demo is wanted

    sys.exit(run_demo(listen))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a SHELL: eval "$(gpumanager completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"click knows no completion for {shell}")
    click.echo(found(main, {}, "gpumanager", "_GPUMANAGER_COMPLETE").source())


def _load(path: str) -> Config:
    try:
        return load_config(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
