"""What a trace comes to, by each policy: small traces whose course is known."""

from __future__ import annotations

import pytest

from gpumanager.simulation.engine import Impossible
from gpumanager.simulation.policies import POLICIES, Promise, played
from gpumanager.simulation.trace import Course, Footprint, Task, Trace
from gpumanager.simulation.workloads import WORKLOADS, workload

ONE_BY_ONE = [name for name in WORKLOADS if name != "busy-office"]

TWO = {"a": Footprint(6000, 4.0, 1.0), "b": Footprint(6000, 3.0, 1.0)}
THREE = {**TWO, "c": Footprint(3000, 2.0, 1.0)}


def trace(
    *tasks: Task, footprints: dict[str, Footprint] = TWO, loaded: tuple[str, ...] = ()
) -> Trace:
    return Trace("test", 10_000, footprints, tasks, loaded=frozenset(loaded))


def jobs(needs: str, run_s: float = 1.0) -> list[Task]:
    """One for each letter, all at the beginning, each of another requester."""
    return [Task(n, 0.0, name, run_s, requester=f"r{n}") for n, name in enumerate(needs, start=1)]


def order(course: Course) -> list[int]:
    granted = [job for job in course.jobs if job.granted is not None]
    return [job.task.number for job in sorted(granted, key=lambda job: job.granted or 0.0)]


def play(name: str, trace: Trace) -> Course:
    return played(trace, name, Promise())


def test_fifo_takes_them_as_they_come_and_swaps_each_time() -> None:
    course = play("fifo", trace(*jobs("abab")))
    assert order(course) == [1, 2, 3, 4]
    assert [(move.what, move.name) for move in course.moves] == [
        ("load", "a"),
        *[("unload", "a"), ("load", "b")],
        *[("unload", "b"), ("load", "a")],
        *[("unload", "a"), ("load", "b")],
    ]
    assert course.jobs[0].began == 4.0
    assert course.jobs[-1].ended == 4 * 1.0 + 4.0 + 3.0 + 4.0 + 3.0 + 3 * 1.0
    assert all(job.overtaken_by == 0 for job in course.jobs)


def test_what_is_decided_is_noted_in_order() -> None:
    course = play("fifo", trace(*jobs("ab"), loaded=("a",)))
    assert course.decisions == (
        ("grant", "1"),
        ("grant", "2"),
        ("evict", "a", "2"),
        ("load", "b", "2"),
    )


def test_unbounded_batching_goes_past_for_as_long_as_there_is_one() -> None:
    course = play("unbounded", trace(*jobs("abababab")))
    assert order(course) == [1, 3, 5, 7, 2, 4, 6, 8]
    second = course.jobs[1]
    assert (second.overtaken_by, second.overtaken_s) == (3, 3.0)
    assert sum(move.what == "unload" for move in course.moves) == 1


def test_one_model_at_a_time_unloads_what_would_fit_beside_it() -> None:
    tasks = jobs("acac")
    beside = play("fifo", trace(*tasks, footprints=THREE))
    alone = play("one-model", trace(*tasks, footprints=THREE))
    assert sum(move.what == "unload" for move in beside.moves) == 0
    assert sum(move.what == "unload" for move in alone.moves) == 3


def test_its_share_is_fair() -> None:
    many = [Task(n, 0.0, "a", 2.0, requester="script") for n in range(1, 6)]
    one = Task(6, 1.0, "a", 1.0, requester="person")
    course = play("one-model", trace(*many, one))
    assert order(course).index(6) == 1


def test_the_cards_memory_is_kept_to() -> None:
    course = play("fifo", trace(*jobs("acb"), footprints=THREE))
    assert [(move.what, move.name) for move in course.moves if move.what == "unload"] == [
        ("unload", "a")  # the larger one is enough; c stays
    ]


