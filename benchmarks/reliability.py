"""What the line withstands: a crowd, a soak with random faults, a slow reader, hostile bytes.

    python -m benchmarks.reliability crowd [--clients 1000]
    python -m benchmarks.reliability soak [--jobs 10000] [--seed N]
    python -m benchmarks.reliability reader [--mib 256]
    python -m benchmarks.reliability fuzz [--requests 30000] [--seed N]

Each starts `waitress-serve wsgi:app` on loopback, with a consumer in this process, prints its
figures as JSON, and exits with 1 if a promise was broken. Loops are bounded in count and time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import requests
import yaml

from benchmarks.running import Broker, serving
from benchmarks.soak import soak
from tests.support.broker import config_for
from tests.support.sockets import Connection, RawClient, Received, ScriptedConsumer, answer

LONGEST_S = 600.0


@contextmanager
def broker(consumer_url: str, **changes: Any) -> Iterator[Broker]:
    with serving(yaml.safe_load(config_for(consumer_url, **changes))) as running:
        yield running


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {
        "p50_ms": round(median(seconds) * 1000, 2),
        "p99_ms": round(cuts[98] * 1000, 2),
        "max_ms": round(max(seconds) * 1000, 2),
    }


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# -- a crowd -------------------------------------------------------------------------------------


def crowd(clients: int) -> tuple[dict[str, Any], bool]:
    """`clients` requests wait at once; one more is refused; all are served in order."""
    release = threading.Event()

    def script(connection: Connection, _: Received) -> None:
        release.wait(LONGEST_S)
        connection.send(answer())

    scheduler = {"kind": "locked", "max_queue": clients, "max_wait": LONGEST_S}
    timeouts = {"timeouts": {"connect": 5, "first_byte": LONGEST_S, "idle": 60, "total": LONGEST_S}}
    with (
        ScriptedConsumer(script) as consumer,
        broker(consumer.url, scheduler=scheduler, consumer=timeouts) as running,
    ):
        rss_before = running.rss_mib()
        waiting: list[RawClient] = []
        for index in range(clients + 1):  # one runs
            named = (f"X-Request-Id: {index}",)
            waiting.append(RawClient(running.port).request("POST", "/v1/tts", b"{}", named))
            if index % 50 == 0 or index == clients:
                running.await_waiting(index)
        line = [entry["request_id"] for entry in running.get("/v1/queue").json()["queue"]]
        cpu_before = cpu_seconds(running.pid)
        time.sleep(5)
        cpu_at_rest = (cpu_seconds(running.pid) - cpu_before) / 5
        healthz = [timed(lambda: running.get("/healthz")) for _ in range(300)]
        status = [timed(lambda: running.get("/v1/status")) for _ in range(100)]
        refusals = []
        for _ in range(20):
            with RawClient(running.port) as one_more:
                one_more.request("POST", "/v1/tts", b"{}")
                refusals.append(timed(one_more.answer))
        rss_full = running.rss_mib()
        began = time.perf_counter()
        release.set()
        statuses = Counter(client.answer().status for client in waiting)
        drained = time.perf_counter() - began
        for client in waiting:
            client.sock.close()
        order = [received.header("x-request-id") for received in consumer.requests]
        figures = {
            "waiting": clients,
            "served": dict(statuses),
            "in the order of the line": order == line,
            "healthz while they wait": spread(healthz),
            "status while they wait": spread(status),
            "refusal of the next one": spread(refusals),
            "CPU while they wait, % of a core": round(100 * cpu_at_rest, 2),
            "RSS MiB, idle and full": [round(rss_before, 1), round(rss_full, 1)],
            "all served in s": round(drained, 2),
        }
        kept = (
            statuses == {200: clients + 1}
            and order == line
            and max(spread(healthz)["p99_ms"], spread(status)["p99_ms"]) < 100
            and spread(refusals)["max_ms"] < 100
        )
        return figures, kept


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- a slow reader -------------------------------------------------------------------------------

READER_MIB_PER_S = 40.0
PIECE = 1024 * 1024


def reader(mib: int) -> tuple[dict[str, Any], bool]:
    """A large answer to a client that reads slowly: when is the GPU free, and what does it cost?"""

    def script(connection: Connection, _: Received) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (mib * PIECE))
        for _piece in range(mib):
            connection.send(bytes(PIECE))

    free_after: list[float] = []
    peak = 0.0
    with ScriptedConsumer(script) as consumer, broker(consumer.url) as running:
        before = running.rss_mib()
        began = time.perf_counter()
        with RawClient(running.port) as client:
            client.request("POST", "/v1/image", b"{}").until(b"\r\n\r\n")
            read = len(client.buffer.partition(b"\r\n\r\n")[2])
            while read < mib * PIECE and (data := client.sock.recv(PIECE)):
                read += len(data)
                peak = max(peak, running.rss_mib())
                if not free_after and running.stats()["in_flight"] == 0:
                    free_after.append(time.perf_counter() - began)
                time.sleep(len(data) / PIECE / READER_MIB_PER_S)
        seconds = time.perf_counter() - began
        figures = {
            "answer MiB": mib,
            "read in s": round(seconds, 2),
            "GPU free after s": round(free_after[0], 2) if free_after else None,
            "RSS MiB, before and at most": [round(before, 1), round(peak, 1)],
        }
        kept = (
            read == mib * PIECE
            and bool(free_after)
            and free_after[0] < seconds / 3
            and peak - before < 64
        )
        return figures, kept


# -- hostile bytes -------------------------------------------------------------------------------

TEMPLATES = [
    b"POST /v1/tts HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/tts HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\n{}\r\n0\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: abc\r\n\r\n",
    b"GET /audio/a%2e%2e/b.wav?x=1 HTTP/1.1\r\nHost: localhost\r\nRange: bytes=0-1\r\n\r\n",
    b"DELETE /v1/queue/1 HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n\r\n",
    b"POST http://localhost/v1/llm HTTP/1.0\r\nPrefer: wait=1\r\nContent-Length: 0\r\n\r\n",
]
PIECES = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"%", b"%00", b"%0d%0a", b".."),
    *(b"/", b"\\", b"\xff", b"\xc3\xbc", b"A" * 3000, b"Content-Length: 5\r\n", b"-1", b"1e9"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: x, chunked\r\n", b"Host: evil\r\n"),
    *(
        b"Connection: close, X-Request-Id\r\n",
        b"Expect: 100-continue\r\n",
        b"HTTP/9.9",
        b"ffffffff",
    ),
]


def hostile(rng: random.Random) -> bytes:
    data = bytearray(rng.choice(TEMPLATES))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at:at] = rng.choice(PIECES)
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case _:
                data[at:at] = data[at : at + rng.randint(1, 30)]
    return bytes(data)


def first_bytes(sock: socket.socket) -> bytes:
    """What comes first, the end of the connection included. A request that waits for more of
    itself is told that there is none."""
    sock.settimeout(0.2)
    try:
        return sock.recv(65536)
    except TimeoutError:
        sock.settimeout(10)
        sock.shutdown(socket.SHUT_WR)
        return sock.recv(65536)


def fuzz(count: int, seed: int) -> tuple[dict[str, Any], bool]:
    """Mutated requests over raw sockets: each is answered or closed, none with a 500."""
    statuses: Counter[str] = Counter()
    lock = threading.Lock()
    bad: list[str] = []
    consumer = ScriptedConsumer(lambda connection, _: connection.send(answer()))
    with consumer, broker(consumer.url) as running:
        before = running.threads()

        def shoot(number: int) -> None:
            data = hostile(random.Random(seed * 1_000_003 + number))
            with socket.create_connection(("127.0.0.1", running.port), 10) as sock:
                try:
                    sock.sendall(data)
                    first = first_bytes(sock)
                except TimeoutError:
                    status = "hang"
                except OSError:
                    status = "reset"
                else:
                    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", first)
                    status = found[1].decode() if found else "closed" if not first else "no HTTP"
            with lock:
                statuses[status] += 1
                if status in ("500", "502", "hang", "no HTTP"):
                    bad.append(repr(data[:300]))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(shoot, range(count)))
        running.await_idle()
        after = running.threads()
        served = requests.post(f"http://127.0.0.1:{running.port}/v1/tts", b"{}", timeout=10)
        figures = {
            "seed": seed,
            "requests": count,
            "answers": dict(statuses.most_common()),
            "threads, before and after": [before, after],
            "an innocent job after that": served.status_code,
            "bad": bad[:5],
        }
        return figures, not bad and after <= before and served.status_code == 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("crowd").add_argument("--clients", type=int, default=1000)
    commands.add_parser("reader").add_argument("--mib", type=int, default=256)
    for name, option, default in (("soak", "--jobs", 10_000), ("fuzz", "--requests", 30_000)):
        command = commands.add_parser(name)
        command.add_argument(option, type=int, default=default)
        command.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    if options.command == "crowd":
        figures, kept = crowd(options.clients)
    elif options.command == "reader":
        figures, kept = reader(options.mib)
    elif options.command == "soak":
        figures, kept = soak(options.jobs, options.seed)
    else:
        figures, kept = fuzz(options.requests, options.seed)
    print(json.dumps(figures, indent=2))
    sys.exit(not kept)


if __name__ == "__main__":
    main()
