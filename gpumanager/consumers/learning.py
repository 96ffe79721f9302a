"""What is learned of each consumer while it works: how much memory its jobs take, what it keeps
after an unload, how long it loads, unloads and runs. Declared values are the prior."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumanager.consumers.footprint import (
    ENOUGH,
    REMEMBERED,
    Figure,
    Footprint,
    Raised,
    Seen,
    count,
    seconds,
)
from gpumanager.model import Declared, StoppedBy

log = logging.getLogger(__name__)

_UNLOADED = "http"
_VERSION = 2
_READ_VERSIONS = (1, 2)
"""In version 1 guesses and measurements were mixed, so its peaks are not taken over."""

_TIMES = ("load_s", "unload_s", "run_s", "cold_s")
"""`cold_s`: jobs that found their consumer not loaded, and loaded it themselves."""


@dataclass(frozen=True, slots=True)
class Times:
    """How long something took, in seconds: median, 95th percentile, of how many, and mean; and
    all of it, from the shortest to the longest."""

    p50: float
    p95: float
    count: int
    mean: float
    values: tuple[float, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Figures:
    """What was learned of one consumer; None where nothing was yet. `peak` is the most that its
    recent jobs held, `raised` what an out-of-memory has raised its footprint to, as long as that
    counts, `residue_mib` what it keeps after an unload: seen when one was waited for to its end,
    and less if less was seen since. `kept_mib` is what it kept after its latest unload.

    `cold_s` is how long jobs took that loaded their consumer themselves, `run_s` all others. What
    the former took longer than a usual run counts as a load.
    """

    peak: Figure | None = None
    raised: Raised | None = None
    residue_mib: int | None = None
    residue_at: float | None = None
    kept_mib: int | None = None
    load_s: Times | None = None
    unload_s: Times | None = None
    run_s: Times | None = None
    cold_s: Times | None = None


class _Record:
    def __init__(self) -> None:
        self.footprint = Footprint()
        self.residue_mib: int | None = None
        self.residue_at: float | None = None
        self.releasing: tuple[float, int] | None = None
        self.times = {name: deque[float](maxlen=REMEMBERED) for name in _TIMES}


class Learned:
    """The figures of all consumers. Safe from any thread. `now` gives seconds since the epoch."""

    def __init__(self, names: Iterable[str], now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._records = {name: _Record() for name in names}
        self._changes = 0

    def add(self, name: str) -> None:
        """Learn of one more consumer; what is known of it already stays."""
        with self._lock:
            self._records.setdefault(name, _Record())

    def forget(self, name: str) -> None:
        """Forget all of one consumer: what is declared of it is all there is again."""
        with self._lock:
            self._records[name] = _Record()
            self._changes += 1

    def figures(self, name: str) -> Figures:
        """What is known of one consumer."""
        with self._lock:
            record = self._records[name]
            times = {each: _times(record.times[each]) for each in _TIMES}
            if record.times["cold_s"] and (usual := times["run_s"]) is not None:
                loads = (max(0.0, seconds - usual.p50) for seconds in record.times["cold_s"])
                times["load_s"] = _times([*record.times["load_s"], *loads])
            return Figures(
                peak=record.footprint.peak,
                raised=record.footprint.raised(self._now()),
                residue_mib=record.residue_mib,
                residue_at=record.residue_at,
                kept_mib=record.residue_mib if record.releasing is None else record.releasing[1],
                **times,
            )

    def needed(self, name: str, declared: Declared) -> Figure:
        """What it needs to be resident and work. It is a guess, unless it is declared: it may
        cost others an eviction, but refuses nothing."""
        with self._lock:
            return self._records[name].footprint.needed(declared, self._now())

    def held(self, name: str, mib: int, source: Seen = "measured", *, working: bool = True) -> None:
        """It holds so much, loaded: by the card's figures for its processes, or by its own; during
        a job or, not `working`, at rest."""
        with self._lock:
            record = self._records[name]
            record.releasing = None
            if record.footprint.saw(mib, source, self._now(), working=working):
                self._changes += 1

    def ran(self, name: str, seconds: float, *, cold: bool = False) -> None:
        """A job of it has ended well. `cold`: the consumer was not loaded before it, so that
        loading is part of what it took."""
        with self._lock:
            record = self._records[name]
            record.times["cold_s" if cold else "run_s"].append(seconds)
            record.footprint.job_done(self._now())
            self._changes += 1

    def knows_enough(self, name: str) -> bool:
        """Whether enough of its jobs were measured for a declaration to count no more."""
        with self._lock:
            return self._records[name].footprint.measured_jobs >= ENOUGH

    def spilled(self, name: str) -> None:
        """Part of it is on the CPU: what it held since it was loaded is not what it needs."""
        with self._lock:
            self._records[name].footprint.spilled()

    def failed(self, name: str) -> None:
        """A job of it has failed: what it held meanwhile says nothing."""
        with self._lock:
            self._records[name].footprint.discard()

    def loaded(self, name: str, seconds: float) -> None:
        """It was loaded."""
        self._took(name, "load_s", seconds)

    def unloaded(self, name: str, seconds: float, kept_mib: int | None, until: float = 0.0) -> None:
        """It was unloaded, and kept `kept_mib`; None where that was not measured. Where more of
        it may come back until `until` (monotonic seconds), that is what it keeps only if it still
        does then."""
        self._took(name, "unload_s", seconds)
        with self._lock:
            record = self._records[name]
            record.footprint.unloaded()
            record.releasing = None
            if kept_mib is None:
                return
            if until:
                record.releasing = (until, kept_mib)
            if not until or kept_mib < (record.residue_mib or 0):
                record.residue_mib, record.residue_at = kept_mib, self._now()

    def kept(self, name: str, mib: int, now: float) -> None:
        """Unloaded and at rest, it was seen to hold so much at `now`: what it keeps is at most
        that."""
        with self._lock:
            record = self._records[name]
            if record.residue_mib is not None and mib < record.residue_mib:
                record.residue_mib, record.residue_at = mib, self._now()
                self._changes += 1
            if record.releasing is not None:
                until, at_most = record.releasing
                if mib > at_most:  # somebody else has it load
                    record.releasing = None
                elif now >= until:
                    record.releasing = None
                    record.residue_mib, record.residue_at = mib, self._now()
                    self._changes += 1
                else:
                    record.releasing = (until, mib)

    def ran_out(self, name: str, needed_mib: int) -> None:
        """A job ran out of memory that needs so much at least."""
        with self._lock:
            self._records[name].footprint.raise_to(needed_mib, self._now())
            self._changes += 1

    def _took(self, name: str, what: str, seconds: float) -> None:
        with self._lock:
            self._records[name].times[what].append(seconds)
            self._changes += 1

    # -- over restarts ---------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """How often something was learned; a mark to compare with a later one."""
        return self._changes

    def as_data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        with self._lock:
            return {
                name: {
                    "footprint": record.footprint.as_data(),
                    "residue_mib": record.residue_mib,
                    "residue_at": record.residue_at,
                    **{
                        each: [round(seconds, 4) for seconds in record.times[each]]
                        for each in _TIMES
                    },
                }
                for name, record in self._records.items()
            }

    def restore(self, data: Mapping[str, Any]) -> None:
        """Take over what `as_data` gave; consumers that are not configured any more are passed
        over. Raises ValueError, TypeError, KeyError or AttributeError for what it never gave."""
        for name, entry in data.items():
            if name not in self._records:
                continue
            record = _Record()
            if "peaks_mib" not in entry:  # as version 1 had them
                record.footprint = Footprint.from_data(entry["footprint"], self._now())
            residue = entry["residue_mib"]
            record.residue_mib = None if residue is None else count(residue)
            at = entry.get("residue_at")  # a newer key
            record.residue_at = None if at is None else seconds(at)
            for each in _TIMES:
                values = entry.get(each, ()) if each == "cold_s" else entry[each]  # a newer key
                record.times[each].extend(seconds(value) for value in values)
            with self._lock:
                self._records[name] = record


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


def state_path(configured: str | None, listen: str, environ: Mapping[str, str]) -> Path:
    """Where the state is kept: as configured, else in systemd's state directory, else in the
    user's, by the address the broker listens on, so that two brokers do not share one."""
    if configured is not None:
        return Path(configured)
    name = "state-" + "".join(c if c.isalnum() else "-" for c in listen) + ".json"
    if systemd := environ.get("STATE_DIRECTORY"):
        return Path(systemd.partition(":")[0]) / name
    home = environ.get("XDG_STATE_HOME")
    base = Path(home) if home else Path(environ.get("HOME", "/tmp")) / ".local" / "state"  # noqa: S108
    return base / "gpumanager" / name


def _times(values: Iterable[float]) -> Times | None:
    """By the nearest rank."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    return Times(p50, p95, len(ordered), sum(ordered) / len(ordered), tuple(ordered))


def _processes(listed: Any) -> tuple[tuple[int, float], ...]:
    return tuple((int(pid), float(born)) for pid, born in listed)
