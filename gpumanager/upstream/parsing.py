"""Reading an answer: bytes in, head and body out. Knows no sockets.

Strict where a mistake would change what the client gets (RFC 9112 sections 5 to 7): an answer whose
length is not certain is refused, never guessed. Lenient where nothing hangs on it: a line of the
head may end with a bare LF, a field may be folded, and control characters are left to whoever hands
the head on.
"""

from __future__ import annotations

import http
import re
from collections.abc import Iterable
from typing import Protocol

from gpumanager.upstream.headers import declared_length

LARGEST_HEAD_BYTES = 64 * 1024
MOST_FIELDS = 100
MOST_INTERIM = 1000
"""Heads of 1xx before the real one: a server may say every few seconds that it still works."""

LONGEST_CHUNK_LINE = 4096
LARGEST_TRAILERS_BYTES = 16 * 1024

MOST_OVERHEAD_BYTES = 16 * 1024
"""Of chunk lines, beyond what the content makes up for: extensions without end."""

FREE_CHUNK_LINE = 16
"""What every chunk may have for its line, however little it holds."""

_STATUS = re.compile(rb"HTTP/1\.[0-9] +([1-9][0-9]{2})(?:[ \t]+(.*))?", re.DOTALL)
_NAME = re.compile(rb"[!-9;-~]+")
"""What may stand before a colon; not all of it is handed on."""

_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t -~\x80-\xff]*)?\r\n")
_CHUNK_LINE_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*(?:;[\t -~\x80-\xff]*)?\r?")


class InvalidAnswer(Exception):
    """What came is no valid HTTP/1.1 answer; the text says why."""


class BrokenAnswer(Exception):
    """The connection ended before the answer did; the text says where."""


class HeadReader:
    """Takes in the head of an answer as it comes; interim ones (1xx) are skipped, but for 101 where
    the request asked for an `upgrade`. What it has read is of use once `feed` has said that it is
    complete."""

    def __init__(self, *, upgrade: bool = False) -> None:
        self._final = {http.HTTPStatus.SWITCHING_PROTOCOLS} if upgrade else set()
        self.status = 0
        self.reason = ""
        self.fields: list[tuple[str, str]] = []
        self._rest = b""
        self._size = 0
        self._interim = 0

    def feed(self, data: bytes) -> bytes | None:
        """Take in `data`; b"" is the end of the connection. Returns what comes after the head, None
        as long as it is not complete. Raises InvalidAnswer or BrokenAnswer."""
        if not data:
            where = "within its answer's head" if self._rest or self.status else "without an answer"
            raise BrokenAnswer(f"closed the connection {where}")
        data = self._rest + data
        at = 0
        while (end := data.find(b"\n", at)) >= 0:
            line = data[at:end].removesuffix(b"\r")
            self._size += end + 1 - at
            at = end + 1
            if self._size > LARGEST_HEAD_BYTES:
                break
            if not self.status:
                self._take_status(line)
            elif line:
                self._take_field(line)
            elif self.status >= 200 or self.status in self._final:
                return data[at:]
            else:
                self._skip_interim()
        self._rest = data[at:]
        if self._size + len(self._rest) > LARGEST_HEAD_BYTES:
            raise InvalidAnswer(f"a head of more than {LARGEST_HEAD_BYTES} bytes")
        return None

    def _take_status(self, line: bytes) -> None:
        found = _STATUS.fullmatch(line)
        if found is None:
            raise InvalidAnswer("no HTTP/1.1 status line")
        self.status = int(found[1])
        self.reason = (found[2] or b"").decode("latin-1")

    def _take_field(self, line: bytes) -> None:
        if line[0] in b" \t" and self.fields:
            folded, before = self.fields[-1]
            more = line.decode("latin-1").strip(" \t")
            self.fields[-1] = (folded, f"{before} {more}".strip(" \t"))
            return
        if len(self.fields) >= MOST_FIELDS:
            raise InvalidAnswer(f"more than {MOST_FIELDS} header fields")
        name, colon, value = line.partition(b":")
        name = name.rstrip(b" \t")  # a proxy is to remove it: RFC 9112 section 5.1
        if not colon or not _NAME.fullmatch(name):
            # What comes after it, the framing perhaps, cannot be relied on.
            raise InvalidAnswer("a malformed header line")
        self.fields.append((name.decode("latin-1"), value.decode("latin-1").strip(" \t")))

    def _skip_interim(self) -> None:
        if self.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
            raise InvalidAnswer("101 without having been asked to upgrade")
        self._interim += 1
        if self._interim > MOST_INTERIM:
            raise InvalidAnswer(f"more than {MOST_INTERIM} interim answers")
        self.status, self.fields, self._size = 0, [], 0


