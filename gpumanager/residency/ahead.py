"""Looking ahead: while a job runs, what the next swap will load is prepared, as far as that does
not touch the card and the config says how. The swap itself is shorter then.

Runs on a thread of its own, outside any lock, and takes no turn. No job waits for it, and none
fails by it: what it could not do is done in the job's turn, as it would have been without it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError
from gpumanager.host import pagecache
from gpumanager.model import StoppedBy, parts_of
from gpumanager.scheduling.interface import Scheduler
from gpumanager.telemetry.events import Emit, Prefetched, StartedAhead

INTERVAL_S = 0.5
LONGEST_INTERVAL_S = 10.0
"""Between two looks at the queue."""

AHEAD_S = 120.0
"""What has its turn later than that is not prepared yet: it may be overtaken, and what was read
might have to leave the page cache again."""

CHECK_S = 0.25
"""How often it is looked, while files are read, whether what they are for is still next."""

SHARE_OF_MEMORY = 0.5
"""Of the host's memory that is available, no more is filled for one swap."""

STARTED_BY = ("unit", "container")
"""The eviction methods whose consumers are started ahead. To start them twice does no harm: the
job's turn may come meanwhile, and starts them, too."""

MIB = 1024 * 1024

log = logging.getLogger(__name__)


class Starts(Protocol):
    """Starts consumers that the broker has stopped. Raises BrokerError on failure."""

    def bring_back(self, name: str, stopped_by: StoppedBy) -> bool:
        """Start it again."""


@dataclass(frozen=True, slots=True)
class _Swap:
    """To a target that had its last job at that time: after the next one, it is another swap."""

    target: str
    used: float | None


class LookAhead:
    """`look` is the body of a periodic worker. `available` tells how many bytes of the host's
    memory are available."""

    def __init__(
        self,
        registry: Registry,
        scheduler: Scheduler,
        starts: Starts,
        clock: Clock,
        emit: Emit,
        available: Callable[[], int] = pagecache.available_bytes,
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._starts = starts
        self._clock = clock
        self._emit = emit
        self._available = available
        self._prepared: _Swap | None = None
        self._started: dict[str, StoppedBy] = {}
        self._stopping = threading.Event()

    @property
    def needed(self) -> bool:
        """Whether the config asks for anything of it."""
        return any(
            consumer.prefetches or consumer.start_ahead
            for consumer in self._registry.now.consumers.values()
        )

    def stop(self) -> None:
        """End what is being read. Idempotent; it does nothing any more after this."""
        self._stopping.set()

    def look(self) -> float:
        """Prepare the next swap's target, once; returns the seconds until the next look."""
        swap = self._next_swap()
        if swap is None or swap == self._prepared:
            self._prepared = swap
            return INTERVAL_S
        far_s = self._turn_in(swap.target) - AHEAD_S
        if far_s > 0:
            return min(max(far_s, INTERVAL_S), LONGEST_INTERVAL_S)
        self._prepared = swap
        owner, _ = parts_of(swap.target)
        consumer = self._registry.now.consumers.get(owner)
        if consumer is not None:  # a reload may have just removed it
            self._start(owner, consumer)
            self._read(swap, consumer)
        return INTERVAL_S

    def _next_swap(self) -> _Swap | None:
        """To what the first waiting job needs that is not loaded, while another job runs; None
        where there is none, or its own turn has come."""
        if self._stopping.is_set() or not self._scheduler.stats().in_flight:
            return None
        now = self._registry.now
        for resident in self._scheduler.upcoming():
            owner, model = parts_of(resident)
            consumer, state = now.consumers.get(owner), now.states.get(owner)
            if consumer is None or state is None or state.busy:
                continue  # a busy one is being loaded, or unloaded, right now
            apart = consumer.apart(model)
            if state.stopped_by is not None or not state.has_loaded(apart):
                used = state.last_used if apart is None else state.model(apart).last_used
                return _Swap(resident, used)
        return None

    def _turn_in(self, target: str) -> float:
        """In how many seconds its first job is expected to have its turn."""
        turns = (
            entry.turn.wait_s
            for entry in self._scheduler.queue()
            if entry.state == "waiting" and entry.job.resident == target
        )
        return min(turns, default=0.0)

    def _start(self, name: str, consumer: ConsumerConfig) -> None:
        """Start its process, if the broker has stopped it. Once for each time that it was: if that
        fails, its job's turn will tell why."""
        stopped_by = self._registry.get(name).stopped_by
        if not consumer.start_ahead or stopped_by is None or stopped_by.method not in STARTED_BY:
            return
        if self._started.get(name) is stopped_by:
            return
        self._started[name] = stopped_by
        began = self._clock.monotonic()
        try:
            with self._registry.using(name):
                self._starts.bring_back(name, stopped_by)
        except BrokerError as error:
            log.warning("not started ahead", extra={"consumer": name, "reason": error.message})
        else:
            self._emit(StartedAhead(consumer=name, ms=self._ms_since(began)))

    def _read(self, swap: _Swap, consumer: ConsumerConfig) -> None:
        """Read its files into the page cache, as long as it is the next."""
        owner, model = parts_of(swap.target)
        places = consumer.files_of(model)
        if not places:
            return
        began, read = self._clock.monotonic(), 0
        most = int(self._available() * SHARE_OF_MEMORY)
        still_next = self._still_next(swap)
        pagecache.idle_io()
        for file in pagecache.files_of(places):
            if read >= most or not still_next():
                break
            try:
                read += pagecache.read_ahead(file, most - read, still_next)
            except OSError as error:
                reason = f"{file}: {error.strerror or error}"
                log.warning("not prefetched", extra={"consumer": owner, "reason": reason})
        if read:
            read_mib, ms = max(1, round(read / MIB)), self._ms_since(began)
            self._emit(Prefetched(consumer=owner, model=model, read_mib=read_mib, ms=ms))

    def _still_next(self, swap: _Swap) -> Callable[[], bool]:
        """Whether a swap is the next one, which is looked at now and then."""
        looked, is_next = self._clock.monotonic(), True

        def still() -> bool:
            nonlocal looked, is_next
            now = self._clock.monotonic()
            if is_next and now - looked >= CHECK_S:
                looked, is_next = now, self._next_swap() == swap
            return is_next and not self._stopping.is_set()

        return still

    def _ms_since(self, began: float) -> int:
        return round((self._clock.monotonic() - began) * 1000)
