"""Growth is told from a leak, on series as servers show them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from gpumanager.consumers.growth import ENOUGH, LOADS, GrowthWatch
from gpumanager.model import Growth

Series = Callable[[int, random.Random], float]
"""MiB at rest after the nth job."""


def after(
    series: Series, jobs: int, seed: int = 0, watch: GrowthWatch | None = None, before: int = 0
) -> tuple[GrowthWatch, list[str]]:
    """A watch that has seen so many jobs, and its verdict after each."""
    watch, dice = GrowthWatch() if watch is None else watch, random.Random(seed)
    verdicts: list[str] = [
        watch.at_rest(round(series(job, dice)), before + job, float(job)).verdict
        for job in range(1, jobs + 1)
    ]
    return watch, verdicts


def cache_of(size: Callable[[random.Random], float]) -> Series:
    """As torch's: what the largest job so far took stays."""
    largest = 0.0

    def series(job: int, dice: random.Random) -> float:
        nonlocal largest
        largest = size(dice) if job == 1 else max(largest, size(dice))
        return 3000 + largest

    return series


def noisy(series: Series, mib: float) -> Series:
    return lambda job, dice: series(job, dice) + dice.uniform(-mib, mib)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(
    "size",
    [
        lambda dice: dice.uniform(0, 1500),
        lambda dice: min(8000, dice.expovariate(1 / 400)),
        lambda dice: min(8000, 100 * dice.paretovariate(1.2)),
    ],
    ids=["even", "exponential", "heavy"],
)
def test_a_cache_that_keeps_what_the_largest_job_took_is_no_leak(
    size: Callable[[random.Random], float], seed: int
) -> None:
    _, verdicts = after(cache_of(size), 300, seed)
    assert "leaks" not in verdicts


def test_a_cache_that_fills_and_is_full_grows() -> None:
    """As a cache of keys and values that is filled block by block."""
    watch, verdicts = after(lambda job, dice: 3000 + min(1000, job * 50), 100)
    assert "leaks" not in verdicts
    assert watch.growth.verdict == "grows"
    assert watch.growth.fresh_mib == 3050
    assert watch.growth.grown_mib == 950
    assert watch.growth.leaked_mib == 0


def test_a_cache_that_is_allocated_once_is_steady() -> None:
    watch, _ = after(lambda job, dice: 9000, 60)
    assert watch.growth == Growth("steady", fresh_mib=9000, jobs=59, trims_to_mib=9000, at=4.0)


def test_what_takes_its_cache_with_the_first_job_grows_by_that_once() -> None:
    watch = GrowthWatch()
    watch.at_rest(2000, 0, 0.0)  # loaded, before any job
    after(lambda job, dice: 9000, 60, watch=watch)
    assert (watch.growth.verdict, watch.growth.fresh_mib) == ("grows", 2000)
    assert watch.growth.grown_mib == 7000


def test_one_whose_cache_takes_longer_to_fill_is_no_leak_in_the_end() -> None:
    """For as long as nobody can tell, it is taken for one."""
    watch, verdicts = after(lambda job, dice: 3000 + min(4000, job * 50), 300)
    assert "leaks" in verdicts
    assert watch.growth.verdict == "grows"
    assert watch.growth.leaked_mib == 0


@pytest.mark.parametrize("noise", [0, 30])
@pytest.mark.parametrize("seed", range(10))
def test_a_slow_leak_is_found(noise: float, seed: int) -> None:
    watch, verdicts = after(noisy(lambda job, dice: 3000 + 5 * job, noise), 100, seed)
    assert watch.growth.verdict == "leaks"
    assert watch.growth.over == "jobs"
    assert watch.growth.mib_per_job == pytest.approx(5, abs=1.5)
    assert "leaks" not in verdicts[: ENOUGH - 1]


@pytest.mark.parametrize(("rate", "jobs"), [(1, 150), (0.3, 600)])
def test_a_slower_leak_is_found_later(rate: float, jobs: int) -> None:
    watch, verdicts = after(noisy(lambda job, dice: 3000 + rate * job, 10), jobs)
    assert "leaks" not in verdicts[:60]
    assert watch.growth.verdict == "leaks"
    assert watch.growth.mib_per_job == pytest.approx(rate, rel=0.35)


@pytest.mark.parametrize("seed", range(10))
def test_a_leak_beneath_a_cache_is_found_and_only_the_leak_is_counted(seed: int) -> None:
    cache = cache_of(lambda dice: dice.uniform(0, 1500))
    watch, _ = after(lambda job, dice: cache(job, dice) + 5 * job, 300, seed)
    assert watch.growth.verdict == "leaks"
    assert 1000 < watch.growth.leaked_mib < 2100  # 1500, and none of the cache's


def test_a_leak_that_begins_late_is_found_soon_after() -> None:
    series = noisy(lambda job, dice: 3000 + 5 * max(0, job - 1000), 10)
    _, verdicts = after(series, 1000 + ENOUGH)
    assert "leaks" not in verdicts[:1015]
    assert verdicts[-1] == "leaks"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [30, 300], ids=["a desktop's", "as much as anything"])
def test_noise_is_no_leak(noise: float, seed: int) -> None:
    _, verdicts = after(noisy(lambda job, dice: 2000, noise), 1000, seed)
    assert "leaks" not in verdicts


def test_of_what_is_seen_after_one_job_the_lowest_counts() -> None:
    watch = GrowthWatch()
    for job in range(1, 60):
        watch.at_rest(7000 + 20 * job, job, 0.0)  # the job's own memory is on its way back
        watch.at_rest(3000, job, 0.0)
        watch.at_rest(3010, job, 0.0)
    assert watch.growth.verdict == "steady"


