"""How good is what the queue tells of its waits?

    python -m benchmarks.estimates [--jobs 400] [--seeds 10]

Traces of mixed jobs over five consumers that never all fit, from eight clients that think for ten
seconds on average, played in virtual time through the broker's own queue, room maker and estimates;
loads, unloads and jobs take a random time around what is usual. Each job that had to wait is told
an estimate when it comes; its error is the share of the real wait by which that was off. Then the
broker is restarted with what it had learned (its state file), and 60 jobs come at once.

Prints a Markdown table; and another one for clients that say how long they wait (`Prefer: wait=N`):
how many would have waited for longer, how many of those are refused when they come, and how many
are refused who would have had their turn in time. Exits with 1 if a median is above 25 % or anybody
who had to wait was told 0. Pure arithmetic: no broker process, no card.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from gpumanager.consumers.learning import Learned
from gpumanager.consumers.statefile import StateFile
from tests.support.replay import SERVERS, Replay, Told

LONGEST_MEDIAN = 0.25
WAITS_S = (10, 30, 60, 120)
BURST = 60


def restarted(learned: Learned) -> Learned:
    """What is known after a restart."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        StateFile(path, learned, dict).save()
        after = Learned(SERVERS)
        StateFile(path, after, dict).load()
        return after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    told: dict[str, list[Told]] = {}
    for seed in range(options.seeds):
        replay = Replay(seed)
        cold = replay.run(options.jobs)
        told.setdefault("the first 60 jobs of a new broker", []).extend(cold[:60])
        told.setdefault("all jobs after them", []).extend(cold[60:])
        again = Replay(seed + 1000, learned=restarted(replay.learned))
        told.setdefault("60 jobs at once, after a restart", []).extend(again.run(BURST, burst=True))
    print("| Jobs | Had to wait | Mean wait | Median error | 90 % are within | Told 0 |")
    print("|---|---|---|---|---|---|")
    failed = False
    for name, jobs in told.items():
        errors = sorted(each.error for each in jobs)
        zeros = sum(each.told_s <= 0 for each in jobs)
        waited = sum(each.waited_s for each in jobs) / len(jobs)
        within = errors[int(0.9 * len(errors))]
        cells = [
            name,
            len(jobs),
            f"{waited:.0f} s",
            f"{median(errors):.0%}",
            f"{within:.0%}",
            zeros,
        ]
        print("|", *(f"{cell} |" for cell in cells))
        failed |= median(errors) > LONGEST_MEDIAN or zeros > 0
    print_deadlines([each for jobs in told.values() for each in jobs])
    return int(failed)


def print_deadlines(jobs: list[Told]) -> None:
    print("\n| `Prefer: wait=` | Too late | Of them refused at once | Refused, but in time |")
    print("|---|---|---|---|")
    for limit in WAITS_S:
        refused = [each for each in jobs if each.surely_s > limit]
        late = [each for each in jobs if each.waited_s > limit]
        in_time = [each for each in refused if each.waited_s <= limit]
        found = (len(refused) - len(in_time)) / len(late)
        print(f"| {limit} | {len(late)} of {len(jobs)} | {found:.0%} | {len(in_time)} |")


if __name__ == "__main__":
    sys.exit(main())
