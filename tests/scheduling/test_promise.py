"""What the policies promise, on random traces: see docs/scheduling.md. More of them:
`python -m benchmarks.promise`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumanager.scheduling.policy import Affinity
from tests.support import policies

pytestmark = pytest.mark.untraced

TRACES = 600
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("plain", [True, False], ids=["one-requester", "several"])
def test_what_is_promised_holds(part: int, plain: bool) -> None:
    overtaken = 0
    for seed in range(part, TRACES, PARTS):
        arrivals, card = policies.trace(seed, plain=plain)
        run = policies.play(arrivals, card, policies.policy_for(seed))
        policies.check(run)
        overtaken += run.longest_overtake > 0
    assert overtaken > TRACES / PARTS / 5  # else nothing was held against the promise


@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_promised_holds_while_conversations_are_waited_for(part: int) -> None:
    """And the card is idle for nothing else: `play` checks that each time."""
    holds = 0
    for seed in range(part, TRACES, PARTS):
        policy = policies.policy_for(seed)
        if isinstance(policy, Affinity):
            policy = replace(policy, hold=(2.0, 10.0)[seed % 2])
        run = policies.play(*policies.talk(seed), policy)
        policies.check(run)
        holds += run.holds
    assert holds > TRACES / PARTS / 2


def test_a_person_waits_less_where_conversations_are_waited_for() -> None:
    """Of the very same traces, and the background work is done all the same."""
    waits = {}
    for hold in (0.0, 4.0):
        policy = Affinity(hold=hold)
        waited = []
        for seed in range(100):
            run = policies.play(*policies.talk(seed), policy)
            assert len(run.grants) + len(run.gone) == len(run.jobs)
            waited += [
                grant.at - run.jobs[grant.ticket].since
                for grant in run.grants
                if run.jobs[grant.ticket].job.requester == "anna"
            ]
        waits[hold] = sum(waited) / len(waited)
    assert waits[4.0] < 0.7 * waits[0.0]
