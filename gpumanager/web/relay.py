"""Handing a consumer's answer on to the client, at the consumer's pace whatever the client's."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Generator, Iterable
from typing import IO, TYPE_CHECKING, cast

from flask import Response

from gpumanager.errors import BrokerError, ClientGone, TruncatedAnswer
from gpumanager.jobs.runner import Answer
from gpumanager.upstream.exchange import READ_BYTES
from gpumanager.web.answering import Remainder
from gpumanager.web.boundary import error_response
from gpumanager.web.record import record_of
from gpumanager.web.server import end_answer, pending_output

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PENDING_BYTES = 1024 * 1024
"""What the server may hold for a slow reader before the rest goes to the spool."""

SPOOL_MEMORY_BYTES = 4 * 1024 * 1024
"""What the spool holds in memory; beyond that it is a file."""

SPOOL_BYTES = 4 * 1024**3
"""The largest spool. A consumer that says more than that to a client that does not listen has to
wait for it, and the GPU with it, within the job's time-outs."""

SLOW_POLL_S = 0.05
STALLED_READER_S = 60.0
"""A client that takes nothing for so long, while its answer is ready, is cut off."""


class RelayedResponse(Response):
    """A consumer's answer, for Flask to return from a view.

    Werkzeug's own header handling is by-passed, so that the consumer's go through unchanged. What
    becomes of an answer that is not read to its end, since the client left, is decided when the
    request ends (`Hold.end`).
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(status=answer.exchange.status)
        self._answer = answer

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer, exchange = self._answer, self._answer.exchange
        if not exchange.consumer_done:
            try:
                exchange.take_in()
            except BrokerError as error:
                # It broke off before its first byte, and nothing was handed on: an envelope can be.
                answer.on_break(error)
                answer.on_end()
                return error_response(error, environ)(environ, start_response)
            if exchange.consumer_done:
                answer.on_end()
        write = start_response(f"{exchange.status} {exchange.reason}", exchange.headers)
        if exchange.consumer_done:
            return exchange.rest()
        if not exchange.ready():
            # The head goes out now: servers send it with the first bytes of the body only.
            write(b"")
        # A `Remainder` comes from our own server only, which knows what to do with it.
        return cast(Iterable[bytes], _relayed(answer, environ))


def _relayed(answer: Answer, environ: WSGIEnvironment) -> Generator[bytes | Remainder, None, None]:
    """The body of an answer that is still to come, at least in part."""
    exchange, pending = answer.exchange, pending_output(environ)
    with _Spool() as spool:
        while spool.size or not exchange.ended:
            if not spool.size:
                chunk = _read(answer, environ)
                if chunk and pending() > PENDING_BYTES:
                    spool.append(chunk)
                elif chunk:
                    yield chunk
                continue
            room = pending() <= PENDING_BYTES
            if room:
                yield spool.take()
            if exchange.ended:
                exchange.close()
                if spool.size:
                    yield spool.hand_over()  # to the server, which needs no thread for it
            elif spool.full:
                _await_reader(pending)
            elif exchange.ready(0.0 if room else SLOW_POLL_S):
                spool.append(_read(answer, environ))


def _read(answer: Answer, environ: WSGIEnvironment) -> bytes:
    exchange = answer.exchange
    try:
        return exchange.read()
    except BrokerError as error:
        record = record_of(environ)
        if not isinstance(error, ClientGone):
            record.truncated(error.message)
        answer.on_break(error)
        if record.goes_on:
            end_answer(environ)
        raise TruncatedAnswer(error) from error
    finally:
        if exchange.ended:
            answer.on_end()


def _await_reader(pending: Callable[[], int]) -> None:
    """Return when the server can take more."""
    waited = 0.0
    left = pending()
    pause = threading.Event()
    while left > PENDING_BYTES:
        pause.wait(SLOW_POLL_S)
        before, left = left, pending()
        waited = waited + SLOW_POLL_S if left >= before else 0.0
        if waited >= STALLED_READER_S:
            raise TruncatedAnswer(ClientGone("the client stopped reading"))


class _Spool:
    """Bytes that wait for the client, first in first out; in memory, beyond a bound on disk."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._read_at = 0
        self._write_at = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def size(self) -> int:
        """Bytes in it."""
        return self._write_at - self._read_at

    @property
    def full(self) -> bool:
        """True if no more may be appended before all of it was taken."""
        return self._write_at >= SPOOL_BYTES

    def append(self, data: bytes) -> None:
        if self._file is None:
            self._file = tempfile.SpooledTemporaryFile(SPOOL_MEMORY_BYTES)  # noqa: SIM115  # closed in __exit__
        self._file.seek(self._write_at)
        self._write_at += self._file.write(data)

    def hand_over(self) -> Remainder:
        """All that is left, which is not this spool's any more."""
        assert self._file is not None  # noqa: S101  # it is not empty
        file, self._file = self._file, None
        rest = Remainder(file, self._read_at, self.size)
        self._read_at = self._write_at = 0
        return rest

    def take(self) -> bytes:
        if self._file is None:
            return b""
        self._file.seek(self._read_at)
        data = self._file.read(min(READ_BYTES, self.size))
        self._read_at += len(data)
        if not self.size:
            self._file.truncate(0)
            self._read_at = self._write_at = 0
        return data
