"""How near the choice of victims comes to the best there is, with the whole trace known."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from gpumanager.scheduling.victims import Order
from tests.support.offline import (
    CARD_MIB,
    NAMES,
    NEEDS_MIB,
    RELOAD_S,
    TRACES,
    least_reload_s,
    reload_s,
)

pytestmark = pytest.mark.untraced

JOBS = 200
SEEDS = range(5)
WAITING = 3, 7
"""As with four and with eight clients that each wait for their answer."""

LONGEST = 1.15
"""Seconds of reloading, against the least there can be."""


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("kind", TRACES)
def test_it_reloads_little_more_than_it_must(kind: str, order: Order) -> None:
    for seed in SEEDS:
        trace = TRACES[kind](seed, JOBS)
        least = least_reload_s(trace)
        for waiting in WAITING:
            ratio = reload_s(trace, order=order, waiting=waiting) / least
            assert 1 <= ratio <= LONGEST, (seed, waiting, ratio)


def test_the_least_is_the_least() -> None:
    """Against every choice that could be made, for a trace that is short enough to try them all."""
    trace = ["vllm", "comfyui", "voice", "vllm", "ollama", "voice", "comfyui"]

    def every(place: int, loaded: frozenset[str]) -> float:
        if place == len(trace):
            return 0.0
        name = trace[place]
        if name in loaded:
            return every(place + 1, loaded)
        rest = sorted(loaded)
        return RELOAD_S[name] + min(
            every(place + 1, kept | {name})
            for keeps in product([False, True], repeat=len(rest))
            for kept in [frozenset(each for each, keep in zip(rest, keeps, strict=True) if keep)]
            if sum(NEEDS_MIB[each] for each in kept) + NEEDS_MIB[name] <= CARD_MIB
        )

    assert least_reload_s(trace) == every(0, frozenset())


def test_the_traces_are_what_they_are_called() -> None:
    for kind, make in TRACES.items():
        traces = [make(seed, JOBS) for seed in SEEDS]
        assert all(len(trace) == JOBS and set(trace) <= set(NAMES) for trace in traces)
        assert len({tuple(trace) for trace in traces}) == len(SEEDS), kind
