"""What a WebSocket through the broker costs: the time that it adds to a message and its answer, its
bulk, and a thousand that are idle.

    python -m benchmarks.websockets [--rounds N]

Client, broker and consumer are processes of their own. Rounds with and without the broker are
interleaved; figures are medians over the rounds (lowest–highest).
"""

from __future__ import annotations

import argparse
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from urllib.parse import parse_qs, urlsplit

from benchmarks.running import ROOT, Broker, serving
from tests.support.websockets import BINARY, Peer, accept, frame, open_websocket

IDLE = 1000
MESSAGES = 2000
BULK_MESSAGES = 200
BULK_BYTES = 1024 * 1024
SIZES = {"100 B": 100, "64 KiB": 64 * 1024}
IDLE_S = 10.0


def consumer() -> None:
    """Answers each message of `size` bytes with one as large; one thread for all."""
    selector = selectors.DefaultSelector()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    print(listener.getsockname()[1], flush=True)
    states: dict[socket.socket, tuple[int, bytes]] = {}
    got: dict[socket.socket, int] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                sock, _ = listener.accept()
                states[sock] = switched(sock)
                got[sock] = 0
                selector.register(sock, selectors.EVENT_READ)
                continue
            sock = key.fileobj  # type: ignore[assignment]  # no other kind is registered
            data = sock.recv(256 * 1024)
            if not data:
                selector.unregister(sock)
                sock.close()
                continue
            size, answer = states[sock]
            got[sock] += len(data)
            while got[sock] >= size:
                got[sock] -= size
                sock.sendall(answer)


def switched(sock: socket.socket) -> tuple[int, bytes]:
    """Shake hands; how long a message is, masked, and the answer to it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(65536)
    lines = head.decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    key = next(
        line.split(": ", 1)[1] for line in lines if line.lower().startswith("sec-websocket-key")
    )
    assert fields["upgrade"] == "websocket"
    size = int(parse_qs(urlsplit(lines[0].split()[1]).query)["size"][0])
    sock.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept(key).encode() + b"\r\n\r\n"
    )
    return len(frame(bytes(size), BINARY, masked=True)), frame(bytes(size), BINARY)


@contextmanager
def echoing() -> Iterator[int]:
    """The port of a consumer in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.websockets", "--consumer"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
            process.wait(10)


class Way:
    """To the consumer, with the broker or without."""

    def __init__(self, port: int, path: str) -> None:
        self.port, self.path = port, path

    def open(self, size: int) -> Peer:
        peer = open_websocket(self.port, f"{self.path}/?size={size}")
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peer

    def round_trips(self, size: int, count: int) -> list[float]:
        """Seconds, each."""
        message, whole = frame(bytes(size), BINARY, masked=True), len(frame(bytes(size), BINARY))
        took = []
        with self.open(size) as peer:
            for _ in range(count):
                began = time.perf_counter()
                peer.sock.sendall(message)
                missing = whole
                while missing:
                    missing -= len(peer.sock.recv(missing))
                took.append(time.perf_counter() - began)
        return took

    def mib_per_s(self) -> float:
        """Of messages of a MiB, there and back."""
        took = sum(self.round_trips(BULK_BYTES, BULK_MESSAGES))
        return 2 * BULK_MESSAGES * BULK_BYTES / took / 1024**2


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def told(values: list[float], digits: int = 3) -> str:
    return f"{median(values):.{digits}g} ({min(values):.{digits}g}–{max(values):.{digits}g})"


def messages(direct: Way, through: Way, rounds: int) -> None:
    print("| | direct | through the broker | added |\n|---|---|---|---|")
    for name, size in SIZES.items():
        pairs = []
        for _ in range(rounds):
            a, b = (1e6 * median(way.round_trips(size, MESSAGES)) for way in (direct, through))
            pairs.append((a, b))
        columns = [a for a, _ in pairs], [b for _, b in pairs], [b - a for a, b in pairs]
        print(f"| {name} and back, p50, µs | {' | '.join(map(told, columns))} |", flush=True)
    bulk = [(direct.mib_per_s(), through.mib_per_s()) for _ in range(rounds)]
    print(
        f"| 1 MiB and back, MiB/s | {told([a for a, _ in bulk])} | {told([b for _, b in bulk])} | |"
    )


def idle(broker: Broker, through: Way) -> None:
    before = broker.rss_mib(), broker.threads(), broker.descriptors()
    alone = 1e6 * median(through.round_trips(100, MESSAGES))
    with ExitStack() as stack:
        began = time.perf_counter()
        for _ in range(IDLE):
            stack.enter_context(through.open(100))
        opening = (time.perf_counter() - began) / IDLE
        after = broker.rss_mib(), broker.threads(), broker.descriptors()
        spent = cpu_s(broker.pid)
        time.sleep(IDLE_S)
        spent = cpu_s(broker.pid) - spent
        beside = 1e6 * median(through.round_trips(100, MESSAGES))
    print(f"\n| {IDLE} idle WebSockets | |\n|---|---|")
    print(f"| opened in, each | {1000 * opening:.2f} ms |")
    print(f"| memory, each | {1024 * (after[0] - before[0]) / IDLE:.1f} KiB |")
    print(f"| threads | {before[1]} → {after[1]} |")
    print(f"| descriptors | {before[2]} → {after[2]} |")
    print(f"| CPU of the broker, all of it | {100 * spent / IDLE_S:.1f} % of one core |")
    print(f"| 100 B and back, p50, without and beside them | {alone:.0f} and {beside:.0f} µs |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--consumer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.consumer:
        consumer()
        return 0
    with echoing() as port:
        config = {
            "max_websockets": IDLE + 10,
            "log": {"level": "warning"},
            "consumers": {"it": {"url": f"http://127.0.0.1:{port}"}},
        }
        with serving(config) as broker:
            direct, through = Way(port, ""), Way(broker.port, "/consumers/it")
            messages(direct, through, options.rounds)
            idle(broker, through)
    return 0


if __name__ == "__main__":
    sys.exit(main())
