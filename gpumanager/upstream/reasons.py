"""Why an exchange failed, from the exceptions that say so."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

from gpumanager.upstream.parsing import BrokenAnswer, InvalidAnswer


def links(error: BaseException) -> Iterator[BaseException]:
    """`error` and everything it was raised from, or carries as an argument."""
    seen: set[int] = set()
    todo: list[BaseException] = [error]
    while todo:
        link = todo.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        related = [link.__cause__, link.__context__, getattr(link, "reason", None), *link.args]
        todo.extend(item for item in related if isinstance(item, BaseException))


def in_words(chain: list[BaseException]) -> str:
    """What went wrong, in words that hold no address."""
    for link in chain:
        if isinstance(link, BrokenAnswer):
            return str(link)
        if isinstance(link, InvalidAnswer):
            return f"sent no valid HTTP answer: {link}"
        if isinstance(link, ssl.SSLCertVerificationError):
            return f"has a certificate that is not trusted: {link.verify_message}"
        if isinstance(link, ssl.SSLEOFError):
            return "cut the connection"
        if isinstance(link, socket.gaierror):
            return "has a host name that cannot be resolved"
    for link in chain:
        if isinstance(link, OSError) and link.strerror:
            return f"could not be reached: {link.strerror}"
    return f"could not be reached ({type(chain[0]).__name__})"
