"""The composition root: makes the broker of a config."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpumanager import __version__
from gpumanager.asyncjobs.callbacks import Callbacks
from gpumanager.asyncjobs.service import AsyncJobs
from gpumanager.asyncjobs.targets import Targets
from gpumanager.card import GpuCard
from gpumanager.clock import Clock, SystemClock
from gpumanager.config import Config
from gpumanager.config.live import LiveConfig
from gpumanager.consumers.admission import Admission
from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.catalogue import ModelCatalogue
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.prober import Prober
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.statefile import StateFile
from gpumanager.consumers.stopped import Stopped
from gpumanager.gpu.device import Card
from gpumanager.host.processes import ConsumerProcesses, SystemProcesses
from gpumanager.jobs.deadlines import Deadlines
from gpumanager.jobs.hold import Means
from gpumanager.jobs.operations import Operations
from gpumanager.jobs.owners import Owners
from gpumanager.jobs.place import Places
from gpumanager.jobs.polling import Completions
from gpumanager.jobs.routing import Router
from gpumanager.jobs.runner import JobRunner
from gpumanager.jobs.shares import Shares
from gpumanager.jobs.shortage import Shortages
from gpumanager.keys import ApiKey
from gpumanager.lifecycle import Lifecycle
from gpumanager.model import ModelListing
from gpumanager.reloading import Reloading
from gpumanager.telemetry import tracing
from gpumanager.telemetry.eventfile import EventFile
from gpumanager.telemetry.eventlog import EventLog, Recorded
from gpumanager.telemetry.events import Started
from gpumanager.telemetry.metrics import Metrics
from gpumanager.telemetry.usage import Usage
from gpumanager.threads import Threads
from gpumanager.upstream.calls import ControlCalls
from gpumanager.upstream.proxy import Proxy
from gpumanager.upstream.tunnels import Tunnels
from gpumanager.upstream.watcher import Watcher
from gpumanager.web import server
from gpumanager.web.deferring import Deferring
from gpumanager.web.forwarding import Forwarder
from gpumanager.web.guard import Guard
from gpumanager.web.jobview import JobView
from gpumanager.web.models import ModelLists
from gpumanager.web.mounts import Mounts
from gpumanager.web.replay import Replay
from gpumanager.web.routes import Services, create_app
from gpumanager.web.security import Keyring
from gpumanager.web.status import StatusView
from gpumanager.web.ways import Ways
from gpumanager.web.websockets import WebSockets
from gpumanager.worker import PeriodicWorker

log = logging.getLogger(__name__)

STATE_INTERVAL_S = 30.0
"""How much of what was learned may be lost if the broker is killed."""


def jobs_folder(config: Config, state_file: Path | None) -> Path | None:
    """Where asynchronous jobs are kept: as configured, else beside the state file, by the address
    that the broker listens on, so that two brokers do not share one; None where there is neither.
    """
    if config.jobs.dir is not None:
        return Path(config.jobs.dir)
    if state_file is None:
        return None
    listen = "".join(c if c.isalnum() else "-" for c in config.listen)
    return state_file.parent / f"jobs-{listen}"


class Broker:
    """Everything that makes one broker, with one card. Building it opens nothing and starts
    nothing.

    `keys` are what clients have to show, if there are any; `callback_secret` is what callbacks are
    signed with, without which nobody is called; `card` and `clock` replace the
    configured card and the system's clocks, for tests. What was learned outlives the broker in
    `state_file`, if there is one. `read_config` reads the config anew for a reload, and raises
    ConfigError; `config_file` is where it reads it, which `/v1/status` tells.
    """

    def __init__(
        self,
        config: Config,
        *,
        keys: Iterable[ApiKey] = (),
        callback_secret: bytes | None = None,
        card: Card | None = None,
        clock: Clock | None = None,
        state_file: Path | None = None,
        read_config: Callable[[], Config] | None = None,
        config_file: str | None = None,
    ) -> None:
        self._clock = SystemClock() if clock is None else clock
        self.events = EventLog(self._clock)
        self._emit = self.events.emit
        keys = tuple(keys)
        self._keyring = Keyring(keys)
        self._shares = Shares(
            {key.name: key.max_queued for key in keys if key.max_queued is not None},
            config.scheduler.max_queued,
        )
        self._config_file = config_file
        self._event_file = None
        if config.events.file is not None:
            self._event_file = EventFile(self.events, config.events)
        self._tracing = tracing.from_environment(os.environ, __version__)
        if self._tracing is not None:
            self.events.listen(self._tracing.take_note)

        self.registry = Registry(config, self._clock)
        self.learned = Learned(config.consumers, lambda: self._clock.now().timestamp())
        self.learned.publish(self.registry.learn)
        # What is made from here on sees the next config, too.
        self._live = LiveConfig(lambda: self.registry.now.config).seen
        self.breakers = Breakers(self._clock, self._emit)
        self._admission = Admission(self.registry, self.breakers, retry_s=config.health_interval)
        self.watcher = Watcher()
        self._calls = ControlCalls(self.watcher, self._clock)
        table = SystemProcesses()
        processes = ConsumerProcesses(self._live, table)
        self.card = GpuCard(
            self._live,
            self.registry,
            self.learned,
            self._calls,
            self._admission,
            processes,
            table,
            self._clock,
            self._emit,
            card,
        )
        self._deadlines = Deadlines(self.card.scheduler, self._clock, config.scheduler.max_wait)
        self._completions = Completions(self._calls, self._clock, self._emit)
        self._owners = Owners()
        self._catalogue = ModelCatalogue(self._models_of, self._clock, self.registry.listed)
        self._draining = threading.Event()
        self._callback_secret = callback_secret
        self._targets = Targets(() if callback_secret is None else config.jobs.callbacks)
        self.jobs = AsyncJobs(
            jobs_folder(config, state_file),
            config,
            self.card.scheduler,
            self._clock,
            self._emit,
            self._draining.is_set,
        )
        self.tunnels = Tunnels(self._live, self._clock, self._emit)
        self.flask = create_app(self._services())
        self.guard = Guard(self.flask.wsgi_app, self._clock, self._emit)
        self.flask.wsgi_app = self.guard  # type: ignore[method-assign]  # Flask's own way
        self.jobs.plays(Replay(self.guard))
        self.lifecycle = Lifecycle(
            self.card.scheduler,
            self._clock,
            self._emit,
            drain_timeout=lambda: self.config.drain_timeout,
            draining=self._draining,
            unfinished=self.guard.unfinished,
        )
        self.lifecycle.when_idle(self.tunnels.drain)  # not before: pages show how far a job is
        self.lifecycle.when_flushed(self._cut_off)
        self._stopped = Stopped(self.registry, processes.of)
        self._state = (
            None if state_file is None else StateFile(state_file, self.learned, self._stopped.now)
        )
        self.threads = Threads(
            self._always(), self.registry, self._prober, self.card.housekeeper, self.card.ahead
        )
        self._lock = threading.Lock()
        self._restored = False
        self.reloading = Reloading(
            read_config,
            self.registry,
            self.learned,
            self.breakers,
            self._catalogue,
            self.tunnels,
            self.threads,
            self._lock,
            self._emit,
        )

    def _services(self) -> Services:
        """What the routes serve, each object once; made after the card and before the guard."""
        card = self.card
        places = Places(self.registry, card.scheduler, self._shares, self._deadlines)
        shortages = Shortages(self.registry, self.learned, card.sampler.look, self._emit)
        usage = Usage()
        self.events.listen(usage.take_note)
        status = StatusView(
            self.registry,
            card.scheduler,
            self.breakers,
            lambda: shortages.failures,
            usage,
            self.jobs.counts,
            self._clock,
            __version__,
            self._config_file,
        )
        metrics = Metrics(
            self._live,
            status.snapshot,
            lambda: self.tunnels.traffic,
            __version__,
            by_client=bool(self._keyring),
        )
        self.events.listen(metrics.take_note)
        proxy = Proxy(self._live, self.watcher, self._clock)
        router = Router(self.registry, self._catalogue)
        websockets = WebSockets(proxy, self.tunnels, self.watcher, self._draining.is_set)
        runner = self._runner(places, shortages)
        forward = Forwarder(
            proxy, self.watcher, most=server.MOUNT_THREADS, most_each=server.MOUNT_THREADS_EACH
        )
        audio = server.AUDIO_THREADS
        fetch = Forwarder(proxy, self.watcher, most=audio, most_each=audio)
        self._forwarders = forward, fetch
        job_view = JobView(self.jobs, card.scheduler, self._usual_run_s)
        self.jobs.calls_back(
            partial(
                Callbacks,
                targets=self._targets,
                secret=self._callback_secret or b"",
                shown=job_view.shown,
                watcher=self.watcher,
                clock=self._clock,
                emit=self._emit,
            )
        )
        deferring = Deferring(self.jobs, job_view, self._live, self._targets)
        self.ways = Ways(self._live, router, self._admission, proxy, runner, deferring)
        return Services(
            config=self._live,
            ways=self.ways,
            mounts=Mounts(
                self._live,
                self._admission,
                proxy,
                router,
                runner,
                forward,
                websockets,
                self._owners,
                deferring,
                self._emit,
            ),
            router=router,
            models=ModelLists(self.registry, self._catalogue),
            forward=forward,
            fetch=fetch,
            operations=Operations(
                places,
                router,
                self.registry,
                self.learned,
                card.scheduler,
                card.room,
                self.watcher,
                self._clock,
                self._emit,
            ),
            status=status,
            keyring=self._keyring,
            version=__version__,
            events=self.events,
            metrics=metrics,
            history=card.history.samples,
            drain=self._end,
            reload=self.reload,
            draining=self._draining.is_set,
            cancel=card.scheduler.cancel,
            jobs=self.jobs,
            job_view=job_view,
        )

    def _usual_run_s(self, name: str) -> float | None:
        """How long jobs of a consumer usually take, in seconds, as far as was learned."""
        runs = self.learned.figures(name).run_s
        return None if runs is None else runs.p50

    def _runner(self, places: Places, shortages: Shortages) -> JobRunner:
        means = Means(
            registry=self.registry,
            learned=self.learned,
            admission=self._admission,
            breakers=self.breakers,
            calls=self._calls,
            clock=self._clock,
            emit=self._emit,
            after_job=self._after_job,
        )
        look = self.card.sampler.look
        return JobRunner(
            means, places, self._completions, self.watcher, shortages, self._owners, look=look
        )

    def _models_of(self, name: str) -> ModelListing | None:
        snapshot = self.registry.now
        consumer, state = snapshot.config.consumers.get(name), snapshot.states.get(name)
        if consumer is None or state is None:
            return None  # a reload has removed it
        if state.healthy is False or state.stopped_by is not None:
            return None  # nobody need wait until it does not answer
        return self._calls.models(name, consumer)

    def _prober(self, name: str) -> Prober:
        interval = self.config.health_interval
        returned = self.card.stopping.returned
        return Prober(
            name,
            self._calls,
            self.registry,
            self.learned,
            returned,
            self._emit,
            interval=interval,
            look=self._catalogue.listed,
        )

    def _always(self) -> list[PeriodicWorker]:
        """The threads that do not depend on the consumers."""
        workers = [
            PeriodicWorker("watcher", self.watcher.sweep, retry_s=1.0),
            self._deadlines.worker,
            *self.card.workers(),
        ]
        if self._state is not None:
            saving = PeriodicWorker("state", self._save_state, retry_s=STATE_INTERVAL_S)
            self.events.listen(partial(self._save_soon, saving))
            workers.append(saving)
        if self._event_file is not None:
            workers.append(PeriodicWorker("events", self._event_file.write, retry_s=1.0))
        return workers

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
            self._emit(Started(version=__version__))
            self.threads.start()
        self.jobs.start()

    def stop(self) -> None:
        """End every thread and wait for it. Idempotent."""
        self.jobs.stop()  # first, so that it does not take for over what is only not followed
        with self._lock:
            self._completions.stop()
            self.tunnels.stop()
            self.threads.stop()
            self.card.close()
            if self._event_file is not None:
                self._event_file.close()
            if self._tracing is not None:
                self._tracing.close()
            if self._state is not None:
                self._state.save()

    def reload(self) -> Mapping[str, Any]:
        """Read the config again and apply it: `Reloading.reload` says what that gives."""
        return self.reloading.reload()

    def _end(self) -> None:
        self.lifecycle.end()  # which is made after the routes

    def _cut_off(self) -> None:
        for each in self._forwarders:
            each.cut_off()

    def _after_job(self, name: str) -> None:
        """A model that went to the CPU shows only while it is loaded: ask at once."""
        consumer = self.registry.now.config.consumers.get(name)  # a reload may have removed it
        if (
            consumer is not None
            and consumer.probe is not None
            and consumer.probe.on_cpu is not None
        ):
            self.threads.wake_prober(name)

    def _save_soon(self, saving: PeriodicWorker, recorded: Recorded) -> None:
        """A broker that is killed now must not forget whom it has just stopped."""
        if self._stopped.concerned(recorded.event):
            saving.wake()

    def _save_state(self) -> float:
        if self._state is not None:
            self._state.save()
        return STATE_INTERVAL_S
