"""How waitress answers: what it refuses itself in the broker's envelope, all else with few system
calls, and never on a thread that waits for a slow reader."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from waitress.buffers import ReadOnlyFileBasedBuffer
from waitress.task import ErrorTask, WSGITask

from gpumanager import errors
from gpumanager.web.protocols import protocol_of
from gpumanager.web.record import ADMITTED, LOCAL_ADDRESS, record_of, request_id

log = logging.getLogger(__name__)


class Remainder:
    """The last `size` bytes of an answer, from `start` of an open `file`: what a WSGI body may
    yield last instead of bytes. Whoever takes it closes the file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file = file
        self.start = start
        self._size = size

    def __len__(self) -> int:
        return self._size


class Switch:
    """What the body of an answer 101 yields instead of bytes. Once the head of that answer is
    sent, `take` is called, on the server's loop, with the client's connection, which the server has
    forgotten, and with what has come on it behind the request; or `drop`, if it never comes to
    that. `take` closes the connection when it is over."""

    def __init__(
        self,
        protocol: str,
        take: Callable[[socket.socket, bytes], object],
        drop: Callable[[], object],
    ) -> None:
        self.protocol = protocol
        self.take = take
        self.drop = drop
        self.promised = False

    def __len__(self) -> int:
        return 1  # waitress asks; an empty piece would not be written

    def end_of_request(self) -> None:
        """Drop it, unless its answer was written."""
        if not self.promised:
            self.drop()


class JsonErrorTask(ErrorTask):
    """Waitress's own refusals (unparsable, too large), in the broker's envelope."""

    def execute(self) -> None:
        request: Any = self.request  # a parser whose `error` says what it refused
        refused = request.error
        error = _as_broker_error(refused)
        given = request.headers.get("X_REQUEST_ID", "")
        named = request_id({"HTTP_X_REQUEST_ID": given})
        protocol = protocol_of(getattr(request, "path", ""))
        body = errors.json_line(protocol.body(error))
        self.status = f"{refused.code} {refused.reason}"
        self.response_headers = [
            ("Content-Type", "application/json"),
            *protocol.headers(error),
            ("X-Request-Id", named),
        ]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
        log.info(
            "refused",
            extra={
                "status": refused.code,
                "failure": error.code,
                "reason": error.message,
                "client": self.channel.addr[0],
                "request_id": named,
            },
        )


class OneSendTask(WSGITask):
    """Waitress's task, which sends the head of an answer together with the first bytes of its
    body: one system call and one packet less. A `Remainder` it leaves to the main loop."""

    def execute(self) -> None:
        """Have the application answer."""
        request: Any = self.request
        if request.is_last:
            self.set_close_on_finish()
        channel: Any = self.channel
        environ = self.get_environment()  # what waitress goes on with
        environ[LOCAL_ADDRESS] = channel.local_address
        if request.admitted is not None:
            environ[ADMITTED] = request.admitted
        try:
            super().execute()
            if request.command == "HEAD":  # none of the chunks that its head speaks of is sent
                self.write(b"")
                self.chunked_response = False
        except OSError as error:
            # What is to be sent is kept in files, too.
            record = record_of(environ)
            record.truncated(f"it cannot be kept for its client: {error.strerror}")
            channel.abandon()
            raise
        except BaseException:
            # HTTP/1.0 has no chunks: there the end of the connection is the end of the answer,
            # unless it is a reset.
            if self.wrote_header and self.version == "1.0":
                channel.end_with_reset()
            raise

    def write(self, data: bytes | Remainder | Switch) -> None:
        """As WSGI's `write`."""
        if isinstance(data, Remainder):
            self._hand_over(data)
            return
        if isinstance(data, Switch):
            self._switch(data)
            return
        whole = self.content_length
        plain = self.complete and whole is not None and len(data) <= whole and self.has_body
        if self.wrote_header or not data or not plain:
            super().write(data)
            return
        head = self.build_response_header()
        self.wrote_header = True
        self.content_bytes_written += len(data)
        self.channel.write_soon(head + data)

    def _switch(self, switch: Switch) -> None:
        channel: Any = self.channel
        switching = [("Connection", "Upgrade"), ("Upgrade", switch.protocol)]
        self.response_headers = [*self.response_headers, *switching]
        self.close_on_finish = True  # or waitress would have the head say that it closes
        head = self.build_response_header()
        self.close_on_finish = False
        self.wrote_header = True
        channel.switch(head, switch)

    def _hand_over(self, rest: Remainder) -> None:
        try:
            self._leave_to_main_loop(rest)
        except BaseException:
            with suppress(OSError):
                rest.file.close()
            raise

    def _leave_to_main_loop(self, rest: Remainder) -> None:
        if not self.wrote_header:
            super().write(b"")
        size, end = len(rest), b""
        if self.chunked_response:
            self.channel.write_soon(f"{size:X}\r\n".encode())
            end = b"\r\n0\r\n\r\n"  # else the thread would wait to write it
            self.chunked_response = False
        elif self.content_length is not None:
            size = min(size, self.content_length - self.content_bytes_written)
        rest.file.seek(rest.start + size)
        rest.file.write(end)
        rest.file.truncate()
        rest.file.seek(rest.start)
        file: Any = rest.file
        buffer: Any = ReadOnlyFileBasedBuffer(file)
        buffer.prepare()
        self.channel.write_soon(buffer)
        self.content_bytes_written += size
        # A request behind it on this connection would have a thread wait for the reader after all.
        self.close_on_finish = True


def _as_broker_error(refused: Any) -> errors.BrokerError:
    if refused.code == 408:
        return errors.RequestTimeout(refused.body)
    if refused.code == 413:
        return errors.PayloadTooLarge("the body is too large")
    if refused.code == 431:
        return errors.HeadersTooLarge("the head is too large")
    if refused.code >= 500 and refused.code != 501:
        return errors.InternalError("the broker failed; its log has the details")
    return errors.BadRequest(str(refused.body))
