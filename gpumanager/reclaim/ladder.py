"""The rungs of a consumer's `evict` that need no co-operation: stop it, and start it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import psutil

from gpumanager.config import Config, Rung
from gpumanager.errors import ConsumerUnreachable
from gpumanager.model import Parked
from gpumanager.reclaim import checkpoint, containers, signals, units
from gpumanager.reclaim.errors import ReclaimFailed

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

    def _park(self, name: str, rung: Rung) -> Parked:
        processes: tuple[tuple[int, float], ...] = ()
        if rung.unit is not None:
            units.stop(rung.unit, rung.scope, rung.grace)
        elif rung.container is not None:
            containers.stop(rung.container, rung.socket, rung.grace)
        elif rung.signal is not None:
            signals.end(self._listening(name), rung.signal, rung.grace)
        elif rung.checkpoint:
            processes = tuple(_with_birth(self._on_card(name)))
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
            alive = dict(_with_birth([pid for pid, _ in parked.processes]))
            same = [pid for pid, born in parked.processes if alive.get(pid) == born]
            checkpoint.resume(same, rung.grace)  # one that died needs nothing
            return True
        return False


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except ReclaimFailed as error:
        raise ConsumerUnreachable(f"{name}: {error}", consumer=name) from error


def _with_birth(pids: Sequence[int]) -> list[tuple[int, float]]:
    """Each pid with the time its process was started; those that ended are left out."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found.append((pid, psutil.Process(pid).create_time()))
    return found
