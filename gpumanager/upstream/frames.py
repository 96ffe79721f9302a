"""WebSocket frames (RFC 6455, 5.2), as far as one has to know them to end a connection properly."""

from __future__ import annotations

import secrets
import struct

GOING_AWAY = struct.pack("!H", 1001)
"""The status code of an end that neither page nor consumer has asked for."""

_CLOSE = 0x8
_OPCODE = 0x0F
_FINAL = 0x80
_MASKED = 0x80
_LENGTH = 0x7F
_LONGER = {126: 2, 127: 8}
"""Bytes of length that follow, where the length itself does not fit."""

_LONGEST_HEAD = 14


class Frames:
    """Where a stream of frames stands: only `between` two of them can another one be put."""

    __slots__ = ("_head", "_left", "closed")

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self.closed = False
        """Whether a close frame went by, behind which there is nothing more."""

    @property
    def between(self) -> bool:
        """Whether the last frame is whole."""
        return not self._left and not self._head

    def advance(self, data: memoryview) -> None:
        """`data` goes by."""
        at, size = 0, len(data)
        while at < size:
            at += self._step(data[at:])

    def until_whole(self, data: memoryview) -> int:
        """How much of `data` belongs to the frame that has begun; it does not go by."""
        ahead = Frames()
        ahead._head, ahead._left = self._head, self._left
        at, size = 0, len(data)
        while at < size and not ahead.between:
            at += ahead._step(data[at:])
        return at

    def _step(self, data: memoryview) -> int:
        if not self._left:
            return self._take_head(data[:_LONGEST_HEAD])
        step = min(self._left, len(data))
        self._left -= step
        return step

    def _take_head(self, data: memoryview) -> int:
        before = len(self._head)
        head = self._head + bytes(data)
        needs = 2
        if len(head) >= needs:
            short = head[1] & _LENGTH
            longer = _LONGER.get(short, 0)
            needs += longer + (4 if head[1] & _MASKED else 0)
        if len(head) < needs or len(head) < 2:
            self._head = head
            return len(data)
        self._left = int.from_bytes(head[2 : 2 + longer], "big") if longer else short
        self._head = b""
        self.closed = self.closed or head[0] & _OPCODE == _CLOSE
        return needs - before


def close_frame(*, masked: bool) -> bytes:
    """One that says that its sender goes away; what a client sends is masked."""
    head = bytes((_FINAL | _CLOSE, len(GOING_AWAY) | (_MASKED if masked else 0)))
    if not masked:
        return head + GOING_AWAY
    mask = secrets.token_bytes(4)
    return head + mask + bytes(a ^ b for a, b in zip(GOING_AWAY, mask, strict=False))
