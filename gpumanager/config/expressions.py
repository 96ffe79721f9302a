"""JMESPath expressions: checked when the config is read, and applied to consumers' answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jmespath
from jmespath.functions import Functions
from jmespath.parser import ParsedResult

from gpumanager.config.faults import nearest


def checked(expression: str) -> str:
    """`expression`, if it can be compiled and every function in it is known; else ValueError."""
    try:
        parsed = _compiled(expression).parsed
    except (ValueError, RecursionError) as error:  # jmespath's own errors, and int()'s
        reason = " ".join(str(error).split())
        raise ValueError(f"must be a JMESPath expression: {reason}") from None
    for node in _nodes(parsed):
        if node["type"] == "function_expression" and node["value"] not in Functions.FUNCTION_TABLE:
            known = nearest(node["value"], Functions.FUNCTION_TABLE)
            raise ValueError(f"unknown JMESPath function '{node['value']}'{known}")
    return expression


def search(expression: str | None, answer: Any) -> Any:
    """What `expression` gives for `answer`; None if it gives nothing, or does not fit."""
    if expression is None:
        return None
    try:
        return _compiled(expression).search(answer)
    except Exception:  # noqa: BLE001  # jmespath lets through what its functions raise
        return None  # an answer of another shape, as `length` of what is not there


@cache
def _compiled(expression: str) -> ParsedResult:
    return jmespath.compile(expression)


def _nodes(parsed: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The nodes of a syntax tree; a slice's children are plain numbers."""
    waiting = [parsed]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [child for child in node["children"] if isinstance(child, dict)]
