"""Events as JSON lines in a file that is rotated by size."""

from __future__ import annotations

import json
import logging
from logging.handlers import RotatingFileHandler

from gpumanager.config import EventsConfig
from gpumanager.telemetry.eventlog import EventLog

log = logging.getLogger(__name__)

WRITE_S = 1.0
"""How much of what happened may be lost if the broker is killed."""


class EventFile:
    """Appends what is new. `write` is the body of a periodic worker; a disk that does not take
    it is tried again, as long as the events are kept in memory."""

    def __init__(self, events: EventLog, settings: EventsConfig) -> None:
        self._events = events
        self._settings = settings
        self._written = 0
        self._failing = False
        self._file: RotatingFileHandler | None = None

    def write(self) -> float:
        """Write what came since the last call; returns the seconds until the next."""
        excerpt = self._events.since(self._written)
        lines = [json.dumps(event.as_json()) for event in excerpt.events]
        if excerpt.missed:
            lines.insert(0, json.dumps({"event": "missed", "count": excerpt.missed}))
        if not lines:
            return WRITE_S
        try:
            self._append(lines)
        except OSError as error:
            if not self._failing:
                reason = error.strerror or str(error)
                log.warning("events not written", extra={"reason": reason})
            self._failing = True
        else:
            self._written, self._failing = excerpt.last, False
        return WRITE_S

    def close(self) -> None:
        """Write the last ones, and close."""
        self.write()
        if self._file is not None:
            self._file.close()

    def _append(self, lines: list[str]) -> None:
        if self._file is None:
            self._file = RotatingFileHandler(
                self._settings.file or "",
                maxBytes=self._settings.max_mib * 1024 * 1024,
                backupCount=self._settings.keep_files,
                encoding="utf-8",
            )
        record = logging.makeLogRecord({"msg": "\n".join(lines)})
        if self._file.shouldRollover(record):
            self._file.doRollover()
        stream = self._file.stream or self._file._open()
        self._file.stream = stream
        stream.write(record.msg + self._file.terminator)
        stream.flush()
