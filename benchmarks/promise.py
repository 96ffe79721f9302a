"""What the policies promise, on many random traces: `python -m benchmarks.promise`.

The same traces and the same checks as tests/scheduling/test_promise.py, which takes the first ones
of them: exclusion, how often and for how long a job is overtaken, order, no starvation, and that
the card is never idle while somebody waits, but for a conversation's next step.
"""

from __future__ import annotations

import click

from gpumanager.scheduling.policy import Affinity
from tests.support import policies


@click.command(help=__doc__)
@click.option("--traces", default=100_000, show_default=True, help="How many traces.")
@click.option("--first", default=0, show_default=True, help="The seed of the first one.")
def main(traces: int, first: int) -> None:
    jobs = passes = broken = at_the_bound = holds = 0
    for seed in range(first, first + traces):
        talks = seed % 4 == 3
        plain = seed % 2 == 0
        arrivals, card = policies.talk(seed) if talks else policies.trace(seed, plain=plain)
        policy = policies.policy_for(seed)
        try:
            run = policies.play(arrivals, card, policy)
            policies.check(run)
        except AssertionError as error:
            broken += 1
            click.echo(f"seed {seed}: {error}", err=True)
            continue
        jobs += len(run.jobs)
        holds += run.holds
        passes += sum(grant.ticket != grant.turn for grant in run.grants)
        if isinstance(policy, Affinity) and policy.max_overtaken_by:
            at_the_bound += run.longest_overtake == policy.max_overtaken_by
    click.echo(
        f"{traces} traces, {jobs} jobs, {passes} grants out of turn, "
        f"{at_the_bound} traces reached max_overtaken_by, {holds} times held back, "
        f"{broken} broken promises"
    )
    raise SystemExit(broken > 0)


if __name__ == "__main__":
    main()
