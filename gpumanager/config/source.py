"""A YAML text as plain data, with the line of everything in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from gpumanager.config.faults import Fault, Path, dotted

MOST_NODES = 100_000
"""Values in a document, aliases expanded: far beyond any config, far below an alias bomb."""

DEEPEST = 50

_PLAIN = frozenset({"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})


class SourceError(Exception):
    """The text is not one well-formed YAML mapping."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = faults


class Lines:
    """The 1-based line of each path; of the nearest parent for what is not in the text."""

    def __init__(self) -> None:
        self._lines: dict[Path, int] = {(): 1}

    def __getitem__(self, path: Path) -> int:
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]

    def __setitem__(self, path: Path, line: int) -> None:
        self._lines[path] = line


def read(text: str | bytes) -> tuple[dict[str, Any], Lines]:
    """The document as plain data, and its lines. Raises SourceError."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise SourceError(Fault("", None, "the file is empty"))
            if not isinstance(node, yaml.MappingNode):
                raise SourceError(Fault("", _line(node), "must be a mapping at the top"))
            lines, faults = Lines(), list[Fault]()
            reader = _Reader(loader, lines, faults)
            data = reader.value(node, ())
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SourceError(Fault("", line, "is not UTF-8 text")) from None
    except yaml.MarkedYAMLError as error:
        raise SourceError(_syntax_fault(error)) from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(Fault("", None, f"is not valid YAML: {reason}")) from None
    if faults:
        raise SourceError(*faults)
    return data, lines


class _Reader:
    """Builds plain data from nodes, noting lines and faults on the way."""

    def __init__(self, loader: yaml.SafeLoader, lines: Lines, faults: list[Fault]) -> None:
        self._loader = loader
        self._lines = lines
        self._faults = faults
        self._nodes = 0
        self._open: list[int] = []

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > MOST_NODES or len(self._open) > DEEPEST:
            raise SourceError(
                Fault(dotted(path), _line(node), "the document is too large or too deep")
            )
        if id(node) in self._open:
            raise SourceError(Fault(dotted(path), _line(node), "an alias contains itself"))
        self._open.append(id(node))
        try:
            if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN:
                fault = Fault(dotted(path), _line(node), f"the tag {node.tag} is not allowed")
                raise SourceError(fault)
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self._item(each, (*path, i)) for i, each in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self._open.pop()

    def _item(self, node: yaml.Node, path: Path) -> Any:
        self._lines[path] = _line(node)
        return self.value(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node, merged in _entries(node):
            key = self._key(key_node, path)
            if key is None or (merged and key in data):
                continue
            here = (*path, key)
            if not merged:
                if key in seen:
                    self._faults.append(
                        Fault(
                            dotted(here),
                            _line(key_node),
                            f"stands here twice, first in line {seen[key]}",
                        )
                    )
                    continue
                seen[key] = _line(key_node)
            self._lines[here] = _line(key_node)
            data[key] = self.value(value_node, here)
        return data

    def _key(self, node: yaml.Node, path: Path) -> str | None:
        key = self._scalar(node, path) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, str):
            return key
        found = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        message = f"a key must be a string; put {found!r} in quotes if it is meant"
        self._faults.append(Fault(dotted(path), _line(node), message))
        return None

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        try:
            return self._loader.construct_object(node)
        except ValueError as error:  # a date such as 2026-13-45
            self._faults.append(Fault(dotted(path), _line(node), str(error), repr(node.value)))
            return None


def _entries(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
    """A mapping's own entries, then those merged in by `<<`, which its own override."""
    merges: list[yaml.Node] = []
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            merges.extend(value.value if isinstance(value, yaml.SequenceNode) else [value])
        else:
            yield key, value, False
    for merge in merges:
        if not isinstance(merge, yaml.MappingNode) or merge is node:
            raise SourceError(Fault("", _line(merge), "'<<' must merge a mapping"))
        for key, value, _ in _entries(merge):
            yield key, value, True


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_fault(error: yaml.MarkedYAMLError) -> Fault:
    mark = error.problem_mark or error.context_mark
    problem = " ".join(filter(None, [error.context, error.problem, error.note]))
    column = f" (column {mark.column + 1})" if mark else ""
    return Fault("", mark.line + 1 if mark else None, f"is not valid YAML: {problem}{column}")
