"""Asynchronous jobs, as the terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpumanager.cli import views
from gpumanager.cli.following import outcome
from gpumanager.cli.words import shortened

_COLOURS = {"running": "green", "preparing": "green", "failed": "red", "lost": "red"}
_NARROW = ("id", "state", "kind", "consumer", "turn", "for")
_WIDE = ("id", "state", "kind", "consumer", "place", "turn in", "for", "submitted", "ended")


def table(
    jobs: Sequence[Mapping[str, Any]], now: float, width: int, rows: int | None = None
) -> RenderableType:
    """The jobs, below the table's head in so many rows; what is cut is counted. `now` is in seconds
    since the epoch. In less than `views.WIDE` + 20 columns there is no room for when it was."""
    if not jobs:
        return Text("there are no such jobs", style="dim")
    names = _WIDE if width >= views.WIDE + 20 else _NARROW
    drawn = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        right = name in ("place", "turn in", "turn", "for")
        least = 32 if name == "id" else None  # to be copied
        drawn.add_column(name, justify="right" if right else "left", no_wrap=True, min_width=least)
    shown, cut = views.cut_to(jobs, rows)
    for job in shown:
        cells = _cells(job, now, 14 if names is _WIDE else 8)
        drawn.add_row(*(cells[name] for name in names))
    return Group(drawn, Text(f"… and {cut} earlier jobs", style="dim")) if cut else drawn


def sentence(job: Mapping[str, Any], now: float) -> str:
    """How far a job is that is not over."""
    since = views.duration(_for(job, now) * 1000)
    if job["state"] != "waiting":
        return f"{job['consumer']}: {job['state']} for {since}"
    turn = f", its turn is expected in {_turn(job)}" if _turn(job) else ""
    return f"{job['consumer']}: waiting for {since}, place {job['position']}{turn}"


def _cells(job: Mapping[str, Any], now: float, most: int) -> dict[str, Text | str]:
    return {
        "id": shortened(job["id"], 40),
        "state": Text(
            shortened(outcome(job), 12 if most < 14 else 30), style=_COLOURS.get(job["state"], "")
        ),
        "kind": shortened(job["kind"], most),
        "consumer": shortened(job["consumer"], most),
        "place": str(job["position"]) if job["state"] == "waiting" else "",
        "turn in": _turn(job),
        "turn": _place_and_turn(job),
        "for": views.duration(_for(job, now) * 1000),
        "submitted": _clock(job["created"]),
        "ended": _clock(job["ended"]),
    }


def _place_and_turn(job: Mapping[str, Any]) -> str:
    if job["state"] != "waiting":
        return ""
    return f"{job['position']}. in {_turn(job)}" if _turn(job) else f"{job['position']}."


def _turn(job: Mapping[str, Any]) -> str:
    if job["state"] != "waiting" or job["estimate_s"] is None:
        return ""
    return views.duration(job["estimate_s"] * 1000)


def _for(job: Mapping[str, Any], now: float) -> float:
    """For how many seconds it has waited, or run; once it is over, how long it took from its start
    to its end."""
    begun = _seconds(job["started"] or job["created"])
    until = now if job["ended"] is None else _seconds(job["ended"])
    return max(0.0, until - begun)


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _clock(time: str | None) -> str:
    """In the terminal's own time zone."""
    return "" if time is None else datetime.fromisoformat(time).astimezone().strftime("%m-%d %H:%M")
