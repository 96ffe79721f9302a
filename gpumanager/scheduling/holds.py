"""Whether the next step of a conversation is about to come, and a long background job had better
wait for it: transcription, then a language model, then speech are one exchange with a person.
No threads, no I/O and no clock: time comes in as a number.

A conversation is what a client calls a session, or else all that one requester asks for. Jobs of a
background urgency belong to none, and only they are ever held back. Of each requester, and of each
kind of job, it is remembered how often the next job came within `hold` after such a one had ended,
and after how long. Where it mostly does not come, nothing is expected.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from gpumanager.model import NORMAL, Job

REMEMBERED = 20
"""So many of the latest ends count, of each requester and kind."""

LEAST = 3
"""After fewer of them nothing is expected: nobody knows yet whether anything comes."""

SURE = 0.6
"""Nor is anything where the next step is less likely than that."""

MOST = 1000
"""Requesters and kinds that are remembered; who was seen longest ago is forgotten first."""

LATE = 1.25
"""The next step is expected until so many times later than nine of ten came."""

Conversation = tuple[str, str | None]
_Of = tuple[str, bool, str]


@dataclass(frozen=True, slots=True)
class NextStep:
    """The next job of a conversation is expected by `until` (monotonic seconds), and comes with
    this `probability`."""

    conversation: Conversation
    until: float
    probability: float


@dataclass(frozen=True, slots=True)
class _End:
    """Of the job that ended last in a conversation in which nothing waits or runs; `step` is what
    is expected after it, None if nothing is."""

    of: _Of
    at: float
    step: NextStep | None


class Conversations:
    """What is going on between the clients and the broker. Whoever changes the queue tells of each
    job: first `arrived`, then `ended` if it had the GPU, or `left` if it did not."""

    def __init__(self, hold: float) -> None:
        self._hold = hold
        self._present: dict[Conversation, int] = {}
        self._ends: OrderedDict[Conversation, _End] = OrderedDict()  # the oldest first
        self._gaps: OrderedDict[_Of, deque[float]] = OrderedDict()

    def arrived(self, job: Job, now: float) -> None:
        """A job came."""
        conversation = conversation_of(job)
        if conversation is None:
            return
        self._expire(now)
        self._present[conversation] = self._present.get(conversation, 0) + 1
        end = self._ends.pop(conversation, None)
        if end is not None:
            self._learn(end.of, now - end.at)

    def ended(self, job: Job, now: float) -> None:
        """A job that had the GPU gave it back."""
        conversation = conversation_of(job)
        if conversation is None or not self._gone(conversation):
            return  # its next step is here already
        self._expire(now)
        of = (job.requester, job.session is not None, job.kind)
        self._ends[conversation] = _End(of, now, self._next(conversation, of, now))

    def left(self, job: Job) -> None:
        """A job left without having had the GPU."""
        conversation = conversation_of(job)
        if conversation is not None:
            self._gone(conversation)

    def expected(self, now: float) -> list[NextStep]:
        """Whose next step is about to come."""
        self._expire(now)
        ends = self._ends.values()
        return [end.step for end in ends if end.step is not None and end.step.until > now]

    def _gone(self, conversation: Conversation) -> bool:
        """Count one less; whether it was the last."""
        left = self._present.pop(conversation, 0) - 1
        if left > 0:
            self._present[conversation] = left
        return left <= 0

    def _expire(self, now: float) -> None:
        while self._ends:
            conversation, end = next(iter(self._ends.items()))
            if now - end.at <= self._hold:
                return
            del self._ends[conversation]
            self._learn(end.of, math.inf)

    def _learn(self, of: _Of, gap: float) -> None:
        """The next step came after so many seconds; infinity: not in time."""
        if of not in self._gaps:
            self._gaps[of] = deque(maxlen=REMEMBERED)
            if len(self._gaps) > MOST:
                self._gaps.popitem(last=False)
        self._gaps.move_to_end(of)
        self._gaps[of].append(gap)

    def _next(self, conversation: Conversation, of: _Of, now: float) -> NextStep | None:
        gaps = self._gaps.get(of, ())
        came = sorted(gap for gap in gaps if gap < math.inf)
        if len(gaps) < LEAST or len(came) < SURE * len(gaps):
            return None
        usual = came[math.ceil(0.9 * len(came)) - 1]
        until = now + min(self._hold, LATE * usual)
        return NextStep(conversation, until, len(came) / len(gaps))


def conversation_of(job: Job) -> Conversation | None:
    """What a job is a step of; None for background work, and for what runs nothing."""
    return (job.requester, job.session) if job.urgency <= NORMAL and job.runs else None


def hold_until(
    steps: Iterable[NextStep], job: Job, seconds: float, now: float, latest: float
) -> float:
    """Until when a job whose turn it is had better be held back; `now` if it had not. `seconds` is
    how long it would have the GPU, loading included, and `latest` until when it may be held back at
    all, by what it was promised.

    It is held back for a next step if that would likely wait longer for it than the GPU idles at
    most, and only if it is background work itself.
    """
    if job.urgency <= NORMAL:
        return now
    worth = [step.until for step in steps if step.probability * seconds > step.until - now]
    return max(now, min(latest, max(worth, default=now)))
