"""This state of the broker beside another one, in one run:
`python -m benchmarks.beside CHECKOUT`.

CHECKOUT is another working tree with a `.venv` of its own (`git worktree add`, then there
`make .venv/.dev`). Both brokers serve the same upstream, each as `waitress-serve wsgi:app`; every
round measures them in a new order.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import requests
import yaml

from benchmarks import running
from benchmarks.performance import client
from tests.support.ports import free_port
from tests.support.threads import eventually

ROOT = Path(__file__).parent.parent
JOB_MS, CLIENTS = 5, 8


@dataclass(frozen=True)
class Broker:
    """One that runs, in a process of its own."""

    pid: int
    port: int

    def cpu_s(self) -> float:
        """What it has used of a processor so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(tree: Path, upstream: int) -> Iterator[Broker]:
    """The broker of a working tree."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = yaml.safe_load(running.one_consumer(upstream))
        config |= {"listen": f"127.0.0.1:{port}", "state_file": f"{folder}/state.json"}
        config["routing"]["tts"] = "it"
        config["consumers"]["it"]["paths"]["tts"] = "/job"
        file = Path(folder) / "broker.yaml"
        file.write_text(yaml.safe_dump(config))
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                [str(tree / ".venv" / "bin" / "waitress-serve"), "wsgi:app"],
                cwd=tree,
                env={**os.environ, "GPUMANAGER_CONFIG": str(file)},
                stdout=log,
                stderr=log,
            )

        def up() -> bool:
            try:
                return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).ok
            except requests.ConnectionError:
                return False

        try:
            eventually(up, timeout=20)
            yield Broker(process.pid, port)
        finally:
            process.terminate()
            process.wait(30)


def measure(broker: Broker, count: int) -> tuple[float, float, float]:
    """p50 of small jobs one by one and processor time of one, in ms; jobs of 5 ms a second while
    eight clients wait."""
    before = broker.cpu_s()
    times = client.one_by_one(broker.port, client.request("/v1/llm"), count)
    cpu_ms = 1000 * (broker.cpu_s() - before) / count
    job = client.request(f"/v1/tts?ms={JOB_MS}")
    took = client.closed_loop(broker.port, job, clients=CLIENTS, count=count // 10)
    return 1000 * median(times), cpu_ms, (count // 10) / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--count", type=int, default=1500, help="small jobs in a round")
    options = parser.parse_args()
    trees = {"the other": options.checkout.absolute(), "this": ROOT}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in trees}
    chance = random.Random(4)
    with ExitStack() as stack:
        upstream = stack.enter_context(running.upstream())
        brokers = {
            name: stack.enter_context(serving(tree, upstream)) for name, tree in trees.items()
        }
        for broker in brokers.values():
            client.one_by_one(broker.port, client.request("/v1/llm"), options.count)
        for _ in range(options.rounds):
            for name in chance.sample(sorted(brokers), len(brokers)):
                found[name].append(measure(brokers[name], options.count))
    print("| | p50 ms | CPU ms a job | jobs of 5 ms a second, 8 waiting |")
    print("|---|---|---|---|")
    for name, rounds in found.items():
        cells = (_spread(values) for values in zip(*rounds, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")


def _spread(values: tuple[float, ...]) -> str:
    return f"{median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


if __name__ == "__main__":
    main()
