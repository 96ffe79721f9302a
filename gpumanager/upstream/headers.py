"""Which headers are for the next hop only, and which go through."""

from __future__ import annotations

import re
from collections.abc import Iterable

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "trailers",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110 section 7.6.1, and the names servers before it used."""


def end_to_end(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """`headers` without the hop-by-hop ones and those that `Connection` names; the rest in
    their order, repeated ones kept."""
    listed = list(headers)
    named = {
        token.strip().lower()
        for name, value in listed
        if name.lower() == "connection"
        for token in value.split(",")
    }
    return [
        (name, value)
        for name, value in listed
        if name.lower() not in HOP_BY_HOP and name.lower() not in named
    ]


def relayable(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """A consumer's answer headers as they may be handed on: end-to-end, names that are tokens,
    values on one line, and at most one Content-Length, which the body's framing agrees with."""
    listed = list(headers)
    lengths = {value.strip() for name, value in listed if name.lower() == "content-length"}
    chunked = any(name.lower() == "transfer-encoding" for name, _ in listed)
    kept = [
        (name, _LINE_BREAK.sub(" ", value).replace("\0", " "))
        for name, value in end_to_end(listed)
        if name.lower() != "content-length" and _TOKEN.fullmatch(name)
    ]
    if not chunked and len(lengths) == 1 and (length := lengths.pop()).isdecimal():
        kept.append(("Content-Length", length))
    return kept


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LINE_BREAK = re.compile(r"[\r\n]+[ \t]*")
"""Obsolete line folding: a proxy is to replace it with a space (RFC 9112 section 5.2)."""
