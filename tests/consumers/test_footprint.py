"""What a consumer is taken to need, from what is declared and what its jobs were seen to hold."""

from __future__ import annotations

import json

import pytest

from gpumanager.consumers.footprint import (
    ENOUGH,
    KEPT_S,
    LONGEST_PATIENCE,
    PATIENCE,
    RAISED_FOR_S,
    REMEMBERED,
    Figure,
    Footprint,
)
from gpumanager.model import Declared


def after(*jobs: int, footprint: Footprint | None = None) -> Footprint:
    """Jobs that were seen to hold so much, one a second from 1 on."""
    footprint = footprint or Footprint()
    for at, mib in enumerate(jobs, 1):
        footprint.saw(mib, "measured", at)
        footprint.job_done(at)
    return footprint


def test_a_declaration_is_all_there_is_at_first() -> None:
    assert Footprint().needed(Declared(6000), 0) == Figure(6000, "declared")
    assert Footprint().peak is None


def test_a_higher_peak_counts_from_the_moment_it_is_seen() -> None:
    footprint = Footprint()
    assert footprint.saw(3000, "measured", 1)
    assert not footprint.saw(2900, "measured", 2)
    assert footprint.needed(Declared(2800), 3) == Figure(3000, "measured", 1)
    assert footprint.needed(Declared(0), 3) == Figure(3000, "measured", 1)
    assert footprint.needed(Declared(4000), 3) == Figure(4000, "declared")


@pytest.mark.parametrize("really", [2000, 0])
def test_a_declaration_that_is_too_high_counts_only_until_enough_is_known(really: int) -> None:
    """0: it runs on another card, or on the CPU."""
    footprint = after(*[really] * (ENOUGH - 1))
    assert footprint.needed(Declared(6000), 9).source == "declared"
    after(really, footprint=footprint)
    assert footprint.needed(Declared(6000), 9) == Figure(really, "measured", 1)


def test_one_large_job_is_forgotten_after_ten() -> None:
    footprint = after(9000, *[3000] * 8)
    assert footprint.needed(Declared(0), 9).mib == 9000
    after(3000, footprint=footprint)
    assert footprint.needed(Declared(0), 9).mib == 3000
    assert footprint.peak == Figure(9000, "measured", 1)
    after(*[3000] * REMEMBERED, footprint=footprint)
    assert footprint.peak is not None
    assert footprint.peak.mib == 3000


def test_one_job_in_five_that_is_large_is_never_forgotten() -> None:
    footprint = Footprint()
    for _ in range(20):
        after(9000, 3000, 3000, 3000, 3000, footprint=footprint)
        assert footprint.needed(Declared(0), 9).mib == 9000


def test_what_an_out_of_memory_raised_counts_until_enough_jobs_went_well() -> None:
    footprint = after(*[3000] * ENOUGH)
    footprint.raise_to(7000, 10)
    assert footprint.needed(Declared(3000), 11) == Figure(7000, "out-of-memory", 10)
    after(*[3000] * (PATIENCE - 1), footprint=footprint)
    assert footprint.needed(Declared(3000), 11).mib == 7000
    after(3000, footprint=footprint)
    assert footprint.needed(Declared(3000), 11) == Figure(3000, "measured", 1)
    assert footprint.raised(11) is None


def test_it_is_kept_for_longer_each_time_that_forgetting_it_was_too_soon() -> None:
    footprint = Footprint()
    patience = PATIENCE
    for _ in range(8):
        footprint.raise_to(7000, 1)
        footprint.raise_to(6000, 2)  # before it is forgotten: no other occasion, nor less
        raised = footprint.raised(3)
        assert raised is not None
        assert (raised.mib, raised.patience) == (7000, patience)
        for _ in range(patience):
            footprint.job_done(4)
        assert footprint.raised(5) is None
        patience = min(LONGEST_PATIENCE, 2 * patience)


def test_it_does_not_outlive_a_week_without_a_job() -> None:
    footprint = Footprint()
    footprint.raise_to(7000, 100)
    assert footprint.needed(Declared(3000), 99 + RAISED_FOR_S).mib == 7000
    assert footprint.needed(Declared(3000), 101 + RAISED_FOR_S).mib == 3000


