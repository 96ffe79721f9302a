"""What the policies promise, on random traces: see docs/scheduling.md. More of them:
`python -m benchmarks.promise`."""

from __future__ import annotations

import pytest

from tests.support import policies

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
