"""What it costs to read a consumer's answer: the broker's reader beside h11 and http.client.

    python -m benchmarks.answers [--rounds N]

Every answer goes over a socket pair, whole, before it is read. Rounds are interleaved; figures are
medians over the rounds (lowest–highest).
"""

from __future__ import annotations

import argparse
import http.client
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from statistics import median

import h11

from gpumanager.upstream.wire import Wire

FIELDS = (
    b"Server: uvicorn\r\nDate: Tue, 24 Nov 2026 07:00:00 GMT\r\n"
    b"Content-Type: application/json\r\nCache-Control: no-store\r\nX-Model: it\r\n"
)
EVENT = b"data: " + b"x" * 180 + b"\n\n"
BULK = 64 * 1024 * 1024
SMALL = b"HTTP/1.1 200 OK\r\n" + FIELDS + b"Content-Length: 300\r\n\r\n" + b"x" * 300
CHUNKED = b"HTTP/1.1 200 OK\r\n" + FIELDS + b"Transfer-Encoding: chunked\r\n\r\n"
EVENTS = CHUNKED + 100 * (b"%x\r\n%b\r\n" % (len(EVENT), EVENT)) + b"0\r\n\r\n"
SINGLE = CHUNKED + 10_000 * b"1\r\nx\r\n" + b"0\r\n\r\n"
READ_BYTES = 256 * 1024


def broker(sock: socket.socket) -> int:
    """The broker's own."""
    answer = Wire(sock, 10)
    answer.await_head()
    size = 0
    while data := answer.read1(READ_BYTES):
        size += len(data)
    return size


def lenient(sock: socket.socket) -> int:
    """The standard library's."""
    answer = http.client.HTTPResponse(sock, method="POST")
    answer.begin()
    size = 0
    while data := answer.read1(READ_BYTES):
        size += len(data)
    answer.close()
    return size


def by_h11(sock: socket.socket) -> int:
    """h11, with the state of a request that was sent."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "it")]))
    connection.send(h11.EndOfMessage())
    size = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(sock.recv(READ_BYTES))
        elif isinstance(event, h11.Data):
            size += len(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return size


READERS: dict[str, Callable[[socket.socket], int]] = {
    "gpumanager": broker,
    "http.client": lenient,
    "h11": by_h11,
}


def microseconds(reader: Callable[[socket.socket], int], data: bytes, count: int) -> float:
    """Of CPU for an answer."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * len(data))
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(data))
    spent = 0.0
    with closing(ours), closing(theirs):
        for _ in range(count):
            theirs.sendall(data)
            began = time.thread_time()
            reader(ours)
            spent += time.thread_time() - began
            ours.setblocking(True)
    return spent / count * 1e6


def mib_per_s(reader: Callable[[socket.socket], int]) -> float:
    """Of a long answer."""
    ours, theirs = socket.socketpair()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BULK
    with closing(ours), closing(theirs):
        sender = threading.Thread(target=lambda: theirs.sendall(head + bytes(BULK)), name="sender")
        sender.start()
        began = time.perf_counter()
        assert reader(ours) == BULK
        took = time.perf_counter() - began
        sender.join()
    return BULK / 1024**2 / took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    measures: dict[str, Callable[[Callable[[socket.socket], int]], float]] = {
        "small JSON, µs": lambda reader: microseconds(reader, SMALL, 2000),
        "100 events, µs": lambda reader: microseconds(reader, EVENTS, 200),
        "10,000 chunks of one byte, ms": lambda reader: microseconds(reader, SINGLE, 5) / 1000,
        "64 MiB, MiB/s": mib_per_s,
    }
    print(f"| | {' | '.join(READERS)} |")
    print("|---" * (len(READERS) + 1) + "|")
    for name, measure in measures.items():
        found: dict[str, list[float]] = {each: [] for each in READERS}
        for _ in range(rounds):
            for each, reader in READERS.items():
                found[each].append(measure(reader))
        cells = [f"{median(f):.3g} ({min(f):.3g}–{max(f):.3g})" for f in found.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
