"""Asking whatever listens on this machine, which may be anything: GET, a bounded answer, no wait
without an end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import requests

TIMEOUT_S = 2.0
LONGEST_S = 5.0
"""For an answer that comes bit by bit."""

LARGEST_ANSWER = 1024 * 1024


class NoAnswer(Exception):
    """Nobody is there, or nobody who speaks HTTP, or, with `in_time` False, not yet."""

    def __init__(self, message: str, *, in_time: bool) -> None:
        super().__init__(message)
        self.in_time = in_time


class Asker:
    """Asks one server. `server` is what its last answer's Server header says. To be used in a
    `with`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.server = ""
        self._session = requests.Session()
        self._session.trust_env = False

    def get(self, path: str) -> tuple[int, bytes]:
        """The status and the body, or the beginning of a large one. Raises NoAnswer."""
        try:
            with self._session.get(
                self.url + path, timeout=TIMEOUT_S, stream=True, allow_redirects=False
            ) as answer:
                body, deadline = bytearray(), time.monotonic() + LONGEST_S
                for piece in answer.iter_content(64 * 1024):
                    body += piece
                    if len(body) >= LARGEST_ANSWER or time.monotonic() > deadline:
                        break
                self.server = answer.headers.get("Server", "")
                return answer.status_code, bytes(body[:LARGEST_ANSWER])
        except requests.RequestException as error:
            raise NoAnswer(str(error), in_time=not isinstance(error, requests.Timeout)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.close()
