"""What the faithful fakes of real servers have in common."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any

from gpumanager.gpu.simulated import SimulatedCard

MIB = 1024 * 1024

Answer = tuple[int, Any]
"""A status, and what goes with it: a text, a Page, or anything for JSON; None: nothing."""


@dataclass(frozen=True)
class Page:
    """What is no JSON."""

    content_type: str
    content: bytes


class Fake:
    """What the fakes have in common. `needs` is what a job takes now, which may be more than
    what was declared; `job_s` how long it works."""

    def __init__(self, card: SimulatedCard, name: str, mib: int) -> None:
        self.card, self.name, self.needs = card, name, mib
        self.job_s = 0.0
        self.pause = threading.Event()
        self.settings: dict[str, Any] = {}

    def configure(self, settings: dict[str, Any]) -> Answer:
        self.settings.update(settings)
        self.needs = settings.get("needs", self.needs)
        self.job_s = settings.get("job_s", self.job_s)
        return 200, {}

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        raise NotImplementedError

    def refuses(self, headers: Message) -> Answer | None:
        """The answer to a request that it takes from nobody with these headers."""
        return None

    def switch(self, handler: BaseHTTPRequestHandler) -> bool:
        """Speak WebSocket to a client that asked for it, until its end; False if it does not."""
        return False

    def work(self) -> None:
        self.pause.wait(self.job_s)
