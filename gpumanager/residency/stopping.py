"""The eviction methods that need no co-operation of the consumer: stop it, and start it again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from gpumanager.config import Config, EvictionMethod
from gpumanager.errors import ConsumerUnreachable
from gpumanager.host import checkpoint, engine, signals, units
from gpumanager.host.errors import ReclaimFailed
from gpumanager.host.processes import still_there, with_birth
from gpumanager.model import StoppedBy

log = logging.getLogger(__name__)

STATE_S = 1.0
"""The longest that a question to the driver may take, beside its start."""

Find = Callable[[str], Sequence[int]]


class Stopping:
    """Stops consumers and starts them again. Safe from any thread; blocks for as long as a method's
    `grace` says, and a little more.

    `listening` finds the processes that listen for a consumer, `on_card` those that hold the
    card's memory for it.
    """

    def __init__(self, config: Config, listening: Find, on_card: Find) -> None:
        self._config = config
        self._listening = listening
        self._on_card = on_card

    def stop(self, name: str, method: EvictionMethod) -> StoppedBy:
        """Stop the consumer; returns what is needed to bring it back. Raises
        ConsumerUnreachable."""
        with _explained(name):
            return self._stop(name, method)

    def bring_back(self, name: str, stopped_by: StoppedBy) -> bool:
        """Start the consumer again; True if it can be used at once, False if it has yet to get
        ready. Raises ConsumerUnreachable."""
        with _explained(name):
            return self._bring_back(name, stopped_by)

    def returned(self, name: str, stopped_by: StoppedBy) -> Literal["resumed", "replaced"] | None:
        """Whether a consumer that was stopped by `checkpoint` is back by somebody else's doing: its
        processes run again, or others have taken their place; None if it is not, or nobody can
        tell. That it answers shows nothing: only its CUDA calls are stopped."""
        same = still_there(stopped_by.processes)
        if not same:
            return "replaced"
        if not set(same) & set(self._on_card(name)):
            return None  # with its memory on the host it does not show on the card
        try:
            return "resumed" if checkpoint.run_on(same, STATE_S) else None
        except ReclaimFailed as error:
            log.warning("state unknown", extra={"consumer": name, "reason": str(error)})
            return None

    def _stop(self, name: str, method: EvictionMethod) -> StoppedBy:
        processes: tuple[tuple[int, float], ...] = ()
        if method.unit is not None:
            units.stop(method.unit, method.scope, method.grace)
        elif method.container is not None:
            engine.stop(method.container, method.socket, method.grace)
        elif method.signal is not None:
            signals.end(self._listening(name), method.signal, method.grace)
        elif method.checkpoint:
            processes = tuple(with_birth(self._on_card(name)))
            if not processes:
                raise ReclaimFailed("its processes on the card cannot be seen")
            checkpoint.suspend([pid for pid, _ in processes], method.grace)
        else:
            raise ReclaimFailed(f"{method.name} is no way to stop a process")
        return StoppedBy(method.name, processes)

    def _bring_back(self, name: str, stopped_by: StoppedBy) -> bool:
        consumer = self._config.consumers[name]
        method = next(
            (method for method in consumer.eviction_methods if method.name == stopped_by.method),
            None,
        )
        if method is None:
            raise ReclaimFailed(
                f"was stopped by {stopped_by.method}, which `evict` no longer names"
            )
        if method.unit is not None:
            units.start(method.unit, method.scope, consumer.ready_timeout)
        elif method.container is not None:
            engine.start(method.container, method.socket, consumer.ready_timeout)
        elif method.signal is not None:
            if method.start:
                signals.start(method.start)
        else:
            same = still_there(stopped_by.processes)  # one that died needs nothing
            checkpoint.resume(same, method.grace)
            return bool(same)
        return False


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except ReclaimFailed as error:
        raise ConsumerUnreachable(f"{name}: {error}", consumer=name) from error
