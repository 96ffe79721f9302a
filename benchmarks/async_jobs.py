"""Asynchronous jobs: what submitting costs, what waiting costs, and what is left after `kill -9`.

    python -m benchmarks.async_jobs [--jobs 10000] [--kills 50] [--seed 1]

`submitting`: that many jobs in a row over one connection, then the same from eight clients at once,
to a broker whose consumer never ends the first one, so that all others wait. It measures how many
were taken in a second, the broker's memory and threads before and after, and how long GET
`/v1/jobs/{id}` takes while all of them wait, and what an open dashboard asks for.

`kills`: 20 jobs, each under an Idempotency-Key; the broker is killed at random moments while they
are submitted and run, and started again, as often as `--kills` says; then all are submitted once
more, and waited for. The consumer counts how often it was sent each. It prints how many jobs ended
in which state, and every job that broke the promise: one that is `done` and did not run, that ran
twice, or that is gone.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import requests

from tests.support.broker import config_for
from tests.support.ports import free_port
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer

LATER = {"Prefer": "respond-async"}
JOBS_KILLED = 20
GETS = 500
WAIT_S = 60.0


class Counting:
    """A consumer: how often it was sent which body. `holds` is the body of the job that it does
    not end; every other takes `seconds`."""

    def __init__(self, seconds: float = 0.0, holds: bytes = b"") -> None:
        self.runs: Counter[str] = Counter()
        self.over = threading.Event()
        self._seconds = seconds
        self._holds = holds
        self._lock = threading.Lock()

    def __call__(self, connection: Connection, received: Received) -> None:
        with self._lock:
            self.runs[received.body.decode()] += 1
        if self._holds and received.body == self._holds:
            self.over.wait()
        time.sleep(self._seconds)
        with suppress(OSError):  # the broker was killed
            connection.send(answer(received.body))


class Process:
    """A broker as a process of its own, started as often as wanted."""

    def __init__(self, folder: Path, consumer: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._folder = folder
        self._config = folder / "broker.yaml"
        self._config.write_text(
            config_for(
                consumer,
                listen=f"127.0.0.1:{port}",
                state_file=str(folder / "state.json"),
                jobs={"dir": str(folder / "jobs"), "max_waiting": 1_000_000},
                log={"level": "error"},
                consumer={"timeouts": {"first_byte": 3600, "total": 3600}},
            )
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpumanager", "serve", "--config", str(self._config)],
                env={**os.environ, "NO_PROXY": "127.0.0.1"},
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            with suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/healthz", timeout=WAIT_S).ok:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        said = (self._folder / "log").read_text(errors="replace")
        raise TimeoutError(f"the broker did not start: {said[-2000:]}")

    def kill(self) -> None:
        """As `kill -9`. Idempotent."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def holds(self) -> tuple[float, int]:
        """Its memory in MiB, and its threads."""
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        return process.memory_info().rss / 2**20, process.num_threads()


@contextmanager
def brokers(counting: Counting) -> Iterator[Process]:
    """A broker, not started, in front of a consumer."""
    with tempfile.TemporaryDirectory() as folder, ScriptedConsumer(counting) as consumer:
        process = Process(Path(folder), consumer.url)
        try:
            yield process
        finally:
            counting.over.set()
            process.kill()


def submit(session: requests.Session, url: str, body: str, key: str | None = None) -> str:
    """Submit a job; its id. Raises requests.ConnectionError."""
    headers = LATER if key is None else LATER | {"Idempotency-Key": key}
    said = session.post(f"{url}/v1/tts", data=body.encode(), headers=headers, timeout=WAIT_S)
    said.raise_for_status()
    return str(said.json()["id"])


