"""Requests as bytes: waitress's parser, stricter. Whatever two servers may read differently is
refused before anything is done with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from waitress.buffers import OverflowableBuffer
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.rfc7230 import CHUNK_EXT_RE, HEADER_FIELD_RE
from waitress.utilities import BadRequest, Error

from gpumanager.errors import BrokerError
from gpumanager.keys import Role
from gpumanager.web.record import asks_websocket

_PATH = re.compile(rb"\s{0,8}[A-Z]{1,16} (?:https?://[^/\s]{0,300})?(/[^?#\s]{0,300})")
_FOLDED = re.compile(rb"\n[ \t]")
_CODINGS = re.compile(rb"\ntransfer-encoding:([^\n]*)", re.IGNORECASE)
_HOST_LINE = re.compile(rb"\nhost:", re.IGNORECASE)
LONGEST_HOST = 256
"""In characters; a name in the DNS has at most 253."""

_AUTHORITY = re.compile(
    rf"(?!.{{{LONGEST_HOST + 1}}})"
    r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(?::[0-9]{0,5})?"
)
"""A host, maybe with a port (RFC 3986 without its comma, which is what joins two headers)."""

_EXTENSIONS: Any = CHUNK_EXT_RE  # of bytes; the stubs say str
_FIELD: Any = HEADER_FIELD_RE
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")

LONGEST_CHUNK_LINE = 1024
"""Bytes of a chunk's size with its extensions, or of one trailer."""

MOST_TRAILERS = 8 * 1024
"""Bytes of all trailers, which nobody reads."""

FRAMING_ALLOWED = 16
"""Bytes of framing that a chunk may have for nothing; two more for each byte it carries."""

MOST_FRAMING = 16 * 1024
"""Bytes of framing beyond that. Both as Go's net/http has them."""

Admitted = tuple[str | None, Role]
"""The name and the role of the key that a request came with; None where there are no keys."""

Admit = Callable[["StrictRequestParser"], "Admitted | BrokerError"]


class TookTooLong(Error):
    """Waitress's way to say 408, which it does not by itself."""

    code = 408
    reason = "Request Timeout"


class StrictRequestParser(HTTPRequestParser):
    """Waitress's parser, which also refuses a length beside a transfer coding, a transfer coding
    in HTTP/1.0 or one that is not just `chunked`, headers on several lines, and a request that
    does not say plainly which host it is for (RFC 9112, 3.2).

    The authority of an absolute target takes the place of `Host`. Before any of a body is taken,
    `admit` is asked. It returns why not, if not; then the request ends here, without a body.
    Behind one that `is_last` nothing more is taken on its connection. Behind one that asks for
    a WebSocket it is kept, in `behind`, until it is known whether that is still HTTP.
    """

    # Waitress leaves these unset in what it cannot parse, and then logs them.
    path = request_uri = query = fragment = ""
    command: Any = ""

    admit: Admit | None = None
    admitted: Admitted | BrokerError | None = None
    is_last = False
    behind: bytes | None = None

    def received(self, data: bytes) -> int:
        """Take what belongs to this request; returns how many bytes that were. Of what comes
        behind one that is wrong or refused nothing can be made, so that all is taken."""
        before = self.header_plus
        consumed = super().received(data)
        if self.error is not None and self.path in ("", "/"):
            self._look_for_path(before + data)
        if self.headers_finished and not self.completed and self.admit is not None:
            self.admitted, self.admit = self.admit(self), None
            if isinstance(self.admitted, BrokerError):
                self.completed = self.is_last = True
                self.body_rcv = None
                self.headers = {k: v for k, v in self.headers.items() if k != "CONTENT_LENGTH"}
        if self.completed:
            self.expect_continue = False  # there is nothing to go on with
            if self.error is not None:
                self.is_last = True
            elif not self.is_last and "UPGRADE" in self.headers and self._asks_websocket():
                self.behind = data[consumed:]
        return consumed if self.behind is None and not self.is_last else len(data)

    def _asks_websocket(self) -> bool:
        given = {f"HTTP_{name}": value for name, value in self.headers.items()}
        return asks_websocket(
            {
                **given,
                "REQUEST_METHOD": self.command.upper(),
                "SERVER_PROTOCOL": f"HTTP/{self.version}",
                "CONTENT_LENGTH": given.get("HTTP_CONTENT_LENGTH"),
            }
        )

    def give_up(self, why: Error) -> None:
        """End it, incomplete as it is."""
        self.error = why
        self.completed = self.is_last = True
        if not self.path:
            self._look_for_path(self.header_plus)

    def _look_for_path(self, head: bytes) -> None:
        """What was asked for, in a head that is refused unread: it says in whose words."""
        if found := _PATH.match(head):
            self.path = found[1].decode("latin-1")

    def close(self) -> None:
        """Let go of its body. What could not be written of it is not missed."""
        with suppress(OSError):
            super().close()

    def parse_header(self, header_plus: bytes) -> None:
        if _FOLDED.search(header_plus):
            raise ParsingError("a header on several lines")
        try:
            super().parse_header(header_plus)
        except ValueError:  # half an IPv6 address; more digits than Python makes a number of
            raise ParsingError("the target or Content-Length is malformed") from None
        if "TRANSFER_ENCODING" in self.headers:  # in HTTP/1.1 waitress takes it out
            raise ParsingError("Transfer-Encoding in HTTP/1.0")
        codings = _CODINGS.findall(header_plus)
        if codings and [coding.strip(b" \t\r").lower() for coding in codings] != [b"chunked"]:
            raise ParsingError("Transfer-Encoding must be chunked, once")
        if codings and "CONTENT_LENGTH" in self.headers:
            raise ParsingError("Content-Length beside Transfer-Encoding")
        if self.chunked:
            self.body_rcv = ChunkedBody(OverflowableBuffer(self.adj.inbuf_overflow))
        self._settle_host(header_plus)

    def _settle_host(self, head: bytes) -> None:
        parsed: Any = self  # its stubs lack half of what it sets
        given = len(_HOST_LINE.findall(head))
        if given > 1:
            raise ParsingError("there must be one Host, not several")
        if not given and self.version not in ("", "1.0"):
            raise ParsingError("a Host is required in HTTP/1.1")
        host: str = parsed.headers.get("HOST", "")
        if not _AUTHORITY.fullmatch(host):
            raise _no_authority(host)
        target: str = parsed.request_uri
        if target.startswith("/") or (target == "*" and parsed.command == "OPTIONS"):
            return
        if parsed.proxy_scheme not in ("http", "https") or not parsed.proxy_netloc:
            raise ParsingError("the target must be a path or an http URL")
        if not _AUTHORITY.fullmatch(parsed.proxy_netloc):
            raise _no_authority(parsed.proxy_netloc)
        parsed.headers["HOST"] = parsed.proxy_netloc
        parsed.path = parsed.path or "/"


