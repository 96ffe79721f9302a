"""Bodies and results that are too large for the database: files beside it, each named by the row of
its job. A file is whole and on disk before a row names it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from gpumanager.asyncjobs.model import SMALL_BYTES

PIECE_BYTES = 256 * 1024


class Files:
    """Those in one folder, which the user alone can read. Raises OSError where the disk does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make_folder(self) -> None:
        """Have the folder be there."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def open(self, name: str) -> IO[bytes]:
        """One of them, to be read; the caller closes it."""
        return (self._folder / name).open("rb")

    def remove(self, names: Iterable[str]) -> None:
        """Delete some; those that are gone already are no fault."""
        for name in names:
            with contextlib.suppress(OSError):  # the next start sweeps what is left
                (self._folder / name).unlink(missing_ok=True)

    def sweep(self, named: frozenset[str]) -> int:
        """Delete those that no row names: left by a broker that was killed in between. Returns how
        many."""
        orphans = [each.name for each in self._folder.iterdir() if each.name not in named]
        self.remove(orphans)
        return len(orphans)

    def sync_folder(self) -> None:
        """Have the names be on disk, too."""
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def create(self, name: str) -> IO[bytes]:
        """A new one, to be written; nobody else may read it."""
        path = self._folder / name
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b")


class Draft:
    """Bytes on their way into the store: in memory while they are few, else in a file called
    `name`. `room` is asked before each piece of a file whether so many more bytes may be kept, and
    raises if not. `size` and `digest` are of all bytes so far."""

    def __init__(self, files: Files, name: str, room: Callable[[int], object]) -> None:
        self._files = files
        self._room = room
        self._memory: io.BytesIO | None = io.BytesIO()
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._finished: tuple[bytes | None, str | None] | None = None
        self.name = name
        self.size = 0

    @classmethod
    def of(cls, files: Files, data: bytes) -> Draft:
        """A short one, all at once."""
        draft = cls(files, "", lambda _: None)
        draft.write(data)
        return draft

    def write(self, data: bytes) -> None:
        """Add some."""
        self._room(self.size + len(data))
        self._digest.update(data)
        self.size += len(data)
        if self._memory is not None and self.size > SMALL_BYTES:
            self._file = self._files.create(self.name)
            self._file.write(self._memory.getvalue())
            self._memory = None
        into = self._file if self._memory is None else self._memory
        assert into is not None  # noqa: S101  # it is one or the other
        into.write(data)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal."""
        return self._digest.hexdigest()

    def finish(self) -> tuple[bytes | None, str | None]:
        """What the row is to have: the bytes, or the name of the file, which is on disk now.
        Idempotent."""
        if self._finished is None and self._memory is not None:
            self._finished = self._memory.getvalue(), None
        elif self._finished is None:
            assert self._file is not None  # noqa: S101  # it is one or the other
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._files.sync_folder()
            self._finished = None, self.name
        return self._finished

    def drop(self) -> None:
        """Forget it, and its file. Idempotent; to be called unless a row names it."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
            self._files.remove([self.name])

    def close(self) -> None:
        """Drop it, unless it was finished."""
        if self._finished is None:
            self.drop()


def pieces(source: IO[bytes], length: int) -> Iterator[bytes]:
    """`length` bytes of a file, a piece at a time; fewer, if it ends."""
    while length > 0 and (data := source.read(min(PIECE_BYTES, length))):
        length -= len(data)
        yield data