def test_what_was_seen_of_many_jobs_takes_no_more_room_than_of_few() -> None:
    watch, _ = after(lambda job, dice: 2000 + job % 7, 20_000)
    assert len(watch._all) + len(watch._recent) + len(watch._loads) < 200


# -- unloads -------------------------------------------------------------------------------------


def test_a_leak_is_not_forgotten_with_the_unload_that_frees_it() -> None:
    watch, _ = after(lambda job, dice: 3000 + 5 * job, 60)
    assert watch.growth.leaked_mib == pytest.approx(295, abs=2)
    watch.unloaded(300, 60, 100.0)
    assert watch.growth.verdict == "leaks"
    assert watch.growth.leaked_mib == 0
    after(lambda job, dice: 3000 + 5 * job, 10, watch=watch, before=60)
    assert watch.growth.verdict == "leaks"
    assert watch.growth.leaked_mib == pytest.approx(45, abs=2)
    watch.unloaded(300, 70, 200.0)
    _, verdicts = after(lambda job, dice: 3000, 2 * ENOUGH, watch=watch, before=70)
    assert verdicts[-1] == "steady"  # another version of it, perhaps


def test_what_is_given_back_while_loaded_was_no_leak() -> None:
    """As a server that trims its cache by itself now and then."""
    _, verdicts = after(lambda job, dice: 3000 + 30 * (job % 30), 300)
    assert "leaks" not in verdicts


def load(watch: GrowthWatch, number: int, floor: int | None, fresh: int) -> str:
    if floor is not None:
        watch.unloaded(floor + 500, 10 * number, number)  # on its way back
        watch.unloaded(floor, 10 * number, number)
    for job in range(3):
        watch.at_rest(fresh, 10 * number + job, number, what=number % 2 if floor is None else None)
    return watch.growth.verdict


def test_a_leak_over_unloads_is_found() -> None:
    watch = GrowthWatch()
    verdicts = [load(watch, number, 500 + 40 * number, 3000 + 40 * number) for number in range(8)]
    assert "leaks" not in verdicts[: LOADS - 1]
    assert verdicts[-1] == "leaks"
    assert (watch.growth.over, watch.growth.mib_per_load) == ("loads", 40)
    assert watch.growth.leaked_mib == 0  # what an unload would not give back


def test_a_leak_over_unloads_ends_with_its_process() -> None:
    watch = GrowthWatch()
    for number in range(8):
        load(watch, number, 500 + 40 * number, 3000 + 40 * number)
    assert watch.unloaded(0, 90, 9.0).verdict == "unknown"
    assert load(watch, 9, 500, 3000) != "leaks"


@pytest.mark.parametrize("seed", range(20))
def test_loads_that_differ_by_chance_are_no_leak(seed: int) -> None:
    watch, dice = GrowthWatch(), random.Random(seed)
    verdicts = {
        load(watch, number, dice.randrange(400, 600), dice.randrange(3000, 5000))
        for number in range(200)
    }
    assert "leaks" not in verdicts


def test_other_models_of_other_sizes_are_no_leak() -> None:
    """Where it says what it has loaded, only levels of the same are compared."""
    watch = GrowthWatch()
    for number in range(30):
        load(watch, number, None, 3000 + 100 * number)
    assert watch.growth.verdict != "leaks"


def test_one_that_is_never_seen_unloaded_is_judged_by_its_level_after_each_load() -> None:
    watch = GrowthWatch()
    for number in range(8):
        watch._loaded = False  # loaded anew between two looks
        for job in range(3):
            watch.at_rest(3000 + 50 * number, 10 * number + job, float(number))
    assert (watch.growth.verdict, watch.growth.over) == ("leaks", "loads")


# -- trims ---------------------------------------------------------------------------------------


def test_a_trim_is_taken_to_give_what_has_grown() -> None:
    watch, _ = after(lambda job, dice: 3000 + min(1000, job * 50), 60)
    assert watch.growth.trims_to_mib == 3050


def test_a_trim_is_taken_to_leave_what_the_last_one_left() -> None:
    watch, _ = after(lambda job, dice: 3000 + min(1000, job * 50), 60)
    assert watch.trimmed(4000, 3400).trims_to_mib == 3400
    watch.at_rest(3900, 61, 0.0)
    assert watch.growth.trims_to_mib == 3400


def test_a_trim_that_gave_nothing_is_taken_to_give_nothing_until_the_next_load() -> None:
    watch, _ = after(lambda job, dice: 3000 + min(1000, job * 50), 60)
    assert watch.trimmed(4000, 3950).trims_to_mib is None
    watch.at_rest(4500, 61, 0.0)
    assert watch.growth.trims_to_mib is None
    watch.unloaded(500, 61, 0.0)
    watch.at_rest(3000, 61, 0.0)
    assert watch.growth.trims_to_mib == 3000


def test_what_is_unloaded_has_nothing_to_trim() -> None:
    watch, _ = after(lambda job, dice: 3000, 10)
    assert watch.unloaded(500, 10, 0.0).trims_to_mib is None


# -- over restarts -------------------------------------------------------------------------------


def test_what_was_found_outlives_the_broker() -> None:
    watch, _ = after(lambda job, dice: 3000 + 5 * job, 60)
    again = GrowthWatch.from_data(watch.as_data())
    assert again.growth == Growth("leaks", "jobs", mib_per_job=5.0, at=40.0)
    after(lambda job, dice: 3000 + 5 * job, 10, watch=again)
    assert again.growth.leaked_mib == 45


@pytest.mark.parametrize(
    "wrong", [{"verdict": "odd"}, {"over": "odd"}, {"mib_per_job": "much"}, {"at": []}]
)
def test_what_was_never_written_is_not_taken_over(wrong: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        GrowthWatch.from_data({**GrowthWatch().as_data(), **wrong})
