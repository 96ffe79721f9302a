"""The calls the broker makes on its own account: health, residency, load, unload."""

from __future__ import annotations

import json
import logging
import socket
import threading
from typing import Any

from gpumanager.clock import Clock
from gpumanager.config import (
    Call,
    ConsumerConfig,
    Done,
    Health,
    LoadCall,
    Lost,
    ModelList,
    Probe,
    Session,
    Timeouts,
    UnloadCall,
    expressions,
)
from gpumanager.errors import BrokerError, ConsumerTimeout, ConsumerUnreachable
from gpumanager.model import ModelListing, ProbeReport, model_key
from gpumanager.upstream.answers import (
    contract_report,
    details_of,
    names_in,
    parsed,
    probe_report,
    sizes_and_aliases,
)
from gpumanager.upstream.exchange import Exchange, Outbound
from gpumanager.upstream.watcher import Watcher

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0
UNLOAD_TIMEOUT_S = 30.0
TRIM_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 120.0
CANCEL_TIMEOUT_S = 10.0
BUSY_POLL_S = 0.5
LONGEST_ANSWER_BYTES = 4 * 1024 * 1024
OPENAI_LIST = ModelList(path="/v1/models", items="data[].id")
"""How a consumer is asked for its models that has no call of its own for that."""


class GivingUp:
    """Has one call given up, from any thread: its connection is shut down, and whoever makes it
    gets the error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exchange: Exchange | None = None
        self.error: BrokerError | None = None
        """Why it was given up; None if it was not."""

    def give_up(self, error: BrokerError) -> None:
        """Now, or as soon as it begins. Does not block."""
        with self._lock:
            if self.error is None:
                self.error = error
            exchange = self._exchange
        if exchange is not None:
            exchange.abort(error)

    def calls_with(self, exchange: Exchange) -> None:
        """The call is about to be made with `exchange`. Raises the error of `give_up`."""
        with self._lock:
            self._exchange = exchange
            if self.error is not None:
                raise self.error


class ControlCalls:
    """Probes, loads and unloads consumers. `consumer` are the settings of the one of that name: as
    of a job's admission, or those in force. Safe from any thread; raises BrokerError."""

    def __init__(self, watcher: Watcher, clock: Clock) -> None:
        self._watcher = watcher
        self._clock = clock

    def probe(self, name: str, consumer: ConsumerConfig) -> ProbeReport:
        """Ask the consumer how it is.

        An answer of `health` that is JSON with `loaded` and `gpu_resident_mib` is believed; a
        `probe` with expressions knows better where there is one. A consumer whose health is
        good but whose probe fails is healthy, with nothing known of its residency.
        """
        report = ProbeReport()
        if consumer.health is not None:
            report = self._ask_health(name, consumer, consumer.health)
        if consumer.probe is not None:
            try:
                report = self._ask_probe(name, consumer, consumer.probe, report)
            except BrokerError:
                if consumer.health is None:
                    raise
        return report

    def load(
        self,
        name: str,
        consumer: ConsumerConfig,
        model: str | None = None,
        giving_up: GivingUp | None = None,
    ) -> None:
        """Have the consumer load its model, or the one that is given. Raises if it has no `load`
        call or answers badly, or was given up."""
        if consumer.load is None:
            raise ConsumerUnreachable(f"{name} has no load call", consumer=name)
        self._ok(name, consumer, _with_model(consumer.load, model), LOAD_TIMEOUT_S, giving_up)

    def warm(
        self,
        name: str,
        consumer: ConsumerConfig,
        model: str | None = None,
        giving_up: GivingUp | None = None,
    ) -> None:
        """Have the consumer load its model, or the one that is given, as its first job would, with
        its `warm` call."""
        if consumer.warm is None:
            raise ConsumerUnreachable(f"{name} has no warm call", consumer=name)
        self._ok(name, consumer, _with_model(consumer.warm, model), LOAD_TIMEOUT_S, giving_up)

    def trim(self, name: str, consumer: ConsumerConfig) -> None:
        """Have the consumer give back what it holds beyond its models, with its `trim` call."""
        if consumer.trim is None:
            raise ConsumerUnreachable(f"{name} has no trim call", consumer=name)
        self._ok(name, consumer, consumer.trim, TRIM_TIMEOUT_S)

    def unload(self, name: str, consumer: ConsumerConfig, model: str | None = None) -> bool:
        """Have the consumer drop its model, or each of the models its probe lists, or of those only
        the one that is given; again and again for a while, where it refuses for being busy. One
        model that cannot be unloaded, as one that was deleted, does not keep the others: only if
        none can, its error is raised. False if its probe lists none, so that there was nothing to
        ask for."""
        call = consumer.unload
        if call is None:
            raise ConsumerUnreachable(f"{name} has no unload call", consumer=name)
        deadline = self._clock.monotonic() + UNLOAD_TIMEOUT_S
        if call.for_each is None:
            self._unload_once(name, consumer, call, deadline)
            return True
        items = self._items(name, consumer)
        if model is not None:
            items = [item for item in items if model_key(item) == model]
        failed: list[tuple[str, BrokerError]] = []
        for item in items:
            try:
                self._unload_once(name, consumer, call.for_item(item), deadline)
            except BrokerError as error:
                gone = isinstance(error, ConsumerUnreachable) and error.nothing_listens
                if gone or self._clock.monotonic() >= deadline:
                    raise
                failed.append((item, error))
        if failed and len(failed) == len(items):
            raise failed[0][1]
        for item, why in failed:
            extra = {"consumer": name, "model": item, "reason": why.message}
            log.warning("model not unloaded", extra=extra)
        return bool(items)

    def settled(self, name: str, consumer: ConsumerConfig, model: str | None = None) -> bool:
        """Whether the consumer's `settled` call says that its unload is over; True if it has
        none. Of one model that was unloaded the probe says so, by not listing it. One look; what
        it cannot say now is False."""
        call = consumer.settled
        if call is None:
            return True
        if model is not None:
            try:
                return all(model_key(item) != model for item in self._items(name, consumer))
            except BrokerError:
                return False
        try:
            # Its own time-out is for all the looks together.
            status, body = self._call(name, consumer, call, PROBE_TIMEOUT_S)
            self._accept(name, call, status, body)
        except BrokerError:
            return False
        return expressions.search(call.until, parsed(body)) is True

    def cancel(self, name: str, consumer: ConsumerConfig) -> None:
        """Make the call of `on_disconnect`. Raises if there is none or it answers badly."""
        call = consumer.on_disconnect
        if not isinstance(call, Call):
            raise ConsumerUnreachable(f"{name} has no call to cancel a job", consumer=name)
        self._ok(name, consumer, call, CANCEL_TIMEOUT_S)

    def busy(self, name: str, consumer: ConsumerConfig) -> bool | None:
        """Whether the consumer says that it works on something; None if it does not tell."""
        probe = consumer.probe
        if probe is None or probe.busy is None:
            return None
        call: Call = probe
        if probe.busy.path is not None:
            call = Call(path=probe.busy.path, timeout=probe.timeout, headers=probe.headers)
        busy = expressions.search(
            probe.busy.expr, self._json(name, consumer, call, PROBE_TIMEOUT_S)
        )
        return busy if isinstance(busy, bool) else None

    def models(self, name: str, consumer: ConsumerConfig) -> ModelListing | None:
        """The models that the consumer lists, None where it gives no list."""
        call = consumer.list_models or OPENAI_LIST
        answer = self._json(name, consumer, call, PROBE_TIMEOUT_S)
        names = names_in(expressions.search(call.items, answer))
        if names is None:
            return None
        sizes, aliases = sizes_and_aliases(call, answer)
        return ModelListing(names, details_of(answer, names), sizes, aliases)

    def slots(self, name: str, consumer: ConsumerConfig) -> int | None:
        """How many jobs the consumer says that it works on at once; None if it does not tell."""
        if consumer.slots is None:
            return None
        answer = self._json(name, consumer, consumer.slots, PROBE_TIMEOUT_S)
        return consumer.slots.find_count(answer)

    # -- asynchronous jobs -----------------------------------------------------------------

    def job_result(
        self, name: str, consumer: ConsumerConfig, done: Done, job_id: str
    ) -> bytes | None:
        """What the consumer says of the job, once that is over; None before."""
        body = self._ok(name, consumer, done.poll.filled("id", job_id), PROBE_TIMEOUT_S)
        return body if expressions.search(done.until, parsed(body)) is True else None

    def job_listed(self, name: str, consumer: ConsumerConfig, lost: Lost, job_id: str) -> bool:
        """Whether the consumer still has the job in work; True if it does not say."""
        listed = expressions.search(lost.listed, self._json(name, consumer, lost, PROBE_TIMEOUT_S))
        return not isinstance(listed, list) or job_id in listed

    def cancel_job(self, name: str, consumer: ConsumerConfig, done: Done, job_id: str) -> None:
        """Make all the calls that stop the job; raises the error of the first that failed."""
        failed: BrokerError | None = None
        for call in done.cancel:
            try:
                self._ok(name, consumer, call.filled("id", job_id), CANCEL_TIMEOUT_S)
            except BrokerError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    # -- inside ----------------------------------------------------------------------------

    def _ask_health(self, name: str, consumer: ConsumerConfig, health: Health) -> ProbeReport:
        if health.tcp is None:
            return contract_report(self._json(name, consumer, health, PROBE_TIMEOUT_S))
        host, _, port = health.tcp.rpartition(":")
        timeout = health.timeout or PROBE_TIMEOUT_S
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout).close()
        except TimeoutError:
            message = f"{name}: no connection to {health.tcp} within {timeout:g} s"
            raise ConsumerTimeout(message, consumer=name) from None
        except OSError as error:
            raise ConsumerUnreachable(
                f"{name} does not listen on {health.tcp}: {error.strerror or error}",
                consumer=name,
                nothing_listens=isinstance(error, ConnectionRefusedError),
            ) from None
        return ProbeReport()

    def _ask_probe(
        self, name: str, consumer: ConsumerConfig, probe: Probe, otherwise: ProbeReport
    ) -> ProbeReport:
        status, body = self._call(name, consumer, probe, probe.timeout or PROBE_TIMEOUT_S)
        if status in probe.absent:
            return ProbeReport(loaded=False)
        self._accept(name, probe, status, body)
        return probe_report(probe, parsed(body), otherwise)

    def _unload_once(
        self, name: str, consumer: ConsumerConfig, call: UnloadCall, deadline: float
    ) -> None:
        """Make the call; again and again, where it may be refused for being busy."""
        pause = threading.Event()
        while True:
            try:
                self._ok(name, consumer, call, UNLOAD_TIMEOUT_S)
            except ConsumerUnreachable as error:
                refused = call.when_busy == "refuses" and not error.nothing_listens
                if not refused or self._clock.monotonic() >= deadline:
                    raise
                pause.wait(BUSY_POLL_S)
            else:
                return

    def _items(self, name: str, consumer: ConsumerConfig) -> list[str]:
        probe = consumer.probe
        if probe is None:
            return []
        found = probe.find_items(self._json(name, consumer, probe, PROBE_TIMEOUT_S))
        if not isinstance(found, list):
            raise ConsumerUnreachable(
                f"{name} does not tell what to unload: {probe.path} gave no list", consumer=name
            )
        return [item for item in found if isinstance(item, str)]

    def _open_session(
        self, name: str, consumer: ConsumerConfig, session: Session, timeout: float
    ) -> str:
        found = expressions.search(session.id, self._json(name, consumer, session, timeout))
        if not isinstance(found, str):
            message = f"{name} opened no session: {session.path} gave no '{session.id}'"
            raise ConsumerUnreachable(message, consumer=name)
        return found

    def _json(self, name: str, consumer: ConsumerConfig, call: Call, timeout: float) -> Any:
        """The answer as JSON, None where it is none."""
        return parsed(self._ok(name, consumer, call, timeout))

    def _ok(
        self,
        name: str,
        consumer: ConsumerConfig,
        call: Call,
        timeout: float,
        giving_up: GivingUp | None = None,
    ) -> bytes:
        """Make the call; the body of an answer that the call accepts."""
        status, body = self._call(name, consumer, call, call.timeout or timeout, giving_up)
        self._accept(name, call, status, body)
        return body

    def _accept(self, name: str, call: Call, status: int, body: bytes) -> None:
        accepted = status in call.ok if call.ok else 200 <= status < 300
        if not accepted:
            message = f"{name} answered {status} to {call.method} {call.path}"
            raise ConsumerUnreachable(message, consumer=name)
        if call.expect is not None and expressions.search(call.expect, parsed(body)) is not True:
            message = f"{name} did not say '{call.expect}' to {call.method} {call.path}"
            raise ConsumerUnreachable(message, consumer=name)

    def _call(
        self,
        name: str,
        consumer: ConsumerConfig,
        call: Call,
        timeout: float,
        giving_up: GivingUp | None = None,
    ) -> tuple[int, bytes]:
        if consumer.model is not None:
            call = call.filled("model", consumer.model)
        if consumer.session is not None and "{session}" in call.model_dump_json():
            call = call.filled(
                "session", self._open_session(name, consumer, consumer.session, timeout)
            )
        body = None if call.json_body is None else json.dumps(call.json_body).encode()
        headers = list(call.headers.items())
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        outbound = Outbound(
            method=call.method,
            base_url=consumer.base_url,
            target=consumer.base_path + call.target,
            headers=headers,
            body=body,
            length=len(body) if body is not None else 0 if call.method != "GET" else None,
            ca_file=consumer.ca_file,
        )
        timeouts = Timeouts(
            connect=min(timeout, consumer.timeouts.connect),
            first_byte=timeout,
            idle=timeout,
            total=timeout,
        )
        exchange = Exchange(name, outbound, timeouts, self._watcher, self._clock)
        try:
            if giving_up is not None:
                giving_up.calls_with(exchange)
            exchange.send()
            parts: list[bytes] = []
            size = 0
            while chunk := exchange.read():
                size += len(chunk)
                if size > LONGEST_ANSWER_BYTES:
                    message = f"{name} answered {call.method} {call.path} without end"
                    raise ConsumerUnreachable(message, consumer=name)
                parts.append(chunk)
            return exchange.status, b"".join(parts)
        finally:
            exchange.close()


def _with_model(call: LoadCall, model: str | None) -> LoadCall:
    return call if model is None else call.filled("model", model)
