"""A long mixture of all that can go wrong at once, and an oracle that sees what no part of the
broker can: whether the one GPU is ever given to two jobs.

Four consumers share the GPU, one of each way of `on_disconnect`, and break in every way that
`tests/support/faults.py` knows; clients leave, upload and are cancelled; the config is reloaded all
the while.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import requests
import yaml

from benchmarks.running import Broker, serving
from tests.support import faults
from tests.support.sockets import Connection, RawClient, Received, ScriptedConsumer, answer

LONGEST_S = 900.0
CLIENTS = 8

WAYS: dict[str, dict[str, Any]] = {
    "native": {},
    "none": {"on_disconnect": "none"},
    "told": {"on_disconnect": {"path": "/interrupt"}},
    "asked": {
        "on_disconnect": "none",
        "probe": {"path": "/state", "busy": "busy", "loaded": "loaded"},
    },
}
KINDS = dict(zip(("tts", "stt", "llm", "image"), WAYS, strict=True))

FAULTS = (
    faults.resets,
    faults.half_a_head,
    faults.speaks_nonsense,
    faults.gives_two_lengths,
    faults.promises_more,
    faults.breaks_a_chunk,
    faults.omits_the_last_chunk,
    faults.refuses,
)
ODD = (
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n00000",
    b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"Content-Length: -2\r\n\r\nok",
    b"Content-Length: 2, 3\r\n\r\nok",
    b"Content-Length: 2\r\n\r\r\nok",
    b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 10_000,
)
"""Answers that cannot be read for certain, behind their status."""

SEEN_LATE_S = 0.25
"""A consumer that aborts when its connection is closed sees that after the broker has done it."""

STALL_S = 0.9
"""Longer than the time-outs below, shorter than the total."""

TIMEOUTS = {"connect": 1, "first_byte": 0.5, "idle": 0.5, "total": 4}


class Oracle:
    """The GPU: who works on it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.Condition(self._lock)
        self._running: list[str] = []
        self.collisions: list[tuple[str, ...]] = []
        self.did: Counter[str] = Counter()
        self.interrupted: set[str] = set()

    @contextmanager
    def job(self, what: str) -> Iterator[None]:
        with self._lock:
            if not self._free.wait_for(lambda: not self._running, SEEN_LATE_S):
                self.collisions.append((*self._running, what))
            self._running.append(what)
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(what)
                self._free.notify()

    def count(self, what: str) -> None:
        with self._lock:
            self.did[what] += 1


