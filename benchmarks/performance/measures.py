"""What is measured, each for one contestant in one round. Figures are plain floats, by name."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import requests

from benchmarks.performance import client
from benchmarks.performance.contestants import Running

MIB = 1024 * 1024
Figures = dict[str, float]


def percentile(values: list[float], share: float) -> float:
    """By the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def job_log(upstream: int) -> list[tuple[int, int]]:
    """Begin and end of every job since the last call, in ns."""
    with client.connect(upstream) as sock:
        sock.sendall(b"GET /_log HTTP/1.1\r\nHost: x\r\n\r\n")
        data = b""
        while b"\r\n\r\n" not in data or not data.rstrip().endswith(b"]"):
            more = sock.recv(1024 * 1024)
            if not more:
                raise client.BadAnswer("the upstream is gone")
            data += more
    rows: list[tuple[int, int]] = json.loads(data.partition(b"\r\n\r\n")[2])
    return sorted(rows)


def latency(it: Running, count: int) -> Figures:
    """One small request after the other."""
    data = client.request(it.paths["chat"], model=it.openai)
    client.one_by_one(it.port, data, max(20, count // 10))
    times = client.one_by_one(it.port, data, count)
    return {"p50_ms": median(times) * 1000, "p99_ms": percentile(times, 0.99) * 1000}


def idle_gap(it: Running, upstream: int, *, ms: int, waiting: int, count: int) -> Figures:
    """How long the upstream has nothing to do between two jobs, while others wait."""
    data = client.request(f"{it.paths['job']}?ms={ms}")
    job_log(upstream)
    took = client.closed_loop(it.port, data, clients=waiting, count=count)
    log = job_log(upstream)
    # The line is full from when all have come, and until the last ones are in it.
    steady = log[waiting : len(log) - waiting] if len(log) > 3 * waiting else log[len(log) // 4 :]
    gaps = [(after[0] - before[1]) / 1e6 for before, after in pairwise(steady)]
    return {
        "gap_ms": median(gaps),
        "gap_p90_ms": percentile(gaps, 0.9),
        "jobs_per_s": count / took,
    }


def events(it: Running, count: int) -> Figures:
    """A stream of events, ten milliseconds apart."""
    path = it.paths["chat"]
    if it.openai:
        body = b'{"model": "it", "stream": true, "messages": [{"role": "user", "content": "hi"}]}'
        data = client.request(path, body)
    else:
        data = client.request(f"{path}?events={count}")
    first, delays, batched = client.stream(it.port, data)
    return {
        "first_ms": first * 1000,
        "delay_p50_ms": median(delays) * 1000,
        "delay_p99_ms": percentile(delays, 0.99) * 1000,
        "batched": float(batched),
    }


def bulk(it: Running, mib: int) -> Figures:
    """A large answer, and what it costs."""
    data = client.request(f"{it.paths['bulk']}?mib={mib}")
    before = it.cpu_s()
    took = client.download(it.port, data, mib * MIB)
    cpu = it.cpu_s() - before
    return {"mib_per_s": mib / took, "cpu_s_per_gib": cpu * 1024 / mib}


def big_body(it: Running, mib: int) -> Figures:
    """A large request."""
    return {"seconds": client.upload(it.port, it.paths["upload"], mib * MIB)}


def status_under_load(it: Running, count: int) -> Figures:
    """`/v1/status` while 64 clients keep the line full of jobs of 5 ms."""
    data = client.request(f"{it.paths['job']}?ms=5")
    load = multiprocessing.get_context("spawn").Process(
        target=client.closed_loop,
        args=(it.port, data),
        kwargs={"clients": 64, "count": 64 + 3 * count},
    )
    load.start()
    try:
        with requests.Session() as session:
            session.trust_env = False
            url = f"http://127.0.0.1:{it.port}/v1/status"
            until(lambda: session.get(url, timeout=10).json()["scheduler"]["queue_depth"] >= 60)
            times = []
            for _ in range(count):
                began = time.perf_counter()
                depth = session.get(url, timeout=10).json()["scheduler"]["queue_depth"]
                times.append(time.perf_counter() - began)
                if depth < 10:
                    break
        rss = it.rss_mib()
    finally:
        load.terminate()
        load.join(10)
    return {
        "p50_ms": median(times) * 1000,
        "p99_ms": percentile(times, 0.99) * 1000,
        "rss_mib": rss,
    }


def at_rest(it: Running, seconds: float) -> Figures:
    """What it takes while nobody asks for anything."""
    before, began = it.cpu_s(), time.perf_counter()
    time.sleep(seconds)
    spent = it.cpu_s() - before
    return {
        "cpu_percent": 100 * spent / (time.perf_counter() - began),
        "rss_mib": it.rss_mib(),
    }


def until(condition: Callable[[], bool], limit: float = 30.0) -> None:
    """Return once the condition holds. Raises TimeoutError."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)
