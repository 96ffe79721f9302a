"""Jobs that ran out of the card's memory: when that is believed, and what is learned from it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpumanager.config import ConsumerConfig
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.gpu.inventory import holders, left, model_shares
from gpumanager.jobs.echo import says_out_of_memory
from gpumanager.model import CONTEXT_MIB, Job, MemoryReading, parts_of
from gpumanager.telemetry.events import Emit, OutOfMemory, OutOfMemoryDoubted, OutOfMemoryHealed
from gpumanager.upstream.exchange import Exchange

LARGEST_FAILURE_BYTES = 64 * 1024
"""An answer that says that memory ran out is small; what is larger is handed on unread."""

LARGEST_REQUEST_BYTES = 4 * 1024 * 1024
"""So much of a request is compared with an answer that says that memory ran out."""

PLENTY = 3
"""Where the card has so many times the room that the consumer was ever known to need, what it says
of a lack of memory is of another kind, or another card's."""

RAISE = 1.25
"""By how much what a consumer needs is raised, where nobody can measure what it really is."""


@dataclass(frozen=True, slots=True)
class MemoryFailures:
    """Jobs that ran out of the card's memory: how many there were, and how many of them were
    done in a second run."""

    seen: int = 0
    healed: int = 0


@dataclass(frozen=True, slots=True)
class Shortage:
    """One of them, of a job that needs `resident`, in MiB as of that moment: `needed` is what was
    taken for enough, `room` what that held and what was free, `most` what can ever be free for it.
    `alone`: nothing else held anything, so that it could not have been given more. `likely` is
    False where the card's figures speak against it."""

    resident: str
    needed_mib: int
    room_mib: int
    most_mib: int
    alone: bool
    likely: bool = True


class Shortages:
    """`look` takes a fresh reading of the card, and has it learned from; None where the card
    cannot be measured. Safe from any thread."""

    def __init__(
        self,
        registry: Registry,
        learned: Learned,
        look: Callable[[], MemoryReading | None],
        emit: Emit,
    ) -> None:
        self._registry = registry
        self._learned = learned
        self._look = look
        self._emit = emit
        self._lock = threading.Lock()
        self._failures = MemoryFailures()

    @property
    def failures(self) -> MemoryFailures:
        """How many jobs ran out of memory since the start, and how many of them were healed."""
        return self._failures

    def in_answer(self, job: Job, consumer: ConsumerConfig, exchange: Exchange) -> Shortage | None:
        """The shortage that an answer tells of, of which nothing was relayed yet; None if it tells
        of none. Nothing is learned from it yet."""
        signs = consumer.out_of_memory
        if exchange.status not in signs.status:
            return None
        body = exchange.read_ahead(LARGEST_FAILURE_BYTES)
        if body is None or not signs.said_in(body):  # before the request is read for it
            return None
        return self._in_text(job, consumer, body, exchange.request_text(LARGEST_REQUEST_BYTES))

    def in_result(
        self, job: Job, consumer: ConsumerConfig, result: bytes, request: bytes
    ) -> Shortage | None:
        """As above, for what a consumer says of a job that was answered at once and is over now.
        Only what its `done` rule calls the failure is looked at: the rest may well hold the
        client's request."""
        try:
            answer = json.loads(result)
        except (ValueError, RecursionError):
            return None
        failure = None if consumer.done is None else consumer.done.find_failure(answer)
        if not failure:
            return None
        return self._in_text(job, consumer, json.dumps(failure).encode(), request)

    def _in_text(
        self, job: Job, consumer: ConsumerConfig, said: bytes, request: bytes
    ) -> Shortage | None:
        if not says_out_of_memory(consumer.out_of_memory, said, request):
            return None
        shortage = self._assess(job, consumer)
        name, room, needed = job.consumer, shortage.room_mib, shortage.needed_mib
        if not shortage.likely:
            self._emit(OutOfMemoryDoubted(consumer=name, available_mib=room, needed_mib=needed))
            return None
        with self._lock:
            self._failures = replace(self._failures, seen=self._failures.seen + 1)
        self._emit(
            OutOfMemory(consumer=name, model=job.model, available_mib=room, needed_mib=needed)
        )
        return shortage

    def healed(self, shortage: Shortage) -> None:
        """The job was done in a second run, alone on the card: learn what it holds now, or, where
        that is not measured, guess."""
        name, _ = parts_of(shortage.resident)
        reading = self._look()  # while it holds what it really needs
        snapshot = self._registry.now.seeing(reading)
        holds = None if reading is None else reading.measured_mib(name)
        own = model_shares(snapshot, name).get(parts_of(shortage.resident)[1] or "")
        if holds:
            needed_mib = min(own or holds, shortage.most_mib)
            self._learned.ran_out(shortage.resident, needed_mib)
        else:
            self._guess(shortage)
        with self._lock:
            self._failures = replace(self._failures, healed=self._failures.healed + 1)
        self._emit(OutOfMemoryHealed(consumer=name))

    def not_retried(self, shortage: Shortage) -> None:
        """There was no second run. What fails alone on the card would fail with any room, so
        nothing is learned from it."""
        if not shortage.alone:
            self._guess(shortage)

    def _guess(self, shortage: Shortage) -> None:
        """It needs more than there was room for, and more than was taken for enough."""
        more = max(shortage.room_mib, math.ceil(shortage.needed_mib * RAISE))
        needed = min(more, shortage.most_mib)
        if needed > shortage.needed_mib:
            self._learned.ran_out(shortage.resident, needed)

    def _assess(self, job: Job, consumer: ConsumerConfig) -> Shortage:
        name, reading = job.consumer, self._look()
        snapshot = self._registry.now.seeing(reading)
        holds = holders(snapshot)
        now = left(snapshot, holds, name)
        own = holds.pop(name)
        others = [each.mib for each in holds.values()]
        needed = snapshot.of(job).needed(job.resident, job.context)
        # What its other models hold is no room for this one.
        theirs = model_shares(snapshot, name)
        theirs.pop(job.model or "", None)
        others += theirs.values()
        room = max(0, own.surely_mib - sum(theirs.values())) + now.free_mib
        known = max(needed.mib, own.mib - sum(theirs.values()))
        nothing = needed.source == "measured" and known == 0
        elsewhere = nothing and room >= consumer.vram_resident_mib
        plenty = known > 0 and room >= PLENTY * known
        # Of a model of which nothing was seen, only guessed, the card has no figures that could
        # speak against it.
        needs = snapshot.figures(job.resident).needs
        unseen = needs.measured is None and needs.reported is None
        guessed = unseen and consumer.declared_for(job.model) is None
        alone = all(mib <= CONTEXT_MIB for mib in others)
        # What is nobody's, as a desktop, is never free for a job.
        held_mib = own.mib + sum(each.mib for each in holds.values())
        nobodys = 0 if reading is None else max(0, now.used_mib - held_mib)
        most = now.total_mib - snapshot.config.gpu.reserved_mib - nobodys
        return Shortage(
            job.resident,
            needed_mib=needed.mib,
            room_mib=room,
            most_mib=max(0, most) if now.total_mib else needed.mib,
            alone=alone,
            # Alone it costs nobody anything to believe it.
            likely=alone or reading is None or guessed or not (elsewhere or plenty),
        )