class Body(Protocol):
    """The body of an answer, by its framing."""

    @property
    def left(self) -> int | None:
        """Bytes still to come; None where that is not known, 0 once it is complete."""

    fault: InvalidAnswer | BrokenAnswer | None
    """Why nothing more can come, though it is not complete."""

    def feed(self, data: bytes) -> bytes:
        """The content in `data`, as far as it is valid; b"" is the end of the connection."""


def body_of(method: str, status: int, fields: Iterable[tuple[str, str]]) -> Body:
    """How the body of this answer to a request of `method` comes, by RFC 9112 section 6.3. Raises
    InvalidAnswer where that is not certain."""
    listed = list(fields)
    try:
        length = declared_length(listed)
    except ValueError as error:
        raise InvalidAnswer(str(error)) from None
    if method == "HEAD" or status in (204, 304):
        return SizedBody(0)
    codings = [
        coding.strip(" \t").lower()
        for name, value in listed
        if name.lower() == "transfer-encoding"
        for coding in value.split(",")
    ]
    if codings == ["chunked"]:
        return ChunkedBody()
    if codings:
        # The broker asks for none (it sends no TE), so nobody may send one.
        raise InvalidAnswer("a Transfer-Encoding other than chunked")
    return UntilClosedBody() if length is None else SizedBody(length)


class SizedBody:
    """One with a Content-Length, or none. What comes beyond it is dropped."""

    def __init__(self, length: int) -> None:
        self.left = length
        self.fault: InvalidAnswer | BrokenAnswer | None = None

    def feed(self, data: bytes) -> bytes:
        if not data and self.left:
            self.fault = BrokenAnswer("broke off its answer")
        content = data[: self.left]
        self.left -= len(content)
        return content


class UntilClosedBody:
    """One that ends with the connection."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.fault: InvalidAnswer | BrokenAnswer | None = None

    def feed(self, data: bytes) -> bytes:
        if not data:
            self.left = 0
        return data


class ChunkedBody:
    """One in chunks. Extensions and trailers are dropped."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.fault: InvalidAnswer | BrokenAnswer | None = None
        self._in_chunk = 0
        self._after_chunk = False
        self._in_trailers = False
        self._rest = b""
        self._overhead = 0
        self._trailers = 0

    def feed(self, data: bytes) -> bytes:
        if not data:
            self.fault = BrokenAnswer("broke off its answer")
            return b""
        data = self._rest + data
        parts: list[bytes] = []
        at = 0
        try:
            while at < len(data) and self.left is None:
                if self._in_chunk:
                    part = data[at : at + self._in_chunk]
                    parts.append(part)
                    at += len(part)
                    self._in_chunk -= len(part)
                    self._after_chunk = not self._in_chunk
                    continue
                end = self._end_of_line(data, at)
                if end < 0:
                    break
                at = end
        except InvalidAnswer as error:
            self.fault = error
        self._rest = data[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _end_of_line(self, data: bytes, at: int) -> int:
        """Take in the line of framing at `at`; where it ends, -1 where it is not yet complete."""
        if self._after_chunk:
            if data.startswith(b"\r\n", at):
                self._after_chunk = False
                return at + 2
            if data[at:] == b"\r":
                return -1
            raise InvalidAnswer("a chunk that is longer than it said")
        if self._in_trailers:
            return self._end_of_trailer(data, at)
        found = _CHUNK_LINE.match(data, at, at + LONGEST_CHUNK_LINE)
        if found is not None:
            self._begin_chunk(int(found[1], 16), found.end() - at)
            return found.end()
        if len(data) - at >= LONGEST_CHUNK_LINE or not _CHUNK_LINE_BEGUN.fullmatch(data, at):
            raise InvalidAnswer("a malformed chunk size")
        return -1

    def _begin_chunk(self, size: int, line: int) -> None:
        self._in_chunk = size
        self._in_trailers = not size
        self._overhead = max(0, self._overhead + line - FREE_CHUNK_LINE - size)
        if self._overhead > MOST_OVERHEAD_BYTES:
            raise InvalidAnswer("chunks that hold more framing than content")

    def _end_of_trailer(self, data: bytes, at: int) -> int:
        end = data.find(b"\n", at) + 1
        if self._trailers + (end or len(data)) - at > LARGEST_TRAILERS_BYTES:
            raise InvalidAnswer(f"trailers of more than {LARGEST_TRAILERS_BYTES} bytes")
        if not end:
            return -1
        self._trailers += end - at
        line = data[at:end]
        if line == b"\r\n":
            self.left = 0
        elif not line.endswith(b"\r\n") or b":" not in line:
            raise InvalidAnswer("a malformed trailer")
        return end
