"""Which models each consumer says that it offers."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from gpumanager.clock import Clock
from gpumanager.errors import BrokerError
from gpumanager.model import ModelListing

FRESH_S = 30.0
"""For so long a list is believed."""

LOOK_AGAIN_S = 2.0
"""A list that lacks the model somebody asks for is asked again after this: it may just have been
pulled."""

FAILED_S = 10.0
"""A consumer that did not tell is not asked again for so long."""


@dataclass(frozen=True, slots=True)
class _Asked:
    models: ModelListing | None
    at: float
    failed: bool = False


class ModelCatalogue:
    """The lists, as they were told last; asked for when somebody wants them, by the thread that
    does, outside every other lock. `ask` gives a consumer's list, and raises BrokerError; `tell` is
    told of each. One that cannot be asked now keeps its last list. Safe from any thread."""

    def __init__(
        self,
        ask: Callable[[str], ModelListing | None],
        clock: Clock,
        tell: Callable[[str, ModelListing], object] = lambda name, models: None,  # noqa: ARG005
    ) -> None:
        self._ask = ask
        self._tell = tell
        self._clock = clock
        self._known: dict[str, _Asked] = {}
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def listed(self, name: str, *, wanted: str | None = None) -> ModelListing | None:
        """The models that the consumer lists, None if that is not known. `wanted`: where this one
        is missing in a list that is not quite new, the consumer is asked again."""
        everything = self._known  # what is asked now is forgotten with the rest
        known = everything.get(name)
        if known is not None and self._holds(known, wanted):
            return known.models
        with self._asking[name]:  # one question at a time; the others take its answer
            now = everything.get(name)
            if now is None or now is known:
                now = everything[name] = self._asked(name, now)
            return now.models

    def forget(self) -> None:
        """The config has changed: nothing is known any more."""
        self._known = {}

    def _holds(self, known: _Asked, wanted: str | None) -> bool:
        age = self._clock.monotonic() - known.at
        if known.failed:
            return age < FAILED_S
        models = known.models
        names = () if models is None else (*models.names, *models.aliases)
        missing = wanted is not None and not {wanted, f"{wanted}:latest"} & set(names)  # as Ollama
        return age < (LOOK_AGAIN_S if missing else FRESH_S)

    def _asked(self, name: str, before: _Asked | None) -> _Asked:
        try:
            models = self._ask(name)
        except BrokerError:
            models = None
        now = self._clock.monotonic()
        if models is None:
            return _Asked(None if before is None else before.models, now, failed=True)
        self._tell(name, models)
        return _Asked(models, now)
