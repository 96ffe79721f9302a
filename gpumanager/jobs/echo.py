"""What of an answer is the consumer's own: a client's words that it repeats are no evidence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gpumanager.config import OutOfMemory

SHORTEST_ECHO = 8
"""Texts of the request that are shorter stand in many an answer by chance."""

MOST_ECHOES = 10_000


def says_out_of_memory(signs: OutOfMemory, answer: bytes, request: bytes) -> bool:
    """Whether the answer says in its own words that the card's memory ran out: not in words that
    stand in the request, nor in such that only together with the request's say so."""
    if not signs.said_in(answer):
        return False
    texts = [text.encode() for text in _texts(request)]
    own = b"\n".join(text.encode() for text in _texts(answer)) or answer
    echoes = sorted({text for text in texts if len(text) >= SHORTEST_ECHO}, key=len, reverse=True)
    for echo in echoes[:MOST_ECHOES]:
        own = own.replace(echo, b"\n")
    said = b"\n".join([request, *texts]).lower()
    return any(match.lower() not in said for match in signs.found_in(own))


def _texts(data: bytes) -> Iterator[str]:
    """Every text in a JSON document, keys included; none if it is no JSON."""
    try:
        todo: list[Any] = [json.loads(data)]
    except (ValueError, RecursionError):
        return
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
