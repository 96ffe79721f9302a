"""The rungs of a consumer's `evict` that need no co-operation: stop it, and start it again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from gpumanager.config import Config, Rung
from gpumanager.errors import ConsumerUnreachable
from gpumanager.model import Parked
from gpumanager.processes import still_there, with_birth
from gpumanager.reclaim import checkpoint, containers, signals, units
from gpumanager.reclaim.errors import ReclaimFailed

log = logging.getLogger(__name__)

STATE_S = 1.0
"""The longest that a question to the driver may take, beside its start."""

Find = Callable[[str], Sequence[int]]


class Ladder:
    """Carries the rungs out. Safe from any thread; blocks for as long as a rung's `grace` says,
    and a little more.

    `listening` finds the processes that listen for a consumer, `on_card` those that hold the
    card's memory for it.
    """

    def __init__(self, config: Config, listening: Find, on_card: Find) -> None:
        self._config = config
        self._listening = listening
        self._on_card = on_card

    def park(self, name: str, rung: Rung) -> Parked:
        """Stop the consumer; returns what is needed to bring it back. Raises
        ConsumerUnreachable."""
        with _explained(name):
            return self._park(name, rung)

    def bring_back(self, name: str, parked: Parked) -> bool:
        """Start the consumer again; True if it can be used at once, False if it has yet to get
        ready. Raises ConsumerUnreachable."""
        with _explained(name):
            return self._bring_back(name, parked)

    def returned(self, name: str, parked: Parked) -> Literal["resumed", "replaced"] | None:
        """Whether a consumer that was stopped by `checkpoint` is back by somebody else's doing: its
        processes run again, or others have taken their place; None if it is not, or nobody can
        tell. That it answers shows nothing: only its CUDA calls are stopped."""
        same = still_there(parked.processes)
        if not same:
            return "replaced"
        if not set(same) & set(self._on_card(name)):
            return None  # with its memory on the host it does not show on the card
        try:
            return "resumed" if checkpoint.run_on(same, STATE_S) else None
        except ReclaimFailed as error:
            log.warning("state unknown", extra={"consumer": name, "reason": str(error)})
            return None

    def _park(self, name: str, rung: Rung) -> Parked:
        processes: tuple[tuple[int, float], ...] = ()
        if rung.unit is not None:
            units.stop(rung.unit, rung.scope, rung.grace)
        elif rung.container is not None:
            containers.stop(rung.container, rung.socket, rung.grace)
        elif rung.signal is not None:
            signals.end(self._listening(name), rung.signal, rung.grace)
        elif rung.checkpoint:
            processes = tuple(with_birth(self._on_card(name)))
            if not processes:
                raise ReclaimFailed("its processes on the card cannot be seen")
            checkpoint.suspend([pid for pid, _ in processes], rung.grace)
        else:
            raise ReclaimFailed(f"{rung.name} is no way to stop a process")
        return Parked(rung.name, processes)

    def _bring_back(self, name: str, parked: Parked) -> bool:
        consumer = self._config.consumers[name]
        rung = next((rung for rung in consumer.rungs if rung.name == parked.rung), None)
        if rung is None:
            raise ReclaimFailed(f"was stopped by {parked.rung}, which `evict` no longer names")
        if rung.unit is not None:
            units.start(rung.unit, rung.scope, consumer.ready_timeout)
        elif rung.container is not None:
            containers.start(rung.container, rung.socket, consumer.ready_timeout)
        elif rung.signal is not None:
            if rung.start:
                signals.start(rung.start)
        else:
            same = still_there(parked.processes)  # one that died needs nothing
            checkpoint.resume(same, rung.grace)
            return bool(same)
        return False


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except ReclaimFailed as error:
        raise ConsumerUnreachable(f"{name}: {error}", consumer=name) from error
