"""Which calls of Ollama's only unload a model: `ollama stop` sends one."""

from __future__ import annotations

import json

from gpumanager.upstream.proxy import Inbound

PATHS = frozenset({"/api/generate", "/api/chat"})

LARGEST_BYTES = 1024
"""Such a body names a model, and little more."""

_AT_ONCE = (0, "0", "0s", "0m", "0h")


def only_unloads(path: str, inbound: Inbound) -> bool:
    """Whether a request has Ollama do nothing but unload a model, so that it needs no room: a
    `keep_alive` of 0, and nothing to answer."""
    if path not in PATHS or inbound.body is None or not inbound.length:
        return False
    if inbound.length > LARGEST_BYTES:
        return False
    at = inbound.body.tell()
    data = inbound.body.read(inbound.length)
    inbound.body.seek(at)
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(said, dict) or said.get("prompt") or said.get("messages"):
        return False
    keeps = said.get("keep_alive")
    return keeps in _AT_ONCE and not isinstance(keeps, bool)
