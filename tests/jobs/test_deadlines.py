"""Jobs whose turn will not come in the time that their clients wait."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import pytest

from gpumanager.consumers.learning import Learned, Times
from gpumanager.errors import QueueTimeout
from gpumanager.jobs.deadlines import CROWD, EVERY_S, Deadlines
from gpumanager.model import Job
from gpumanager.scheduling.estimate import Outlook, Profile, guess
from gpumanager.scheduling.factory import locked, passthrough
from gpumanager.scheduling.interface import Ticket
from gpumanager.scheduling.policy import Affinity
from gpumanager.scheduling.victims import Demand, Resident
from tests.support.clock import FakeClock
from tests.support.threads import eventually

MAX_WAIT = 600.0


def seen(*seconds: float) -> Times:
    learned = Learned(["it"])
    for each in seconds:
        learned.ran("it", each)
    times = learned.figures("it").run_s
    assert times is not None
    return times


def loaded(name: str, run: Times) -> Profile:
    return Profile(Resident(name, loaded=True, held_mib=0), Demand(name, 0, 0), run=run)


class Setting:
    """Jobs of `image` take 30 s, those of `voice` 2 s; of `stranger` nobody knows."""

    def __init__(self, image: Times | None = None, crowd: int = CROWD) -> None:
        self.clock = FakeClock()
        self.profiles = {
            "image": loaded("image", seen(30, 30) if image is None else image),
            "voice": loaded("voice", seen(2)),
            "stranger": loaded("stranger", guess(30)),
        }
        self.scheduler = locked(
            max_queue=99, max_wait=MAX_WAIT, clock=self.clock, outlook=self.outlook
        )
        self.deadlines = Deadlines(self.scheduler, self.clock, MAX_WAIT, crowd)
        self.since: dict[str, float] = {}

    def outlook(self) -> Outlook:
        """With whose job runs since when."""
        return Outlook(
            {
                name: replace(profile, running_since=self.since.get(name))
                for name, profile in self.profiles.items()
            }
        )

    def join(self, name: str, wait: float | None = None) -> Ticket:
        ticket = self.scheduler.enqueue(Job(name, "tts", max_wait=wait))
        if self.scheduler.stats().queue_depth == 0:
            self.since[name] = self.clock.monotonic()
        return ticket

    def check(self, wait: float) -> None:
        self.deadlines.check(Job("voice", "tts", max_wait=wait))

    def is_told(self, ticket: Ticket) -> QueueTimeout:
        with pytest.raises(QueueTimeout) as told:
            ticket.wait()
        return told.value


# -- who comes -----------------------------------------------------------------------------------


def test_who_cannot_have_its_turn_in_time_is_told_at_once() -> None:
    setting = Setting()
    setting.join("image")
    setting.join("image")
    with pytest.raises(QueueTimeout) as told:
        setting.check(12)
    error = told.value
    assert (error.message, error.consumer) == (
        "no turn within 12 s: it is expected in 60 s",
        "voice",
    )
    assert (error.estimate_s, error.retry_after) == (60, 48)
    assert error.envelope()["estimate_s"] == 60


@pytest.mark.parametrize("wait", [30, 31, 1000])
def test_who_can_is_not(wait: float) -> None:
    setting = Setting()
    setting.join("image")
    setting.check(wait)


def test_where_nobody_waits_nothing_is_too_short() -> None:
    Setting().check(0)


def test_no_wait_is_longer_than_any_may_be() -> None:
    setting = Setting(seen(MAX_WAIT + 1))
    setting.join("image")
    with pytest.raises(QueueTimeout, match="no turn within 600 s"):
        setting.check(10_000)


def test_nobody_is_refused_on_a_guess() -> None:
    setting = Setting()
    setting.join("stranger")
    setting.check(1)


def test_nobody_is_refused_while_a_job_is_overdue() -> None:
    """Nobody knows when it will end."""
    setting = Setting()
    setting.join("image")
    for after, refused in ((36, True), (2, False)):
        setting.clock.advance(after)
        if refused:
            with pytest.raises(QueueTimeout):
                setting.check(1)
        else:
            setting.check(1)


def test_what_waits_behind_an_overdue_job_counts() -> None:
    setting = Setting()
    for _ in range(3):
        setting.join("image")
    setting.clock.advance(100)
    with pytest.raises(QueueTimeout) as told:
        setting.check(20)
    assert told.value.estimate_s == 60


def test_what_may_be_overtaken_does_not_count() -> None:
    """With `affinity` the one of another requester may come later, the own one does not."""
    setting = Setting()
    scheduler = locked(
        max_queue=9,
        max_wait=MAX_WAIT,
        clock=setting.clock,
        outlook=setting.outlook,
        policy=Affinity(),
    )
    deadlines = Deadlines(scheduler, setting.clock, MAX_WAIT)
    scheduler.enqueue(Job("stranger", "tts"))
    scheduler.enqueue(Job("image", "tts", requester="bob"))
    mine = Job("image", "tts", requester="anna", max_wait=10)
    deadlines.check(mine)
    scheduler.enqueue(replace(mine, max_wait=None))
    with pytest.raises(QueueTimeout) as told:
        deadlines.check(mine)
    assert told.value.estimate_s == 30


def test_nobody_is_refused_where_jobs_run_together() -> None:
    setting = Setting()
    scheduler = passthrough(
        max_queue=9, max_wait=MAX_WAIT, clock=setting.clock, outlook=setting.outlook
    )
    scheduler.enqueue(Job("image", "tts"))
    Deadlines(scheduler, setting.clock, MAX_WAIT).check(Job("voice", "tts", max_wait=1))


def test_in_a_crowd_one_estimate_serves_all() -> None:
    """Who comes is let in, and told with the next look."""
    setting = Setting(crowd=3)
    setting.join("image")
    for _ in range(3):
        setting.join("voice", 500)
    with pytest.raises(QueueTimeout):
        setting.check(1)
    setting.join("voice")
    setting.check(1)
    late = setting.join("voice", 1)
    setting.deadlines.look()
    assert setting.is_told(late).estimate_s == 38


# -- who waits -----------------------------------------------------------------------------------


def test_one_that_has_become_hopeless_is_told_while_it_waits() -> None:
    """Its turn was expected in 32 s; the job before it takes 28 s longer."""
    setting = Setting(seen(30, 30, 60))
    for name in ("image", "image"):
        setting.join(name)
    late, patient = setting.join("voice", 85), setting.join("voice", 500)
    without = setting.join("voice")
    assert setting.deadlines.look() == EVERY_S
    assert setting.scheduler.stats().queue_depth == 4
    setting.clock.advance(45)  # the job that runs is one of the long ones
    assert setting.deadlines.look() == EVERY_S
    error = setting.is_told(late)
    assert error.message == "no turn within 85 s: after 45 s it is expected in 55 s"
    assert (error.estimate_s, error.retry_after) == (55, 0)
    assert [entry.ticket for entry in setting.scheduler.queue()][2:] == [
        patient.number,
        without.number,
    ]


@pytest.mark.parametrize(("wait", "told"), [(28, False), (23, True)])
def test_a_little_late_is_not_hopeless(wait: float, told: bool) -> None:
    setting = Setting()
    setting.join("image")
    setting.join("voice", wait)
    setting.deadlines.look()
    assert setting.scheduler.stats().queue_depth == (0 if told else 1)


@pytest.mark.parametrize("why", ["guessed", "overdue"])
def test_one_that_waits_is_not_refused_on_a_guess_either(why: str) -> None:
    setting = Setting()
    setting.join("stranger" if why == "guessed" else "image")
    setting.clock.advance(38 if why == "overdue" else 0)
    setting.join("voice", 1)
    setting.deadlines.look()
    assert setting.scheduler.stats().queue_depth == 1


def test_a_job_that_runs_is_left_alone() -> None:
    setting = Setting()
    running = setting.join("image", 1)
    setting.join("voice", 500)
    setting.clock.advance(20)
    setting.deadlines.look()
    running.wait()


# -- when it looks -------------------------------------------------------------------------------


def test_it_looks_once_a_second_at_most_and_only_while_somebody_waits() -> None:
    setting = Setting()
    looks = []
    queue = setting.scheduler.queue
    setting.scheduler.queue = lambda: looks.append(1) or queue()  # type: ignore[method-assign,func-returns-value]
    setting.join("image")
    assert setting.deadlines.look() == math.inf  # nobody with a deadline
    setting.join("voice", 500)
    assert setting.deadlines.look() == EVERY_S  # too soon
    setting.clock.advance(0.75)
    assert setting.deadlines.look() == 0.25
    assert len(looks) == 1
    setting.clock.advance(0.25)
    assert setting.deadlines.look() == EVERY_S
    assert len(looks) == 2


def test_who_joins_wakes_it_and_it_ends() -> None:
    setting = Setting()
    setting.join("image")
    asleep = threading.Event()
    look = setting.deadlines.look

    def noted() -> float:
        delay = look()
        if delay == math.inf:
            asleep.set()
        return delay

    worker: Any = setting.deadlines.worker
    worker._body = noted
    worker.start()
    assert asleep.wait(10)
    setting.clock.advance(EVERY_S)
    ticket = setting.join("voice", 5)
    setting.deadlines.joined()
    assert setting.is_told(ticket).estimate_s == 29
    worker.stop()
    assert worker.join()
    eventually(lambda: not any(each.name == "deadlines" for each in threading.enumerate()))
