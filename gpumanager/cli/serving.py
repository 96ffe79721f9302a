"""The command line. Exit codes: 0 done, 1 failed while running, 2 bad config or usage."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import click

from gpumanager import __version__
from gpumanager.config import KINDS, Config, ConfigError, config_path_from_env, load_config


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


@main.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.option(
    "--url",
    envvar="GPUMANAGER_URL",
    default="http://127.0.0.1:8770",
    show_default=True,
    help="The broker; else GPUMANAGER_URL.",
)
@click.option("--key", envvar="GPUMANAGER_KEY", help="An API key; else GPUMANAGER_KEY.")
@click.option("--json", "as_json", is_flag=True, help="The broker's own answer.")
def plan(kind: str, url: str, key: str | None, as_json: bool) -> None:
    """Ask a running broker what a job of KIND would do now: would it fit, and who would go.

    Acts on nothing. Exit code 0 if the job could run, 1 if not.
    """
    from gpumanager.client import BrokerUnavailable, ask  # `serve` needs no client

    try:
        answer = ask(url, f"/v1/plan/{kind}", key)
    except BrokerUnavailable as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    click.echo(json.dumps(answer, indent=2) if as_json else plan_text(answer))
    sys.exit(0 if answer["fits"] else 1)


def plan_text(answer: Mapping[str, Any]) -> str:
    """The answer of `/v1/plan/{kind}` for a person to read."""
    name, needed, held = answer["consumer"], answer["needed_mib"], answer["held_mib"]
    lines = [f"{name} needs {needed} MiB and holds {held}; {answer['free_mib']} MiB are free, "]
    lines[0] += f"{answer['reserved_mib']} of them reserved ({answer['source']})"
    if not answer["fits"]:
        lines.append(f"does not fit: {answer['short_mib']} MiB short, even without all that may go")
    elif answer["fits_now"]:
        lines.append("fits as it is")
    else:
        lines.append("fits after unloading:")
        lines += [
            f"  {victim['consumer']:<16} {victim['mib']:>7} MiB  {victim['why']}"
            for victim in answer["victims"]
        ]
    times = answer["estimate_ms"]
    parts = [f"{what} {times[what] / 1000:.1f} s" for what in ("wait", "evict", "load")]
    lines.append(f"estimated: {', '.join(parts)}")
    return "\n".join(lines)


def _load(path: str) -> Config:
    try:
        return load_config(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
