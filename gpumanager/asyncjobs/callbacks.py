"""Tells whoever submitted an asynchronous job with `X-Callback-Url` that it is over, as Standard
Webhooks says: signed, at least once, again after a failure."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from gpumanager import __version__
from gpumanager.asyncjobs.model import AsyncJob, Callback
from gpumanager.asyncjobs.store import Store
from gpumanager.asyncjobs.targets import Targets
from gpumanager.clock import Clock
from gpumanager.config import Timeouts
from gpumanager.errors import BrokerError, ConsumerUnreachable, ShuttingDown, json_line
from gpumanager.telemetry.events import CallbackSent, Emit
from gpumanager.upstream.exchange import Exchange, Outbound
from gpumanager.upstream.watcher import Watcher
from gpumanager.worker import PeriodicWorker

log = logging.getLogger(__name__)

AGAIN_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0)
"""How long after each failed attempt the next one is made; after the last of these, none is."""

TIMEOUTS = Timeouts(connect=3.0, first_byte=10.0, idle=5.0, total=15.0)

MOST_ANSWER_BYTES = 64 * 1024
"""Of an answer, which nobody reads: a larger one is cut off."""

LOOK_S = 60.0
RETRY_S = 5.0

REST = 4.0
"""A URL whose attempt failed after so many seconds is left alone for as often as many: one that
hangs does not take all of the thread."""

MOST_RESTING = 100


def signature(secret: bytes, message_id: str, timestamp: int, payload: bytes) -> str:
    """What `webhook-signature` says."""
    signed = f"{message_id}.{timestamp}.".encode() + payload
    return "v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()


class _NotListed(Exception):
    """The config was changed since the job was submitted."""


class Callbacks:
    """Those of the jobs in `store`. One thread makes all attempts, one after another; it begins
    with the first job that has a callback. `shown` is a job's state, for JSON.

    How far each is stands in the store, so a restart goes on with what is pending: a job of which
    nobody could be told yet when the broker was killed is told of then, perhaps once more.
    """

    def __init__(
        self,
        store: Store,
        *,
        targets: Targets,
        secret: bytes,
        shown: Callable[[AsyncJob], Mapping[str, Any]],
        watcher: Watcher,
        clock: Clock,
        emit: Emit,
    ) -> None:
        self._store = store
        self._targets = targets
        self._secret = secret
        self._shown = shown
        self._watcher = watcher
        self._clock = clock
        self._emit = emit
        self._resting: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._exchange: Exchange | None = None
        self._worker = PeriodicWorker("async-callbacks", self.turn, retry_s=RETRY_S)

    def wake(self) -> None:
        """Somebody is to be told of another one. Never blocks."""
        self._worker.start()
        self._worker.wake()

    def stop(self) -> None:
        """End the thread, and the attempt that it makes, which is not counted. Idempotent."""
        with self._lock:
            self._stopped = True
            exchange = self._exchange
        if exchange is not None:
            exchange.abort(ShuttingDown("the broker shuts down"))
        self._worker.stop()
        self._worker.join()

    def turn(self) -> float:
        """Make the attempt that is due, if one is; returns the seconds until the next look."""
        now = self._clock.monotonic()
        self._resting = {url: until for url, until in self._resting.items() if until > now}
        job = self._store.next_callback(tuple(self._resting))
        soonest = min(self._resting.values(), default=now + LOOK_S) - now
        if job is None or job.callback is None or job.ended is None:
            return min(LOOK_S, soonest)
        due = job.ended if job.callback.due is None else job.callback.due
        wait = due - self._now()
        if 0 < wait <= AGAIN_S[-1]:  # further off, the clock was set back
            return min(LOOK_S, soonest, wait)
        try:
            self._attempt(job, job.callback)
        except ShuttingDown:
            return LOOK_S  # the next broker goes on
        return 0.0

    def _attempt(self, job: AsyncJob, callback: Callback) -> None:
        host, began = "", self._clock.monotonic()
        failure: str | None = None
        final = False
        try:
            try:
                target = self._targets.target(callback.url)
            except ValueError:
                raise _NotListed from None
            host = f"{target.host}:{target.port}"
            status = self._post(target.base, target.path, self._targets.addresses(target), job)
            if not 200 <= status < 300:
                failure = f"it answered {status}"
                final = status == HTTPStatus.GONE
        except ShuttingDown:
            raise
        except _NotListed:
            failure, final = "jobs.callbacks does not list its host any more", True
        except ValueError as error:
            failure = str(error)
        except OSError as error:
            failure = f"its host cannot be resolved: {error.strerror or error}"
        except BrokerError as error:
            failure = error.message
        attempts = callback.attempts + 1
        again = None if failure is None or final else self._again(attempts)
        state = "delivered" if failure is None else "failed" if again is None else "pending"
        due = None if again is None else self._now() + again
        if failure is not None:
            spent = self._clock.monotonic() - began
            if spent > 0 and len(self._resting) < MOST_RESTING:
                self._resting[callback.url] = self._clock.monotonic() + REST * spent
        self._store.called_back(
            job,
            replace(callback, state=state, attempts=attempts, due=due, failure=failure),  # type: ignore[arg-type]  # one of them
        )
        self._emit(
            CallbackSent(
                job=job.id,
                key=job.key,
                host=host,
                told="retried" if state == "pending" else state,  # type: ignore[arg-type]
                attempt=attempts,
                reason=failure,
                again_ms=None if again is None else round(again * 1000),
            )
        )

    def _again(self, attempts: int) -> float | None:
        return AGAIN_S[attempts - 1] if attempts <= len(AGAIN_S) else None

    def _post(self, base: str, path: str, addresses: list[str], job: AsyncJob) -> int:
        """The status of the answer. Raises BrokerError."""
        for number, address in enumerate(addresses, start=1):
            exchange = self._prepared(base, path, address, job)
            try:
                exchange.send()
                exchange.read_ahead(MOST_ANSWER_BYTES)
                return exchange.status
            except ShuttingDown:
                raise
            except BrokerError:
                if exchange.status:
                    return exchange.status  # what follows its head is nothing to anybody
                if exchange.reached or number == len(addresses):
                    raise
            finally:
                with self._lock:
                    self._exchange = None
                exchange.close()
        raise ConsumerUnreachable("the host of the callback has no address")

    def _prepared(self, base: str, path: str, address: str, job: AsyncJob) -> Exchange:
        payload, name, at = self._payload(job), f"msg_{job.id}", int(self._now())
        headers = [
            ("Content-Type", "application/json"),
            ("User-Agent", f"gpumanager/{__version__}"),
            ("webhook-id", name),
            ("webhook-timestamp", str(at)),
            ("webhook-signature", signature(self._secret, name, at, payload)),
        ]
        outbound = Outbound("POST", base, path, headers, payload, len(payload), address=address)
        exchange = Exchange("the callback's host", outbound, TIMEOUTS, self._watcher, self._clock)
        with self._lock:
            if self._stopped:
                raise ShuttingDown("the broker shuts down")
            self._exchange = exchange
        return exchange

    def _payload(self, job: AsyncJob) -> bytes:
        """The same at each attempt."""
        data = {name: value for name, value in self._shown(job).items() if name != "callback"}
        return json_line({"type": f"job.{job.state}", "timestamp": data["ended"], "data": data})

    def _now(self) -> float:
        return self._clock.now().timestamp()
