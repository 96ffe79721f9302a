"""Which jobs may have the GPU at the same time: a pure function over plain data.

One job at a time, unless its consumer says more. Those that run together are a pool. Nothing is
loaded or unloaded beside them: whoever joins has all that it needs on the card already.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpumanager.scheduling.policy import Running, Waiting


@dataclass(frozen=True, slots=True)
class Sharing:
    """With whom a job shares the GPU: `most` jobs of its consumer run at once, and those `beside`
    are the consumers that may work at the same time, if they say so, too."""

    most: int = 1
    beside: frozenset[str] = frozenset()

    @property
    def is_open(self) -> bool:
        """Whether anybody may run at the same time."""
        return self.most > 1 or bool(self.beside)


ALONE = Sharing()


def may_join(place: Waiting, running: Iterable[Running]) -> bool:
    """Whether a job may run beside those that do, by what their consumers say. One that loads or
    unloads has the GPU to itself."""
    job, own, same = place.job, place.sharing, 0
    if not (job.makes_room and job.runs):
        return False
    for each in running:
        other = each.job
        if not (other.makes_room and other.runs):
            return False
        if other.consumer == job.consumer:
            same += 1
        elif other.consumer not in own.beside or job.consumer not in each.sharing.beside:
            return False
    return same < own.most
