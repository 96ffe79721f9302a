"""Whether the next step of a conversation is about to come: pure, with made-up times."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumanager.model import Job
from gpumanager.scheduling.holds import (
    LEAST,
    MOST,
    REMEMBERED,
    SURE,
    Conversations,
    NextStep,
    hold_until,
)

HOLD = 4.0


def step(kind: str = "stt", requester: str = "alice", **more: Any) -> Job:
    return Job("it", kind, requester=requester, **more)


class Talk:
    """Jobs one after the other, each of which takes a second."""

    def __init__(self, hold: float = HOLD) -> None:
        self.now = 100.0
        self.conversations = Conversations(hold)

    def job(self, job: Job, after: float = 0.0) -> list[NextStep]:
        """Comes `after` so many seconds; what is expected when it has ended."""
        self.now += after
        self.conversations.arrived(job, self.now)
        self.now += 1
        self.conversations.ended(job, self.now)
        return self.expected()

    def expected(self, after: float = 0.0) -> list[NextStep]:
        return self.conversations.expected(self.now + after)


def test_what_always_comes_is_expected_for_as_long_as_it_takes() -> None:
    talk = Talk()
    assert [talk.job(step(), after=0.4) for _ in range(LEAST)] == [[]] * LEAST
    (expected,) = talk.job(step(), after=0.4)
    assert expected.conversation == ("alice", None)
    assert expected.probability == 1
    assert expected.until - talk.now == pytest.approx(0.5)
    assert talk.expected(after=0.49) == [expected]
    assert talk.expected(after=0.51) == []


def test_each_step_is_known_by_itself() -> None:
    """After speech it is the person's turn, which takes longer than anybody holds."""
    talk = Talk()
    for _ in range(5):
        talk.job(step("stt"), after=10)
        talk.job(step("llm"), after=0.1)
        talk.job(step("tts"), after=0.2)
    assert talk.job(step("stt"), after=10)[0].until - talk.now == pytest.approx(0.125)
    assert talk.job(step("llm"), after=0.1)[0].until - talk.now == pytest.approx(0.25)
    assert talk.job(step("tts"), after=0.2) == []


def test_it_stops_where_nothing_comes_any_more() -> None:
    talk = Talk()
    for _ in range(REMEMBERED):
        talk.job(step(), after=0.4)
    proposed = [bool(talk.job(step(), after=HOLD + 1)) for _ in range(REMEMBERED)]
    # One that comes late is learned of with the next job; so is the one before the first.
    stopped = proposed.index(False)
    assert stopped <= (1 - SURE) * REMEMBERED + 1
    assert not any(proposed[stopped:])


def test_and_begins_again_where_it_does() -> None:
    talk = Talk()
    for _ in range(REMEMBERED):
        talk.job(step(), after=HOLD + 1)
    assert any(talk.job(step(), after=0.4) for _ in range(REMEMBERED))


def test_sessions_of_one_requester_are_apart_but_teach_the_same() -> None:
    talk = Talk()
    for number in range(LEAST):
        talk.job(step(session=f"s{number}"), after=9)
        talk.job(step("llm", session=f"s{number}"), after=0.2)
    assert [each.conversation for each in talk.job(step(session="new"))] == [("alice", "new")]
    talk.job(step("llm", session="other"), after=0.2)  # not the next step of that
    assert [each.conversation for each in talk.expected()] == []
    assert talk.job(step()) == []  # without a session nothing is known yet


def test_who_has_more_in_the_queue_is_not_waited_for() -> None:
    talk = Talk()
    for _ in range(LEAST + 1):
        assert talk.job(step(), after=0.4) is not None
    first, second, third = step(), step(), step()
    for job in (first, second, third):
        talk.conversations.arrived(job, talk.now)
    talk.conversations.ended(first, talk.now)
    assert talk.expected() == []
    talk.conversations.left(second)
    assert talk.expected() == []
    talk.conversations.ended(third, talk.now)
    assert len(talk.expected()) == 1


