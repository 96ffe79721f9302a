"""What choosing victims can come to: traces of jobs, the least reloading that serves one in its
order (exactly, with the whole trace known), and what the broker's choice makes of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations

from gpumanager.scheduling.victims import Demand, Order, Resident, plan_eviction

CARD_MIB = 11_744
NEEDS_MIB = {
    "ollama": 6000,
    "voice": 3000,
    "whisper": 2500,
    "comfyui": 5000,
    "embed": 1200,
    "vllm": 5500,
    "flux": 9000,
    "rerank": 900,
}
RELOAD_S = {
    "ollama": 8.0,
    "voice": 4.0,
    "whisper": 3.0,
    "comfyui": 12.0,
    "embed": 1.5,
    "vllm": 30.0,
    "flux": 20.0,
    "rerank": 1.2,
}
RUN_S = 2.0
NAMES = tuple(NEEDS_MIB)


def skewed(seed: int, jobs: int) -> list[str]:
    """A few are asked for often, most seldom."""
    weights = [(place + 1) ** -1.2 for place in range(len(NAMES))]
    return random.Random(seed).choices(NAMES, weights, k=jobs)


def cyclic(seed: int, jobs: int) -> list[str]:
    """One after the other, in an order of their own, from some place of it on."""
    order = list(NAMES)
    random.Random(seed).shuffle(order)
    order = order[: 4 + seed % 5]
    return [order[place % len(order)] for place in range(jobs)]


def bursty(seed: int, jobs: int) -> list[str]:
    """Two clients, each of which stays with one for a while."""
    chance = random.Random(seed)

    def client() -> Iterator[str]:
        while True:
            yield from [chance.choice(NAMES)] * chance.randint(1, 12)

    both = client(), client()
    return [next(chance.choice(both)) for _ in range(jobs)]


def mixed_sizes(seed: int, jobs: int) -> list[str]:
    """Many for the small ones, now and then one for a large one."""
    chance = random.Random(seed)
    small = [name for name, mib in NEEDS_MIB.items() if mib <= 3000]
    large = [name for name, mib in NEEDS_MIB.items() if mib > 3000]
    return [chance.choice(small if chance.random() < 0.7 else large) for _ in range(jobs)]


TRACES = {"skewed": skewed, "cyclic": cyclic, "bursty": bursty, "mixed sizes": mixed_sizes}


def least_reload_s(trace: Sequence[str]) -> float:
    """Seconds of loading at least, whatever is chosen: all states that can be reached are followed.
    That nobody is unloaded before he has to be loses nothing."""
    costs: dict[frozenset[str], float] = {frozenset(): 0.0}
    for name in trace:
        found: dict[frozenset[str], float] = {}
        for state, cost in costs.items():
            if name in state:
                after, more = [state], 0.0
            else:
                after, more = [each | {name} for each in _kept(state, name)], RELOAD_S[name]
            for each in after:
                found[each] = min(cost + more, found.get(each, float("inf")))
        costs = found
    return min(costs.values())


def _kept(state: frozenset[str], name: str) -> Iterator[frozenset[str]]:
    """What may be left of a state where `name` is loaded, and no more has gone than needed."""
    room = CARD_MIB - NEEDS_MIB[name]
    for kept in chain.from_iterable(combinations(state, n) for n in range(len(state) + 1)):
        left = room - sum(NEEDS_MIB[each] for each in kept)
        if left >= 0 and all(NEEDS_MIB[each] > left for each in state.difference(kept)):
            yield frozenset(kept)


def reload_s(trace: Sequence[str], *, order: Order, waiting: int) -> float:
    """Seconds of loading with the broker's choice, where so many wait behind each job."""
    used: dict[str, float] = {}
    loaded: set[str] = set()
    now = spent = 0.0
    for place, name in enumerate(trace):
        if name not in loaded:
            loaded -= _victims(name, loaded, used, now, trace[place + 1 :][:waiting], order)
            loaded.add(name)
            assert sum(NEEDS_MIB[each] for each in loaded) <= CARD_MIB
            spent += RELOAD_S[name]
            now += RELOAD_S[name]
        now += RUN_S
        used[name] = now
    return spent


def _victims(
    target: str,
    loaded: set[str],
    used: Mapping[str, float],
    now: float,
    queue: Sequence[str],
    order: Order,
) -> set[str]:
    residents = [
        Resident(
            name,
            loaded=name in loaded,
            held_mib=NEEDS_MIB[name] if name in loaded else 0,
            last_used=used.get(name),
            reload_s=RELOAD_S[name],
        )
        for name in NAMES
    ]

    def demand(name: str) -> Demand:
        return Demand(name, NEEDS_MIB[name], NEEDS_MIB[name] if name in loaded else 0)

    free = CARD_MIB - sum(NEEDS_MIB[name] for name in loaded)
    upcoming = [demand(name) for name in queue]
    plan = plan_eviction(demand(target), residents, free, order=order, now=now, upcoming=upcoming)
    assert plan.fits or plan.victims
    return {victim.name for victim in plan.victims}
