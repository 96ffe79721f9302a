"""Which headers are for the next hop only, and which go through."""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

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


def end_to_end(
    headers: Iterable[tuple[str, str]], *, without: AbstractSet[str] = frozenset()
) -> list[tuple[str, str]]:
    """`headers` but the hop-by-hop ones, those that `Connection` names, and those in `without`
    (in lower case); the rest in their order, repeated ones kept."""
    listed = list(headers)
    dropped = HOP_BY_HOP | tokens(listed, "connection") | without
    return [(name, value) for name, value in listed if name.lower() not in dropped]


def declared_length(headers: Iterable[tuple[str, str]]) -> int | None:
    """The length that an answer's Content-Length gives, in bytes; None if it has none. The same one
    several times over is taken for one (RFC 9112 section 6.3). Raises ValueError for any other."""
    given = [
        text.strip(" \t")
        for name, value in headers
        if name.lower() == "content-length"
        for text in value.split(",")
    ]
    if not all(map(_LENGTH.fullmatch, given)):
        raise ValueError("a Content-Length that is no number of bytes")
    lengths = set(map(int, given))
    if len(lengths) > 1:
        raise ValueError("several Content-Lengths that differ")
    return lengths.pop() if lengths else None


def relayable(status: int, headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """A consumer's answer headers as they may be handed on: end-to-end, names that are tokens,
    values on one line, and at most one Content-Length, which the body's framing agrees with.
    Raises ValueError for a length that is none."""
    listed = list(headers)
    length = declared_length(listed)
    chunked = any(name.lower() == "transfer-encoding" for name, _ in listed)
    kept = [
        (name, value if value.isprintable() else printable(value))
        for name, value in end_to_end(listed, without={"content-length"})
        if _TOKEN.fullmatch(name)
    ]
    if length is not None and not chunked and status not in (101, 204, 304):
        kept.append(("Content-Length", str(length)))
    return kept


def tokens(headers: Iterable[tuple[str, str]], wanted: str) -> set[str]:
    """The words of the list that a header (in lower case) holds, perhaps in several lines; in
    lower case."""
    return {
        token.strip().lower()
        for name, value in headers
        if name.lower() == wanted
        for token in value.split(",")
    }


def check_switch(headers: Iterable[tuple[str, str]], protocol: str | None) -> None:
    """Whether a 101 with these headers switches to `protocol`. Raises ValueError if not."""
    listed = list(headers)
    if tokens(listed, "upgrade") != {protocol} or "upgrade" not in tokens(listed, "connection"):
        raise ValueError(f"a 101 that does not switch to {protocol}")


def printable(text: str) -> str:
    """`text` on one line, each run of control characters but tabs replaced by a space: what a proxy
    is to do with folded lines (RFC 9112 section 5.2) and a lone CR (section 2.2)."""
    return _CONTROLS.sub(" ", text).strip(" \t")


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CONTROLS = re.compile(r"[\x00-\x08\n-\x1f\x7f]+[ \t]*")
