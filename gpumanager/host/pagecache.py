"""Files read into the kernel's page cache, so that whoever reads them next need not wait for the
disk."""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import psutil

CHUNK = 4 * 1024 * 1024
"""So much is read at a time; between two, somebody else may want the disk."""

MOST_FILES = 10_000
"""No more are looked at: a model has some ten, and a pattern may match a whole disk."""

_NOWAIT = getattr(os, "RWF_NOWAIT", None)


def available_bytes() -> int:
    """How much of the host's memory programs and the page cache could still take."""
    return int(psutil.virtual_memory().available)


def idle_io() -> None:
    """Have this thread use the disk only while nobody else does, as far as its scheduler knows
    priorities."""
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        psutil.Process(threading.get_native_id()).ionice(psutil.IOPRIO_CLASS_IDLE)


def files_of(places: Iterable[str]) -> Iterator[str]:
    """The regular files that are meant by paths of files and folders, and by patterns: of a folder
    all that are in it, at any depth. In their order, those of one place by name."""
    return islice((file for place in places for file in _files(place)), MOST_FILES)


def _files(place: str) -> Iterator[str]:
    for found in sorted(glob.iglob(place, recursive=True)):
        if os.path.isfile(found):
            yield found
        else:
            for folder, folders, names in os.walk(found):
                folders.sort()
                paths = (os.path.join(folder, name) for name in sorted(names))
                yield from filter(os.path.isfile, paths)


def read_ahead(file: str, most: int, go_on: Callable[[], bool]) -> int:
    """Have a file in the page cache, as far as it is not there yet: `most` bytes of it, and only as
    long as `go_on` says so, which is asked before each chunk. Returns how many bytes were read from
    the disk. Raises OSError."""
    read, at, buffer = 0, 0, bytearray(CHUNK)
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # Or the kernel would read on by itself, also after a look at what is there.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        size = os.fstat(descriptor).st_size
        while at < size and read < most and go_on():
            length = min(CHUNK, size - at, most - read)
            if not _is_cached(descriptor, at, length):
                length = os.preadv(descriptor, [memoryview(buffer)[:length]], at)
                if not length:
                    break  # it has become shorter
                read += length
            at += length
    finally:
        os.close(descriptor)
    return read


def _is_cached(descriptor: int, at: int, length: int) -> bool:
    """Whether the first and the last byte of a chunk are in the cache, and so most likely all of
    it. False where that cannot be told."""
    if _NOWAIT is None:
        return False
    byte = bytearray(1)
    try:
        return all(
            os.preadv(descriptor, [byte], place, _NOWAIT) == 1 for place in (at, at + length - 1)
        )
    except OSError:  # it would have to be read, or the file system does not tell
        return False
