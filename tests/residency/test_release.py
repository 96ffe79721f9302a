"""Did the memory come back, and whose doing is it?"""

from __future__ import annotations

from dataclasses import replace

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


@pytest.mark.parametrize(("born", "outcome"), [(7, "leaked"), (8, "released")])
def test_one_that_ended_holds_what_its_processes_do_but_not_who_has_their_pids(
    born: int, outcome: str
) -> None:
    process = (GpuProcess(50, 4000, "it"),)
    before, after = totals(1000), totals(1000)
    held = Holdings({"victim": 4000}, {"victim": (50,)}, births={50: 7})
    before = replace(before, processes=process, holdings=held)
    later = Holdings({}, {}, process, births={50: born})
    after = replace(after, free_mib=5000, processes=process, holdings=later)
    assert judge("victim", before, after, 4000).outcome == outcome


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


# -- where the card's memory is the host's ---------------------------------------------------------


def of_host(free: int, on_gpu: int | None = None, **held: int) -> MemoryReading:
    reading = replace(totals(free), memory="host", on_gpu_mib=on_gpu)
    return replace(reading, holdings=Holdings(dict(held))) if held else reading


@pytest.mark.parametrize("others", [-700, -60, 0, 60, 700])
def test_what_is_held_for_the_gpu_counts_and_not_what_other_programs_do(others: int) -> None:
    before = of_host(3000, on_gpu=5000)
    kept, gone = of_host(3000 + others, on_gpu=5000), of_host(4000 + others, on_gpu=4000)
    assert judge("victim", before, kept, 1000).outcome == "leaked"
    assert judge("victim", before, gone, 1000).mib == 1000
    assert judge("victim", before, gone, 1000).complete


@pytest.mark.parametrize("before", [of_host(3000, on_gpu=5000), of_host(3000, victim=4000)])
def test_another_program_may_take_at_once_what_the_victim_gave(before: MemoryReading) -> None:
    known = {"on_gpu": 1000} if before.on_gpu_mib else {"victim": 0}
    release = judge("victim", before, of_host(3100, **known), 4000)
    assert (release.outcome, release.taken_by) == ("stolen", "other programs of this machine")


def test_a_consumer_that_took_it_is_named() -> None:
    before, after = of_host(3000, victim=4000, other=0), of_host(3000, victim=0, other=3500)
    assert judge("victim", before, after, 4000).taken_by == "other (+3500 MiB)"


@pytest.mark.parametrize("others", [-300, -20, 0, 20, 300])
def test_a_small_change_of_the_hosts_memory_proves_nothing(others: int) -> None:
    release = judge("victim", of_host(3000), of_host(3000 + others), 400)
    assert release.outcome == "unverified"
    assert judge("victim", of_host(3000), of_host(7000 + others), 4000).outcome == "released"
    assert judge("victim", of_host(3000), of_host(3000 + others), 4000).outcome == "leaked"


def test_nothing_expected_is_nothing_missed() -> None:
    assert judge("victim", of_host(3000), of_host(2900), 0).outcome != "unverified"
