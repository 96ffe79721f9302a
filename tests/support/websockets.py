"""WebSockets by hand (RFC 6455), for both sides: every byte is the test's own."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.sockets import Connection, Received, Script
from tests.support.threads import PATIENCE_S

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def accept(key: str) -> str:
    """What a server answers to a client's key."""
    return base64.b64encode(hashlib.sha1((key + _GUID).encode()).digest()).decode()  # noqa: S324


def frame(payload: bytes, opcode: int = TEXT, *, masked: bool = False) -> bytes:
    """One frame, the only one of its message."""
    size, mask_bit = len(payload), 0x80 if masked else 0
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, mask_bit | size)
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, mask_bit | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, mask_bit | 127, size)
    if not masked:
        return head + payload
    mask = os.urandom(4)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return head + mask + (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")


@dataclass(frozen=True)
class Message:
    """A frame as it came; `code` is what a close frame says."""

    opcode: int
    payload: bytes
    masked: bool

    @property
    def code(self) -> int | None:
        is_close = self.opcode == CLOSE and len(self.payload) >= 2
        return int.from_bytes(self.payload[:2], "big") if is_close else None


class Peer:
    """One end of an open WebSocket; a client masks what it sends. A context manager."""

    def __init__(self, sock: socket.socket, buffer: bytes = b"", *, client: bool) -> None:
        self.sock = sock
        self.buffer = buffer
        self.client = client

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, payload: bytes, opcode: int = TEXT) -> None:
        self.sock.sendall(frame(payload, opcode, masked=self.client))

    def receive(self) -> Message | None:
        """The next frame; None at the end."""
        head = self._take(2)
        if head is None:
            return None
        size, masked = head[1] & 0x7F, bool(head[1] & 0x80)
        if size >= 126:
            size = int.from_bytes(self._whole(2 if size == 126 else 8), "big")
        mask = self._whole(4) if masked else b"\0\0\0\0"
        payload = self._whole(size)
        key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        plain = (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")
        return Message(head[0] & 0x0F, plain, masked)

    def text(self) -> bytes:
        """The payload of the next frame, which has to be a text."""
        message = self.receive()
        assert message is not None
        assert message.opcode == TEXT
        return message.payload

    def _whole(self, size: int) -> bytes:
        data = self._take(size)
        assert data is not None, "it broke off within a frame"
        return data

    def _take(self, size: int) -> bytes | None:
        while len(self.buffer) < size:
            data = self.sock.recv(65536)
            if not data:
                assert not self.buffer, f"it broke off within a frame: {self.buffer[:50]!r}"
                return None
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data


def handshake(path: str, *headers: str, key: str = KEY) -> bytes:
    """What a client asks with."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Refused(Exception):
    """The handshake was not answered with 101."""

    def __init__(self, head: str, rest: bytes) -> None:
        super().__init__(head)
        self.status = int(head.split()[1])
        self.head = head
        self.rest = rest


def open_websocket(port: int, path: str, *headers: str, ahead: bytes = b"") -> Peer:
    """A client's end; `ahead` is sent together with the request. Raises Refused."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    try:
        sock.sendall(handshake(path, *headers) + ahead)
        buffer = b""
        while b"\r\n\r\n" not in buffer:
            data = sock.recv(65536)
            if not data:
                raise EOFError(f"no answer: {buffer!r}")
            buffer += data
        head, _, rest = buffer.partition(b"\r\n\r\n")
        text = head.decode("latin-1")
        if not text.startswith("HTTP/1.1 101"):
            raise Refused(text, rest)
        assert f"Sec-WebSocket-Accept: {accept(KEY)}".lower() in text.lower(), text
        return Peer(sock, rest, client=True)
    except BaseException:
        sock.close()
        raise


def switching(received: Received, *headers: str) -> bytes:
    """What a server answers to a handshake."""
    key = received.header("sec-websocket-key") or ""
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept(key)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def websocket_script(talk: Callable[[Peer], None]) -> Script:
    """A consumer whose connections are WebSockets."""

    def script(connection: Connection, received: Received) -> None:
        connection.send(switching(received))
        talk(Peer(connection.sock, connection.rest(), client=False))

    return script


def echo(peer: Peer) -> None:
    """Send everything back, until the end; a close frame is answered, as it is to be."""
    while (message := peer.receive()) is not None:
        peer.send(message.payload, message.opcode)
        if message.opcode == CLOSE:
            return
