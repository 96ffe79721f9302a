"""One suite for every scheduler: what its callers may rely on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from gpumanager.clock import SystemClock
from gpumanager.config import SchedulerConfig
from gpumanager.errors import BrokerError, ClientGone, QueueFull, QueueTimeout, ShuttingDown
from gpumanager.model import Job, Stats, Turn
from gpumanager.scheduling.estimate import Outlook, Profile, guess
from gpumanager.scheduling.factory import build_scheduler, locked, passthrough
from gpumanager.scheduling.interface import Scheduler, Ticket
from gpumanager.scheduling.policy import Affinity, FirstComeFirstServed, Policy, Prospect
from gpumanager.scheduling.queue import Granted, Queue
from gpumanager.scheduling.sharing import ALONE, Sharing
from gpumanager.scheduling.ticket import QueueTicket
from gpumanager.scheduling.victims import Demand, Resident
from tests.support.clock import EPOCH, FakeClock
from tests.support.threads import Outcome, eventually

Make = Callable[..., Scheduler]


class NoRoomNeeded:
    evictions = 0

    def ready(self, job: Job) -> bool:
        return True

    def prospect(self, job: Job) -> Prospect:
        return Prospect()

    def sharing(self, job: Job) -> Sharing:
        return ALONE

    def make_room(self, ticket: Granted) -> None:
        pass

    def relieve(self, ticket: Granted) -> bool:
        return True


class RoomRefused(NoRoomNeeded):
    def make_room(self, ticket: Granted) -> None:
        raise AssertionError("nothing is to be evicted")


def evicting(**settings: object) -> Scheduler:
    return locked(**settings, room=NoRoomNeeded())  # type: ignore[arg-type]


def by_turns(**settings: object) -> Scheduler:
    return locked(**settings, policy=Affinity())  # type: ignore[arg-type]


def by_turns_evicting(**settings: object) -> Scheduler:
    return evicting(**settings, policy=Affinity())


EXCLUSIVE = [
    pytest.param(locked, id="locked"),
    pytest.param(evicting, id="evicting"),
    pytest.param(by_turns, id="affinity"),
    pytest.param(by_turns_evicting, id="affinity-evicting"),
]
EVERY = [*EXCLUSIVE, pytest.param(passthrough, id="passthrough")]


def build(make: Make, **changes: object) -> Scheduler:
    settings = {"max_queue": 100, "max_wait": 60.0, "clock": SystemClock(), **changes}
    return make(**settings)


def job(name: str = "mvoice", **more: object) -> Job:
    return Job(name, "tts", **more)  # type: ignore[arg-type]


# -- every scheduler ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
def test_a_job_alone_runs_at_once(make: Make) -> None:
    scheduler = build(make)
    ticket = scheduler.enqueue(job())
    ticket.wait()
    assert scheduler.stats().in_flight == 1
    ticket.close()
    assert scheduler.stats().in_flight == 0
    assert scheduler.stats().total_jobs == 1


@pytest.mark.parametrize("make", EVERY)
def test_tickets_rise_and_never_come_back(make: Make) -> None:
    scheduler = build(make)
    numbers = []
    for _ in range(3):
        ticket = scheduler.enqueue(job())
        ticket.wait()
        numbers.append(ticket.number)
        ticket.close()
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("make", EVERY)
def test_closing_twice_gives_back_once(make: Make) -> None:
    scheduler = build(make)
    first, second = scheduler.enqueue(job()), scheduler.enqueue(job())
    first.wait()
    first.close()
    second.wait()
    first.close()
    assert scheduler.stats().in_flight == 1
    second.close()
    assert scheduler.stats().in_flight == 0


@pytest.mark.parametrize("make", EVERY)
def test_many_threads_leave_nothing_behind(make: Make) -> None:
    scheduler = build(make)
    start = threading.Barrier(8)

    def hammer() -> None:
        start.wait(10)
        for number in range(50):
            ticket = scheduler.enqueue(job())
            ticket.when_granted(partial(bool, number % 3))
            try:
                ticket.wait()
            finally:
                ticket.close()

    for outcome in [Outcome(hammer) for _ in range(8)]:
        outcome.result()
    stats = scheduler.stats()
    assert (stats.queue_depth, stats.in_flight, stats.total_jobs) == (0, 0, 400)
    assert scheduler.queue() == ()


@pytest.mark.parametrize("make", EVERY)
def test_a_running_job_that_is_cancelled_keeps_its_hold_until_closed(make: Make) -> None:
    scheduler = build(make)
    ticket = scheduler.enqueue(job())
    ticket.wait()
    assert scheduler.cancel(ticket.number, ClientGone("left"))
    with pytest.raises(ClientGone):
        ticket.pause(10)
    assert scheduler.stats().in_flight == 1
    ticket.close()
    assert scheduler.stats().in_flight == 0


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("before", [True, False])
def test_a_cancelled_job_is_told_once(make: Make, before: bool) -> None:
    scheduler = build(make)
    ticket = scheduler.enqueue(job())
    ticket.wait()
    told: list[BrokerError] = []
    first = ClientGone("first")
    if before:
        ticket.cancel(first)
    ticket.when_cancelled(told.append)
    ticket.cancel(first)
    ticket.cancel(ClientGone("second"))
    assert told == [first]
    ticket.close()


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_only_who_waits_can_be_refused(make: Make) -> None:
    """So that nobody who looks at the queue aborts a job that has begun meanwhile."""
    scheduler = build(make)
    first, second, third = (scheduler.enqueue(job()) for _ in range(3))
    error = QueueTimeout("too late")
    assert [scheduler.refuse(each.number, error) for each in (first, second)] == [False, True]
    with pytest.raises(QueueTimeout) as told:
        second.wait()
    assert told.value is error
    assert not scheduler.refuse(second.number, error)
    first.wait()
    first.close()
    third.wait()
    assert not scheduler.refuse(first.number, error)


@pytest.mark.parametrize("make", EVERY)
def test_cancelling_what_is_over_or_never_was_says_so(make: Make) -> None:
    scheduler = build(make)
    ticket = scheduler.enqueue(job())
    ticket.wait()
    ticket.close()
    assert not ticket.cancel(ClientGone("left"))
    assert not scheduler.cancel(ticket.number, ClientGone("left"))
    assert not scheduler.cancel(12345, ClientGone("left"))


@pytest.mark.parametrize("make", EVERY)
def test_a_pause_ends_by_itself(make: Make) -> None:
    ticket = build(make).enqueue(job())
    ticket.wait()
    ticket.pause(0.001)
    ticket.close()


@pytest.mark.parametrize("make", EVERY)
def test_draining_refuses_new_jobs_and_lets_running_ones_finish(make: Make) -> None:
    scheduler = build(make)
    running = scheduler.enqueue(job())
    running.wait()
    scheduler.drain()
    with pytest.raises(ShuttingDown) as refused:
        scheduler.enqueue(job())
    assert refused.value.retry_after is not None
    assert not scheduler.wait_idle(0.01)
    idle = Outcome(lambda: scheduler.wait_idle(10))
    running.close()
    assert idle.result()


@pytest.mark.parametrize("make", EVERY)
def test_the_line_shows_who_runs_and_for_what(make: Make) -> None:
    scheduler = build(make)
    ticket = scheduler.enqueue(job("whisper", client="10.0.0.7", request_id="abc"))
    ticket.wait()
    (entry,) = scheduler.queue()
    assert (entry.ticket, entry.state) == (ticket.number, "running")
    assert (entry.job.consumer, entry.job.client) == ("whisper", "10.0.0.7")
    assert (entry.job.kind, entry.job.request_id) == ("tts", "abc")
    ticket.close()


# -- those that run one job at a time ------------------------------------------------------------


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_five_threads_hammering_are_never_two_in_flight(make: Make) -> None:
    scheduler = build(make)
    start = threading.Barrier(5)
    inside = threading.Semaphore(1)
    collisions = []

    def hammer() -> None:
        start.wait(10)
        for _ in range(100):
            ticket = scheduler.enqueue(job())
            try:
                ticket.wait()
                if not inside.acquire(blocking=False):
                    collisions.append(ticket.number)
                else:
                    if scheduler.stats().in_flight != 1:
                        collisions.append(ticket.number)
                    inside.release()
            finally:
                ticket.close()

    for outcome in [Outcome(hammer) for _ in range(5)]:
        outcome.result()
    assert collisions == []
    assert scheduler.stats().total_jobs == 500


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_jobs_run_in_the_order_of_arrival(make: Make) -> None:
    scheduler = build(make)
    tickets = [scheduler.enqueue(job()) for _ in range(50)]
    order: list[int] = []

    def run(ticket: Ticket) -> None:
        ticket.wait()
        order.append(ticket.number)
        ticket.close()

    # The threads begin to wait in the opposite order.
    for outcome in [Outcome(partial(run, ticket)) for ticket in reversed(tickets)]:
        outcome.result()
    assert order == [ticket.number for ticket in tickets]


@pytest.mark.parametrize("make", EXCLUSIVE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_cancelling_while_stopped_frees_the_place(make: Make, place: int) -> None:
    scheduler = build(make)
    holder = scheduler.enqueue(job())
    holder.wait()
    stopped_by = [scheduler.enqueue(job()) for _ in range(3)]
    waits = [Outcome(ticket.wait) for ticket in stopped_by]
    assert scheduler.stats().queue_depth == 3

    assert stopped_by[place].cancel(ClientGone("left"))
    with pytest.raises(ClientGone):
        waits[place].result()
    assert scheduler.stats().queue_depth == 2
    stopped_by[place].close()

    holder.close()
    for index, ticket in enumerate(stopped_by):
        if index != place:
            waits[index].result()
            ticket.close()
    stats = scheduler.stats()
    assert (stats.queue_depth, stats.in_flight, stats.total_jobs) == (0, 0, 3)
    assert scheduler.queue() == ()


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_leaving_the_line_without_having_waited_frees_the_place(make: Make) -> None:
    scheduler = build(make)
    holder, leaver, next_one = (scheduler.enqueue(job()) for _ in range(3))
    leaver.close()
    holder.close()
    next_one.wait()
    next_one.close()
    assert scheduler.stats().total_jobs == 2


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_a_grant_that_nobody_takes_is_given_on(make: Make) -> None:
    scheduler = build(make)
    holder, absent, next_one = (scheduler.enqueue(job()) for _ in range(3))
    holder.close()  # grants to `absent`, whose thread is not there to take it
    absent.close()
    next_one.wait()
    assert [entry.ticket for entry in scheduler.queue()] == [next_one.number]


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_a_full_line_refuses_the_next_and_keeps_the_rest(make: Make) -> None:
    scheduler = build(make, max_queue=2)
    tickets = [scheduler.enqueue(job()) for _ in range(3)]  # one runs, two wait
    with pytest.raises(QueueFull) as refused:
        scheduler.enqueue(job("ollama"))
    assert refused.value.consumer == "ollama"
    assert refused.value.retry_after is not None
    assert scheduler.stats().queue_depth == 2
    tickets[0].close()
    scheduler.enqueue(job()).close()
    assert [entry.ticket for entry in scheduler.queue()] == [t.number for t in tickets[1:]]


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_waiting_is_bounded(make: Make) -> None:
    scheduler = build(make, max_wait=0.02)
    holder = scheduler.enqueue(job())
    stopped_by = scheduler.enqueue(job())
    with pytest.raises(QueueTimeout) as refused:
        stopped_by.wait()
    assert refused.value.retry_after is not None
    assert scheduler.stats().queue_depth == 0
    holder.close()
    assert scheduler.stats().total_jobs == 1


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_a_job_may_be_less_patient_than_the_line_but_not_more(make: Make) -> None:
    scheduler = build(make, max_wait=0.02)
    holder = scheduler.enqueue(job())
    for patience in (0.0, 3600.0):
        with pytest.raises(QueueTimeout):
            scheduler.enqueue(job(max_wait=patience)).wait()
    holder.close()


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_draining_turns_away_those_in_line(make: Make) -> None:
    scheduler = build(make)
    holder = scheduler.enqueue(job())
    stopped_by = [scheduler.enqueue(job()) for _ in range(3)]
    waits = [Outcome(ticket.wait) for ticket in stopped_by]
    scheduler.drain()
    for outcome in waits:
        with pytest.raises(ShuttingDown):
            outcome.result()
    assert scheduler.stats().queue_depth == 0
    assert not scheduler.wait_idle(0)
    holder.close()
    assert scheduler.wait_idle(0)


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_a_job_that_fails_hands_on_to_the_next(make: Make) -> None:
    scheduler = build(make)

    def fail() -> None:
        ticket = scheduler.enqueue(job())
        try:
            ticket.wait()
            raise RuntimeError("the job broke")
        finally:
            ticket.close()

    failures = [Outcome(fail) for _ in range(5)]
    for failure in failures:
        with pytest.raises(RuntimeError, match="the job broke"):
            failure.result()
    assert scheduler.stats().in_flight == 0


@pytest.mark.parametrize("make", [locked, by_turns])
def test_stats_through_every_transition(make: Make) -> None:
    clock = FakeClock()
    scheduler = build(make, clock=clock)
    assert scheduler.stats() == Stats()

    first = scheduler.enqueue(job())
    first.wait()
    assert scheduler.stats() == Stats(in_flight=1, total_jobs=1)

    clock.advance(2)
    second = scheduler.enqueue(job())
    oldest = clock.now()
    clock.advance(1)
    third = scheduler.enqueue(job())
    assert scheduler.stats() == Stats(
        queue_depth=2, in_flight=1, total_jobs=1, oldest_queued=oldest
    )
    assert (second.waited_s, third.waited_s) == (1, 0)

    clock.advance(0.25)
    first.close()
    assert scheduler.stats() == Stats(
        queue_depth=1,
        in_flight=1,
        total_jobs=2,
        last_wait_ms=1250,
        last_run_ms=3250,
        oldest_queued=oldest.replace(second=oldest.second + 1),
    )
    third.cancel(ClientGone("left"))
    clock.advance(1)
    second.close()
    assert scheduler.stats() == Stats(total_jobs=2, last_wait_ms=1250, last_run_ms=1000)
    assert second.waited_s == 1.25
    assert third.waited_s == 0.25
    assert oldest > EPOCH


def test_stats_are_consistent_under_load() -> None:
    scheduler = build(locked)
    stop = threading.Event()
    torn: list[Stats] = []

    def look() -> None:
        while not stop.is_set():
            stats = scheduler.stats()
            if stats.in_flight > 1 or (stats.queue_depth > 0) != (stats.oldest_queued is not None):
                torn.append(stats)

    looking = Outcome(look)

    def hammer() -> None:
        for _ in range(200):
            ticket = scheduler.enqueue(job())
            try:
                ticket.wait()
            finally:
                ticket.close()

    for outcome in [Outcome(hammer) for _ in range(4)]:
        outcome.result()
    stop.set()
    looking.result()
    assert torn == []


def test_passthrough_runs_everything_at_once_up_to_its_bound() -> None:
    scheduler = build(passthrough, max_queue=3)
    tickets = [scheduler.enqueue(job()) for _ in range(3)]
    for ticket in tickets:
        ticket.wait()
    assert scheduler.stats().in_flight == 3
    with pytest.raises(QueueFull):
        scheduler.enqueue(job())
    for ticket in tickets:
        ticket.close()


def test_passthrough_is_never_exclusive_by_accident() -> None:
    settings = SchedulerConfig(kind="passthrough", max_queue=1)
    scheduler = build_scheduler(settings, RoomRefused(), Outlook, SystemClock())
    ticket = scheduler.enqueue(job())
    ticket.wait()
    ticket.close()


def test_a_long_queue_drains_in_time_that_grows_with_its_length_only() -> None:
    looks = []

    def outlook() -> Outlook:
        looks.append(1)
        return Outlook()

    scheduler = build(locked, clock=FakeClock(), max_queue=2000, outlook=outlook)
    for _ in range(2000):
        scheduler.enqueue(job())
    scheduler.drain()
    assert scheduler.stats().queue_depth == 0
    assert len(looks) == 1


class OneAtATime(NoRoomNeeded):
    """Only `holds` is on the card."""

    def __init__(self, holds: str) -> None:
        self.holds = holds

    def ready(self, job: Job) -> bool:
        return job.resident == self.holds

    def prospect(self, job: Job) -> Prospect:
        return Prospect(
            job.resident == self.holds, fits=False, load_s=10.0, unload_s=1.0, run_s=1.0
        )

    def make_room(self, ticket: Granted) -> None:
        self.holds = ticket.job.resident


def order_of(scheduler: Scheduler, tickets: list[Ticket]) -> list[int]:
    """Have them run one by one, each by its own thread."""
    order: list[int] = []

    def run(ticket: Ticket) -> None:
        ticket.wait()
        order.append(ticket.number)
        ticket.close()

    for outcome in [Outcome(partial(run, ticket)) for ticket in tickets]:
        outcome.result()
    return order


@pytest.mark.parametrize("most", [0, 2, 20])
def test_jobs_for_what_is_loaded_overtake_as_often_as_they_may(most: int) -> None:
    scheduler = locked(
        max_queue=20,
        max_wait=60,
        clock=SystemClock(),
        room=OneAtATime("a"),
        policy=Affinity(max_overtaken_by=most),
    )
    tickets: list[Ticket] = [scheduler.enqueue(job(name)) for name in "ababaaab"]
    overtook = {0: [1, 2, 3, 4, 5, 6, 7, 8], 2: [1, 3, 5, 2, 4, 8, 6, 7]}
    assert order_of(scheduler, tickets) == overtook.get(most, [1, 3, 5, 6, 7, 2, 4, 8])
    assert scheduler.stats().longest_overtake == min(most, 4)


def test_the_config_names_the_policy() -> None:
    settings = SchedulerConfig(policy="affinity", max_overtaken_by=1)
    scheduler = build_scheduler(settings, OneAtATime("a"), Outlook, SystemClock())
    tickets = [scheduler.enqueue(job(name)) for name in "abaa"]
    assert order_of(scheduler, tickets) == [1, 3, 2, 4]
    fifo = build_scheduler(SchedulerConfig(), OneAtATime("a"), Outlook, SystemClock())
    assert order_of(fifo, [fifo.enqueue(job(name)) for name in "abaa"]) == [1, 2, 3, 4]


def test_a_full_queue_is_estimated_once_for_all_that_it_refuses_at_a_time() -> None:
    looks = []

    def outlook() -> Outlook:
        looks.append(1)
        return Outlook()

    clock = FakeClock()
    scheduler = build(locked, clock=clock, max_queue=1, outlook=outlook)
    for _ in range(2):
        scheduler.enqueue(job())
    for _ in range(5):
        with pytest.raises(QueueFull):
            scheduler.enqueue(job())
    assert len(looks) == 1
    clock.advance(0.3)
    with pytest.raises(QueueFull):
        scheduler.enqueue(job())
    assert len(looks) == 2


def takes(seconds: dict[str, float], began: float) -> Outlook:
    """A picture of consumers that are loaded, the first of which began a job then."""
    first = next(iter(seconds))
    return Outlook(
        {
            name: Profile(
                Resident(name, loaded=True, held_mib=0),
                Demand(name, 0, 0),
                run=guess(each),
                running_since=began if name == first else None,
            )
            for name, each in seconds.items()
        }
    )


def test_retry_after_is_when_the_queue_is_done() -> None:
    clock = FakeClock()
    outlook = takes({"mvoice": 8, "comfyui": 30}, clock.monotonic())
    scheduler = build(locked, clock=clock, max_queue=3, outlook=lambda: outlook)
    for name in ("mvoice", "comfyui", "mvoice"):
        scheduler.enqueue(job(name))
    clock.advance(3)
    with pytest.raises(QueueTimeout) as late:
        scheduler.enqueue(job(max_wait=0)).wait()
    assert late.value.retry_after == 5 + 30 + 8
    clock.advance(1)
    scheduler.enqueue(job("comfyui"))
    with pytest.raises(QueueFull) as refused:
        scheduler.enqueue(job())
    assert refused.value.retry_after == 4 + 30 + 8 + 30


@pytest.mark.parametrize("make", [locked, evicting, by_turns])
def test_it_tells_whose_jobs_come_next(make: Make) -> None:
    scheduler = build(make, max_queue=200)
    first = scheduler.enqueue(job("first"))
    scheduler.enqueue(job("a"))
    scheduler.enqueue(job("b", makes_room=False))
    scheduler.enqueue(job("c"))
    assert scheduler.upcoming() == ("a", "c")
    for _ in range(150):
        scheduler.enqueue(job("a"))
    assert len(scheduler.upcoming()) == 100
    first.close()
    assert scheduler.upcoming()[0] == "c"


def test_the_queue_tells_positions_and_when_each_turn_is_expected() -> None:
    clock = FakeClock()
    outlook = takes({"comfyui": 30, "mvoice": 2}, clock.monotonic())
    scheduler = build(locked, clock=clock, outlook=lambda: outlook)
    for name in ("comfyui", "mvoice", "comfyui", "mvoice"):
        scheduler.enqueue(job(name))
    clock.advance(10)
    line = scheduler.queue()
    assert [entry.position for entry in line] == [0, 1, 2, 3]
    # 20 s of the running job are left; then 2 s, then 30 s
    assert [entry.turn.wait_s for entry in line] == [0, 20, 22, 52]
    assert [entry.turn.run_s for entry in line] == [20, 2, 30, 2]
    assert scheduler.estimate(job("comfyui")) == Turn(wait_s=54, run_s=30)


@pytest.mark.parametrize("make", EVERY)
def test_a_job_that_would_run_at_once_is_told_so(make: Make) -> None:
    scheduler = build(make)
    assert scheduler.estimate(job()).wait_s == 0
    ticket = scheduler.enqueue(job())
    assert (scheduler.estimate(job()).wait_s == 0) == (make is passthrough)
    ticket.close()


class Refuses(NoRoomNeeded):
    def ready(self, job: Job) -> bool:
        return False

    def __init__(self, error: BrokerError) -> None:
        self.error = error

    def make_room(self, ticket: Granted) -> None:
        raise self.error

    def relieve(self, ticket: Granted) -> bool:
        raise self.error


def test_a_job_there_is_no_room_for_hands_on_to_the_next() -> None:
    error = ClientGone("no room")
    scheduler = build(locked, room=Refuses(error))
    first, second = scheduler.enqueue(job()), scheduler.enqueue(job())
    with pytest.raises(ClientGone):
        first.wait()
    first.close()
    with pytest.raises(ClientGone):
        second.wait()
    second.close()
    assert scheduler.stats().in_flight == 0


# -- begun by who hands over -------------------------------------------------------------------


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_a_job_is_begun_by_who_hands_the_gpu_over(make: Make) -> None:
    scheduler = build(make)
    first, second = scheduler.enqueue(job()), scheduler.enqueue(job())
    begun_by = []

    def begin() -> bool:
        begun_by.append(threading.current_thread())
        assert scheduler.stats().in_flight == 1  # and no lock is held
        return True

    second.when_granted(begin)
    waiting = Outcome(second.wait)
    first.wait()
    first.close()
    waiting.result()
    assert begun_by == [threading.current_thread()]
    assert second.prepared_s == 0
    second.close()


@pytest.mark.parametrize("make", EVERY)
def test_whose_turn_has_come_already_begins_by_itself(make: Make) -> None:
    scheduler = build(make)
    ticket = scheduler.enqueue(job())
    ticket.when_granted(lambda: pytest.fail("too late"))
    ticket.wait()
    ticket.close()


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_nothing_is_begun_for_who_has_left(make: Make) -> None:
    scheduler = build(make)
    first, second = scheduler.enqueue(job()), scheduler.enqueue(job())
    second.when_granted(lambda: pytest.fail("it has left"))
    second.cancel(ClientGone("left"))
    first.close()
    with pytest.raises(ClientGone):
        second.wait()
    assert scheduler.stats().in_flight == 0


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_a_job_that_has_begun_is_cancelled_as_one_that_runs(make: Make) -> None:
    scheduler = build(make)
    first, second = scheduler.enqueue(job()), scheduler.enqueue(job())
    second.when_granted(lambda: second.cancel(ClientGone("left")))
    first.close()
    second.wait()  # it has begun, so it is seen to its end
    told: list[BrokerError] = []
    second.when_cancelled(told.append)
    assert [type(error) for error in told] == [ClientGone]
    assert scheduler.stats().in_flight == 1
    second.close()
    assert scheduler.stats().in_flight == 0


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_nobody_overtakes_a_job_that_is_being_begun(make: Make) -> None:
    """Its own thread waits until the one that begins it is done with that."""
    scheduler = build(make)
    first, second = scheduler.enqueue(job()), scheduler.enqueue(job())
    entered, go_on = threading.Event(), threading.Event()

    def begin() -> bool:
        entered.set()
        return go_on.wait(10)

    second.when_granted(begin)
    waiting, closing = Outcome(second.wait), Outcome(first.close)
    assert entered.wait(10)
    assert not waiting.done
    second.cancel(ClientGone("left"))
    assert not waiting.done
    go_on.set()
    closing.result()
    waiting.result()
    second.close()


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_a_beginning_that_fails_is_left_to_the_job_itself(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = build(make)
    first, second = scheduler.enqueue(job()), scheduler.enqueue(job())

    def begin() -> bool:
        raise ValueError("a fault")

    second.when_granted(begin)
    first.close()
    second.wait()
    assert "beginning a job failed" in caplog.text
    second.close()
    assert scheduler.stats().in_flight == 0


def test_a_job_that_needs_room_is_not_begun_before_there_is_some() -> None:
    made: list[str] = []

    class RoomLater(NoRoomNeeded):
        def ready(self, job: Job) -> bool:
            return False

        def make_room(self, ticket: Granted) -> None:
            made.append(ticket.job.consumer)

    scheduler = build(locked, room=RoomLater())
    first, second = scheduler.enqueue(job("a")), scheduler.enqueue(job("b"))
    second.when_granted(lambda: pytest.fail("there is no room yet"))
    first.close()
    second.wait()
    assert made == ["b"]
    second.close()


def test_a_fault_in_the_look_at_who_is_ready_costs_nobody_the_turn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made: list[str] = []

    class Faulty(NoRoomNeeded):
        def ready(self, job: Job) -> bool:
            raise ValueError("a fault")

        def make_room(self, ticket: Granted) -> None:
            made.append(ticket.job.consumer)

    scheduler = build(locked, room=Faulty())
    first, second = scheduler.enqueue(job("a")), scheduler.enqueue(job("b"))
    first.wait()
    first.close()
    second.wait()
    second.close()
    assert made == ["a", "b"]  # by the card itself, then
    assert scheduler.stats().in_flight == 0
    assert "looking at who is ready failed" in caplog.text


# -- several at once ---------------------------------------------------------------------------


class Shared(NoRoomNeeded):
    """Consumers that share the GPU; those in `holds` are on the card."""

    def __init__(self, holds: str, **sharing: Sharing) -> None:
        self.holds = set(holds)
        self.shares = sharing
        self.made: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def ready(self, job: Job) -> bool:
        return job.resident in self.holds

    def prospect(self, job: Job) -> Prospect:
        return Prospect(job.resident in self.holds, fits=False, load_s=5, unload_s=1, run_s=1)

    def sharing(self, job: Job) -> Sharing:
        return self.shares.get(job.consumer, ALONE)

    def make_room(self, ticket: Granted) -> None:
        assert self.may_go_on.wait(10)
        self.made.append(ticket.job.resident)


def running(scheduler: Scheduler) -> list[int]:
    return [entry.ticket for entry in scheduler.queue() if entry.state == "running"]


POLICIES = [
    pytest.param(FirstComeFirstServed(), id="fifo"),
    pytest.param(Affinity(), id="affinity"),
]


def shared(policy: Policy, room: Shared) -> Scheduler:
    return locked(max_queue=50, max_wait=60, clock=SystemClock(), room=room, policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_consumer_runs_as_many_at_once_as_it_says(policy: Policy) -> None:
    scheduler = shared(policy, Shared("a", a=Sharing(3)))
    tickets = [scheduler.enqueue(job("a")) for _ in range(5)]
    assert running(scheduler) == [1, 2, 3]
    tickets[1].close()
    assert running(scheduler) == [1, 3, 4]
    for ticket in tickets:
        ticket.close()
    assert running(scheduler) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_once_another_one_is_due_nobody_joins(policy: Policy) -> None:
    """Not with affinity either, where as many as may have overtaken it."""
    if isinstance(policy, Affinity):
        policy = Affinity(max_overtaken_by=0)
    room = Shared("a", a=Sharing(8))
    scheduler = shared(policy, room)
    tickets = [scheduler.enqueue(job(name)) for name in "aabaa"]
    assert running(scheduler) == [1, 2]
    tickets[0].close()
    assert running(scheduler) == [2]
    tickets[1].close()
    assert running(scheduler) == [3]
    tickets[2].wait()
    assert room.made == ["b"]
    tickets[2].close()
    assert running(scheduler) == [4, 5]


def test_with_affinity_later_ones_join_as_far_as_they_may_overtake() -> None:
    scheduler = shared(Affinity(max_overtaken_by=1), Shared("a", a=Sharing(8)))
    for name in "abaa":
        scheduler.enqueue(job(name))
    assert running(scheduler) == [1, 3]


def test_one_that_may_not_join_is_not_in_the_way_of_one_that_may() -> None:
    scheduler = shared(Affinity(), Shared("ab", a=Sharing(2)))
    for name in "acba":  # c would cost a swap; b is loaded, but runs beside nobody
        scheduler.enqueue(job(name))
    assert running(scheduler) == [1, 4]


@pytest.mark.parametrize("policy", POLICIES)
def test_two_consumers_run_at_once_only_if_both_say_so_and_are_ready(policy: Policy) -> None:
    one, both = Sharing(1, frozenset("b")), Sharing(1, frozenset("a"))
    for room, at_once in (
        (Shared("ab", a=one), [1]),
        (Shared("ab", b=both), [1]),
        (Shared("a", a=one, b=both), [1]),
        (Shared("ab", a=one, b=both), [1, 2]),
    ):
        scheduler = shared(policy, room)
        for name in "abab":
            scheduler.enqueue(job(name))
        assert running(scheduler) == at_once


@pytest.mark.parametrize("policy", POLICIES)
def test_what_loads_or_unloads_has_the_gpu_to_itself(policy: Policy) -> None:
    scheduler = shared(policy, Shared("a", a=Sharing(8)))
    first = scheduler.enqueue(job("a"))
    unload = scheduler.enqueue(job("a", makes_room=False))
    load = scheduler.enqueue(job("a", runs=False))
    scheduler.enqueue(job("a"))
    assert running(scheduler) == [1]
    first.close()
    assert running(scheduler) == [2]
    unload.close()
    assert running(scheduler) == [3]
    load.close()
    assert running(scheduler) == [4]


@pytest.mark.parametrize("policy", POLICIES)
def test_others_join_as_soon_as_there_is_room_for_the_first(policy: Policy) -> None:
    room = Shared("", a=Sharing(8))
    room.may_go_on.clear()
    scheduler = shared(policy, room)
    tickets = [scheduler.enqueue(job("a")) for _ in range(3)]
    waits = [Outcome(ticket.wait) for ticket in tickets]
    assert running(scheduler) == [1]
    room.may_go_on.set()
    for wait in waits:
        wait.result()
    assert running(scheduler) == [1, 2, 3]
    assert room.made == ["a"]  # one load for all of them


@pytest.mark.parametrize("policy", POLICIES)
def test_a_job_that_ran_out_of_memory_is_tried_again_alone(policy: Policy) -> None:
    scheduler = shared(policy, Shared("a", a=Sharing(8)))
    first, second, third = (scheduler.enqueue(job("a")) for _ in range(3))
    relieved = [Outcome(ticket.relieve) for ticket in (second, first)]
    eventually(lambda: not scheduler.stats().queue_depth)
    scheduler.enqueue(job("a"))
    assert running(scheduler) == [1, 2, 3]
    assert not any(each.done for each in relieved)
    third.close()
    assert relieved[1].result() is True  # the second one, which waits as well, is in nobody's way
    assert not relieved[0].done
    assert running(scheduler) == [1, 2]  # and nobody joins
    first.close()
    assert relieved[0].result() is True
    assert running(scheduler) == [2]
    second.close()
    assert running(scheduler) == [4]


def test_the_wait_beside_others_is_estimated() -> None:
    clock = FakeClock()
    outlook = takes({"a": 8, "b": 30}, clock.monotonic())
    scheduler = locked(
        max_queue=9,
        max_wait=60,
        clock=clock,
        outlook=lambda: outlook,
        room=Shared("ab", a=Sharing(2)),
    )
    scheduler.enqueue(job("a"))
    assert scheduler.estimate(job("a")).wait_s == 0  # it would join
    assert scheduler.estimate(job("b")).wait_s == 8
    for name in "aaab":
        scheduler.enqueue(job(name))
    waits = [entry.turn.wait_s for entry in scheduler.queue() if entry.state == "waiting"]
    assert waits == [8, 8, 16]  # two at once, then two, then b
    assert scheduler.estimate(job("a")).wait_s == 16 + 30
    assert all(entry.turn.surely_s == 0 for entry in scheduler.queue()[2:])


def test_eviction_over_a_scheduler_that_runs_several_jobs_is_refused() -> None:
    with pytest.raises(ValueError, match="one job at a time"):
        Queue(
            FirstComeFirstServed(2),
            max_queue=9,
            max_wait=60,
            clock=SystemClock(),
            room=NoRoomNeeded(),
        )


@pytest.mark.parametrize("make", EXCLUSIVE)
def test_a_grant_wakes_only_the_thread_it_is_for(make: Make) -> None:
    """No thundering herd: handing on wakes one waiter, with a thousand in line."""
    scheduler = build(make, max_queue=2000)
    holder = scheduler.enqueue(job())
    stopped_by: list[Any] = [scheduler.enqueue(job()) for _ in range(1000)]
    woken = []

    def count(ticket: QueueTicket, n: int = 1) -> None:
        woken.append(ticket.number)
        threading.Condition.notify(ticket._turn, n)

    for ticket in stopped_by:
        ticket._turn.notify = partial(count, ticket)
    holder.close()
    assert woken == [stopped_by[0].number]


# -- held back for the next step of a conversation -----------------------------------------------


class Roomy(NoRoomNeeded):
    """All is loaded, and each job takes half a minute."""

    def prospect(self, job: Job) -> Prospect:
        return Prospect(run_s=30)


def talking(clock: FakeClock, hold: float = 4.0) -> Queue:
    """After a job of anna's the next one comes after half a second; that is known already."""
    policy = Affinity(hold=hold, max_overtake=30)
    queue = locked(max_queue=99, max_wait=600, clock=clock, room=Roomy(), policy=policy)
    for _ in range(5):
        clock.advance(0.5)
        queue.enqueue(step()).close()
    return queue