def test_a_job_comes_when_the_one_before_is_over() -> None:
    first, second = Task(1, 0.0, "a", 1.0), Task(2, 0.0, "a", 1.0, after=1, think_s=5.0)
    course = play("fifo", trace(first, second))
    assert course.jobs[1].came == course.jobs[0].ended + 5.0 == 10.0


def test_one_whose_client_leaves_gets_no_turn() -> None:
    long, leaves = Task(1, 0.0, "a", 10.0), Task(2, 0.0, "a", 1.0, leaves_s=3.0)
    course = play("fifo", trace(long, leaves))
    gone = course.jobs[1]
    assert (gone.granted, gone.waited_s) == (None, 3.0)


def test_operations_take_their_turn() -> None:
    tasks = (
        Task(1, 0.0, "a", 0.0, operation="load"),
        Task(2, 0.0, "a", 0.0, operation="unload"),
        Task(3, 0.0, "b", 1.0),
    )
    course = play("fifo", trace(*tasks))
    assert [(move.what, move.name, move.task) for move in course.moves] == [
        ("load", "a", 1),
        ("unload", "a", 2),
        ("load", "b", 3),
    ]
    assert course.jobs[2].ended == 4.0 + 1.0 + 3.0 + 1.0


def test_a_job_that_has_no_room_beside_what_may_not_go_is_told() -> None:
    pinned = {**TWO, "a": Footprint(6000, 4.0, movable=False)}
    with pytest.raises(Impossible, match="job 2: there is no room for b"):
        play("fifo", trace(*jobs("ab"), footprints=pinned, loaded=("a",)))


@pytest.mark.parametrize(
    ("footprint", "message"),
    [({}, "job 1 needs a, whose size is not known"), ({"a": Footprint(20_000, 1.0)}, "20000 MiB")],
)
def test_a_trace_that_cannot_be(footprint: dict[str, Footprint], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(*jobs("a"), footprints=footprint)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_every_job_of_every_workload_has_its_turn_alone_on_the_card(name: str, policy: str) -> None:
    made = workload(name, 3, 60)
    course = play(policy, made)
    assert [job.task for job in course.jobs] == sorted(made.tasks, key=lambda task: task.number)
    until = 0.0
    for job in sorted(course.jobs, key=lambda job: job.granted or 0.0):
        assert job.granted is not None
        assert job.began is not None
        assert job.came <= job.granted
        assert until <= job.granted <= job.began < job.ended
        until = job.ended
    held: set[str] = set()
    for move in course.moves:
        (held.add if move.what == "load" else held.remove)(move.name)
        room = made.total_mib - made.reserved_mib
        assert sum(made.footprints[each].mib for each in held) <= room


@pytest.mark.parametrize("policy", POLICIES)
def test_a_course_is_the_same_again(policy: str) -> None:
    made = workload("mixed", 5, 60)
    assert play(policy, made) == play(policy, workload("mixed", 5, 60))
    assert play(policy, workload("mixed", 6, 60)) != play(policy, made)


def test_what_is_overtaken_out_of_turn_is_told_where_there_are_turns() -> None:
    tasks = jobs("ababab")
    course = played(trace(*tasks), "affinity", Promise(max_overtake=60.0, max_overtaken_by=1))
    assert course.out_of_turn is not None
    assert course.out_of_turn[0] == 1
    assert play("fifo", trace(*tasks)).out_of_turn is None


@pytest.mark.parametrize("policy", POLICIES)
def test_jobs_share_the_card_as_far_as_their_consumer_says(policy: str) -> None:
    made = workload("busy-office", 3, 80)
    jobs = [job for job in play(policy, made).jobs if job.began is not None]
    most = 0
    for job in jobs:
        assert job.began is not None
        at_once = [
            each for each in jobs if each.began is not None and each.began <= job.began < each.ended
        ]
        assert {each.task.needs for each in at_once} == {job.task.needs}
        assert len(at_once) <= made.footprints[job.task.needs].parallel
        most = max(most, len(at_once))
    assert most > 3
