"""The file that outlives the broker: what was learned of each consumer, and which ones were
stopped or unloaded."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpumanager.consumers.learning import Learned
from gpumanager.folders import state_folder
from gpumanager.model import StoppedBy

log = logging.getLogger(__name__)

_UNLOADED = "http"
_VERSION = 2
_READ_VERSIONS = (1, 2)
"""In version 1 guesses and measurements were mixed, so its peaks are not taken over."""


class StateFile:
    """What outlives the broker: what was learned, and which consumers it has stopped, or, by the
    method `http`, unloaded."""

    def __init__(
        self,
        path: Path,
        learned: Learned,
        stopped_by: Callable[[], Mapping[str, StoppedBy]],
    ) -> None:
        self._path = path
        self._learned = learned
        self._stopped_by = stopped_by
        self._saved: tuple[int, Mapping[str, StoppedBy]] = (0, {})
        self._failed = False
        self._lock = threading.Lock()

    def load(self) -> Mapping[str, StoppedBy]:
        """Restore what was learned; returns the consumers that were stopped. A file that cannot
        be understood is put aside, with a warning, and nothing is restored."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("state not read", extra={"file": str(self._path), "reason": str(error)})
            return {}
        try:
            data = json.loads(text)
            if data["version"] not in _READ_VERSIONS:
                raise ValueError(f"version {data['version']!r}")
            self._learned.restore(data["consumers"])
            stopped_by = {
                name: StoppedBy(str(entry["rung"]), _processes(entry["processes"]))
                for name, entry in data["parked"].items()
            }
            for name, processes in data.get("unloaded", {}).items():  # a newer key
                stopped_by[name] = StoppedBy(_UNLOADED, _processes(processes))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            aside = self._path.with_name(self._path.name + ".bad")
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            reason = f"not understood ({error}), put aside as {aside.name}"
            log.warning("state not read", extra={"file": str(self._path), "reason": reason})
            return {}
        self._saved = (self._learned.changes, stopped_by)
        return stopped_by

    def save(self) -> None:
        """Write it, if anything changed: whole or not at all. Never raises."""
        with self._lock:
            stopped_by, changes = dict(self._stopped_by()), self._learned.changes
            if (changes, stopped_by) == self._saved:
                return
            try:
                self._write(stopped_by)
            except OSError as error:
                if not self._failed:
                    extra = {"file": str(self._path), "reason": str(error)}
                    log.warning("state not saved", extra=extra)
                self._failed = True
            else:
                self._saved, self._failed = (changes, stopped_by), False

    def _write(self, stopped_by: Mapping[str, StoppedBy]) -> None:
        data = {
            # `parked` and `rung`: as older brokers have it. Stopped, and by which method.
            "version": _VERSION,
            "consumers": self._learned.as_data(),
            "parked": {
                name: {"rung": each.method, "processes": each.processes}
                for name, each in stopped_by.items()
                if each.method != _UNLOADED
            },
            "unloaded": {
                name: each.processes
                for name, each in stopped_by.items()
                if each.method == _UNLOADED
            },
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(self._path.name + ".new")
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)


def _processes(listed: Any) -> tuple[tuple[int, float], ...]:
    return tuple((int(pid), float(born)) for pid, born in listed)


def state_path(configured: str | None, listen: str, environ: Mapping[str, str]) -> Path:
    """Where the state is kept: as configured, else in systemd's state directory, else in the
    user's, by the address the broker listens on, so that two brokers do not share one."""
    if configured is not None:
        return Path(configured)
    name = "state-" + "".join(c if c.isalnum() else "-" for c in listen) + ".json"
    if systemd := environ.get("STATE_DIRECTORY"):
        return Path(systemd.partition(":")[0]) / name
    return state_folder(environ) / name
