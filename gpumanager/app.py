"""The composition root: builds the broker from a config, starts and stops its threads."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpumanager import __version__
from gpumanager.clock import Clock, SystemClock
from gpumanager.config import Config, ConfigError
from gpumanager.config.live import Changes, LiveConfig, changes
from gpumanager.consumers.admission import Admission
from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.prober import Prober
from gpumanager.consumers.registry import InUse, Registry
from gpumanager.consumers.statefile import StateFile, state_path
from gpumanager.consumers.stopped import Stopped
from gpumanager.errors import BadRequest
from gpumanager.gpu.attribution import Attributor
from gpumanager.gpu.containers import ContainedConsumers
from gpumanager.gpu.device import Card, GpuMemory, open_card
from gpumanager.gpu.history import EVERY_S, MemoryHistory
from gpumanager.gpu.sampler import Sampler
from gpumanager.host.notify import ALIVE, READY, STOPPING, Notifier
from gpumanager.host.processes import ConsumerProcesses, SystemProcesses, programs_at
from gpumanager.jobs.hold import Means
from gpumanager.jobs.operations import Operations
from gpumanager.jobs.place import Places
from gpumanager.jobs.polling import Completions
from gpumanager.jobs.runner import JobRunner
from gpumanager.jobs.shortage import Shortages
from gpumanager.keys import GUARD_IT, ApiKey, KeysError, load_keys, unguarded
from gpumanager.lifecycle import Lifecycle
from gpumanager.residency.housekeeper import Housekeeper
from gpumanager.residency.room import RoomMaker
from gpumanager.residency.stopping import Stopping
from gpumanager.scheduling.factory import build_scheduler
from gpumanager.telemetry import logs, tracing
from gpumanager.telemetry.eventfile import EventFile
from gpumanager.telemetry.eventlog import EventLog, Recorded
from gpumanager.telemetry.events import ConfigReloaded, Started
from gpumanager.telemetry.metrics import Metrics
from gpumanager.upstream.calls import ControlCalls
from gpumanager.upstream.proxy import Proxy
from gpumanager.upstream.watcher import Watcher
from gpumanager.web import server
from gpumanager.web.guard import Guard
from gpumanager.web.routes import Services, create_app
from gpumanager.web.security import Keyring
from gpumanager.web.status import StatusView
from gpumanager.worker import PeriodicWorker

log = logging.getLogger(__name__)

STATE_INTERVAL_S = 30.0
"""How much of what was learned may be lost if the broker is killed."""


class Broker:
    """Everything that makes one broker. Building it opens nothing and starts nothing.

    `keys` are what clients have to show, if there are any; `card` and `clock` replace the
    configured card and the system's clocks, for tests. What was learned outlives the broker in
    `state_file`, if there is one. `read_config` reads the config anew for a reload, and raises
    ConfigError; `config_file` is where it reads it, which `/v1/status` tells.
    """

    def __init__(
        self,
        config: Config,
        *,
        keys: Iterable[ApiKey] = (),
        card: Card | None = None,
        clock: Clock | None = None,
        state_file: Path | None = None,
        read_config: Callable[[], Config] | None = None,
        config_file: str | None = None,
    ) -> None:
        self._read_config = read_config
        self._file_events: EventFile | None = None
        clock = SystemClock() if clock is None else clock
        self.registry = Registry(config, clock)
        self.learned = Learned(config.consumers, lambda: clock.now().timestamp())
        self.learned.publish(self.registry.learn)
        self.events = EventLog(clock)
        emit = self.events.emit
        if config.events.file is not None:
            self._file_events = EventFile(self.events, config.events)
        config = LiveConfig(
            lambda: self.registry.now.config
        ).seen  # what is made from here on sees the next one, too
        self.watcher = Watcher()
        processes = SystemProcesses()
        consumer_processes = ConsumerProcesses(config, processes)
        self.memory = GpuMemory(
            open_card(config.gpu.device) if card is None else card,
            clock,
            Attributor(
                consumer_processes,
                ContainedConsumers(config, consumer_processes, processes),
                processes,
                clock,
            ),
        )
        calls = ControlCalls(config, self.watcher, clock)
        self.breakers = Breakers(clock, emit)
        admission = Admission(self.registry, self.breakers, retry_s=config.health_interval)
        sampler = Sampler(
            self.memory,
            self.registry,
            self.learned,
            clock,
            emit,
            interval=config.gpu.sample_interval,
        )
        self._stopping = Stopping(
            config, listening=consumer_processes.of, on_card=self._pids_on_card
        )
        room = RoomMaker(
            config,
            self.registry,
            self.learned,
            calls,
            self._stopping,
            sampler.look,
            admission.check,
            clock,
            emit,
            self._upcoming,
        )
        self.scheduler = build_scheduler(config.scheduler, room, clock)
        self._completions = Completions(calls, clock, emit)
        keyring = Keyring(keys)
        places = Places(self.registry, self.scheduler, keyring)
        self._probers: dict[str, PeriodicWorker] = {}
        self._tidying: PeriodicWorker | None = None
        self._saving: PeriodicWorker | None = None
        proxy = Proxy(config, self.watcher, clock)
        shortages = Shortages(self.registry, self.learned, sampler.look, emit)
        means = Means(
            registry=self.registry,
            learned=self.learned,
            admission=admission,
            breakers=self.breakers,
            calls=calls,
            clock=clock,
            emit=emit,
            after_job=self._after_job,
        )
        jobs = JobRunner(
            means,
            places,
            self._completions,
            self.watcher,
            shortages,
            look=sampler.look,
        )
        self._stopped = Stopped(self.registry, consumer_processes.of)
        self._state = (
            None if state_file is None else StateFile(state_file, self.learned, self._stopped.now)
        )
        self._history = MemoryHistory(self.registry, clock)
        draining = threading.Event()
        status = StatusView(
            self.registry,
            self.scheduler,
            self.breakers,
            lambda: shortages.failures,
            clock,
            __version__,
            config_file,
        )
        metrics = Metrics(
            config,
            status.snapshot,
            lambda: self.scheduler.stats().longest_overtake,
            __version__,
            by_client=bool(keyring),
        )
        self.events.listen(metrics.take_note)
        self._tracing = tracing.from_environment(os.environ, __version__)
        if self._tracing is not None:
            self.events.listen(self._tracing.take_note)
        self.flask = create_app(
            Services(
                config=config,
                admission=admission,
                proxy=proxy,
                jobs=jobs,
                operations=Operations(
                    config,
                    places,
                    self.registry,
                    self.learned,
                    self.scheduler,
                    room,
                    self.watcher,
                    clock,
                    emit,
                ),
                status=status,
                watcher=self.watcher,
                keyring=keyring,
                version=__version__,
                events=self.events,
                metrics=metrics,
                history=self._history.samples,
                drain=self._end,
                reload=self.reload,
                draining=draining.is_set,
                cancel=self.scheduler.cancel,
            )
        )
        self.guard = Guard(self.flask.wsgi_app, clock, emit)
        self.flask.wsgi_app = self.guard  # type: ignore[method-assign]  # Flask's own way
        self.lifecycle = Lifecycle(
            self.scheduler,
            clock,
            emit,
            drain_timeout=lambda: config.drain_timeout,
            draining=draining,
            unfinished=self.guard.unfinished,
        )
        self._calls = calls
        self._housekeeper = Housekeeper(config, self.registry, self.scheduler, room, clock, emit)
        self._workers = self._make_workers(sampler)
        self._lock = threading.Lock()
        self._restored = False

    @property
    def config(self) -> Config:
        """The config as it is applied at the moment."""
        return self.registry.now.config

    def start(self) -> None:
        """Restore what was learned; start sampling, probing and watching. Idempotent."""
        with self._lock:
            if self._state is not None and not self._restored:
                self._restored = True
                self._stopped.restore(self._state.load())
            self.events.emit(Started(version=__version__))
            self._adjust_workers()
            for worker in self._all_workers():
                worker.start()

    def stop(self) -> None:
        """End every thread and wait for it. Idempotent."""
        with self._lock:
            self._completions.stop()
            for worker in self._all_workers():
                worker.stop()
            for worker in self._all_workers():
                if not worker.join():
                    log.warning("thread still running", extra={"worker": worker.name})
            self.memory.close()
            if self._file_events is not None:
                self._file_events.close()
            if self._tracing is not None:
                self._tracing.close()
            if self._state is not None:
                self._state.save()

    def _upcoming(self) -> tuple[str, ...]:
        return self.scheduler.upcoming()  # which is made around it

    def _end(self) -> None:
        self.lifecycle.end()  # which is made after the routes

    def _pids_on_card(self, name: str) -> tuple[int, ...]:
        reading = self.memory.measure()
        holdings = None if reading is None else reading.holdings
        return () if holdings is None else holdings.pids.get(name, ())

    def _after_job(self, name: str) -> None:
        """A model that went to the CPU shows only while it is loaded: ask at once."""
        consumer, prober = self.config.consumers.get(name), self._probers.get(name)
        if consumer is None or prober is None:
            return  # a reload has removed it meanwhile
        if consumer.probe is not None and consumer.probe.on_cpu is not None:
            prober.wake()

    def _save_soon(self, recorded: Recorded) -> None:
        """A broker that is killed now must not forget whom it has just stopped."""
        if self._saving is not None and self._stopped.concerned(recorded.event):
            self._saving.wake()

    def _save_state(self) -> float:
        if self._state is not None:
            self._state.save()
        return STATE_INTERVAL_S

    def _make_workers(self, sampler: Sampler) -> list[PeriodicWorker]:
        config = self.config
        workers = [
            PeriodicWorker("watcher", self.watcher.sweep, retry_s=1.0),
            PeriodicWorker("gpu-sampler", sampler.sample, retry_s=config.gpu.sample_interval),
            PeriodicWorker("history", self._history.take, retry_s=EVERY_S),
        ]
        if self._state is not None:
            self._saving = PeriodicWorker("state", self._save_state, retry_s=STATE_INTERVAL_S)
            self.events.listen(self._save_soon)
            workers.append(self._saving)
        if self._file_events is not None:
            workers.append(PeriodicWorker("events", self._file_events.write, retry_s=1.0))
        return workers

    def _adjust_workers(self) -> None:
        """One prober for every consumer that can be asked, and a housekeeper, if there is
        anything to keep."""
        config = self.config
        for name, consumer in config.consumers.items():
            if name in self._probers or (consumer.health is None and consumer.probe is None):
                continue  # who is never probed is never refused
            prober = Prober(
                name,
                self._calls,
                self.registry,
                self._stopping.returned,
                self.events.emit,
                interval=config.health_interval,
            )
            self._probers[name] = PeriodicWorker(
                f"probe-{name}", prober.probe, retry_s=config.health_interval
            )
        if self._housekeeper.needed and self._tidying is None:
            self._tidying = PeriodicWorker("housekeeper", self._housekeeper.tidy, retry_s=1.0)

    def _all_workers(self) -> list[PeriodicWorker]:
        tidying = [] if self._tidying is None else [self._tidying]
        return [*self._workers, *self._probers.values(), *tidying]

    # -- another config --------------------------------------------------------------------

    def reload(self) -> Mapping[str, Any]:
        """Read the config anew and apply what changed, while jobs run and wait.

        Returns what changed. Raises BadRequest, with nothing changed, if the config has faults,
        or changes what is read once, or takes a consumer away that is in use.
        """
        with self._lock:
            if self._read_config is None:
                raise BadRequest(
                    "this broker was not started from a config file, so it cannot reload one; "
                    "end it, and start one with: gpumanager serve --config FILE"
                )
            try:
                new = self._read_config()
            except ConfigError as error:
                raise BadRequest(f"the config was not applied; {error}") from None
            old = self.config
            found = changes(old, new)
            if found.fixed:
                fixed = ", ".join(found.fixed)
                raise BadRequest(f"the config was not applied: changes of {fixed} need a restart")
            moved = [
                name for name in found.changed if old.consumers[name].url != new.consumers[name].url
            ]
            self._apply(new, found, moved)
        self.events.emit(
            ConfigReloaded(
                added=found.added, removed=found.removed, changed=found.changed, keys=found.keys
            )
        )
        return found.as_json()

    def _apply(self, new: Config, found: Changes, moved: Iterable[str]) -> None:
        # First, so that no probe looks for a consumer that is not there, or takes the answer of
        # the one at the old address for that of the new.
        self._end_probers((*found.removed, *found.changed))
        fresh = (*found.added, *moved)
        for name in fresh:
            self.learned.add(name)
            self.breakers.forget(name)
        try:
            self.registry.reshape(new, fresh)
        except InUse as error:
            raise BadRequest(f"the config was not applied: {error}") from None
        finally:
            self._adjust_workers()
            for worker in self._all_workers():
                worker.start()

    def _end_probers(self, names: Iterable[str]) -> None:
        ending = [self._probers.pop(name) for name in names if name in self._probers]
        for prober in ending:
            prober.stop()
        for prober in ending:
            prober.join()


def serve(
    config: Config,
    read_config: Callable[[], Config] | None = None,
    config_file: str | None = None,
) -> int:
    """Serve the broker on `config.listen` until it is told to end; returns the exit code.
    `read_config` reads the config anew for a reload, from `config_file`.

    To be called from the main thread.
    """
    try:
        broker = prepare(config, read_config, config_file)
    except KeysError as error:
        log.error("bad keys", extra={"reason": str(error)})
        return 2
    if config_file is not None:
        log.info("config read", extra={"file": os.path.abspath(config_file)})
    notifier = Notifier()
    watchdog = None
    if notifier.watchdog_s is not None:
        watchdog = PeriodicWorker(
            "watchdog", partial(_sign_of_life, broker, notifier), retry_s=notifier.watchdog_s
        )

    def listening() -> None:
        notifier.tell(READY)
        if watchdog is not None:
            watchdog.start()

    broker.lifecycle.when_draining(partial(notifier.tell, STOPPING))
    try:
        server.run(broker.flask, listening)
    except (OSError, ValueError) as error:  # waitress: a host name that cannot be resolved
        told = {"listen": config.listen, "reason": str(error)}
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            programs = programs_at(config.port, SystemProcesses())
            told["taken_by"] = " and ".join(programs) or "a program that this account cannot see"
        log.error("cannot listen", extra=told)  # a trace would tell nothing more
        return 1
    finally:
        if watchdog is not None:
            watchdog.stop()
        broker.stop()
    return 0


def _sign_of_life(broker: Broker, notifier: Notifier) -> float:
    """Tell systemd that the broker is alive: that its scheduler answers, which takes the lock
    that everything hangs on."""
    broker.scheduler.stats()
    notifier.tell(ALIVE)
    return notifier.watchdog_s or 1.0


def prepare(
    config: Config,
    read_config: Callable[[], Config] | None = None,
    config_file: str | None = None,
) -> Broker:
    """A started broker, with logs, signals and the server's defaults set for this process.

    Raises KeysError if the API keys cannot be read.
    """
    logs.configure(config.log)
    server.set_defaults(config)
    keys = load_keys(os.environ, config.auth.keys_file)
    if without := [key.name for key in keys if key.role is None]:
        # As before there were roles, so that an update takes nothing from anybody.
        log.warning("keys without a role are admins", extra={"keys": " ".join(without)})
    if unguarded(config.host, keys):
        log.warning(
            "open to everybody who can reach it: there are no keys",
            extra={"listen": config.listen, "advice": GUARD_IT},
        )
    broker = Broker(
        config,
        keys=keys,
        state_file=state_path(config.state_file, config.listen, os.environ),
        read_config=read_config,
        config_file=None if config_file is None else os.path.abspath(config_file),
    )
    broker.lifecycle.install_signal_handlers(broker.reload)
    broker.start()
    return broker
