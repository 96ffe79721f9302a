"""Requests as bytes: waitress's parser, stricter. Whatever two servers may read differently is
refused before anything is done with it."""

from __future__ import annotations

import re
from typing import Any

from waitress.parser import HTTPRequestParser, ParsingError

_HOST_LINE = re.compile(rb"\nhost:", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(?::[0-9]{0,5})?")
"""A host, maybe with a port (RFC 3986 without its comma, which is what joins two headers)."""

LONGEST_HOST = 256
"""In characters; a name in the DNS has at most 253."""


class StrictRequestParser(HTTPRequestParser):
    """Waitress's parser, which also refuses a length beside a transfer coding, a transfer coding
    in HTTP/1.0, and a request that does not say plainly which host it is for (RFC 9112, 3.2).

    The authority of an absolute target takes the place of `Host`.
    """

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        # Of a Transfer-Encoding that it honours waitress keeps `chunked` only.
        if "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("Transfer-Encoding in HTTP/1.0")
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            raise ParsingError("Content-Length beside Transfer-Encoding")
        self._settle_host(header_plus)

    def _settle_host(self, head: bytes) -> None:
        parsed: Any = self  # its stubs lack half of what it sets
        given = len(_HOST_LINE.findall(head))
        if given > 1:
            raise ParsingError("there must be one Host, not several")
        if not given and self.version not in ("", "1.0"):
            raise ParsingError("a Host is required in HTTP/1.1")
        _check_authority(parsed.headers.get("HOST", ""))
        target: str = parsed.request_uri
        if target.startswith("/") or (target == "*" and parsed.command == "OPTIONS"):
            return
        if parsed.proxy_scheme not in ("http", "https") or not parsed.proxy_netloc:
            raise ParsingError("the target must be a path or an http URL")
        _check_authority(parsed.proxy_netloc)
        parsed.headers["HOST"] = parsed.proxy_netloc
        parsed.path = parsed.path or "/"


def _check_authority(host: str) -> None:
    if len(host) > LONGEST_HOST:
        raise ParsingError(f"the Host is longer than {LONGEST_HOST} characters")
    if not _AUTHORITY.fullmatch(host):
        raise ParsingError("the Host is not a name or an address, with a port or without")
