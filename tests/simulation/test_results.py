"""Figures of courses that can be counted by hand."""

from __future__ import annotations

from xml.etree import ElementTree

from gpumanager.simulation.plot import svg
from gpumanager.simulation.policies import POLICIES, Comparison, Promise, compared
from gpumanager.simulation.results import figures, overtakes, percentile, waits
from gpumanager.simulation.trace import Course, Move, Played, Task, Trace
from gpumanager.simulation.workloads import WORKLOADS, at_once, workload


def done(number: int, came: float, granted: float, ended: float, kind: str = "llm") -> Played:
    task = Task(number, came, "a", ended - granted, kind, requester=f"r{number % 2}")
    return Played(task, came, granted, granted, ended)


def test_they_are_what_can_be_counted() -> None:
    gone = Played(Task(4, 1.0, "a", 1.0), 1.0, None, None, 2.5)
    course = Course(
        "fifo",
        (done(1, 0.0, 0.0, 4.0), done(2, 1.0, 4.0, 6.0, "tts"), done(3, 2.0, 8.0, 10.0), gone),
        (Move("unload", "b", 3, 6.0, 0.5), Move("load", "a", 3, 6.5, 1.5)),
    )
    found = figures(course)
    assert (found.jobs, found.left, found.makespan_s, found.utilisation) == (3, 1, 10.0, 0.8)
    assert (found.swaps, found.loads, found.swapping_s, found.longest_queue) == (1, 1, 2.0, 3)
    assert (found.waits.p50, found.waits.p99, found.waits.mean) == (1.5, 6.0, 2.625)
    assert {kind: each.jobs for kind, each in found.by_kind.items()} == {"llm": 3, "tts": 1}
    assert found.by_requester["r1"].longest == 6.0
    assert found.as_json()["waits"]["longest"] == 6.0


def test_nothing_comes_to_nothing() -> None:
    found = figures(Course("fifo", ()))
    assert (found.jobs, found.makespan_s, found.utilisation, waits([]).p99) == (0, 0.0, 0.0, 0.0)


def test_percentiles_are_by_the_nearest_rank() -> None:
    assert [percentile([1, 2, 3, 4], share) for share in (0.25, 0.5, 0.51, 0.99)] == [1, 2, 3, 4]


def test_overtakes_are_counted_from_the_grants() -> None:
    # 2 and 3 go past 1; 3 past 2 as well.
    assert overtakes({3: 1.0, 2: 4.0, 1: 6.0, 4: 7.0}) == {
        3: (0, 0.0),
        2: (1, 3.0),
        1: (2, 5.0),
        4: (0, 0.0),
    }


def test_the_picture_has_a_row_for_each_policy() -> None:
    found = compared(workload("alternating", 1, 24), POLICIES, Promise())
    drawn = ElementTree.fromstring(svg(found))  # noqa: S314  # it is our own
    words = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert all(words.count(policy) == 2 for policy in POLICIES)  # its row, and its curve
    assert {"left", "right"} <= set(words)


def test_workloads_are_the_same_for_the_same_seed() -> None:
    for name, words in WORKLOADS.items():
        assert words.endswith(".")
        assert workload(name, 1) == workload(name, 1)
        assert workload(name, 1) != workload(name, 2)
        few = workload(name, 1, 9)
        assert len(few.tasks) == 9
        together = at_once(few)
        assert max(task.at for task in together.tasks) <= 1.0
        assert all(task.after is None for task in together.tasks)


def test_a_picture_of_many_jobs_is_no_larger() -> None:
    jobs = tuple(done(n, n * 1.0, n * 1.0, n + (0.9 if n % 2 else 0.2)) for n in range(20_000))
    drawn = svg(Comparison(Trace("long", 1000, {}, ()), (Course("fifo", jobs),)))
    assert len(drawn) < 200_000