class ChunkedBody(ChunkedReceiver):
    """A body in chunks (RFC 9112, 7.1), to the letter, with bounds on everything that is not
    content. What it costs grows with the bytes received, not with their square."""

    def __init__(self, buf: OverflowableBuffer) -> None:
        super().__init__(buf)
        self._line = b""
        self._left = 0
        self._expects: Literal["size", "end", "trailer"] = "size"
        self._framing = 0
        self._trailers = 0

    def received(self, s: bytes) -> int:
        """Take what belongs to the body; returns how many bytes that were."""
        pieces = []
        at = 0
        while at < len(s) and not self.completed and self.error is None:
            if self._left:
                piece = s[at : at + self._left]
                pieces.append(piece)
                self._left -= len(piece)
                at += len(piece)
                continue
            stop = s.find(b"\n", at) + 1 or len(s)
            self._line += s[at:stop]
            at = stop
            if len(self._line) > LONGEST_CHUNK_LINE:
                self.error = BadRequest("a chunk's size or a trailer is too long")
            elif self._line.endswith(b"\n"):
                line, self._line = self._line, b""
                wrong = self._take(line[:-2]) if line.endswith(b"\r\n") else "a bare line feed"
                if wrong is not None:
                    self.error = BadRequest(f"the body is not in chunks: {wrong}")
        self.buf.append(b"".join(pieces))
        return at

    def _take(self, line: bytes) -> str | None:
        """Take a line; returns what is wrong with it."""
        if self._expects == "size":
            return self._take_size(line)
        if self._expects == "trailer":
            return self._take_trailer(line)
        self._expects = "size"
        return "a chunk is longer than its size" if line else None

    def _take_size(self, line: bytes) -> str | None:
        digits, semicolon, extensions = line.partition(b";")
        if not _CHUNK_SIZE.fullmatch(digits):
            return "there is no size"
        if semicolon and not _EXTENSIONS.match(semicolon + extensions):
            return "an extension is malformed"
        self._left = int(digits, 16)
        framing = self._framing + len(line) + 4 - FRAMING_ALLOWED - 2 * self._left
        self._framing = max(0, framing)
        if framing > MOST_FRAMING:
            return "too little content for so many chunks"
        self._expects = "end" if self._left else "trailer"
        return None

    def _take_trailer(self, line: bytes) -> str | None:
        self._trailers += len(line) + 2
        if not line:
            self.completed = True
        elif not _FIELD.match(line):
            return "a trailer is malformed"
        elif self._trailers > MOST_TRAILERS:
            return "there are too many trailers"
        return None


def _no_authority(host: str) -> ParsingError:
    if len(host) > LONGEST_HOST:
        return ParsingError(f"the Host is longer than {LONGEST_HOST} characters")
    return ParsingError("the Host is not a name or an address, with a port or without")