class Studio:
    """One of the consumers, by its way of `on_disconnect`."""

    def __init__(self, way: str, oracle: Oracle, seed: int) -> None:
        self._way = way
        self._oracle = oracle
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self._job = ""

    def __call__(self, peer: Connection, request: Received) -> None:
        line = request.line
        if line.startswith(b"GET /state"):
            busy = b"true" if self._job else b"false"
            peer.send(answer(b'{"busy": %s, "loaded": true}' % busy))
        elif line.startswith(b"POST /interrupt"):
            self._oracle.count("told to stop")
            if self._job:
                self._oracle.interrupted.add(self._job)
            self._stop.set()
            peer.send(answer())
        else:
            self._work(peer, request.header("x-request-id") or "-")

    def _work(self, peer: Connection, job: str) -> None:
        kinds = [
            "answers",
            "streams",
            "streams slowly",
            "fails itself",
            "breaks",
            "is odd",
            "stalls",
        ]
        does = self._rng.choices(kinds, [54, 16, 6, 4, 13, 5, 2])[0]
        with self._oracle.job(f"{self._way} {does} {job}"):
            self._job = job
            self._stop.clear()
            self._oracle.count(does)
            try:
                self._do(does, peer)
            finally:
                self._job = ""
                # One that works on is not over because its client went: it is over now.

    def _do(self, does: str, peer: Connection) -> None:
        if does == "answers":
            peer.send(answer(b"x" * 2000))
        elif does == "fails itself":
            peer.send(answer(b"", "500 Oops"))
        elif does == "breaks":
            self._rng.choice(FAULTS)(peer, Received(b"", b""))
        elif does == "is odd":
            peer.send(b"HTTP/1.1 200 OK\r\n" + self._rng.choice(ODD))
        elif does == "stalls":
            self._stall(peer)
        else:
            self._stream(peer, 5 if does == "streams" else 20)

    def _stall(self, peer: Connection) -> None:
        if self._way == "native":
            peer.wait_closed(5)
        else:
            self._stop.wait(STALL_S)

    def _stream(self, peer: Connection, pieces: int) -> None:
        gone = not self._say(peer, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(pieces):
            if (gone and self._way == "native") or self._stop.wait(0.002):
                break
            gone = gone or not self._say(peer, b"5\r\nhello\r\n")
        self._say(peer, b"0\r\n\r\n")

    def _say(self, peer: Connection, data: bytes) -> bool:
        """False if the client is gone, which ends the job only where that is this one's way."""
        try:
            peer.send(data)
        except OSError:
            return False
        return True


class Client:
    """Sends jobs; what it does to them is drawn by lot."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._rng = random.Random(seed)
        self._count = 0
        self._name = f"c{seed}"
        self.served: set[str] = set()

    def one_job(self) -> str:
        rng = self._rng
        self._count += 1
        job = f"{self._name}-{self._count}"
        with RawClient(self._port) as raw:
            self._ask(raw, rng.choice(list(KINDS)), job)
            leaves = rng.random()
            if leaves < 0.05:
                time.sleep(rng.random() * 0.02)
                return "left"
            try:
                if leaves < 0.08:
                    raw.until(b"\r\n\r\n")
                    return "left in mid-answer"
                got = raw.answer()
            except (EOFError, OSError):
                return "closed without an answer"
        if b"several times" in got.body:
            return "refused by the breaker"
        if got.complete and got.status == 200:
            self.served.add(job)
            if got.body != b"x" * 2000 and got.body.replace(b"hello", b""):
                return "200 with something else in it"
        code = b'"error":"' in got.body and got.body.partition(b'"error":"')[2].partition(b'"')[0]
        what = f"{got.status} {code.decode()}" if code else f"{got.status}"
        return what if got.complete else f"{got.status}, cut short"

    def _ask(self, raw: RawClient, kind: str, job: str) -> None:
        size = self._rng.randrange(70_000, 600_000) if self._rng.random() < 0.1 else 2
        body, named = bytes(size), (f"X-Request-Id: {job}",)
        try:
            if self._rng.random() < 0.8:
                raw.request("POST", f"/v1/{kind}", body, named)
            else:
                raw.request("POST", f"/v1/{kind}", None, (*named, "Transfer-Encoding: chunked"))
                raw.send(b"%x\r\n" % size + body + b"\r\n0\r\n\r\n")
        except OSError:
            pass  # it was answered before all of it was read


class Operator:
    """Cancels jobs, and reloads a config that has one consumer more, or less, or elsewhere."""

    def __init__(self, running: Broker, seed: int) -> None:
        self._running = running
        self._rng = random.Random(seed)
        self._session = requests.Session()
        self._session.trust_env = False
        self._url = f"http://127.0.0.1:{running.port}"
        self._file: Path = running.config_file
        self.did: Counter[str] = Counter()
        self.cancelled: set[str] = set()
        self.surprises: list[str] = []

    def cancel_one(self) -> None:
        line = self._session.get(f"{self._url}/v1/queue", timeout=30).json()["queue"]
        if line:
            entry = self._rng.choice(line)
            self.cancelled.add(entry["request_id"])
            said = self._session.delete(f"{self._url}/v1/queue/{entry['ticket']}", timeout=30)
            self._note(f"cancel: {said.status_code}", said, {200, 404})

    def reload(self) -> None:
        config = yaml.safe_load(self._file.read_text())
        before, consumers = self._file.read_text(), config["consumers"]
        if "spare" not in consumers:
            what, consumers["spare"] = "add", {**consumers["native"], "paths": {}}
        elif self._rng.random() < 0.5:
            what = "remove"
            del consumers["spare"]
        else:
            what = "move"
            name = self._rng.choice(["spare", "native"])
            host = "localhost" if "127.0.0.1" in consumers[name]["url"] else "127.0.0.1"
            url = consumers[name]["url"].rpartition(":")[2]
            consumers[name]["url"] = f"http://{host}:{url}"
        consumers["none"]["priority"] = self._rng.randrange(10)
        self._file.write_text(yaml.safe_dump(config))
        said = self._session.post(f"{self._url}/v1/reload", timeout=30)
        in_use = said.status_code == 400 and "in use" in said.text
        if said.status_code != 200:
            self._file.write_text(before)
        self._note(f"{what}: {'in use' if in_use else said.status_code}", said, {200}, in_use)

    def _note(
        self, what: str, said: requests.Response, fine: set[int], in_use: bool = False
    ) -> None:
        self.did[what] += 1
        if said.status_code not in fine and not in_use:
            self.surprises.append(f"{what} {said.text[:200]}")


def soak(jobs: int, seed: int) -> tuple[dict[str, Any], bool]:
    """`jobs` short jobs from eight clients, with faults on all sides."""
    oracle = Oracle()
    studios = {way: Studio(way, oracle, seed + i) for i, way in enumerate(WAYS)}
    left = iter(range(jobs))
    lock = threading.Lock()
    outcomes: Counter[str] = Counter()
    over = threading.Event()
    began = time.monotonic()
    samples: list[tuple[int, int, float]] = []

    def work(client: Client) -> None:
        while time.monotonic() - began < LONGEST_S:
            with lock:
                if next(left, None) is None:
                    return
            outcome = client.one_job()
            while outcome == "refused by the breaker":
                over.wait(0.1)
                outcome = client.one_job()
            with lock:
                outcomes[outcome] += 1

    def again_and_again(act: Any, seconds: float) -> None:
        while not over.wait(seconds):
            act()

    with _consumers(studios) as urls, serving(_config(urls)) as running:
        clients = [Client(running.port, seed * 31 + number) for number in range(CLIENTS)]
        operator = Operator(running, seed)
        reloader = Operator(running, seed + 1)
        with ThreadPoolExecutor(CLIENTS + 2) as pool:
            helping = [
                pool.submit(again_and_again, operator.cancel_one, 0.15),
                pool.submit(again_and_again, reloader.reload, 0.3),
            ]
            work_of = [pool.submit(work, client) for client in clients]
            while not all(each.done() for each in work_of):
                over.wait(1)
                samples.append((running.threads(), running.descriptors(), running.rss_mib()))
            over.set()
            for each in (*work_of, *helping):
                each.result()
        running.await_idle()
        time.sleep(1)  # for connections to be closed
        stats, text = running.stats(), running.log()
        states = running.get("/v1/status").json()["consumers"]
        early = samples[len(samples) // 4]
        late = (running.threads(), running.descriptors(), running.rss_mib())
    served = set().union(*(client.served for client in clients))
    # One that was cancelled with its last byte on the way is both, and rightly so.
    wrong = (served & oracle.interrupted) - operator.cancelled
    errors = [line for line in text.splitlines() if "level=ERROR" in line]
    figures = {
        "seed": seed,
        "jobs": sum(outcomes.values()),
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": dict(outcomes.most_common()),
        "the consumers' doings": dict(oracle.did.most_common()),
        "the operator's doings": dict((operator.did + reloader.did).most_common()),
        "two at once": oracle.collisions[:5],
        "told to stop, though wanted": sorted(wrong)[:5],
        "tracebacks in the log": text.count("Traceback"),
        "errors in the log": errors[:5],
        "surprises": (operator.surprises + reloader.surprises)[:5],
        "at the end": {k: stats[k] for k in ("queue_depth", "in_flight", "total_jobs")},
        "active at the end": {each["name"]: each["active"] for each in states},
        "threads, a quarter in and at the end": [early[0], late[0]],
        "descriptors, likewise": [early[1], late[1]],
        "RSS MiB, in quarters": [
            *(round(samples[len(samples) * quarter // 4][2], 1) for quarter in (1, 2, 3)),
            round(late[2], 1),
        ],
    }
    bad = ("internal_error", "scheduler_error", "closed without", "something else")
    kept = (
        not oracle.collisions
        and not wrong
        and sum(outcomes.values()) == jobs
        and not any(word in outcome for outcome in outcomes for word in bad)
        and "Traceback" not in text
        and not errors
        and not operator.surprises + reloader.surprises
        and not any(each["active"] for each in states)
        # One more is started whenever all are taken, which a burst of leavers may bring about.
        and late[0] <= early[0] + 4
        and late[1] <= early[1] + 8
        and late[2] < early[2] * 1.1 + 5
    )
    return figures, kept


def _config(urls: dict[str, str]) -> dict[str, Any]:
    return {
        "health_interval": 1,
        "routing": KINDS,
        "consumers": {
            way: {
                "url": url,
                "paths": {kind: f"/{kind}" for kind, its in KINDS.items() if its == way},
                "timeouts": TIMEOUTS,
                **WAYS[way],
            }
            for way, url in urls.items()
        },
    }


@contextmanager
def _consumers(studios: dict[str, Studio]) -> Iterator[dict[str, str]]:
    running: dict[str, ScriptedConsumer] = {}

    def forget(way: str, peer: Connection, request: Received) -> None:
        running[way].requests.clear()  # they hold uploads
        studios[way](peer, request)

    try:
        for way in studios:
            running[way] = ScriptedConsumer(partial(forget, way)).__enter__()
        yield {way: consumer.url for way, consumer in running.items()}
    finally:
        for consumer in running.values():
            consumer.__exit__(None, None, None)
