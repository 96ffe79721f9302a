"""What is learned of each consumer, and of its models, while it works: how much memory its jobs
take, what it keeps after an unload, how long it loads, unloads and runs. Declared values are the
prior."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from gpumanager.consumers.footprint import (
    RAISED_FOR_S,
    REMEMBERED,
    Figure,
    Footprint,
    Needs,
    Raised,
    Seen,
    count,
    seconds,
)
from gpumanager.consumers.growth import Growths
from gpumanager.consumers.shares import MOST_MODELS
from gpumanager.model import Declared, parts_of

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


@dataclass(frozen=True)
class Figures:
    """What was learned of one consumer, as of one moment; None where nothing was yet. `peak` is the
    most that its recent jobs held, `residue_mib` what it keeps after an unload: seen when one was
    waited for to its end, and less if less was seen since. `kept_mib` is what it kept after its
    latest unload.

    `loads`, `unloads`, `runs` and `colds` are how long each took, in seconds, the latest last.
    `colds` are jobs that loaded their consumer themselves, `runs` all others.
    """

    peak: Figure | None = None
    needs: Needs = field(default_factory=Needs)
    residue_mib: int | None = None
    residue_at: float | None = None
    kept_mib: int | None = None
    loads: tuple[float, ...] = ()
    unloads: tuple[float, ...] = ()
    runs: tuple[float, ...] = ()
    colds: tuple[float, ...] = ()

    def needed(self, declared: Declared, context: int | None = None) -> Figure:
        """What it needs to be resident and work; with a `context` of so many tokens. It is a guess,
        unless it is declared: it may cost others an eviction, but refuses nothing."""
        return self.needs.of(declared, context)

    @property
    def raised(self) -> Raised | None:
        """What an out-of-memory has raised to what it needs, as long as that counts."""
        return self.needs.raised

    @cached_property
    def load_s(self) -> Times | None:
        """Of its loads; what jobs took longer than usual that loaded it themselves counts, too."""
        cold: Iterable[float] = ()
        if self.colds and (usual := self.run_s) is not None:
            cold = (max(0.0, seconds - usual.p50) for seconds in self.colds)
        return _times([*self.loads, *cold])

    @cached_property
    def unload_s(self) -> Times | None:
        """Of its unloads."""
        return _times(self.unloads)

    @cached_property
    def run_s(self) -> Times | None:
        """Of its jobs that found it loaded."""
        return _times(self.runs)

    @cached_property
    def cold_s(self) -> Times | None:
        """Of its jobs that did not."""
        return _times(self.colds)


NOTHING = Figures()


class _Record:
    def __init__(self) -> None:
        self.footprint = Footprint()
        self.residue_mib: int | None = None
        self.residue_at: float | None = None
        self.releasing: tuple[float, int] | None = None
        self.times = {name: deque[float](maxlen=REMEMBERED) for name in _TIMES}
        # Of the footprint, as long as nothing is new in it: most jobs change only the times.
        self.drawn: tuple[Figure | None, Needs] | None = None

    def figures(self, now: float) -> Figures:
        if self.drawn is None:
            self.drawn = (self.footprint.peak, self.footprint.needs(now))
        peak, needs = self.drawn
        return Figures(
            peak=peak,
            needs=needs,
            residue_mib=self.residue_mib,
            residue_at=self.residue_at,
            kept_mib=self.residue_mib if self.releasing is None else self.releasing[1],
            loads=tuple(self.times["load_s"]),
            unloads=tuple(self.times["unload_s"]),
            runs=tuple(self.times["run_s"]),
            colds=tuple(self.times["cold_s"]),
        )


class Learned:
    """The figures of all consumers and their models, by the names of residents: a consumer, or
    `consumer/model`. Nothing is known of a model before the first is learned of it. `growths` knows
    which consumers leak. Safe from any thread. `now` gives seconds since the epoch."""

    def __init__(self, names: Iterable[str], now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._records = {name: _Record() for name in names}
        self._known: Mapping[str, Figures] = MappingProxyType(dict.fromkeys(self._records, NOTHING))
        self._tell: Callable[[Mapping[str, Figures]], object] = lambda known: None  # noqa: ARG005
        self._changes = 0
        self.growths = Growths()

    def publish(self, tell: Callable[[Mapping[str, Figures]], object]) -> None:
        """Have `tell`, which never raises, told what is known, by consumer, now and after each
        change: a mapping that is never changed again."""
        with self._lock:
            self._tell = tell
            tell(self._known)

    def add(self, name: str) -> None:
        """Learn of one more consumer; what is known of it already stays."""
        with self._lock:
            self._records.setdefault(name, _Record())
            self._changed(name)

    def forget(self, name: str) -> None:
        """Forget all of one consumer and its models, or of one model: what is declared of it is all
        there is again."""
        with self._lock:
            for model in self._models_of(name):
                self._drop(model)
            if parts_of(name)[1] is not None:
                self._drop(name)
            else:
                self._records[name] = _Record()
                self._changed(name)
            self._changes += 1
        self.growths.forget(name)

    def forget_the_old(self) -> None:
        """Figures that have counted for long enough count no more."""
        now = self._now()
        for name, known in self._known.items():
            if known.raised is not None and now - known.raised.at >= RAISED_FOR_S:
                with self._lock:
                    self._changed(name)

    def figures(self, name: str) -> Figures:
        """What is known of one consumer or model."""
        self.forget_the_old()
        return self._known.get(name, NOTHING)

    def needed(self, name: str, declared: Declared) -> Figure:
        """See `Figures.needed`."""
        return self.figures(name).needed(declared)

    def held(self, name: str, mib: int, source: Seen = "measured", *, working: bool = True) -> None:
        """It holds so much, loaded: by the card's figures for its processes, or by its own; during
        a job or, not `working`, at rest."""
        with self._lock:
            record = self._record(name)
            was_releasing, record.releasing = record.releasing, None
            news = record.footprint.saw(mib, source, self._now(), working=working)
            self._changes += news
            if news or was_releasing:  # most samples are none
                self._changed(name)

    def ran(
        self, name: str, seconds: float, *, cold: bool = False, context: int | None = None
    ) -> None:
        """A job of it has ended well. `cold`: it was not loaded before, so that loading is part of
        what it took. `context` is for how many tokens its model is loaded."""
        with self._lock:
            record = self._record(name)
            record.times["cold_s" if cold else "run_s"].append(seconds)
            self._changed(name, footprint=record.footprint.job_done(self._now(), context))
            self._changes += 1

    def knows_enough(self, name: str) -> bool:
        """Whether enough of its jobs were measured for a declaration to count no more."""
        return self._known.get(name, NOTHING).needs.known

    def spilled(self, name: str) -> None:
        """Part of it is on the CPU: what it held since it was loaded is not what it needs."""
        with self._lock:
            self._record(name).footprint.spilled()
            self._changed(name)

    def leaks(self, name: str) -> None:
        """It turned out to leak with its jobs: what had leaked by then is taken from what they, and
        those with each of its models, were seen to hold."""
        leaked = self.growths.leaked(name)
        with self._lock:
            for each, record in self._records.items():
                if parts_of(each)[0] == name:
                    record.footprint.without(leaked)
                    self._changed(each)
            self._changes += 1

    def failed(self, name: str) -> None:
        """A job of it has failed: what it held meanwhile says nothing."""
        with self._lock:
            if name in self._records:
                self._records[name].footprint.discard()
                self._changed(name)

    def loaded(self, name: str, seconds: float) -> None:
        """Note how many seconds a load took."""
        with self._lock:
            self._record(name).times["load_s"].append(seconds)
            self._changed(name)
            self._changes += 1

    def unloaded(self, name: str, seconds: float, kept_mib: int | None, until: float = 0.0) -> None:
        """It was unloaded, and kept `kept_mib`; None where that was not measured. Where more of
        it may come back until `until` (monotonic seconds), that is what it keeps only if it still
        does then."""
        with self._lock:
            record = self._record(name)
            record.times["unload_s"].append(seconds)
            record.footprint.unloaded()
            record.releasing = None
            if kept_mib is not None:
                if until:
                    record.releasing = (until, kept_mib)
                if not until or kept_mib < (record.residue_mib or 0):
                    record.residue_mib, record.residue_at = kept_mib, self._now()
            self._changed(name)
            self._changes += 1

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
            self._changed(name)

    def ran_out(self, name: str, needed_mib: int) -> None:
        """A job ran out of memory that needs so much at least."""
        with self._lock:
            self._record(name).footprint.raise_to(needed_mib, self._now())
            self._changed(name)
            self._changes += 1

    def _record(self, name: str) -> _Record:
        """With the lock: what is known of a consumer, or of a model, of which this may be the
        first. Of a consumer's models the `MOST_MODELS` are kept that were heard of last."""
        consumer, model = parts_of(name)
        if model is None or consumer not in self._records:
            return self._records[name]
        record = self._records.pop(name, None)
        if record is None:
            record = _Record()
            models = self._models_of(consumer)
            if len(models) >= MOST_MODELS:
                self._drop(models[0])
        self._records[name] = record
        return record

    def _models_of(self, consumer: str) -> list[str]:
        return [each for each in self._records if each.startswith(f"{consumer}/")]

    def _drop(self, model: str) -> None:
        self._records.pop(model, None)
        if model in self._known:
            self._known = MappingProxyType(
                {name: each for name, each in self._known.items() if name != model}
            )
            self._tell(self._known)

    def _changed(self, name: str, *, footprint: bool = True) -> None:
        """With the lock: publish, if it is news. Without `footprint`, nothing changed in that."""
        record = self._records.get(name)
        if record is None:  # a model that was just forgotten
            return
        if footprint:
            record.drawn = None
        figures = record.figures(self._now())
        if figures != self._known.get(name):
            self._known = MappingProxyType({**self._known, name: figures})
            self._tell(self._known)

    # -- over restarts ---------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """How often something was learned; a mark to compare with a later one."""
        return self._changes

    def as_data(self) -> dict[str, Any]:
        """What the state file keeps of all consumers, as plain data."""
        with self._lock:
            return {
                name: {
                    "footprint": record.footprint.as_data(),
                    "residue_mib": record.residue_mib,
                    "residue_at": record.residue_at,
                    "growth": self.growths.as_data(name),
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
            if parts_of(name)[0] not in self._records:
                continue
            record = _Record()
            if "peaks_mib" not in entry:  # as version 1 had them
                record.footprint = Footprint.from_data(entry["footprint"], self._now())
            residue = entry["residue_mib"]
            record.residue_mib = None if residue is None else count(residue)
            at = entry.get("residue_at")  # a newer key
            record.residue_at = None if at is None else seconds(at)
            growth = entry.get("growth")  # a newer key
            if growth is not None:
                self.growths.restore(name, growth)
            for each in _TIMES:
                values = entry.get(each, ()) if each == "cold_s" else entry[each]  # a newer key
                record.times[each].extend(seconds(value) for value in values)
            with self._lock:
                self._record(name)  # makes room for a model
                self._records[name] = record
                self._changed(name)


def _times(values: Iterable[float]) -> Times | None:
    """By the nearest rank."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    return Times(p50, p95, len(ordered), sum(ordered) / len(ordered), tuple(ordered))
