"""How much reloading does the choice of victims cost, against the least there can be?

    python -m benchmarks.victims [--jobs 200] [--seeds 20]

Traces of four kinds over eight consumers that never all fit, served in their order by the broker's
own decision (`plan_eviction`), with so many jobs waiting behind each; the least is found exactly,
with the whole trace known. Prints the mean and the highest ratio of the seconds spent on loading
as a Markdown table. Pure arithmetic: no broker, no card.
"""

from __future__ import annotations

import argparse
from statistics import mean

from gpumanager.scheduling.victims import Order
from tests.support.offline import TRACES, least_reload_s, reload_s

WAITING = (0, 1, 3, 7, 15, 63)
ORDERS: tuple[Order, ...] = ("lru", "cost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    print("| Trace | `eviction` |", *(f"{waiting} wait |" for waiting in WAITING))
    print("|---|---|" + "---|" * len(WAITING))
    for kind, make in TRACES.items():
        traces = [make(seed, options.jobs) for seed in range(options.seeds)]
        least = [least_reload_s(trace) for trace in traces]
        for order in ORDERS:
            cells = []
            for waiting in WAITING:
                spent = [reload_s(trace, order=order, waiting=waiting) for trace in traces]
                ratios = [a / b for a, b in zip(spent, least, strict=True)]
                cells.append(f"{mean(ratios):.2f}, {max(ratios):.2f} |")
            print(f"| {kind} | {order} |", *cells)


if __name__ == "__main__":
    main()
