"""Reads what a broker wrote into its event file (`events.file`), or what `gpumanager events --json`
printed: one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

LONGEST_LINE = 1 << 20
"""Bytes; an event has a few hundred."""

MOST_EVENTS = 2_000_000
"""As many as fill 1 GiB of files."""
_SHOWN = 60


class BadEvents(Exception):
    """A file that cannot be read, or is no broker's. The message says which, where, and why."""


@dataclass(frozen=True, slots=True)
class Line:
    """One event: its name, when it was told (seconds since the epoch), its fields, and where it
    stands."""

    event: str
    at: float
    fields: Mapping[str, Any]
    where: str

    def text(self, name: str, default: str | None = None) -> str:
        """A field that is a text. Raises BadEvents, as those below."""
        found = self.fields.get(name, default)
        if not isinstance(found, str):
            raise BadEvents(f"{self.where}: {self._lacks(name, 'a text')}")
        return found

    def maybe_text(self, name: str) -> str | None:
        """The same, None if it is not there."""
        return None if self.fields.get(name) is None else self.text(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A field that is a number of 0 or more."""
        found = self.fields.get(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 1e12:
            raise BadEvents(f"{self.where}: {self._lacks(name, 'a number of 0 or more')}")
        return found

    def maybe_number(self, name: str) -> float | None:
        """The same, None if it is not there."""
        return None if self.fields.get(name) is None else self.number(name)

    def moment(self, name: str) -> float | None:
        """A field that is a time, in seconds since the epoch; None if it is not there."""
        found = self.maybe_text(name)
        if found is None:
            return None
        return _moment(found, f"{self.where}: {self._lacks(name, 'a time (RFC 3339)')}")

    def _lacks(self, name: str, what: str) -> str:
        found = json.dumps(self.fields[name])[:_SHOWN] if name in self.fields else "nothing"
        return f"the event {self.event!r} has to have {what} in {name!r} (found {found})"


@dataclass(frozen=True, slots=True)
class Lines:
    """All events of some files, in the order of time, and what is missing among them: `missed` were
    not kept by the broker, `cut` says where a last line is not whole, empty if all are."""

    events: tuple[Line, ...]
    missed: int = 0
    cut: str = ""


def read(paths: Iterable[str]) -> Lines:
    """The events in these files, `-` for the standard input. Raises BadEvents."""
    events: list[Line] = []
    missed, cut = 0, ""
    for path in paths:
        with _opened(path) as file:
            for number, raw in _lines(file, path):
                where = f"{path}, line {number}"
                found = _parsed(raw, where)
                if found is None:
                    if raw.endswith(b"\n"):
                        raise BadEvents(f"{where}: is no JSON object (found {_shown(raw)})")
                    cut = where  # the broker was killed while it wrote
                    continue
                if found.get("event") == "missed":
                    missed += found["count"] if isinstance(found.get("count"), int) else 0
                else:
                    events.append(_line(found, where))
                if len(events) > MOST_EVENTS:
                    raise BadEvents(f"{where}: more than {MOST_EVENTS} events are too many")
    events.sort(key=lambda each: each.at)
    return Lines(tuple(events), missed, cut)


def _line(found: Mapping[str, Any], where: str) -> Line:
    name, time = found.get("event"), found.get("time")
    if not isinstance(name, str) or not isinstance(time, str):
        raise BadEvents(
            f"{where}: is no event of a broker, which has 'event' and 'time' "
            f"(found {', '.join(map(repr, found)) or 'nothing'})"[:400]
        )
    return Line(name, _moment(time, f"{where}: 'time' is no time (RFC 3339)"), found, where)


def _moment(text: str, otherwise: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadEvents(f"{otherwise} (found {text[:_SHOWN]!r})") from None
    if moment.tzinfo is None:
        raise BadEvents(f"{otherwise}: without a zone (found {text[:_SHOWN]!r})")
    return moment.timestamp()


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise BadEvents(f"{path} cannot be read: {error.strerror or error}") from None


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise BadEvents(f"{path}, line {number}: is far longer than an event")
        if line.strip():
            yield number, line


def _parsed(raw: bytes, where: str) -> dict[str, Any] | None:
    try:
        found = json.loads(raw.decode())
    except UnicodeDecodeError:
        raise BadEvents(f"{where}: is no text (found {_shown(raw)})") from None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _shown(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
