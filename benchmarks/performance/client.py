"""Clients that speak HTTP by hand, so that little of what is measured is theirs."""

from __future__ import annotations

import re
import selectors
import socket
import time
from dataclasses import dataclass, field

LIMIT_S = 120.0


def request(path: str, body: bytes = b"{}", *, model: bool = False) -> bytes:
    """A POST, as bytes. `model`: with the body that an OpenAI-compatible server wants."""
    if model:
        body = b'{"model": "it", "messages": [{"role": "user", "content": "hi"}]}'
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer sk-1234\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def connect(port: int) -> socket.socket:
    """A connection without delays of its own."""
    sock = socket.create_connection(("127.0.0.1", port), LIMIT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class BadAnswer(Exception):
    """A contestant did not do its job: its figures would mean nothing."""


@dataclass
class Reader:
    """Finds the ends of answers in what comes over one connection."""

    buffer: bytearray = field(default_factory=bytearray)

    def complete(self, data: bytes) -> bool:
        """Take in data; True once a whole answer has come. Raises BadAnswer if it is not a 200,
        or if there is no data."""
        if not data:
            raise BadAnswer("the connection was closed")
        buffer = self.buffer
        buffer += data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        if not buffer.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
            raise BadAnswer(buffer[:200].decode("latin-1"))
        head = bytes(buffer[:end]).lower()
        length = re.search(rb"\r\ncontent-length: *(\d+)", head)
        if length is not None:
            done = len(buffer) - end - 4 >= int(length[1])
        else:
            done = buffer.endswith(b"0\r\n\r\n")
        if done:
            buffer.clear()
        return done


def one_by_one(port: int, data: bytes, count: int) -> list[float]:
    """Seconds each of `count` requests took, one after the other on one connection."""
    times = []
    with connect(port) as sock:
        reader = Reader()
        for _ in range(count):
            began = time.perf_counter()
            sock.sendall(data)
            while not reader.complete(sock.recv(65536)):
                pass
            times.append(time.perf_counter() - began)
    return times


def closed_loop(port: int, data: bytes, *, clients: int, count: int) -> float:
    """Keep `clients` requests in flight until `count` were answered; returns the seconds."""
    selector = selectors.DefaultSelector()
    left = count - clients
    began = time.perf_counter()
    opened = [connect(port) for _ in range(clients)]
    for number, sock in enumerate(opened):
        selector.register(sock, selectors.EVENT_READ, (number, Reader()))
        sock.sendall(data)
    done = 0
    try:
        while done < count:
            events = selector.select(LIMIT_S)
            if not events:
                raise BadAnswer("no answer came any more")
            for key, _ in events:
                number, reader = key.data
                if reader.complete(opened[number].recv(65536)):
                    done += 1
                    if left > 0:
                        left -= 1
                        opened[number].sendall(data)
        return time.perf_counter() - began
    finally:
        selector.close()
        for sock in opened:
            sock.close()


def download(port: int, data: bytes, size: int) -> float:
    """Seconds until an answer of `size` bytes was there."""
    into = bytearray(1024 * 1024)
    with connect(port) as sock:
        began = time.perf_counter()
        sock.sendall(data)
        received = 0
        while received < size:
            count = sock.recv_into(into)
            if not count:
                raise BadAnswer("the answer broke off")
            received += count
        return time.perf_counter() - began


def upload(port: int, path: str, size: int) -> float:
    """Seconds until a request of `size` bytes was answered."""
    block = bytes(1024 * 1024)
    head = request(path, b"")[:-2].replace(b"Content-Length: 0", b"Content-Length: %d" % size)
    with connect(port) as sock:
        began = time.perf_counter()
        sock.sendall(head + b"\r\n")
        for _ in range(size // len(block)):
            sock.sendall(block)
        reader = Reader()
        while not reader.complete(sock.recv(65536)):
            pass
        return time.perf_counter() - began


def stream(port: int, data: bytes) -> tuple[float, list[float], int]:
    """An event stream: seconds to its first byte, each event's delay in seconds, and how many
    events came together with another one."""
    delays: list[float] = []
    batched = 0
    with connect(port) as sock:
        began = time.perf_counter()
        sock.sendall(data)
        first = 0.0
        tail = b""
        while True:
            received = sock.recv(65536)
            now = time.monotonic_ns()
            if not received:
                break
            first = first or time.perf_counter() - began
            text = tail + received
            stamps = re.findall(rb"ns=(\d+)", text)
            batched += max(0, len(stamps) - 1)
            delays += [(now - int(stamp)) / 1e9 for stamp in stamps]
            if b"[DONE]" in text:
                break
            tail = text[text.rfind(b"}") + 1 :] if stamps else text[-4000:]
    if not delays:
        raise BadAnswer("no event came")
    return first, delays, batched
