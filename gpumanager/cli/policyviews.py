"""Policies beside each other, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpumanager.simulation.policies import POLICIES, Comparison
from gpumanager.simulation.results import Figures, Waits
from gpumanager.simulation.workloads import WORKLOADS

MOST_ROWS = 12
"""Of a table by kind or requester; the longest waits come first."""

LEGEND = (
    "makespan: from the first arrival to the last end; runs: the share of it during which a job "
    "ran; swaps: unloads; swapping: unloading and loading together; p50, p95, p99: of the waits in "
    "the queue; overtaken, for: the most jobs that came later and went past one, and the longest "
    "that one waited after that; queue: the most jobs that waited at once"
)


def comparison(found: Comparison, *, brief: bool = False) -> RenderableType:
    """What it is, the figures of all policies, and, unless it is to be `brief`, the waits by kind
    and requester."""
    trace, all_figures = found.trace, found.figures
    requesters = len({task.requester for task in trace.tasks})
    head = f"{trace.name}: {len(trace.tasks)} jobs of {requesters} requesters"
    parts: list[RenderableType] = [Text(head, style="bold")]
    if trace.name in WORKLOADS:
        parts.append(Text(WORKLOADS[trace.name], style="dim"))
    parts.append(_summary(found, all_figures))
    parts += [
        Text(
            f"{each.policy}: out of turn, nobody was overtaken by more than {each.out_of_turn_by} "
            f"jobs, nor for longer than {seconds(each.out_of_turn_s or 0.0)} s"
        )
        for each in all_figures
        if each.out_of_turn_by is not None
    ]
    if not brief:
        parts += [Text(), Text("Waits by kind and by requester: p50, p95, p99", style="bold")]
        parts += _waits("kind", all_figures, lambda each: each.by_kind)
        parts += _waits("requester", all_figures, lambda each: each.by_requester)
        parts += [Text(), Text(LEGEND, style="dim")]
        parts += [
            Text(f"{each.policy}: {POLICIES[each.policy]}", style="dim")
            for each in all_figures
            if each.policy in POLICIES
        ]
    return Group(*parts)


def _summary(found: Comparison, all_figures: Sequence[Figures]) -> Table:
    table = _table("seconds", "makespan", "runs", "swaps", "swapping", "p50", "p95", "p99")
    for name in ("overtaken", "for", "queue"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in all_figures:
        table.add_row(
            each.policy,
            seconds(each.makespan_s),
            f"{each.utilisation:.0%}",
            str(each.swaps),
            seconds(each.swapping_s),
            seconds(each.waits.p50),
            seconds(each.waits.p95),
            seconds(each.waits.p99),
            str(each.overtaken_by),
            seconds(each.overtaken_s),
            str(each.longest_queue),
        )
    if found.best is not None:
        table.add_row("optimum", seconds(found.best.makespan_s))
    return table


def _waits(
    what: str, all_figures: Sequence[Figures], by: Callable[[Figures], Mapping[str, Waits]]
) -> list[RenderableType]:
    groups = {
        name: max(by(each)[name].p99 for each in all_figures if name in by(each))
        for each in all_figures
        for name in by(each)
    }
    if len(groups) < 2:
        return []
    names = sorted(groups, key=lambda name: (-groups[name], name))
    table = _table(what, "jobs", *(each.policy for each in all_figures))
    for name in names[:MOST_ROWS]:
        found = [by(each).get(name) for each in all_figures]
        jobs = max(waits.jobs for waits in found if waits is not None)
        table.add_row(
            name,
            str(jobs),
            *(
                "–"
                if waits is None
                else " ".join(f"{seconds(value):>4}" for value in (waits.p50, waits.p95, waits.p99))
                for waits in found
            ),
        )
    parts: list[RenderableType] = [Text(), table]
    if len(names) > MOST_ROWS:
        parts.append(Text(f"and {len(names) - MOST_ROWS} more: --json has all", style="dim"))
    return parts


def seconds(value: float) -> str:
    """Seconds as they are read at a glance."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
