"""What is a policy worth, by the simulator?

    python -m benchmarks.policies [--seeds 20] [--policy affinity]

Each workload of `gpumanager simulate` is played by `fifo`, by the policy, and as other programs
would, with so many seeds; and instances of nine jobs that all come within a second, by the policy
and at best (the exact optimum). Prints Markdown tables, each figure with its mean, and in brackets
the lowest and the highest of all seeds. Exits with 1, if

- the makespan on a small instance is above 1.10 of the optimum, on average,
- there are not at least 3 times fewer swaps than with fifo on the alternating workload,
- the p99 wait of people under the night's flood of pictures is above half of fifo's, or
- a makespan is above 1.02 of fifo's, on any workload, with any seed.

The last does not count for `crowded-night`, where it cannot be met together with the one before:
there, one turn of the people's model in the midst of the pictures costs two swaps, which are 2.2 %
of the night.

Pure arithmetic: no broker process, no card; about a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpumanager.simulation.optimum import can_solve, solve
from gpumanager.simulation.policies import POLICIES, Promise, played
from gpumanager.simulation.results import Figures, figures
from gpumanager.simulation.workloads import SMALL_JOBS, WORKLOADS, at_once, workload

OF_OPTIMUM = 1.10
FEWER_SWAPS = 3.0
OF_WAIT = 0.5
WORSE = 1.02

PRICE_OF_URGENCY = "crowded-night"
PEOPLE = "llm"
"""The kind of the jobs that people wait for, in `image-night`."""


@dataclass(frozen=True)
class Spread:
    """A figure over all seeds."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def text(self, digits: int = 2) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def ratios(mine: Iterable[float], theirs: Iterable[float]) -> Spread:
    return Spread([one / other for one, other in zip(mine, theirs, strict=True)])


def row(*cells: object) -> None:
    print("|", *(f"{cell} |" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--policy", default="affinity", choices=list(POLICIES))
    parser.add_argument("--jobs", type=int, help="of each workload, instead of its usual number")
    options = parser.parse_args()
    seeds, promise, failures = range(1, options.seeds + 1), Promise(), []
    names = list(dict.fromkeys(("fifo", options.policy, *POLICIES)))

    found: dict[tuple[str, str], list[Figures]] = {}
    for kind in WORKLOADS:
        for name in names:
            found[kind, name] = [
                figures(played(workload(kind, seed, options.jobs), name, promise)) for seed in seeds
            ]
    row("Workload", "Policy", "Makespan / fifo's", "Swaps", "Wait p50 s", "p99 s", "GPU runs")
    row(*["---"] * 7)
    for (kind, name), each in found.items():
        fifo = found[kind, "fifo"]
        makespan = ratios((one.makespan_s for one in each), (one.makespan_s for one in fifo))
        row(
            kind,
            name,
            makespan.text(),
            Spread([one.swaps for one in each]).text(0),
            Spread([one.waits.p50 for one in each]).text(0),
            Spread([one.waits.p99 for one in each]).text(0),
            Spread([100 * one.utilisation for one in each]).text(0) + " %",
        )
        cannot = kind == PRICE_OF_URGENCY
        if name == options.policy and max(makespan.values) > WORSE and not cannot:
            failures.append(f"{kind}: makespan {max(makespan.values):.3f} of fifo's")

    mine, fifo = found["alternating", options.policy], found["alternating", "fifo"]
    fewer = ratios((one.swaps for one in fifo), (max(1, one.swaps) for one in mine))
    if min(fewer.values) < FEWER_SWAPS:
        failures.append(f"alternating: only {min(fewer.values):.1f} times fewer swaps")
    people = {
        kind: ratios(
            (one.by_kind[PEOPLE].p99 for one in found[kind, options.policy]),
            (one.by_kind[PEOPLE].p99 for one in found[kind, "fifo"]),
        )
        for kind in ("image-night", PRICE_OF_URGENCY)
    }
    failures += [
        f"{kind}: p99 of people {each.mean:.2f} of fifo's"
        for kind, each in people.items()
        if each.mean > OF_WAIT
    ]

    print()
    row("Small instances", "fifo / optimum", f"{options.policy} / optimum")
    row(*["---"] * 3)
    for kind in WORKLOADS:
        traces = [at_once(workload(kind, seed, SMALL_JOBS)) for seed in seeds]
        if not can_solve(traces[0]):
            continue
        made = {
            name: [figures(played(trace, name, promise)).makespan_s for trace in traces]
            for name in ("fifo", options.policy)
        }
        known = [min(each) for each in zip(*made.values(), strict=True)]
        best = [solve(trace, least).makespan_s for trace, least in zip(traces, known, strict=True)]
        of_best = {name: ratios(each, best) for name, each in made.items()}
        row(kind, *(each.text(3) for each in of_best.values()))
        if of_best[options.policy].mean > OF_OPTIMUM and kind != PRICE_OF_URGENCY:
            failures.append(f"{kind}: {of_best[options.policy].mean:.3f} of the optimum")

    print()
    row("What", "Ratio")
    row(*["---"] * 2)
    row("alternating: fifo's swaps / the policy's", fewer.text(1))
    for kind, wait in people.items():
        row(f"{kind}: p99 wait of people / fifo's", wait.text())
    for failure in failures:
        print(f"NOT MET: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
