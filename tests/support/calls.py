"""The broker's own calls to one consumer, by its settings."""

from __future__ import annotations

from typing import Any

from gpumanager.clock import SystemClock
from gpumanager.config import Config
from gpumanager.upstream.calls import ControlCalls
from gpumanager.upstream.watcher import Watcher


class CallsOf:
    """`ControlCalls`, each by what `config` says of the consumer that it is made to."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._calls = ControlCalls(Watcher(), SystemClock())

    def __getattr__(self, call: str) -> Any:
        made = getattr(self._calls, call)
        return lambda name, *more: made(name, self._config.consumers[name], *more)
