"""A YAML text as plain data, with the line of everything in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from gpumanager.config.faults import Fault, Path, dotted, shown

_YAML = "tag:yaml.org,2002:"
_TOO_DEEP = "is not valid YAML: nested too deeply, or an alias contains itself"
_SCALARS = frozenset(_YAML + kind for kind in ("null", "bool", "int", "float", "str", "timestamp"))

PORTS: Path = ("ports",)
"""The one mapping whose keys are numbers."""


class SourceError(Exception):
    """The text is not one well-formed YAML mapping."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


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


@dataclass
class Document:
    """A text that was read. Faults in single keys do not keep the rest from being checked: a
    value that could not be read is None in `data`, and its path is in `unread`."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: Lines = field(default_factory=Lines)
    faults: list[Fault] = field(default_factory=list)
    unread: set[Path] = field(default_factory=set)


def read(text: str | bytes) -> Document:
    """The document as plain data. Raises SourceError if there is none."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise SourceError(Fault("", None, "the file is empty"))
            if not isinstance(node, yaml.MappingNode) or node.tag != f"{_YAML}map":
                raise SourceError(Fault("", _line(node), "must be a mapping at the top"))
            document = Document()
            document.data = _Reader(loader, document).mapping(node, ())
            return document
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SourceError(Fault("", line, "is not UTF-8 text")) from None
    except yaml.MarkedYAMLError as error:
        raise SourceError(_syntax_fault(error)) from None
    except RecursionError:
        raise SourceError(Fault("", None, _TOO_DEEP)) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise SourceError(Fault("", None, f"is not valid YAML: {reason}")) from None


class _Reader:
    """Builds plain data from nodes, noting lines and faults on the way."""

    def __init__(self, loader: yaml.SafeLoader, document: Document) -> None:
        self._loader = loader
        self._document = document

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node, merged in self._entries(node, path):
            key = self._key(key_node, path)
            if key is None or (merged and key in data):
                continue
            here = (*path, key)
            if key in seen:
                message = f"stands here twice, first in line {seen[key]}"
                self._document.faults.append(Fault(dotted(here), _line(key_node), message))
                continue
            if not merged:
                seen[key] = _line(key_node)
            self._document.lines[here] = _line(key_node)
            data[key] = self._value(value_node, here)
        return data

    def _value(self, node: yaml.Node, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_YAML}map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_YAML}seq":
            return self._sequence(node, path)
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, path)
        self._refuse(node, path, f"the tag {node.tag} is not allowed")
        return None

    def _sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        for index, item in enumerate(node.value):
            self._document.lines[*path, index] = _line(item)
        return [self._value(item, (*path, i)) for i, item in enumerate(node.value)]

    def _key(self, node: yaml.Node, path: Path) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_YAML}str":
            return str(node.value)
        if isinstance(node, yaml.ScalarNode) and path == PORTS and node.tag == f"{_YAML}int":
            return str(node.value)
        found = shown(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        message = f"a key must be a string; put {found} in quotes if it is meant"
        self._document.faults.append(Fault(dotted(path), _line(node), message))
        return None

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        kind = node.tag.removeprefix(_YAML)
        try:
            return self._loader.construct_object(node)
        except (ValueError, LookupError, AttributeError, ArithmeticError):
            # PyYAML's constructors trust that the text fits its tag: 2026-13-45, !!bool x, 0b_
            message = f"is no valid {kind} in YAML; put it in quotes if it is meant as text"
            self._refuse(node, path, message)
            return None

    def _entries(
        self, node: yaml.MappingNode, path: Path
    ) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """A mapping's own entries, then those merged in by `<<`, which its own override."""
        merges: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == f"{_YAML}merge":
                merges.extend(value.value if isinstance(value, yaml.SequenceNode) else [value])
            else:
                yield key, value, False
        for merge in merges:
            if not isinstance(merge, yaml.MappingNode):
                raise SourceError(Fault(dotted(path), _line(merge), "'<<' must merge a mapping"))
            for key, value, _ in self._entries(merge, path):
                yield key, value, True

    def _refuse(self, node: yaml.Node, path: Path, message: str) -> None:
        found = shown(node.value) if isinstance(node, yaml.ScalarNode) else ""
        self._document.faults.append(Fault(dotted(path), _line(node), message, found))
        self._document.unread.add(path)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_fault(error: yaml.MarkedYAMLError) -> Fault:
    mark = error.problem_mark or error.context_mark
    problem = " ".join(filter(None, [error.context, error.problem, error.note]))
    column = f" (column {mark.column + 1})" if mark else ""
    return Fault("", mark.line + 1 if mark else None, f"is not valid YAML: {problem}{column}")
