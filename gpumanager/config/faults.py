"""What is wrong with a config, where, and what is allowed instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]
"""Keys and indices from the top of the document."""

_LONGEST_FOUND = 60


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `line` is 1-based, None where the fault has no place in the file; `found` is a
    short form of what stands there."""

    path: str
    line: int | None
    message: str
    found: str = ""

    def __str__(self) -> str:
        where = [f"line {self.line}"] if self.line else []
        where += [self.path] if self.path else []
        found = f" (found {self.found})" if self.found else ""
        text = ": ".join([*where, self.message]) + found
        # One line, whatever a key holds: faults end up on terminals and in logs.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(Exception):
    """A config with faults: all of them, in the order of their lines. `source` is the file."""

    def __init__(self, source: str, faults: Iterable[Fault]) -> None:
        self.source = source
        self.faults = tuple(sorted(faults, key=lambda fault: (fault.line or 0, fault.path)))
        super().__init__(source, self.faults)

    def __str__(self) -> str:
        count = len(self.faults)
        head = f"{self.source}: {count} fault{'s' * (count != 1)}"
        return "\n".join([head, *(f"  {fault}" for fault in self.faults)])


def dotted(path: Path) -> str:
    """`("consumers", "mvoice", "can_coexist_with", 0)` → `consumers.mvoice.can_coexist_with[0]`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def shown(value: object) -> str:
    """What was found, in short, and without the password of a URL."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool | date):
        return str(value).lower()
    text = repr(value)
    if "://" in text and "@" in text:
        text = f"{text.partition('://')[0]}://…@{text.rpartition('@')[2]}"
    return text if len(text) <= _LONGEST_FOUND else text[:_LONGEST_FOUND] + "…"


def nearest(name: object, known: Iterable[str]) -> str:
    """`; did you mean …? known: …` for a name that is not known."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{hint} known: {', '.join(names) or 'none'}"


def in_words(error: ErrorDetails, model: type[BaseModel]) -> tuple[Path, str, str]:
    """The path, message and found text for one of pydantic's errors."""
    kind = error["type"]
    path = _without_tag(error["loc"])
    context: dict[str, Any] = error.get("ctx", {})
    # consumers.NAME.CALL.headers.HEADER: what stands there may be a secret
    found = "" if path[3:4] == ("headers",) else shown(error["input"])
    if kind == "extra_forbidden":
        known = _names_at(model, path[:-1])
        return path, f"unknown key '{path[-1]}'{nearest(path[-1], known)}", ""
    if path and path[-1] == "[key]":
        path = path[:-1]
        if kind == "literal_error":
            return path, f"unknown kind '{path[-1]}'{nearest(path[-1], _choices(context))}", ""
        return path, _plain(error, context), ""
    if kind == "missing":
        return path, "is required", ""
    return path, _plain(error, context), found


def _without_tag(path: Path) -> Path:
    """`path` without the mark of a union's member, which is no key of the config."""
    of_consumer = path[2:3] in (("on_disconnect",), ("max_parallel",))
    at = 2 if path[:1] == ("routing",) else 3 if of_consumer else len(path)
    marks = ("<word>", "<number>", "<call>", "<name>", "<list>")
    tagged = path[at : at + 1] != () and path[at] in marks
    return path[:at] + path[at + tagged :]


_MESSAGES = {
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "too_short": "must not be empty",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}


def _plain(error: ErrorDetails, context: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind in _MESSAGES:
        return _MESSAGES[kind]
    if kind == "literal_error":
        return f"must be one of {', '.join(_choices(context))}"
    bounds = {
        "greater_than": "gt",
        "greater_than_equal": "ge",
        "less_than": "lt",
        "less_than_equal": "le",
    }
    if kind in bounds:
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        limit = context[bounds[kind]]
        return f"must be {words[bounds[kind]]} {limit:g}"
    if kind == "value_error":
        return str(context["error"])
    message = error["msg"]
    return message[:1].lower() + message[1:]


def _choices(context: Mapping[str, Any]) -> list[str]:
    """The choices of a Literal, from pydantic's `'a', 'b' or 'c'`."""
    text = str(context.get("expected", "")).replace(" or ", ", ")
    words = [choice.strip("'") for choice in text.split(", ")]
    return [{"True": "true", "False": "false"}.get(word, word) for word in words]  # as YAML does


def _names_at(model: type[BaseModel], path: Path) -> list[str]:
    """The keys that are known at `path` below `model`."""
    annotation: Any = model
    for key in path:
        found = _model_in(annotation)
        if found is not None:
            field = found.model_fields.get(str(key))
            if field is None:
                return []
            annotation = field.annotation
        else:
            annotation = _inside(annotation)
    found = _model_in(annotation)
    if found is None:
        return []
    return [field.alias or name for name, field in found.model_fields.items()]


def _inside(annotation: Any) -> Any:
    """What a mapping's values or a list's items are, in an annotation such as
    `Annotated[tuple[Call, ...] | None, …]`."""
    while (origin := get_origin(annotation)) not in (dict, tuple, list, None):
        annotation = get_args(annotation)[0]
    return None if origin is None else get_args(annotation)[1 if origin is dict else 0]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model an annotation such as `Annotated[Call | None, …]` is about."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    if getattr(annotation, "__origin__", None) in (dict, tuple, list):
        return None
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