def test_room_is_never_made_for_more_than_is_declared_as_the_most() -> None:
    footprint = after(*[22_000] * 9)
    footprint.raise_to(23_000, 10)
    assert footprint.needed(Declared(4000, 6000), 11) == Figure(6000, "declared")
    assert footprint.needed(Declared(4000), 11).mib == 23_000


def test_what_an_elastic_one_holds_counts_not_at_all_but_an_out_of_memory_does() -> None:
    footprint = after(*[22_000] * 9)
    elastic = Declared(4000, elastic=True)
    assert footprint.needed(elastic, 11) == Figure(4000, "declared")
    footprint.raise_to(7000, 10)
    assert footprint.needed(elastic, 11) == Figure(7000, "out-of-memory", 10)
    capped = Declared(4000, 6000, elastic=True)
    assert footprint.needed(capped, 11) == Figure(6000, "declared")


def test_a_report_counts_where_it_is_more_and_nobody_measured() -> None:
    footprint = Footprint()
    for _ in range(ENOUGH):
        footprint.saw(5000, "reported", 1)
        footprint.job_done(2)
    assert footprint.needed(Declared(4000), 3) == Figure(5000, "reported", 1)
    assert footprint.needed(Declared(6000), 3).source == "declared"
    after(4500, footprint=footprint)
    assert footprint.needed(Declared(4000), 3).source == "measured"


def test_what_it_holds_at_rest_is_of_the_job_before() -> None:
    footprint = Footprint()
    footprint.saw(2000, "measured", 1, working=False)  # loaded, but no job yet
    footprint.saw(2500, "measured", 2)
    footprint.job_done(3)
    assert footprint.peak == Figure(2500, "measured", 2)
    footprint.saw(3000, "measured", 4, working=False)
    footprint.saw(2900, "measured", 5, working=False)
    assert (footprint.peak, footprint.measured_jobs) == (Figure(3000, "measured", 4), 1)
    footprint.job_done(6)  # too short for anybody to look
    assert footprint.measured_jobs == 1
    footprint.saw(3100, "measured", 7, working=False)
    footprint.unloaded()
    assert (footprint.peak, footprint.measured_jobs) == (Figure(3100, "measured", 7), 2)
    footprint.saw(9000, "measured", 8, working=False)  # somebody else had it load
    footprint.unloaded()
    assert footprint.peak == Figure(3100, "measured", 7)


def test_what_a_failed_job_held_says_nothing() -> None:
    footprint = Footprint()
    footprint.saw(9000, "measured", 1)
    footprint.discard()
    footprint.job_done(2)
    assert footprint.needed(Declared(3000), 3).mib == 3000


def test_what_went_to_the_cpu_is_no_measure_of_what_is_needed() -> None:
    footprint = after(*[6000] * ENOUGH)
    footprint.unloaded()
    after(*[2000] * 45, footprint=footprint)
    assert footprint.needed(Declared(6000), 9).mib == 2000
    footprint.spilled()
    assert footprint.needed(Declared(6000), 9).mib == 6000
    footprint.spilled()  # the rest is from before
    assert footprint.measured_jobs == ENOUGH


def test_all_of_it_outlives_a_restart() -> None:
    footprint = after(3000, 4000)
    footprint.saw(4500, "reported", 3)
    footprint.raise_to(7000, 4)
    footprint.job_done(5)
    footprint.saw(4100, "measured", 6)
    data = json.loads(json.dumps(footprint.as_data()))
    again = Footprint.from_data(data, 7)
    assert again.as_data() == footprint.as_data()
    assert again.raised(7) == footprint.raised(7)
    assert again.needed(Declared(0), 7) == footprint.needed(Declared(0), 7)
    assert Footprint.from_data(data, KEPT_S + 10).peak is None


def test_what_had_leaked_before_each_job_is_not_what_that_needed() -> None:
    footprint = Footprint()
    for job in range(5):
        footprint.saw(4000 + 100 * job, "measured", 10.0 * job + 5)
        footprint.job_done(10.0 * job + 6)
    footprint.saw(4500, "measured", 55.0)
    # Seen at rest after each of them.
    footprint.without([(10.0 * job + 8, 100 * job + 100) for job in range(5)])
    assert [mib for mib, _ in footprint._peaks["measured"]] == [4000] * 5
    assert footprint._current["measured"][0] == 4000
    assert footprint.needed(Declared(), 60.0).mib == 4000
    footprint.without([(0.0, 1000)])  # told a second time
    assert footprint.needed(Declared(), 60.0).mib == 4000


