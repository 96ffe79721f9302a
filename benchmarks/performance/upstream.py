"""The consumer of all contestants: one thread, one event loop, as little work per request as Python
can do, so that it is not what is measured.

`python -m benchmarks.performance.upstream` prints its port and serves until its input ends. What a
request does is in its query: `ms=N` works so long (nothing else is served meanwhile, as on a GPU),
`events=N` streams so many server-sent events, each with the time it was sent, `mib=N` answers so
much. `GET /_log` gives begin and end of every job since the last time, in ns of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import sys
import time

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "it",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
EVENT_GAP_S = 0.01
MIB = 1024 * 1024


class Connection:
    """One client: what it has sent so far."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.missing = 0
        self.head = b""


class Upstream:
    """Serves until `stop`."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self.listener.getsockname()[1]
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        self.log: list[tuple[int, int]] = []
        self.block = os.memfd_create("block")
        os.truncate(self.block, 1024 * MIB)

    def serve(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fileobj is sys.stdin:
                    return
                else:
                    self._read(key.data)

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(sock, selectors.EVENT_READ, Connection(sock))
        self._read(self.selector.get_key(sock).data, flags=socket.MSG_DONTWAIT)

    def _read(self, connection: Connection, flags: int = 0) -> None:
        try:
            data = connection.sock.recv(256 * 1024, flags)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(connection.sock)
            connection.sock.close()
            return
        if connection.missing:
            connection.missing -= len(data)
        else:
            connection.buffer += data
            end = connection.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            connection.head = bytes(connection.buffer[:end])
            length = re.search(rb"(?i)content-length: *(\d+)", connection.head)
            body = int(length[1]) if length else 0
            connection.missing = body - (len(connection.buffer) - end - 4)
            self.last_body = bytes(connection.buffer[end + 4 : end + 2000])
            connection.buffer.clear()
        if connection.missing <= 0:
            connection.missing = 0
            try:
                self._answer(connection)
            except OSError:
                self.selector.unregister(connection.sock)
                connection.sock.close()

    def _answer(self, connection: Connection) -> None:
        began = time.monotonic_ns()
        sock, line = connection.sock, connection.head.partition(b"\r\n")[0]
        if b"/_log" in line:
            self._send_json(sock, json.dumps(self.log).encode())
            self.log.clear()
            return
        query = dict(re.findall(rb"[?&](\w+)=(\d+)", line))
        if b"mib" in query:
            self._send_block(sock, int(query[b"mib"]) * MIB)
        elif b"events" in query or re.search(rb'"stream": ?true', self.last_body):
            self._send_events(sock, int(query.get(b"events", 50)))
        else:
            if b"ms" in query and query[b"ms"] != b"0":
                time.sleep(int(query[b"ms"]) / 1000)
            self._send_json(sock, ANSWER)
        if b"health" not in line:
            self.log.append((began, time.monotonic_ns()))

    @staticmethod
    def _send_json(sock: socket.socket, body: bytes) -> None:
        sock.sendall(HEAD + str(len(body)).encode() + b"\r\n\r\n" + body)

    def _send_block(self, sock: socket.socket, size: int) -> None:
        sock.sendall(HEAD + str(size).encode() + b"\r\n\r\n")
        sent = 0
        while sent < size:
            sent += os.sendfile(sock.fileno(), self.block, sent, size - sent)

    @staticmethod
    def _send_events(sock: socket.socket, count: int) -> None:
        sock.sendall(SSE_HEAD)
        for _ in range(count):
            time.sleep(EVENT_GAP_S)
            text = json.dumps(
                {
                    "id": "1",
                    "object": "chat.completion.chunk",
                    "created": 1,
                    "model": "it",
                    "choices": [{"index": 0, "delta": {"content": f"ns={time.monotonic_ns()}"}}],
                }
            )
            event = f"data: {text}\n\n".encode()
            sock.sendall(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        event = b"data: [DONE]\n\n"
        sock.sendall(f"{len(event):x}\r\n".encode() + event + b"\r\n0\r\n\r\n")


if __name__ == "__main__":
    upstream = Upstream()
    print(upstream.port, flush=True)
    upstream.serve()
