"""The broker beside its peers.

    make bench                                    # installs what it needs, runs, writes the page
    python -m benchmarks.performance [--quick] [--rounds N] [--write]

Every round measures every contestant, in a new order; a ratio is taken within its round. `--write`
puts table and plot into docs/performance.md and docs/performance.svg.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import running
from benchmarks.performance import contestants, measures, report, trace
from benchmarks.performance.client import BadAnswer
from benchmarks.performance.contestants import ROOT, Running
from benchmarks.performance.measures import Figures

Results = dict[str, dict[str, list[Figures]]]
"""By measure, then by contestant, a round after the other."""

GAPS = [(0, 8), (0, 64), (5, 8), (5, 64), (50, 8)]
LENGTHS = [1, 10, 100, 1000]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute, one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--only", default="", help="measures, separated by commas")
    parser.add_argument("--without", default="", help="contestants, separated by commas")
    parser.add_argument("--write", action="store_true", help="write the page and its plot")
    options = parser.parse_args()
    results = run(
        rounds=1 if options.quick else options.rounds,
        quick=options.quick,
        seed=options.seed,
        only=set(filter(None, options.only.split(","))),
        without=set(filter(None, options.without.split(","))),
    )
    print(report.table(results))
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "performance.json").write_text(json.dumps(results))
    if options.write:
        report.write(results, ROOT / "docs", "make bench")
    return 0


def run(*, rounds: int, quick: bool, seed: int, only: set[str], without: set[str]) -> Results:
    """Start everybody, and measure in rounds."""
    results: Results = {}
    chance = random.Random(seed)

    def note(measure: str, name: str, figures: Figures) -> None:
        results.setdefault(measure, {}).setdefault(name, []).append(figures)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"{measure:28} {name:22} {shown}", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(running.upstream())
        everybody = _start_all(stack, folder, upstream, without)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for measure, wanted in _measures(upstream, quick=quick, first=number == 0):
                if only and measure.partition(":")[0] not in only:
                    continue
                order = [it for it in everybody if wanted.takes(it)]
                chance.shuffle(order)
                for it in order:
                    try:
                        note(measure, it.name, wanted.measure(it))
                    except BadAnswer as error:
                        print(f"{measure}: {it.name} failed: {error}", file=sys.stderr, flush=True)
        if not only or "rest" in only:
            for _ in range(1 if quick else 3):
                with contestants.broker(folder, upstream, probed=5) as it:
                    note("start", it.name, {"seconds": it.started_s})
                    note("rest", it.name, measures.at_rest(it, 5 if quick else 20))
        if not only or "trace" in only:
            for _ in range(1 if quick else 3):
                note("trace", "gpumanager, locked", trace.makespan(60 if quick else 200, seed))
    return results


@dataclass(frozen=True)
class _Wanted:
    """A measure, and who takes part in it."""

    measure: Callable[[Running], Figures]
    takes: Callable[[Running], bool]


def _measures(upstream: int, *, quick: bool, first: bool) -> list[tuple[str, _Wanted]]:
    count = 300 if quick else 1500

    def everybody(_: Running) -> bool:
        return True

    def serial(it: Running) -> bool:
        return it.name in ("direct", "HAProxy, maxconn 1", "gpumanager, locked")

    def queueing(it: Running) -> bool:
        return serial(it) and it.name != "direct"

    def plain(it: Running) -> bool:
        return not it.openai

    found = [
        (
            "latency",
            _Wanted(
                lambda it: measures.latency(it, count // 5 if it.openai else count),
                everybody,
            ),
        )
    ]

    def gap(ms: int, waiting: int, jobs: int) -> Callable[[Running], Figures]:
        return partial(measures.idle_gap, upstream=upstream, ms=ms, waiting=waiting, count=jobs)

    for ms, waiting in GAPS[:3] if quick else GAPS:
        jobs = {0: 1500, 5: 400, 50: 60}[ms]
        jobs = max(4 * waiting, jobs // 3 if quick else jobs)
        found.append((f"gap:{ms} ms, {waiting} waiting", _Wanted(gap(ms, waiting, jobs), serial)))
    for length in LENGTHS[:3] if quick else LENGTHS:
        jobs = max(400, 3 * length)
        found.append((f"line:{length}", _Wanted(gap(5, length + 1, jobs), queueing)))
    found.append(("events", _Wanted(lambda it: measures.events(it, 50), everybody)))
    mib = 64 if quick else 256
    found.append(("bulk", _Wanted(lambda it: measures.bulk(it, mib), plain)))
    found.append(("upload", _Wanted(lambda it: measures.big_body(it, 64), plain)))
    status = _Wanted(
        lambda it: measures.status_under_load(it, 50 if quick else 150),
        lambda it: it.name == "gpumanager, locked",
    )
    if first:
        found.append(("status", status))
    return found


def _start_all(stack: ExitStack, folder: Path, upstream: int, without: set[str]) -> list[Running]:
    ways: dict[str, Callable[[], AbstractContextManager[Running]]] = {
        "direct": lambda: contestants.direct(upstream),
        "haproxy": lambda: contestants.haproxy(folder, upstream, serial=False),
        "haproxy1": lambda: contestants.haproxy(folder, upstream, serial=True),
        "nginx": lambda: contestants.nginx(folder, upstream),
        "locked": lambda: contestants.broker(folder, upstream),
        "passthrough": lambda: contestants.broker(folder, upstream, kind="passthrough"),
        "litellm": lambda: contestants.litellm(folder, upstream),
    }
    found = []
    for name, start in ways.items():
        if name in without:
            continue
        try:
            found.append(stack.enter_context(start()))
        except (FileNotFoundError, RuntimeError) as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