# -- by the length of the context -----------------------------------------------------------------


def with_contexts(*seen: tuple[int, int]) -> Footprint:
    """Jobs whose model was loaded for so many tokens, and held so much."""
    footprint = Footprint()
    for at, (tokens, mib) in enumerate(seen, 1):
        footprint.saw(mib, "measured", at)
        footprint.job_done(at, tokens)
    return footprint


def for_context(footprint: Footprint, tokens: int, declared: Declared | None = None) -> int:
    return footprint.needs(99).of(declared or Declared(0), tokens).mib


def test_a_length_that_was_seen_needs_what_was_held_then() -> None:
    footprint = with_contexts((4096, 5000), (32_768, 9000))
    assert for_context(footprint, 4096) == 5000
    assert for_context(footprint, 32_768) == 9000
    assert footprint.needs(99).of(Declared(0)).mib == 9000  # a job that says nothing


def test_between_two_lengths_the_longer_one_counts() -> None:
    footprint = with_contexts((4096, 5000), (32_768, 9000))
    assert for_context(footprint, 4097) == 9000
    assert for_context(footprint, 512) == 5000


def test_beyond_the_longest_it_grows_as_between_the_two_longest() -> None:
    footprint = with_contexts((2048, 4000), (4096, 5000), (8192, 6000))
    assert for_context(footprint, 16_384) == 8000  # 1000 MiB each 4,096 tokens
    shrinking = with_contexts((4096, 6000), (8192, 5000))
    assert for_context(shrinking, 16_384) == 5000


def test_where_one_length_was_seen_a_quarter_of_it_grows() -> None:
    footprint = with_contexts((4096, 8000))
    assert for_context(footprint, 8192) == 10_000
    assert for_context(footprint, 32_768) == 22_000


def test_where_none_was_seen_what_is_known_is_taken_to_be_of_a_usual_one() -> None:
    declared = Declared(8000)
    assert for_context(Footprint(), 2048, declared) == 8000
    assert for_context(Footprint(), 4096, declared) == 8000
    assert for_context(Footprint(), 8192, declared) == 10_000
    assert Footprint().needs(0).of(declared, 8192).source == "declared"


def test_a_length_raises_no_elastic_one_and_nothing_above_the_most() -> None:
    assert for_context(Footprint(), 32_768, Declared(8000, elastic=True)) == 8000
    assert for_context(Footprint(), 32_768, Declared(8000, 9000)) == 9000


def test_an_out_of_memory_counts_for_each_length() -> None:
    footprint = with_contexts((4096, 5000))
    footprint.raise_to(7000, 2)
    assert for_context(footprint, 4096) == 7000
    assert for_context(footprint, 65_536) > 7000


def test_the_shortest_lengths_are_forgotten() -> None:
    footprint = with_contexts(*((1000 * each, 100 * each) for each in range(1, 21)))
    known = footprint.needs(99).contexts
    assert [tokens for tokens, _ in known] == [1000 * each for each in range(13, 21)]


def test_one_large_job_of_a_length_is_forgotten_little_by_little() -> None:
    footprint = with_contexts((4096, 9000), *[(4096, 5000)] * 10)
    assert 5000 < for_context(footprint, 4096) < 7000
    footprint = with_contexts((4096, 9000), *[(4096, 5000)] * 100)
    assert for_context(footprint, 4096) == 5000


def test_lengths_outlive_a_restart() -> None:
    footprint = with_contexts((4096, 5000), (32_768, 9000))
    again = Footprint.from_data(json.loads(json.dumps(footprint.as_data())), 9)
    assert again.needs(9).contexts == ((4096, 5000), (32_768, 9000))
    old = footprint.as_data()
    del old["contexts"]  # of an older version
    assert Footprint.from_data(old, 9).needs(9).contexts == ()


@pytest.mark.parametrize("contexts", [[[4096, -1]], [["4096", 5000]], [4096], [[4096]]])
def test_lengths_that_nobody_wrote_are_refused(contexts: object) -> None:
    data = {**Footprint().as_data(), "contexts": contexts}
    with pytest.raises((ValueError, TypeError)):
        Footprint.from_data(data, 9)
