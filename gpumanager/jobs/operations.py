"""What an operator asks for: would it fit, load it, unload it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from gpumanager.clock import Clock
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import NoConsumer, NotFound
from gpumanager.jobs.client import ClientWatch
from gpumanager.jobs.place import Place, Places
from gpumanager.jobs.record import RequestRecord
from gpumanager.jobs.routing import Router
from gpumanager.model import Job, parts_of, resident_name
from gpumanager.scheduling.interface import Moves, PlannedVictim, Scheduler, Ticket
from gpumanager.telemetry.events import Emit, Forgotten, Pinned, Unpinned
from gpumanager.upstream.watcher import Watcher

T = TypeVar("T")


class Operations:
    """The operator's requests. Each that changes something waits in the queue like a job."""

    def __init__(
        self,
        places: Places,
        router: Router,
        registry: Registry,
        learned: Learned,
        scheduler: Scheduler,
        moves: Moves,
        watcher: Watcher,
        clock: Clock,
        emit: Emit,
    ) -> None:
        self._places = places
        self._router = router
        self._registry = registry
        self._learned = learned
        self._scheduler = scheduler
        self._moves = moves
        self._watcher = watcher
        self._clock = clock
        self._emit = emit

    def unload(self, record: RequestRecord, name: str, model: str | None = None) -> dict[str, Any]:
        """Unload a consumer, or one model of it. Raises NotFound, NoConsumer if there is no way to,
        or what waiting and unloading raise."""
        resident = resident_name(name, model)
        release = self._in_turn(
            record, name, "unload", lambda it: self._moves.unload(resident, it), model=model
        )
        answer = {
            **_named(name, model),
            "outcome": release.outcome,
            "mib": release.mib,
            "ms": round(release.seconds * 1000),
        }
        return {**answer, "taken_by": release.taken_by} if release.taken_by else answer

    def load(self, record: RequestRecord, name: str, model: str | None = None) -> dict[str, Any]:
        """Make room for a consumer, or one model of it, and load it. Raises as above."""
        began = self._clock.monotonic()
        self._in_turn(
            record,
            name,
            "load",
            lambda it: self._moves.load(name, it),
            self._can_be_loaded,
            model=model,
        )
        seconds = self._clock.monotonic() - began
        return {
            **_named(name, model),
            "loaded": self._registry.get(name).has_loaded(model),
            "ms": round(seconds * 1000),
        }

    def pin(self, name: str, pinned: bool, model: str | None = None) -> dict[str, Any]:
        """Never evict a consumer, or one model of it, nor unload it for being idle, or do so again:
        whatever the config says, until the broker ends. Raises NotFound, and NoConsumer for a model
        of a consumer that cannot tell them apart."""
        place = self._place(name)
        try:
            _check_model(place, model)
            self._registry.pin(name, pinned, model)
        finally:
            place.give_up()
        self._emit(
            Pinned(consumer=name, model=model) if pinned else Unpinned(consumer=name, model=model)
        )
        return {**_named(name, model), "pinned": pinned}

    def forget(self, name: str, model: str | None = None) -> dict[str, Any]:
        """Forget what was learned of a consumer and its models, or of one model. Raises
        NotFound."""
        place = self._place(name)
        resident = resident_name(name, model)
        self._learned.forget(resident)
        needed = self._registry.now.needed(resident)
        place.give_up()
        self._emit(Forgotten(consumer=name, model=model))
        return {
            **_named(name, model),
            "needed": {"mib": needed.mib, "source": needed.source},
        }

    def plan(
        self, kind: str, model: str | None = None, context: int | None = None
    ) -> dict[str, Any]:
        """What would happen to a job of `kind` that came now, with that model and context length in
        tokens. Acts on nothing. Raises NoConsumer and ModelNotFound."""
        choice, place = self._places.chosen(lambda: self._router.choose((kind,), lambda: model))
        try:
            wanted = choice.served_as or model
            if wanted is not None and place.config.counts_by_model:
                wanted = self._router.counted_as(place.name, wanted)
            else:
                wanted = None
            return self._plan(Job(place.name, kind, model=wanted, context=context))
        finally:
            place.give_up()

    def _plan(self, job: Job) -> dict[str, Any]:
        now = self._moves.preview(job)
        fits = now.fits or bool(now.victims)
        turn = self._scheduler.estimate(job)
        return {
            "kind": job.kind,
            **_named(job.consumer, job.model),
            "fits": fits,
            "fits_now": now.fits,
            "needed_mib": now.needed_mib,
            "held_mib": now.held_mib,
            "free_mib": now.balance.free_mib,
            "reserved_mib": self._registry.now.config.gpu.reserved_mib,
            "short_mib": now.short_mib,
            "source": now.balance.source,
            "victims": [
                {
                    **_named(*parts_of(victim.name)),
                    "method": victim.method,
                    "mib": victim.mib,
                    "why": self._why(victim),
                    "estimate_ms": round(victim.unload_s * 1000),
                }
                for victim in now.victims
            ],
            "must_load": now.must_load,
            "estimate_ms": {
                "wait": round(turn.wait_s * 1000),
                "evict": round(turn.evict_s * 1000),
                "load": round(turn.load_s * 1000),
                "run": round(turn.run_s * 1000),
            },
            "overdue": turn.overdue,
        }

    def _why(self, victim: PlannedVictim) -> str:
        if victim.method == "trim":
            return "gives back what it holds beyond its models, and stays loaded"
        idle = "never used"
        if victim.last_used is not None:
            idle = f"idle for {self._clock.monotonic() - victim.last_used:.0f} s"
        if victim.wanted is not None:
            return f"its next job is number {victim.wanted} in the queue, {idle}"
        if self._registry.now.config.eviction == "cost":
            return f"costs least to reload: {victim.reload_s:.1f} s, {idle}"
        return f"least recently used: {idle}"

    def _can_be_loaded(self, place: Place) -> None:
        name, consumer = place.name, place.config
        stopped_by = self._registry.get(name).stopped_by is not None
        if consumer.load is None and consumer.warm is None and not stopped_by:
            raise NoConsumer(
                f"consumer {name} has neither a load nor a warm call: it loads with its first job",
                consumer=name,
            )

    def _place(self, name: str) -> Place:
        try:
            return self._places.open(name)
        except NoConsumer:
            known = ", ".join(sorted(self._registry.now.config.consumers)) or "none"
            raise NotFound(f"there is no consumer '{name}'; known: {known}") from None

    def _in_turn(
        self,
        record: RequestRecord,
        name: str,
        kind: str,
        act: Callable[[Ticket], T],
        check: Callable[[Place], None] = lambda place: None,  # noqa: ARG005
        model: str | None = None,
    ) -> T:
        place = self._place(name)
        try:
            _check_model(place, model)
            check(place)
            record.consumer = name
            client = ClientWatch(record, self._watcher)
            record.stack.callback(client.stop)
            job = Job(
                name,
                kind,
                record.who,
                record.request_id,
                makes_room=kind != "unload",
                runs=False,
                key=record.key,
                settings=place.config,
                urgency=record.urgency_or(self._registry.now.config.urgency_of(kind)),
                requester=record.who,
                session=record.session,
                model=model,
            )
            return act(place.wait_turn(job, client))
        finally:
            place.give_up()


def _named(name: str, model: str | None) -> dict[str, Any]:
    return {"consumer": name} if model is None else {"consumer": name, "model": model}


def _check_model(place: Place, model: str | None) -> None:
    if model is not None and not place.config.tells_models_apart:
        message = f"consumer {place.name} does not tell its models apart, so it is all or nothing"
        raise NoConsumer(message, consumer=place.name)