@pytest.mark.parametrize("other", [{"urgency": 4}, {"runs": False}])
def test_background_work_and_moves_are_no_steps(other: dict[str, Any]) -> None:
    talk = Talk()
    for _ in range(3 * LEAST):
        assert talk.job(step(**other), after=0.1) == []
    for _ in range(LEAST + 1):
        talk.job(step(), after=0.4)
    (expected,) = talk.expected()
    talk.conversations.arrived(step(**other), talk.now)
    assert talk.expected() == [expected]


def test_it_keeps_no_more_than_it_needs() -> None:
    talk = Talk()
    for number in range(2 * MOST):
        for _ in range(2):
            talk.job(step(requester=f"r{number}"), after=0.1)
    conversations: Any = talk.conversations
    assert len(conversations._gaps) == MOST
    assert all(len(gaps) <= REMEMBERED for gaps in conversations._gaps.values())
    assert conversations._present == {}
    talk.expected(after=HOLD + 1)
    assert not conversations._ends


# -- who is held back ----------------------------------------------------------------------------

BACKGROUND = step("image", "nightly", urgency=6)
SOON = NextStep(("alice", None), until=102, probability=0.8)


@pytest.mark.parametrize(
    ("job", "seconds", "latest", "until"),
    [
        (BACKGROUND, 30, 130, 102),
        (BACKGROUND, 30, 101, 101),  # no longer than it was promised
        (BACKGROUND, 30, 99, 100),  # which is over already
        (BACKGROUND, 2, 130, 100),  # it would be done by then: the next step waits less
        (step("image", "bob"), 30, 130, 100),  # a person's
    ],
)
def test_a_long_background_job_is_held_back(
    job: Job, seconds: float, latest: float, until: float
) -> None:
    assert hold_until([SOON], job, seconds, 100, latest) == until


def test_nobody_is_held_back_for_nobody() -> None:
    assert hold_until([], BACKGROUND, 1000, 100, 1000) == 100


steps = st.lists(
    st.builds(
        NextStep,
        st.just(("alice", None)),
        until=st.floats(100, 110),
        probability=st.floats(SURE, 1),
    ),
    max_size=4,
)


@given(steps, st.integers(0, 7), st.floats(0, 100), st.floats(90, 120))
def test_nobody_is_held_back_beyond_what_is_expected_or_was_promised(
    expected: list[NextStep], urgency: int, seconds: float, latest: float
) -> None:
    job = step("image", "bob", urgency=urgency)
    bound = min(latest, max((each.until for each in expected), default=100))
    before = now = 100.0
    while (until := hold_until(expected, job, seconds, now, latest)) > now:
        assert urgency > 3
        assert before <= until <= bound  # as time goes by more may be worth it, never less
        before, now = until, now + (until - now) / 2 if until - now > 0.01 else until
        expected = [each for each in expected if each.until > now]
    assert until == now


events = st.lists(
    st.tuples(
        st.sampled_from(["stt", "llm"]),
        st.sampled_from(["alice", "bob"]),
        st.sampled_from([None, "s"]),
        st.integers(0, 7),
        st.floats(0, 6),
        st.sampled_from(["end", "leave", "stay"]),
    ),
    max_size=60,
)


@given(events)
def test_whatever_happens_what_is_expected_is_near_and_likely(
    trace: list[tuple[str, str, str | None, int, float, str]],
) -> None:
    """And of a conversation that has nothing in the queue."""
    conversations, now = Conversations(HOLD), 0.0
    ends: dict[tuple[str, str | None], float] = {}
    present: list[Job] = []
    for kind, requester, session, urgency, after, then in trace:
        job = step(kind, requester, session=session, urgency=urgency)
        now += after
        conversations.arrived(job, now)
        present.append(job)
        if then != "stay":
            present.remove(job)
            if then == "end":
                conversations.ended(job, now)
                ends[requester, session] = now
            else:
                conversations.left(job)
        for each in conversations.expected(now):
            assert now < each.until <= ends[each.conversation] + HOLD
            assert each.probability >= SURE
            assert not any(
                (job.requester, job.session) == each.conversation and job.urgency <= 3
                for job in present
            )
