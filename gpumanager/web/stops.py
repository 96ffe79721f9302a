"""Calls to a consumer that stop jobs of its, by their ids."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

from gpumanager.config import ConsumerConfig
from gpumanager.errors import PayloadTooLarge
from gpumanager.jobs.owners import Owners
from gpumanager.jobs.record import RequestRecord
from gpumanager.upstream.proxy import Inbound

LARGEST_BODY_BYTES = 256 * 1024
"""Of a call that stops jobs, where it has to be read: thousands of ids."""


def checked(
    record: RequestRecord,
    name: str,
    consumer: ConsumerConfig,
    path: str,
    inbound: Inbound,
    owners: Owners,
) -> Inbound:
    """The request, if it stops none of another key's jobs. Raises Forbidden, PayloadTooLarge."""
    if record.whose is None:
        return inbound
    for call in consumer.stops:
        if call.matches(inbound.method, path):
            body, inbound = _read(inbound)
            owners.check(record, name, call.jobs(body))
    return inbound


def _read(inbound: Inbound) -> tuple[Any, Inbound]:
    """What the body says, {} if that is no JSON, and the request with it still to be read."""
    if inbound.body is None or not inbound.length:
        return {}, inbound
    if inbound.length > LARGEST_BODY_BYTES:
        raise PayloadTooLarge(f"a call that stops jobs has at most {LARGEST_BODY_BYTES} bytes")
    raw = inbound.body.read(inbound.length)
    try:
        body = json.loads(raw)
    except ValueError:
        body = {}
    return body, replace(inbound, body=io.BytesIO(raw))
