"""The composition root: builds the broker from a config, starts and stops its threads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from gpumanager import __version__, logs
from gpumanager.admission import Admission
from gpumanager.breaker import Breakers
from gpumanager.clock import Clock, SystemClock
from gpumanager.config import Config, ConsumerConfig
from gpumanager.keys import ApiKey, KeysError, load_keys
from gpumanager.learning import Learned, StateFile, state_path
from gpumanager.lifecycle import Lifecycle
from gpumanager.monitoring.attribution import Attributor
from gpumanager.monitoring.housekeeper import Housekeeper
from gpumanager.monitoring.memory import Card, GpuMemory, open_card
from gpumanager.monitoring.prober import Prober
from gpumanager.monitoring.sampler import Sampler
from gpumanager.monitoring.worker import PeriodicWorker
from gpumanager.processes import ConsumerProcesses, SystemProcesses
from gpumanager.reclaim.ladder import Ladder
from gpumanager.registry import Registry
from gpumanager.scheduling.factory import build_scheduler
from gpumanager.scheduling.interface import Moves
from gpumanager.scheduling.room import RoomMaker
from gpumanager.upstream.calls import ControlCalls
from gpumanager.upstream.proxy import Proxy
from gpumanager.watcher import Watcher
from gpumanager.web import server
from gpumanager.web.completion import Completions
from gpumanager.web.guard import Guard
from gpumanager.web.jobs import JobRunner
from gpumanager.web.operations import Operations
from gpumanager.web.routes import Services, create_app
from gpumanager.web.security import Keyring
from gpumanager.web.status import StatusView

log = logging.getLogger(__name__)

STATE_INTERVAL_S = 30.0
"""How much of what was learned may be lost if the broker is killed."""


class Broker:
    """Everything that makes one broker. Building it opens nothing and starts nothing.

    `keys` are what clients have to show, if there are any; `card` and `clock` replace the
    configured card and the system's clocks, for tests. What was learned outlives the broker in
    `state_file`, if there is one.
    """

    def __init__(
        self,
        config: Config,
        *,
        keys: Iterable[ApiKey] = (),
        card: Card | None = None,
        clock: Clock | None = None,
        state_file: Path | None = None,
    ) -> None:
        self.config = config
        clock = SystemClock() if clock is None else clock
        self.registry = Registry(
            {name: _assumed_loaded(consumer) for name, consumer in config.consumers.items()}, clock
        )
        self.learned = Learned(config.consumers)
        self.watcher = Watcher()
        processes = SystemProcesses()
        consumer_processes = ConsumerProcesses(config, processes)
        self.memory = GpuMemory(
            open_card(config.gpu.device) if card is None else card,
            clock,
            Attributor(consumer_processes, processes, clock),
        )
        calls = ControlCalls(config, self.watcher, clock)
        self.breakers = Breakers(clock)
        admission = Admission(self.registry, self.breakers, retry_s=config.health_interval)
        sampler = Sampler(
            self.memory, self.registry, self.learned, clock, interval=config.gpu.sample_interval
        )
        room = RoomMaker(
            config,
            self.registry,
            self.learned,
            calls,
            Ladder(config, listening=consumer_processes.of, on_card=self._pids_on_card),
            sampler.look,
            admission.check,
            clock,
        )
        self.scheduler = build_scheduler(config.scheduler, room, clock)
        self._completions = Completions(calls, clock)
        self._probers: dict[str, PeriodicWorker] = {}
        proxy = Proxy(config, self.watcher, clock)
        jobs = JobRunner(
            self.scheduler,
            self.registry,
            self.learned,
            admission,
            self.breakers,
            proxy,
            calls,
            self._completions,
            self.watcher,
            clock,
            look=sampler.look,
            after_job=self._after_job,
        )
        self._state = (
            None
            if state_file is None
            else StateFile(state_file, self.learned, self.registry.parked)
        )
        draining = threading.Event()
        self.flask = create_app(
            Services(
                config=config,
                admission=admission,
                proxy=proxy,
                jobs=jobs,
                operations=Operations(
                    config,
                    self.registry,
                    self.learned,
                    self.scheduler,
                    room,
                    self.watcher,
                    clock,
                ),
                status=StatusView(
                    config,
                    self.registry,
                    self.learned,
                    self.scheduler,
                    self.breakers,
                    lambda: jobs.memory_failures,
                    clock,
                    __version__,
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
        self._workers = self._make_workers(sampler, calls, room, clock)
        self._lock = threading.Lock()
        self._restored = False

    def start(self) -> None:
        """Restore what was learned; start sampling, probing and watching. Idempotent."""
        with self._lock:
            if self._state is not None and not self._restored:
                self._restored = True
                for name, parked in self._state.load().items():
                    if name in self.config.consumers:
                        self.registry.park(name, parked)
            for worker in self._workers:
                worker.start()

    def stop(self) -> None:
        """End every thread and wait for it. Idempotent."""
        with self._lock:
            self._completions.stop()
            for worker in self._workers:
                worker.stop()
            for worker in self._workers:
                if not worker.join():
                    log.warning("thread still running", extra={"worker": worker.name})
            self.memory.close()
            if self._state is not None:
                self._state.save()

    def _pids_on_card(self, name: str) -> tuple[int, ...]:
        reading = self.memory.measure()
        holdings = None if reading is None else reading.holdings
        return () if holdings is None else holdings.pids.get(name, ())

    def _after_job(self, name: str) -> None:
        """A model that went to the CPU shows only while it is loaded: ask at once."""
        probe = self.config.consumers[name].probe
        if probe is not None and probe.on_cpu is not None and name in self._probers:
            self._probers[name].wake()

    def _save_state(self) -> float:
        if self._state is not None:
            self._state.save()
        return STATE_INTERVAL_S

    def _make_workers(
        self, sampler: Sampler, calls: ControlCalls, moves: Moves, clock: Clock
    ) -> list[PeriodicWorker]:
        config = self.config
        workers = [
            PeriodicWorker("watcher", self.watcher.sweep, retry_s=1.0),
            PeriodicWorker("gpu-sampler", sampler.sample, retry_s=config.gpu.sample_interval),
        ]
        for name, consumer in config.consumers.items():
            if consumer.health is None and consumer.probe is None:
                continue  # never probed, so never refused
            prober = Prober(name, calls, self.registry, interval=config.health_interval)
            worker = PeriodicWorker(f"probe-{name}", prober.probe, retry_s=config.health_interval)
            self._probers[name] = worker
            workers.append(worker)
        if self._state is not None:
            workers.append(PeriodicWorker("state", self._save_state, retry_s=STATE_INTERVAL_S))
        housekeeper = Housekeeper(config, self.registry, self.scheduler, moves, clock)
        if housekeeper.needed:
            workers.append(PeriodicWorker("housekeeper", housekeeper.tidy, retry_s=1.0))
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
    broker = Broker(
        config,
        keys=load_keys(os.environ, config.auth.keys_file),
        state_file=state_path(config.state_file, config.listen, os.environ),
    )
    broker.lifecycle.install_signal_handlers()
    broker.start()
    return broker


def _assumed_loaded(consumer: ConsumerConfig) -> bool:
    """Whether to take a consumer for loaded before it has told: yes, unless it can only be
    unloaded, which is how servers that load with their first job look."""
    return consumer.unload is None or consumer.load is not None
