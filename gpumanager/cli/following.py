"""Waiting for asynchronous jobs, from the command line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click

from gpumanager.client import BrokerClient, BrokerUnavailable

DAY_S = 86400.0
WAIT_S = 2.0
"""How long one request waits for a job: what is shown of it is never older."""

AGAIN_S = 1.0
"""Between two looks, where the broker answers at once: too many wait for jobs already, or it
restarts."""


def timeout_option(seconds: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a command that waits for jobs: so long, unless it is told another `timeout`."""
    return click.option(
        "--timeout",
        type=click.FloatRange(0),
        default=seconds,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait at most.",
    )


def path_of(job_id: str) -> str:
    """Where a job is."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def awaited(
    broker: BrokerClient,
    job_id: str,
    until: float,
    *,
    seen: Any = None,
    tell: Callable[[Any], object] | None = None,
) -> Any:
    """The job once it is over, or as it is at `until`, of the monotonic clock. `tell` gets it each
    time it is looked at; `seen` is what an earlier look has found. A broker that goes away after
    the first look may come back: jobs survive that. Raises BrokerUnavailable, if there is none to
    begin with, or it no longer knows the job."""
    job = seen
    while True:
        begun, looked_before = time.monotonic(), job is not None
        wait = round(max(0.0, min(WAIT_S, until - begun))) if looked_before else 0
        try:
            job = broker.get(path_of(job_id), wait=wait)
        except BrokerUnavailable as error:
            if job is None or error.status not in (0, 503):
                raise
        if job["ended"] is not None or time.monotonic() >= until:
            return job
        if tell is not None:
            tell(job)
        if looked_before:
            pause = min(begun + AGAIN_S, until) - time.monotonic()
            time.sleep(max(0.0, pause))


def look(broker: BrokerClient, job_id: str) -> Any:
    """The job as it is now, None if the broker is away. Raises BrokerUnavailable, if it no longer
    knows the job."""
    try:
        return broker.get(path_of(job_id))
    except BrokerUnavailable as error:
        if error.status not in (0, 503):
            raise
        return None


def outcome(job: Any) -> str:
    """How far it is, and why it failed, in a few words."""
    if job["state"] != "failed":
        return str(job["state"])
    why = job.get("failure") or job["status"]
    return f"failed ({why})" if why else "failed"
