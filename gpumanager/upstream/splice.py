"""A request's body in which one piece is replaced, without holding the body in memory."""

from __future__ import annotations

import io
from typing import IO


class Spliced(io.RawIOBase):
    """The first `length` bytes from where `file` stands, with the bytes from `start` to `end`
    replaced by `piece`; `size` is how many bytes that makes. The file stays its owner's."""

    def __init__(self, file: IO[bytes], length: int, *, start: int, end: int, piece: bytes) -> None:
        self._file = file
        self._first = file.tell()
        self._piece = piece
        self._start, self._end = start, end
        self._at = 0
        self.size = length - (end - start) + len(piece)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = min(max(0, base + offset), self.size)
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        wanted = self.size - self._at if size < 0 else min(size, self.size - self._at)
        parts = []
        while wanted > 0:
            part = self._next(wanted)
            if not part:
                break  # the file is shorter than was said
            parts.append(part)
            wanted -= len(part)
            self._at += len(part)
        return b"".join(parts)

    def _next(self, most: int) -> bytes:
        behind = self._start + len(self._piece)
        if self._at < self._start:
            return self._of_file(self._at, min(most, self._start - self._at))
        if self._at < behind:
            begin = self._at - self._start
            return self._piece[begin : begin + most]
        return self._of_file(self._end + self._at - behind, most)

    def _of_file(self, at: int, most: int) -> bytes:
        self._file.seek(self._first + at)
        return self._file.read(most)
