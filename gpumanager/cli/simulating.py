"""Commands that say what a policy would do: to a made-up workload, or to what a broker's own event
file says has happened."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpumanager.cli.group import fail, main

if TYPE_CHECKING:
    from gpumanager.config import Config
    from gpumanager.simulation.policies import Comparison, Promise

POLICIES = ("fifo", "affinity", "unbounded", "one-model")
WORKLOADS = (
    "chat-bursts",
    "voice-assistant",
    "image-night",
    "crowded-night",
    "agent-fleet",
    "alternating",
    "mixed",
    "busy-office",
)


def _about_policies(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both commands."""
    for option in (
        click.option(
            "--plot",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Draw it into this file, as SVG.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON, with every figure."),
        click.option(
            "--hold",
            type=click.FloatRange(min=0),
            help="The policies' `hold`, in seconds; by default the config's.",
        ),
        click.option(
            "--max-overtaken-by",
            type=click.IntRange(min=0),
            help="The policies' `max_overtaken_by`; by default the config's.",
        ),
        click.option(
            "--max-overtake",
            type=click.FloatRange(min=0),
            help="The policies' `max_overtake`, in seconds; by default the config's.",
        ),
        click.option(
            "--policy",
            "policies",
            multiple=True,
            type=click.Choice(POLICIES),
            help="Play this policy; may be given several times. By default all.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("workloads", nargs=-1, type=click.Choice(WORKLOADS))
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option(
    "--jobs",
    type=click.IntRange(1, 5000),
    help="How many jobs a workload has; by default 120 to 200. Of up to 12, the optimum is shown.",
)
@_about_policies
def simulate(
    workloads: tuple[str, ...],
    seed: int,
    jobs: int | None,
    policies: tuple[str, ...],
    max_overtake: float | None,
    max_overtaken_by: int | None,
    hold: float | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Say what each policy makes of made-up WORKLOADS, by default of all.

    They are played in virtual time, by the broker's own decisions, on a card of 24 GB. The same
    seed gives the same figures.
    """
    from gpumanager.simulation.policies import compared
    from gpumanager.simulation.workloads import workload

    if plot is not None and len(workloads) != 1:
        raise click.UsageError("--plot draws one workload: name it")
    promise = _promise(max_overtake, max_overtaken_by, hold)
    found = [
        compared(workload(name, seed, jobs), _once(policies) or POLICIES, promise)
        for name in _once(workloads) or WORKLOADS
    ]
    if as_json:
        answers = [{"seed": seed, **each.as_json()} for each in found]
        click.echo(json.dumps(answers, indent=2))
    else:
        _show(found)
    _draw(plot, found[0])


@main.command()
@click.argument("events", nargs=-1, required=True, type=click.Path(allow_dash=True))
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False),
    help="Take the consumers' sizes, and what may be unloaded, from this config.",
)
@click.option(
    "--card-mib",
    type=click.IntRange(min=1),
    help="The card's memory; by default what the config or the events say.",
)
@click.option(
    "--clients-wait",
    is_flag=True,
    help="Take a client whose job came within 10 s after the end of its last one to have waited "
    "for that: its job comes as long after it in the replay, too.",
)
@_about_policies
def replay(
    events: tuple[str, ...],
    config_path: str | None,
    card_mib: int | None,
    clients_wait: bool,
    policies: tuple[str, ...],
    max_overtake: float | None,
    max_overtaken_by: int | None,
    hold: float | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Say what each policy would have made of what a broker's EVENTS say has happened, beside what
    really happened.

    EVENTS are files that a broker has written (`events.file`), or that `gpumanager events --json`
    printed; - is the standard input. Nothing is changed, and no broker is asked.
    """
    from gpumanager.config import ConfigError, load_config
    from gpumanager.simulation.engine import Impossible
    from gpumanager.simulation.eventlines import BadEvents, read
    from gpumanager.simulation.policies import compared
    from gpumanager.simulation.recorded import reconstruct

    try:
        config = None if config_path is None else load_config(config_path)
        promise = _promise(max_overtake, max_overtaken_by, hold, config)
        name = events[0] if len(events) == 1 else f"{events[0]} and {len(events) - 1} more"
        recorded = reconstruct(
            read(_once(events)), name, config, card_mib, clients_wait=clients_wait
        )
        found = compared(recorded.trace, _once(policies) or POLICIES, promise, recorded.real)
    except ConfigError as error:
        fail(str(error), 2)
    except BadEvents as error:
        fail(str(error))
    except Impossible as error:
        fail(f"{error}: with --config and --card-mib other sizes can be given")
    if as_json:
        click.echo(json.dumps({**found.as_json(), "guesses": recorded.guesses}, indent=2))
    else:
        _show([found])
        for guess in recorded.guesses:
            click.echo(f"- {guess}")
    _draw(plot, found)


def _promise(
    max_overtake: float | None,
    max_overtaken_by: int | None,
    hold: float | None,
    config: Config | None = None,
) -> Promise:
    from gpumanager.config import SchedulerConfig
    from gpumanager.simulation.policies import Promise

    usual = SchedulerConfig() if config is None else config.scheduler
    return Promise(
        usual.max_overtake if max_overtake is None else max_overtake,
        usual.max_overtaken_by if max_overtaken_by is None else max_overtaken_by,
        usual.hold if hold is None else hold,
    )


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _show(found: Sequence[Comparison]) -> None:
    from gpumanager.cli import policyviews, views

    console = views.console()
    for number, each in enumerate(found):
        if number:
            console.print()
        console.print(policyviews.comparison(each, brief=len(found) > 1))


def _draw(path: Path | None, found: Comparison) -> None:
    if path is None:
        return
    from gpumanager.simulation.plot import svg

    try:
        path.write_text(svg(found), encoding="utf-8")
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror or error}")
    click.echo(f"{path}: drawn", err=True)
