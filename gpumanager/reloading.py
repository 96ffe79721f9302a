"""Another config, while jobs run and wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

from gpumanager.config import Config, ConfigError
from gpumanager.config.live import Changes, changes
from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.catalogue import ModelCatalogue
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import InUse, Registry
from gpumanager.errors import BadRequest
from gpumanager.telemetry.events import ConfigReloaded, Emit
from gpumanager.threads import Threads
from gpumanager.upstream.tunnels import Tunnels


class Reloading:
    """`read` reads the config anew, and raises ConfigError; None: there is no file to read. `lock`
    keeps whoever starts and stops the threads out."""

    def __init__(
        self,
        read: Callable[[], Config] | None,
        registry: Registry,
        learned: Learned,
        breakers: Breakers,
        catalogue: ModelCatalogue,
        tunnels: Tunnels,
        threads: Threads,
        lock: Lock,
        emit: Emit,
    ) -> None:
        self.read = read
        self._registry = registry
        self._learned = learned
        self._breakers = breakers
        self._catalogue = catalogue
        self._tunnels = tunnels
        self._threads = threads
        self._lock = lock
        self._emit = emit

    def reload(self) -> Mapping[str, Any]:
        """Read the config anew and apply what changed, while jobs run and wait.

        Returns what changed. Raises BadRequest, with nothing changed, if the config has faults,
        or changes what is read once, or takes a consumer away that is in use.
        """
        with self._lock:
            if self.read is None:
                raise BadRequest(
                    "this broker was not started from a config file, so it cannot reload one; "
                    "end it, and start one with: gpumanager serve --config FILE"
                )
            try:
                new = self.read()
            except ConfigError as error:
                raise BadRequest(f"the config was not applied; {error}") from None
            old = self._registry.now.config
            found = changes(old, new)
            if found.fixed:
                fixed = ", ".join(found.fixed)
                raise BadRequest(f"the config was not applied: changes of {fixed} need a restart")
            self._apply(old, new, found)
        self._emit(
            ConfigReloaded(
                added=found.added, removed=found.removed, changed=found.changed, keys=found.keys
            )
        )
        return found.as_json()

    def _apply(self, old: Config, new: Config, found: Changes) -> None:
        before, after = old.consumers, new.consumers
        moved = [name for name in found.changed if before[name].url != after[name].url]
        # First, so that no probe looks for a consumer that is not there, or takes the answer of
        # the one at the old address for that of the new.
        self._threads.end_probers((*found.removed, *found.changed))
        for name in found.added:
            self._learned.add(name)
        try:
            self._registry.reshape(new, moved)
        except InUse as error:
            raise BadRequest(f"the config was not applied: {error}") from None
        else:
            for name in (*found.added, *moved):
                self._breakers.forget(name)
            self._catalogue.forget()
            self._tunnels.part(found.removed, "the consumer was removed from the config")
            self._tunnels.part(moved, "the consumer has another address now")
        finally:
            self._threads.start()
