"""Handing a consumer's answer on to the client, at the consumer's pace whatever the client's."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator
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
        try:
            exchange.take_in()
        except BrokerError as error:
            # It broke off before its first byte, and nothing was handed on: an envelope can be.
            answer.on_break(error)
            answer.on_end()
            return error_response(error, environ)(environ, start_response)
        write = start_response(f"{exchange.status} {exchange.reason}", exchange.headers)
        if not exchange.ready():
            # The head goes out now: servers send it with the first bytes of the body only.
            write(b"")
        return RelayedBody(answer, environ)


class RelayedBody:
    """The body of a RelayedResponse. An iterator for one thread, with a `close`."""

    def __init__(self, answer: Answer, environ: WSGIEnvironment) -> None:
        self._answer = answer
        self._exchange = answer.exchange
        self._environ = environ
        self._pending = pending_output(environ)
        self._chunks = self._relay()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        # A `Remainder` comes from our own server only, which knows what to do with it.
        return cast(bytes, next(self._chunks))

    def close(self) -> None:
        """Let go of what waits for the client."""
        self._chunks.close()

    def _relay(self) -> Generator[bytes | Remainder, None, None]:
        with _Spool() as spool:
            while not (self._exchange.ended and not len(spool)):
                if not len(spool):
                    chunk = self._read()
                    if chunk and self._pending() > PENDING_BYTES:
                        spool.append(chunk)
                    elif chunk:
                        yield chunk
                    continue
                room = self._pending() <= PENDING_BYTES
                if room:
                    yield spool.take()
                if self._exchange.ended:
                    self._exchange.close()
                    if len(spool):
                        yield spool.hand_over()  # to the server, which needs no thread for it
                elif spool.full:
                    self._await_reader()
                elif self._exchange.ready(0.0 if room else SLOW_POLL_S):
                    spool.append(self._read())

    def _read(self) -> bytes:
        try:
            return self._exchange.read()
        except BrokerError as error:
            record = record_of(self._environ)
            if not isinstance(error, ClientGone):
                record.truncated(error.message)
            self._answer.on_break(error)
            if record.goes_on:
                end_answer(self._environ)
            raise TruncatedAnswer(error) from error
        finally:
            if self._exchange.ended:
                self._answer.on_end()

    def _await_reader(self) -> None:
        """Return when the server can take more."""
        waited = 0.0
        pending = self._pending()
        pause = threading.Event()
        while pending > PENDING_BYTES:
            pause.wait(SLOW_POLL_S)
            before, pending = pending, self._pending()
            waited = waited + SLOW_POLL_S if pending >= before else 0.0
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

    def __len__(self) -> int:
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
        rest = Remainder(file, self._read_at, len(self))
        self._read_at = self._write_at = 0
        return rest

    def take(self) -> bytes:
        if self._file is None:
            return b""
        self._file.seek(self._read_at)
        data = self._file.read(min(READ_BYTES, len(self)))
        self._read_at += len(data)
        if not len(self):
            self._file.truncate(0)
            self._read_at = self._write_at = 0
        return data