def submitting(jobs: int) -> None:
    """Print what it costs to submit, and to wait."""
    with brokers(Counting(holds=b"first")) as broker, requests.Session() as session:
        broker.start()
        submit(session, broker.url, "first")
        time.sleep(1)
        before = broker.holds()
        began = time.monotonic()
        ids = [submit(session, broker.url, f"job {number}") for number in range(jobs)]
        alone = time.monotonic() - began
        after = broker.holds()
        took = []
        for name in random.Random(1).choices(ids, k=GETS):
            began = time.monotonic()
            session.get(f"{broker.url}/v1/jobs/{name}", timeout=WAIT_S).raise_for_status()
            took.append((time.monotonic() - began) * 1000)
        looks = {
            path: _looked(session, broker.url + path)
            for path in ("/v1/jobs?limit=20", "/v1/jobs?limit=200", "/v1/status")
        }
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            sessions = [requests.Session() for _ in range(8)]
            several = max(8, jobs // 4)
            list(
                pool.map(
                    lambda number: submit(sessions[number % 8], broker.url, f"more {number}"),
                    range(several),
                )
            )
            for each in sessions:
                each.close()
        together = time.monotonic() - began
    p50, p95 = statistics.median(took), statistics.quantiles(took, n=20)[-1]
    print(f"submitted by one client: {jobs} jobs, {jobs / alone:.0f} a second")
    print(f"submitted by eight at once: {several} jobs, {several / together:.0f} a second")
    print(f"memory: {before[0]:.0f} MiB before, {after[0]:.0f} MiB with {jobs} waiting")
    print(f"threads: {before[1]} before, {after[1]} with {jobs} waiting")
    print(f"GET /v1/jobs/ID: p50 {p50:.1f} ms, p95 {p95:.1f} ms with {jobs} waiting")
    for path, ms in looks.items():
        print(f"GET {path}: p50 {ms:.1f} ms with {jobs} waiting")


def _looked(session: requests.Session, url: str, times: int = 50) -> float:
    """The median time of a GET, in ms."""
    took = []
    for _ in range(times):
        began = time.monotonic()
        session.get(url, timeout=WAIT_S).raise_for_status()
        took.append((time.monotonic() - began) * 1000)
    return statistics.median(took)


def kills(times: int, seed: int) -> int:
    """Print what is left after so many kills; how many jobs broke the promise."""
    random_ = random.Random(seed)
    bodies = [f"job {number}" for number in range(JOBS_KILLED)]
    counting = Counting(seconds=0.05)
    states: Counter[str] = Counter()
    wrong = []
    killed = rounds = 0
    while killed < times:
        rounds += 1
        counting.runs.clear()
        with brokers(counting) as broker:
            for _ in range(min(5, times - killed)):
                broker.start()
                at = threading.Timer(random_.uniform(0.0, 0.6), broker.kill)
                at.start()
                _submit_all(broker.url, bodies)
                at.join()
                killed += 1
            broker.start()
            ids = _submit_all(broker.url, bodies)
            with requests.Session() as session:
                for body in bodies:
                    state = _ended(session, broker.url, ids.get(body, "none"))
                    states[state] += 1
                    ran = counting.runs[body]
                    if ran > 1 or (state == "done" and ran != 1) or state not in ("done", "lost"):
                        wrong.append(f"{body}: {state}, {ran} runs")
    print(f"{killed} kills, {rounds} times {JOBS_KILLED} jobs: {dict(states)}")
    print(f"broke the promise: {wrong or 'none'}")
    return len(wrong)


def _submit_all(url: str, bodies: list[str]) -> dict[str, str]:
    """Submit them, as far as the broker lives."""
    ids = {}
    with requests.Session() as session, suppress(requests.RequestException):
        for body in bodies:
            ids[body] = submit(session, url, body, key=body)
    return ids


def _ended(session: requests.Session, url: str, job: str) -> str:
    """The state in which a job ended."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        said = session.get(f"{url}/v1/jobs/{job}?wait=20", timeout=WAIT_S)
        if said.status_code != 200:
            return "gone"
        if said.json()["ended"] is not None:
            return str(said.json()["state"])
    return "unfinished"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.jobs:
        submitting(options.jobs)
    return 1 if options.kills and kills(options.kills, options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
