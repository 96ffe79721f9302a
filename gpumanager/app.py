"""The composition root: builds the broker from a config, starts and stops its threads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable

from gpumanager import __version__, logs
from gpumanager.admission import Admission
from gpumanager.breaker import Breakers
from gpumanager.clock import Clock, SystemClock
from gpumanager.config import Config, ConsumerConfig
from gpumanager.keys import ApiKey, KeysError, load_keys
from gpumanager.lifecycle import Lifecycle
from gpumanager.monitoring.memory import Card, GpuMemory, open_card
from gpumanager.monitoring.prober import Prober
from gpumanager.monitoring.sampler import Sampler
from gpumanager.monitoring.worker import PeriodicWorker
from gpumanager.registry import Registry
from gpumanager.scheduling.factory import build_scheduler
from gpumanager.scheduling.room import RoomMaker
from gpumanager.upstream.calls import ControlCalls
from gpumanager.upstream.proxy import Proxy
from gpumanager.watcher import Watcher
from gpumanager.web import server
from gpumanager.web.guard import Guard
from gpumanager.web.jobs import JobRunner
from gpumanager.web.routes import Services, create_app
from gpumanager.web.security import Keyring
from gpumanager.web.status import StatusView

log = logging.getLogger(__name__)


class Broker:
    """Everything that makes one broker. Building it opens nothing and starts nothing.

    `keys` are what clients have to show, if there are any; `card` and `clock` replace the
    configured card and the system's clocks, for tests.
    """

    def __init__(
        self,
        config: Config,
        *,
        keys: Iterable[ApiKey] = (),
        card: Card | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        clock = SystemClock() if clock is None else clock
        self.registry = Registry(
            {name: _assumed_loaded(consumer) for name, consumer in config.consumers.items()}, clock
        )
        self.watcher = Watcher()
        self.memory = GpuMemory(open_card(config.gpu.device) if card is None else card, clock)
        calls = ControlCalls(config, self.watcher, clock)
        self.breakers = Breakers(clock)
        admission = Admission(self.registry, self.breakers, retry_s=config.health_interval)
        room = RoomMaker(config, self.registry, calls, self.memory.measure, admission.check, clock)
        self.scheduler = build_scheduler(config.scheduler, room, clock)
        draining = threading.Event()
        proxy = Proxy(config, self.watcher, clock)
        self.flask = create_app(
            Services(
                config=config,
                admission=admission,
                proxy=proxy,
                jobs=JobRunner(
                    self.scheduler,
                    self.registry,
                    admission,
                    self.breakers,
                    proxy,
                    calls,
                    self.watcher,
                    clock,
                ),
                status=StatusView(
                    config, self.registry, self.scheduler, self.breakers, clock, __version__
                ),
                watcher=self.watcher,
                keyring=Keyring(keys),
                version=__version__,
                draining=draining.is_set,
                cancel=self.scheduler.cancel,
            )
        )
        self.guard = Guard(self.flask.wsgi_app, clock)
        self.flask.wsgi_app = self.guard  # type: ignore[method-assign]  # Flask's own way
        self.lifecycle = Lifecycle(
            self.scheduler,
            clock,
            drain_timeout=config.drain_timeout,
            draining=draining,
            unfinished=self.guard.unfinished,
        )
        self._workers = self._make_workers(calls, clock)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start sampling, probing and watching. Idempotent."""
        with self._lock:
            for worker in self._workers:
                worker.start()

    def stop(self) -> None:
        """End every thread and wait for it. Idempotent."""
        with self._lock:
            for worker in self._workers:
                worker.stop()
            for worker in self._workers:
                if not worker.join():
                    log.warning("thread still running", extra={"worker": worker.name})
            self.memory.close()

    def _make_workers(self, calls: ControlCalls, clock: Clock) -> list[PeriodicWorker]:
        config = self.config
        sampler = Sampler(self.memory, self.registry, clock, interval=config.gpu.sample_interval)
        workers = [
            PeriodicWorker("watcher", self.watcher.sweep, retry_s=1.0),
            PeriodicWorker("gpu-sampler", sampler.sample, retry_s=config.gpu.sample_interval),
        ]
        for name, consumer in config.consumers.items():
            if consumer.health is None and consumer.probe is None:
                continue  # never probed, so never refused
            prober = Prober(name, calls, self.registry, interval=config.health_interval)
            workers.append(
                PeriodicWorker(f"probe-{name}", prober.probe, retry_s=config.health_interval)
            )
        return workers


def serve(config: Config) -> int:
    """Serve the broker on `config.listen` until it is told to end; returns the exit code.

    To be called from the main thread.
    """
    try:
        broker = prepare(config)
    except KeysError as error:
        log.error("bad keys", extra={"reason": str(error)})
        return 2
    try:
        server.run(broker.flask)
    except (OSError, ValueError) as error:  # waitress: a host name that cannot be resolved
        log.error("cannot listen", extra={"listen": config.listen, "reason": str(error)})
        return 1
    finally:
        broker.stop()
    return 0


def prepare(config: Config) -> Broker:
    """A started broker, with logs, signals and the server's defaults set for this process.

    Raises KeysError if the API keys cannot be read.
    """
    logs.configure(config.log)
    server.set_defaults(config)
    broker = Broker(config, keys=load_keys(os.environ, config.auth.keys_file))
    broker.lifecycle.install_signal_handlers()
    broker.start()
    return broker


def _assumed_loaded(consumer: ConsumerConfig) -> bool:
    """Whether to take a consumer for loaded before it has told: yes, unless it can only be
    unloaded, which is how servers that load with their first job look."""
    return consumer.unload is None or consumer.load is not None
