"""The events as a trace that chrome://tracing and https://ui.perfetto.dev open.

Source: the Trace Event Format, with times and durations in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpumanager.events import Event

_GPU, _LINE, _MOVES = 1, 2, 3
_TRACKS = {_GPU: "GPU", _LINE: "line", _MOVES: "evictions and loads"}
_LASTING = frozenset({"evicted", "loaded", "brought_back"})


def chrome_trace(events: Iterable[Event]) -> dict[str, Any]:
    """Jobs as spans on the GPU's track, and their waits on the line's, one below the other;
    evictions and loads as spans on a track of theirs; all else as marks."""
    rows: list[dict[str, Any]] = [
        _named("process_name", pid, 0, name) for pid, name in _TRACKS.items()
    ]
    for event in events:
        end_us = event.at.timestamp() * 1e6
        if event.name == "job":
            rows += _job(event, end_us)
        elif event.name in _LASTING:
            took = event.fields.get("ms", 0) * 1000
            name = f"{event.name} {event.fields.get('consumer', '')}"
            rows.append(_span(name, _MOVES, 1, end_us - took, took, event))
        else:
            rows.append(
                {
                    "name": f"{event.name} {event.fields.get('consumer', '')}".strip(),
                    "ph": "i",
                    "s": "g",
                    "ts": end_us,
                    "pid": _GPU,
                    "tid": 1,
                    "args": dict(event.fields),
                }
            )
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _job(event: Event, end_us: float) -> list[dict[str, Any]]:
    fields = event.fields
    run, prepare, wait = (fields[f"{what}_ms"] * 1000 for what in ("run", "prepare", "wait"))
    name = f"{fields['consumer']} {fields['kind']}"
    granted = end_us - run - prepare
    # Whoever waits at the same time gets a row of his own: the ticket is as good as any.
    waits = _span(name, _LINE, fields["ticket"], granted - wait, wait, event)
    return [waits, _span(name, _GPU, 1, granted, prepare + run, event)]


def _span(
    name: str, pid: int, tid: int, start_us: float, took_us: float, event: Event
) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "ts": start_us,
        "dur": took_us,
        "pid": pid,
        "tid": tid,
        "args": dict(event.fields),
    }


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
