"""Did the memory come back, and whose doing is it?"""

from __future__ import annotations

import pytest

from gpumanager.model import GpuProcess, Holdings, MemoryReading
from gpumanager.residency.release import judge

TOTAL = 10_000


def totals(free: int) -> MemoryReading:
    return MemoryReading(TOTAL, TOTAL - free, free)


def detailed(
    free: int, foreign: int = 0, listening: tuple[str, ...] = ("victim", "other"), **held: int
) -> MemoryReading:
    """A reading with figures per process; the consumer's pid is the length of its name."""
    processes = [GpuProcess(len(name), mib) for name, mib in held.items() if mib]
    strangers = (GpuProcess(99, foreign, "game"),) if foreign else ()
    return MemoryReading(
        TOTAL,
        TOTAL - free,
        free,
        processes=(*processes, *strangers),
        holdings=Holdings(
            {name: held.get(name, 0) for name in listening},
            {name: (len(name),) for name, mib in held.items() if mib},
            strangers,
        ),
    )


@pytest.mark.parametrize(
    ("free_after", "outcome", "mib"),
    [
        (5000, "released", 4000),
        (4600, "released", 3600),
        (4500, "partial", 3500),
        (1400, "partial", 400),
        (1399, "leaked", 399),
        (1000, "leaked", 0),
        (200, "leaked", 0),  # somebody took some meanwhile: no underflow
    ],
)
def test_by_the_totals(free_after: int, outcome: str, mib: int) -> None:
    release = judge("victim", totals(1000), totals(free_after), 4000)
    assert (release.outcome, release.mib, release.residue_mib) == (outcome, mib, None)


@pytest.mark.parametrize(
    ("keeps", "outcome"), [(0, "released"), (400, "released"), (500, "partial"), (4000, "leaked")]
)
def test_by_the_victims_own_processes(keeps: int, outcome: str) -> None:
    before = detailed(1000, victim=4000, other=5000)
    after = detailed(5000 - keeps, victim=keeps, other=5000)
    release = judge("victim", before, after, 4000)
    assert (release.outcome, release.mib, release.residue_mib) == (outcome, 4000 - keeps, keeps)


def test_what_others_give_back_is_not_the_victims() -> None:
    before = detailed(1000, victim=4000, other=5000)
    after = detailed(6000, victim=4000, other=0)
    assert judge("victim", before, after, 4000).outcome == "leaked"


@pytest.mark.parametrize(
    ("after", "taken_by"),
    [
        (detailed(1000, foreign=4000, other=5000), "game (pid 99) (+4000 MiB)"),
        (detailed(1000, other=9000), "other (+4000 MiB)"),
        (detailed(1000, other=5000), "somebody"),
    ],
)
def test_what_somebody_took_at_once_was_released_and_stolen(
    after: MemoryReading, taken_by: str
) -> None:
    release = judge("victim", detailed(1000, victim=4000, other=5000), after, 4000)
    assert (release.outcome, release.mib, release.taken_by) == ("stolen", 4000, taken_by)
    assert release.complete


def test_a_victim_that_ended_is_known_by_its_processes_of_before() -> None:
    before = detailed(1000, victim=4000)
    ended = detailed(5000, listening=("other",))
    assert judge("victim", before, ended, 4000).outcome == "released"
    lingering = detailed(1000, listening=("other",), victim=4000)
    assert judge("victim", before, lingering, 4000).outcome == "leaked"


def test_nothing_to_expect_is_nothing_to_miss() -> None:
    assert judge("victim", totals(1000), totals(1000), 0).outcome == "released"
