"""A request as it came, read of its WSGI environ for who forwards it."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from gpumanager import errors
from gpumanager.upstream.proxy import Inbound, inbound_headers
from gpumanager.web.record import record_of

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_SENDABLE = re.compile(r"[!-~]*")
"""What may stand in a request line."""

_DECODINGS = 3
"""How often a path may be percent-encoded over before it is refused unread."""


def inbound_of(environ: WSGIEnvironment) -> Inbound:
    """The request, to be forwarded. Raises BadRequest for a query that cannot be."""
    length = environ.get("CONTENT_LENGTH")
    query = environ.get("QUERY_STRING", "")
    if not _SENDABLE.fullmatch(query):
        raise errors.BadRequest("the query holds characters that must be percent-encoded")
    return Inbound(
        method=environ["REQUEST_METHOD"],
        query=query,
        headers=inbound_headers(environ),
        body=environ["wsgi.input"] if length else None,
        length=int(length) if length else None,
        request_id=record_of(environ).request_id,
    )


def raw_path(environ: WSGIEnvironment, prefix: str) -> str:
    """The request's path as the client wrote it, if it names something below `prefix`.

    Raises BadRequest for a path that could lead out of it in any encoding.
    """
    target = environ.get("REQUEST_URI") or quote(environ["PATH_INFO"].encode("latin-1"))
    if "://" in target.partition("?")[0]:
        target = urlsplit(target).path or "/"
    path = target.partition("?")[0].partition("#")[0]
    decoded = path
    try:
        for _ in range(_DECODINGS):
            decoded, before = unquote(decoded, errors="strict"), decoded
            if decoded == before:
                break
        else:
            raise errors.BadRequest("the path is percent-encoded too often")
    except UnicodeDecodeError:
        raise errors.BadRequest("the path is not UTF-8") from None
    # Some servers cut parameters off a segment first, as in `..;x`.
    segments = {part.partition(";")[0] for part in decoded.replace("\\", "/").split("/")}
    if not path.startswith(prefix) or not {".", ".."}.isdisjoint(segments):
        raise errors.BadRequest(f"the path leads out of {prefix}")
    if not decoded.isprintable() and any(map(_is_control, decoded)):
        raise errors.BadRequest("the path holds characters that cannot be printed")
    return path


def _is_control(character: str) -> bool:
    """Whether it is a control character or a line's end. Wide spaces, and what joins the parts of
    an emoji, stand in the names of files."""
    return unicodedata.category(character) in ("Cc", "Zl", "Zp")


def preferred_wait(header: str) -> float | None:
    """The seconds of `Prefer: wait=N` (RFC 7240), the first if there are several; None where
    there is none, or it is malformed, which that RFC says to ignore."""
    for preference in header.split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        seconds = value.strip().strip('"')
        if name.strip().lower() == "wait":
            return float(seconds) if re.fullmatch(r"[0-9]{1,9}", seconds) else None
    return None
