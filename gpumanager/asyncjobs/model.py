"""What is known of an asynchronous job: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["waiting", "preparing", "running", "done", "failed", "cancelled", "lost"]
Ended = Literal["done", "failed", "cancelled", "lost"]
CallbackState = Literal["pending", "delivered", "failed"]

KEPT_STATES = ("waiting", "running", "done", "failed", "cancelled", "lost")
"""The states that the store tells apart, in their order."""

LATER = 5
"""The urgency of an asynchronous job that asks for none, unless what it would have with a client
that waits for it is less urgent still."""

SMALL_BYTES = 64 * 1024
"""A body or a result up to this size lies in the database, a larger one in a file beside it."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as it came, to be run later. `environ` is what WSGI says of it, texts only;
    `fingerprint` tells whether another request with the same `idempotency_key` asks for the same.
    `requester` is whose it is: the name of its key where there are keys, else its address; `role`
    is its key's. `model` is what it calls its model, None where that is not known."""

    kind: str
    consumer: str
    urgency: int
    requester: str
    key: str | None
    role: str
    environ: Mapping[str, str]
    idempotency_key: str | None = None
    fingerprint: str = ""
    callback: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The head of an answer, and how long its body is. `reason` is its status line's."""

    status: int
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    size: int = 0


@dataclass(frozen=True, slots=True)
class Callback:
    """Whom to tell that a job is over, and how far that is. `attempts` were made; the next one is
    due at `due` (seconds since the epoch, None: as soon as the job is over); `failure` is why the
    latest one failed."""

    url: str
    state: CallbackState = "pending"
    attempts: int = 0
    due: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class AsyncJob:
    """One of them, as the store has it. `number` rises with arrival; times are seconds since the
    epoch, None until they come. `state` is never `preparing` here: only the queue knows that.
    `cancelling`: somebody has cancelled it, and it still runs; `failure` is the code of the
    broker's error, if that is why it ended."""

    number: int
    id: str
    state: State
    kind: str
    consumer: str
    urgency: int
    requester: str
    key: str | None
    role: str
    created: float
    environ: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    fingerprint: str = ""
    callback: Callback | None = None
    started: float | None = None
    ended: float | None = None
    cancelling: bool = False
    failure: str | None = None
    result: Result | None = None
    model: str | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.ended is not None
