"""The events as a trace that chrome://tracing and https://ui.perfetto.dev open.

Source: the Trace Event Format, with times and durations in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpumanager.telemetry.eventlog import Recorded
from gpumanager.telemetry.events import Evicted, JobEnded, Loaded, Resumed

_GPU, _QUEUE, _MOVES = 1, 2, 3
_TRACKS = {_GPU: "GPU", _QUEUE: "queue", _MOVES: "evictions and loads"}


def chrome_trace(events: Iterable[Recorded]) -> dict[str, Any]:
    """Jobs as spans on the GPU's track, and their waits on the queue's, one below the other;
    evictions and loads as spans on a track of theirs; all else as marks."""
    rows: list[dict[str, Any]] = [
        _named("process_name", pid, 0, name) for pid, name in _TRACKS.items()
    ]
    for recorded in events:
        event, args = recorded.event, dict(recorded.fields)
        end_us = recorded.at.timestamp() * 1e6
        name = f"{event.name} {args.get('consumer', '')}".strip()
        if isinstance(event, JobEnded):
            rows += _job(event, end_us, args)
        elif isinstance(event, Evicted | Loaded | Resumed):
            took = event.ms * 1000
            rows.append(_span(name, _MOVES, 1, end_us - took, took, args))
        else:
            mark = {"ph": "i", "s": "g", "ts": end_us, "pid": _GPU, "tid": 1}
            rows.append({"name": name, **mark, "args": args})
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _job(job: JobEnded, end_us: float, args: dict[str, Any]) -> list[dict[str, Any]]:
    name = f"{job.consumer} {job.kind}"
    wait, on_gpu = job.wait_ms * 1000, (job.prepare_ms + job.run_ms) * 1000
    granted = end_us - on_gpu
    # Whoever waits at the same time gets a row of his own: the ticket is as good as any.
    waits = _span(name, _QUEUE, job.ticket, granted - wait, wait, args)
    return [waits, _span(name, _GPU, 1, granted, on_gpu, args)]


def _span(
    name: str, pid: int, tid: int, start_us: float, took_us: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "ts": start_us,
        "dur": took_us,
        "pid": pid,
        "tid": tid,
        "args": args,
    }


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
