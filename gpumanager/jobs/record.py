"""What is remembered of one request from its first byte to its last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from gpumanager.keys import Role
from gpumanager.telemetry.events import AnswerTruncated, Emit


class Course(Protocol):
    """Somebody who wants to know how far a request's job is: one who runs it for a client that does
    not wait for it. `urgency` is that of the job."""

    urgency: int

    def joined(self) -> None:
        """It has its place in the queue."""

    def sending(self, consumer: str) -> None:
        """The first byte of it may go to the consumer when this returns, and not before. Raises
        BrokerError if it must not."""

    def goes_on(self) -> None:
        """The consumer has only taken it, and works on it after its answer."""

    def over(self, failure: str | None) -> None:
        """One that goes on is over; `failure` says how it failed, as far as that is known."""


@dataclass(slots=True)
class RequestRecord:
    """One request. `stack` holds whatever must be undone when it is over, however it ends;
    times are in seconds, None until known. `client` is its address; `role` is the key's; without
    keys everybody is an admin. `urgency` is the one that it, or else its key, asks for, None where
    neither does, and `most_urgent` the most urgent one that the key allows; `session` is the
    conversation that it says it belongs to. `gone` says whether its client has left, None where
    nobody can tell; `emit` tells what happens to it. `goes_on`: its thread is still needed when its
    client has the answer, which had better not send the next request over the same connection.
    `course` is told how far its job is, if anybody wants to know."""

    request_id: str
    method: str
    path: str
    client: str
    started: float
    emit: Emit
    stack: ExitStack = field(default_factory=ExitStack)
    status: int = 0
    key: str | None = None
    role: Role = "admin"
    urgency: int | None = None
    most_urgent: int = 0
    session: str | None = None
    traceparent: str | None = None
    gone: Callable[[], bool] | None = None
    consumer: str | None = None
    waited_s: float | None = None
    prepared_s: float | None = None
    upstream_s: float | None = None
    run_s: float | None = None
    failure: str | None = None
    goes_on: bool = False
    course: Course | None = None

    @property
    def who(self) -> str:
        """Whose request it is: the name of its key where keys are in use, else its address."""
        return self.client if self.key is None else self.key

    @property
    def whose(self) -> str | None:
        """The key whose jobs this request may see whole and cancel; None: everybody's."""
        return self.key if self.role == "client" else None

    def urgency_or(self, default: int) -> int:
        """The urgency of its job, where `default` is that of one which asks for none."""
        return max(self.most_urgent, default if self.urgency is None else self.urgency)

    def truncated(self, reason: str) -> None:
        """Tell that the answer broke off, and why."""
        request_id, name = self.request_id, self.consumer
        self.emit(AnswerTruncated(consumer=name, request_id=request_id, reason=reason))

    def server_timing(self) -> str | None:
        """The `Server-Timing` of a job that was granted the GPU, None for any other request."""
        if self.waited_s is None or self.prepared_s is None:
            return None
        phases = [("queue", self.waited_s), ("evict", self.prepared_s)]
        if self.upstream_s is not None:
            phases.append(("upstream", self.upstream_s))
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in phases)
