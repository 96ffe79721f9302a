"""How other programs order jobs, to compare with. They are policies of the simulation only."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from gpumanager.model import Job
from gpumanager.scheduling.policy import Running, Waiting
from gpumanager.simulation.stage import Stage


@dataclass(slots=True)
class UnboundedBatching:
    """What llama-swap and large-model-proxy do: a job for what is loaded goes past all others, for
    as long as there is one. Else the first of the queue has its turn."""

    stage: Stage
    limit: int = 1
    looks_at: int = 10_000

    def next_up(
        self,
        waiting: Iterable[Waiting],
        running: Collection[Running],
        now: float,  # noqa: ARG002  # part of the interface
    ) -> Waiting | None:
        if len(running) >= self.limit:
            return None
        first: Waiting | None = None
        for place in waiting:
            if self.stage.is_loaded(place.job.resident):
                return place
            first = place if first is None else first
        return first


@dataclass(slots=True)
class FairShare:
    """What gpu-broker does: whoever has had the least of the GPU is next (start-time fair queueing
    on the seconds that its jobs had it), his jobs in their order. It keeps one model on the card
    at a time, which is the engine's part (`Player.alone`)."""

    limit: int = 1
    looks_at: int = 10_000
    _had_s: dict[str, float] = field(default_factory=dict)
    _virtual: float = 0.0

    def next_up(
        self,
        waiting: Iterable[Waiting],
        running: Collection[Running],
        now: float,  # noqa: ARG002  # part of the interface
    ) -> Waiting | None:
        if len(running) >= self.limit:
            return None
        firsts: dict[str, Waiting] = {}
        for place in waiting:
            firsts.setdefault(place.job.requester, place)
        chosen = min(firsts.values(), key=self._start, default=None)
        if chosen is not None:
            self._virtual = max(self._virtual, self._start(chosen))
        return chosen

    def ended(self, job: Job, seconds: float) -> None:
        """Its requester has had so much more of the GPU."""
        self._had_s[job.requester] = max(self._had_s.get(job.requester, 0.0), self._virtual) + (
            seconds
        )

    def _start(self, place: Waiting) -> float:
        """The virtual time at which its turn comes: one who was away has saved up nothing."""
        return max(self._virtual, self._had_s.get(place.job.requester, 0.0))
