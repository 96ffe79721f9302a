"""What looking ahead is worth: `python -m benchmarks.lookahead [--mib N] [--runs N] [--folder F]`.

Two consumers do not fit on the card together. While a job of the first runs, one of the second
waits. Prints how long the swap takes, from the end of the first job's turn until the second one's
job begins, as a Markdown table, median and range of all runs:

- its load reads a file of N MiB that is not in the page cache, without and with `prefetch`;
- it was stopped as a systemd unit (a stand-in for systemctl starts it), and is ready two seconds
  after its start, without and with `start_ahead`.

The file is written to the folder, which should be on the disk that holds models.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.broker import LiveBroker, live_broker
from tests.support.pages import drop
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import Outcome, eventually

WORK_S = 4.0
START_S = 2.0
CHUNK = 1024 * 1024


class Server:
    """Its load reads `weights`; if it is a unit, it answers `START_S` after the flag's time."""

    def __init__(self, weights: Path | None = None, flag: Path | None = None) -> None:
        self._weights = weights
        self._flag = flag
        self._pause = threading.Event()

    def __call__(self, connection: Connection, received: Received) -> None:
        if not self._runs():
            connection.send(answer(status="503 Service Unavailable"))
            return
        if received.line.startswith(b"POST /load") and self._weights is not None:
            with self._weights.open("rb", buffering=0) as file:
                while file.read(CHUNK):
                    pass
        elif received.line.startswith(b"POST /work/long"):
            self._pause.wait(WORK_S)
        connection.send(answer())

    def _runs(self) -> bool:
        if self._flag is None:
            return True
        try:
            return time.time() - self._flag.stat().st_mtime >= START_S
        except FileNotFoundError:
            return False


@contextmanager
def _broker(second: Server, keys: dict[str, Any]) -> Iterator[LiveBroker]:
    with ScriptedConsumer(Server()) as one, ScriptedConsumer(second) as other:
        base = {"vram_resident_mib": 6000, "health": "/", "load": "/load", "unload": "/unload"}
        config = {
            "gpu": {"total_mib": 10_000},
            "routing": {"llm": "one", "image": "other"},
            "consumers": {
                "one": {**base, "url": one.url, "paths": {"llm": "/work/long"}},
                "other": {**base, "url": other.url, "paths": {"image": "/work"}, **keys},
            },
        }
        with live_broker(yaml.safe_dump(config)) as broker:
            yield broker


def _swap_s(broker: LiveBroker, weights: Path | None) -> float:
    """Of one swap, in seconds."""
    broker.post("/v1/image")
    first = Outcome(lambda: broker.post("/v1/llm"))
    eventually(lambda: broker.stats.in_flight == 1)
    if weights is not None:
        drop(weights)
    second = Outcome(lambda: broker.post("/v1/image"))
    for each in (first, second):
        each.result().raise_for_status()
    broker.await_idle()
    jobs = [each for each in broker.get("/v1/events").json()["events"] if each["event"] == "job"]
    assert jobs[-1]["kind"] == "image"
    return float(jobs[-1]["prepare_ms"]) / 1000


def _swaps(second: Server, keys: dict[str, Any], runs: int, weights: Path | None = None) -> str:
    with _broker(second, keys) as broker:
        took = [_swap_s(broker, weights) for _ in range(runs)]
    return f"{statistics.median(took):.2f} s ({min(took):.2f} to {max(took):.2f})"


def _systemctl(folder: Path, flag: Path) -> None:
    """The stand-in, first on the path."""
    script = folder / "bin" / "systemctl"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\ncase "$*" in\n*stop*) rm -f {flag} ;;\n'
        f"*start*) test -e {flag} || touch {flag} ;;\nesac\n"
    )
    script.chmod(0o755)
    os.environ["PATH"] = f"{script.parent}{os.pathsep}{os.environ['PATH']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        weights, flag = folder / "weights", folder / "runs"
        with weights.open("wb") as file:
            for _ in range(options.mib):
                file.write(os.urandom(CHUNK))
        flag.touch()
        os.utime(flag, (0, 0))
        _systemctl(folder, flag)
        unit = {"unload": None, "evict": [{"unit": "other.service"}]}
        ahead = {**unit, "start_ahead": True}
        print("| The second consumer | Swap without | With |\n|---|---|---|")
        without = _swaps(Server(weights), {}, options.runs, weights)
        with_it = _swaps(Server(weights), {"prefetch": str(weights)}, options.runs, weights)
        print(f"| its load reads {options.mib} MiB; `prefetch` | {without} | {with_it} |")
        without = _swaps(Server(flag=flag), unit, options.runs)
        with_it = _swaps(Server(flag=flag), ahead, options.runs)
        print(f"| a unit, ready after {START_S:g} s; `start_ahead` | {without} | {with_it} |")


if __name__ == "__main__":
    main()
