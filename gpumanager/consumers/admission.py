"""May a job of this consumer be tried at all? Asked before it waits, and again when its turn has
come, so that neither a place in the queue nor an eviction is spent on a consumer that is known to
be broken."""

from __future__ import annotations

from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.registry import Registry
from gpumanager.errors import ConsumerUnhealthy


class Admission:
    """`check` raises ConsumerUnhealthy where a job would be in vain. `retry_s` is after how many
    seconds a consumer that failed its probe may be better."""

    def __init__(self, registry: Registry, breakers: Breakers, *, retry_s: float) -> None:
        self._registry = registry
        self._breakers = breakers
        self._retry_s = retry_s

    def check(self, name: str) -> None:
        """A consumer that was never probed is admitted."""
        state = self._registry.now.states[name]
        if state.healthy is False:
            raise ConsumerUnhealthy(
                f"consumer {name} last probe failed: {state.last_error}",
                consumer=name,
                retry_after=self._retry_s,
            )
        if name in self._breakers.failing:
            self._refuse(name, self._breakers.refusal(name))

    def begin(self, name: str) -> None:
        """As `check` for the breaker alone, for a call that is made now: it may be the trial."""
        if name in self._breakers.failing:
            self._refuse(name, self._breakers.begin(name))

    def _refuse(self, name: str, seconds: float | None) -> None:
        if seconds is not None:
            message = f"consumer {name} failed several times in a row"
            raise ConsumerUnhealthy(message, consumer=name, retry_after=seconds)