def step() -> Job:
    return job(requester="anna")


def nightly() -> Job:
    return job(requester="nightly", urgency=6)


def test_the_next_step_goes_before_a_job_that_was_held_back() -> None:
    clock = FakeClock()
    queue = talking(clock)
    held = queue.enqueue(nightly())
    assert queue.stats().in_flight == 0
    clock.advance(0.5)
    queue.enqueue(step()).close()  # it had the GPU at once
    assert [entry.ticket for entry in queue.queue()] == [held.number]
    held.cancel(ClientGone("gone"))
    assert queue.stats().queue_depth == 0


def test_a_job_that_was_held_back_for_nothing_starts_when_that_is_over() -> None:
    queue = talking(clock := FakeClock())
    held = queue.enqueue(nightly())
    granted = Outcome(held.wait)
    assert queue.stats().in_flight == 0
    clock.advance(1)
    granted.result()  # its own thread has looked again
    assert queue.stats().in_flight == 1
    held.close()


def test_a_hold_is_over_when_a_person_has_come_and_gone() -> None:
    """Who comes meanwhile is granted at once; then the one that was held has its turn."""
    queue = talking(clock := FakeClock())
    held, other = queue.enqueue(nightly()), queue.enqueue(job(requester="bob"))
    assert [entry.ticket for entry in queue.queue() if entry.state == "running"] == [other.number]
    clock.advance(5)
    other.close()
    held.wait()
    held.close()


@pytest.mark.parametrize(
    "job",
    [job(requester="bob"), job(requester="b", urgency=6, runs=False)],
    ids=["a person's", "a load"],
)
def test_only_background_work_is_held_back(job: Job) -> None:
    queue = talking(FakeClock())
    queue.enqueue(job)
    assert queue.stats().in_flight == 1


def test_without_a_hold_nobody_is_held_back() -> None:
    queue = talking(FakeClock(), hold=0)
    queue.enqueue(nightly())
    assert queue.stats().in_flight == 1


def test_nobody_is_held_back_who_has_waited_for_as_long_as_was_promised() -> None:
    queue = talking(clock := FakeClock())
    running = queue.enqueue(step())
    held = queue.enqueue(nightly())
    clock.advance(31)
    running.close()
    assert queue.stats().in_flight == 1
    held.wait()
    held.close()
