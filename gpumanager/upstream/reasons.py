"""Why an exchange failed, from the exceptions that say so."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import requests
import urllib3

from gpumanager.config import Timeouts
from gpumanager.errors import BadRequest, BrokerError, ConsumerTimeout, ConsumerUnreachable
from gpumanager.upstream.parsing import BrokenAnswer, InvalidAnswer


def too_late(consumer: str, what: str, seconds: float) -> ConsumerTimeout:
    """The error for `what` did not come about within a time-out of the consumer's."""
    return ConsumerTimeout(f"{consumer}: {what} within {seconds:g} s", consumer=consumer)


def explained(
    error: Exception, consumer: str, timeouts: Timeouts, *, answered: bool
) -> BrokerError:
    """The broker's error for what `requests`, urllib3 or the socket raised; `answered`: after the
    head of an answer."""
    chain = list(_links(error))
    if any(isinstance(link, ConnectionRefusedError) for link in chain):
        message = f"{consumer} refused the connection"
        return ConsumerUnreachable(message, consumer=consumer, nothing_listens=True)
    if any(isinstance(link, TimeoutError | urllib3.exceptions.TimeoutError) for link in chain):
        if any(isinstance(link, urllib3.exceptions.ConnectTimeoutError) for link in chain):
            return too_late(consumer, "no connection", timeouts.connect)
        if not answered:
            return too_late(consumer, "no answer", timeouts.first_byte)
        return too_late(consumer, "nothing more came", timeouts.idle)
    if isinstance(error, ValueError) and not isinstance(error, requests.RequestException):
        return BadRequest(f"the request cannot be sent to {consumer}", consumer=consumer)
    return ConsumerUnreachable(f"{consumer} {_in_words(chain)}", consumer=consumer)


def _links(error: BaseException) -> Iterator[BaseException]:
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


def _in_words(chain: list[BaseException]) -> str:
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
