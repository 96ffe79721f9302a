"""Adding entries to a YAML text that somebody wrote by hand, and changing one value in it, with
nothing else in it changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def with_entries(text: str, key: str, entries: Mapping[Any, Any], rows: Sequence[str]) -> str:
    """`text` with `entries` added to the mapping at its top-level `key`, in the style that it has
    there: in flow style (`{a: 1}`) as such, else as the block lines `rows`, which say the same,
    and may hold comments. A `key` that is not there is added at the end.

    Raises ValueError for a text that is laid out in a way that this cannot add to.
    """
    root = yaml.compose(text)
    newline = "\r\n" if "\r\n" in text else "\n"
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it is no mapping")
    pair = next((pair for pair in root.value if pair[0].value == key), None)
    node = None if pair is None else pair[1]
    if root.flow_style:
        after = _in_flow_root(text, root, key, node, entries)
    elif node is None:
        body = text if text.endswith(newline) else text + newline
        after = body + newline.join(["", f"{key}:", *_indented(rows, "  "), ""])
    elif isinstance(node, yaml.MappingNode) and node.value:
        if node.flow_style:
            after = _into_flow(text, node, entries)
        else:
            at = _end_of_block(text, node)
            indent = " " * node.value[0][0].start_mark.column
            after = _with_lines(text, at, _indented(rows, indent), newline)
    else:
        after = _into_empty(text, node, rows, newline)
    _check(text, after, key, entries)
    return after


def with_value(text: str, path: Sequence[str], value: str) -> str:
    """`text` with `value` in place of the string that stands at the keys of `path`, quoted as that
    was. Raises ValueError for a text that does not have it in one place of its own."""
    node = yaml.compose(text)
    for key in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((inner for outer, inner in pairs if outer.value == key), None)
    if not isinstance(node, yaml.ScalarNode) or node.style not in (None, "'", '"'):
        raise ValueError(f"{'.'.join(path)} is laid out in a way that it cannot be changed")
    quote = node.style or ""
    start, end = node.start_mark.index, node.end_mark.index
    after = f"{text[:start]}{quote}{value}{quote}{text[end:]}"
    expected = inside = yaml.safe_load(text)
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    try:
        same = yaml.safe_load(after) == expected
    except yaml.YAMLError:
        same = False
    if not same:
        raise ValueError(f"{'.'.join(path)} is laid out in a way that it cannot be changed")
    return after


def _in_flow_root(
    text: str,
    root: yaml.MappingNode,
    key: str,
    node: yaml.Node | None,
    entries: Mapping[Any, Any],
) -> str:
    if node is None:
        return _into_flow(text, root, {key: dict(entries)})
    if isinstance(node, yaml.MappingNode):
        return _into_flow(text, node, entries)
    start, end = node.start_mark.index, node.end_mark.index  # a null, written or not
    gap = "" if text[start - 1 : start].isspace() else " "
    return f"{text[:start]}{gap}{{{_flow(entries)}}}{text[end:]}"


def _into_flow(text: str, node: yaml.MappingNode, entries: Mapping[Any, Any]) -> str:
    if not node.value:
        start, end = node.start_mark.index, node.end_mark.index
        return f"{text[:start]}{{{_flow(entries)}}}{text[end:]}"
    at = _last_leaf(node).end_mark.index
    return f"{text[:at]}, {_flow(entries)}{text[at:]}"


def _flow(entries: Mapping[Any, Any]) -> str:
    written = yaml.safe_dump(
        dict(entries), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
    )
    return written.strip()[1:-1]


def _into_empty(text: str, node: yaml.Node, rows: Sequence[str], newline: str) -> str:
    """In place of `{}`, or of nothing, on the key's own line."""
    start, end = node.start_mark.index, node.end_mark.index
    head = text[:start].rstrip(" ") if end > start else text[:start]
    tail = text[end:]
    rest, _, _ = tail.partition("\n")
    if head.endswith("\n"):  # a null: the mark is at the next line
        head, tail = head[:-1].rstrip("\r"), newline + tail
        rest = ""
    body = head + tail
    at = body[: len(head) + len(rest)].count("\n") + 1
    return _with_lines(body, at, _indented(rows, "  "), newline)


def _with_lines(text: str, at: int, rows: Sequence[str], newline: str) -> str:
    """`text` with `rows` as its lines from number `at` on, counted from 0."""
    lines = text.splitlines()
    return newline.join([*lines[:at], *rows, *lines[at:]]) + newline


def _end_of_block(text: str, node: yaml.MappingNode) -> int:
    """The number of the line after a block mapping, and after the comments that still belong to
    it by their indentation."""
    lines = text.splitlines()
    last = _last_leaf(node)
    end = last.end_mark
    at = end.line + (end.column > 0 or end.line == last.start_mark.line)
    while at > 0 and not lines[at - 1].strip():
        at -= 1
    ahead = at
    while ahead < len(lines):
        line = lines[ahead]
        if line.strip() and not (line.startswith(" ") and line.lstrip().startswith("#")):
            break
        ahead += 1
        if line.strip():
            at = ahead
    return at


def _last_leaf(node: yaml.Node) -> yaml.Node:
    """The last node that a block collection's text ends with: the marks of a collection in block
    style are where the next token begins."""
    if isinstance(node, yaml.MappingNode) and node.value:
        last = node.value[-1][1]
    elif isinstance(node, yaml.SequenceNode) and node.value:
        last = node.value[-1]
    else:
        return node
    # What a flow collection ends with is its bracket.
    return last if getattr(last, "flow_style", False) else _last_leaf(last)


def _indented(rows: Sequence[str], indent: str) -> list[str]:
    return [f"{indent}{row}".rstrip() for row in rows]


def _check(before: str, after: str, key: str, entries: Mapping[Any, Any]) -> None:
    """Nothing but `entries` came in: an alias, say, may have led into another key."""
    expected: dict[str, Any] = yaml.safe_load(before)
    expected[key] = {**(expected.get(key) or {}), **entries}
    try:
        same = yaml.safe_load(after) == expected
    except yaml.YAMLError:
        same = False
    if not same:
        raise ValueError(f"{key} is laid out in a way that nothing can be added to")
