"""One answer on a connection, read as it comes."""

from __future__ import annotations

from gpumanager.upstream.parsing import (
    Body,
    BrokenAnswer,
    HeadReader,
    InvalidAnswer,
    body_of,
)
from gpumanager.upstream.wire import READ_BYTES, Wire


class Answer:
    """Stands where `requests` has one of urllib3's responses. `status`, `reason` and `fields` (the
    headers in their order, repeated ones kept) are there after `await_head`, and then `read1` gives
    the body. `close` closes the connection, and is idempotent. For one thread."""

    def __init__(self, wire: Wire, method: str) -> None:
        self.close = wire.close
        self._wire = wire
        self._method = method
        self._head = HeadReader()
        self._body: Body | None = None
        self._left: int | None = None
        self._content = b""
        self._fault: Exception | None = None
        self.status = 0
        self.reason = ""
        self.fields: list[tuple[str, str]] = []

    def hear(self, data: bytes) -> bool:
        """Take in what came; b"" is the end of the connection. True once the head is complete.
        Raises InvalidAnswer or BrokenAnswer for a head that never will be."""
        if self._body is None:
            head = self._head
            try:
                rest = head.feed(data)
                if rest is None:
                    return False
                self._body = body_of(self._method, head.status, head.fields)
            except (InvalidAnswer, BrokenAnswer) as error:
                self._fault = error
                raise
            self.status, self.reason, self.fields = head.status, head.reason, head.fields
            self._left = self._body.left
            if not rest:
                return True
            data = rest
        if self._left != 0:
            self._content += self._body.feed(data)
            self._left, self._fault = self._body.left, self._body.fault
        return True

    def await_head(self) -> None:
        """Return when the head is complete. Raises as `hear`, and OSError."""
        while self._body is None:
            if self._fault is not None:
                raise self._fault
            self.hear(self._wire.receive(READ_BYTES))

    @property
    def length_remaining(self) -> int | None:
        """Bytes of the body that `read1` has still to give; None where that is not known yet."""
        return None if self._left is None else self._left + len(self._content)

    def read1(self, n: int = -1, *, decode_content: bool = False) -> bytes:  # noqa: ARG002
        """The next bytes of the body as they come, undecoded, at most `n`; b"" at its end.
        Raises OSError, InvalidAnswer or BrokenAnswer if it breaks off. `decode_content` is there
        because urllib3 has it."""
        most = n if n > 0 else READ_BYTES
        while not self._content and self._left != 0:
            if self._fault is not None:
                raise self._fault
            self.hear(self._wire.receive(most))
        content, self._content = self._content[:most], self._content[most:]
        return content

    def ready(self, timeout: float = 0.0) -> bool:
        """True if `read1` would not have to wait. Looks again if something comes within `timeout`
        seconds. What has come already is taken in; what of it is framing makes nothing ready."""
        while not self._content and self._fault is None and self._left != 0:
            try:
                data = self._wire.receive_now(READ_BYTES)
            except OSError as error:
                self._fault = error  # said once only: without it the end would look like a good one
                break
            if data is not None:
                self.hear(data)
            elif timeout > 0:
                self._wire.wait(timeout)
                timeout = 0.0
            else:
                return False
        return True
