"""What of a file is in the kernel's page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

PAGE = mmap.PAGESIZE


def cached_pages(file: Path) -> int:
    """How many of a file's pages are in the page cache."""
    size = file.stat().st_size
    found = (ctypes.c_ubyte * -(-size // PAGE))()
    private = mmap.MAP_PRIVATE  # so that it can be had writable, for its address
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, flags=private) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(ctypes.addressof(start))
        assert libc.mincore(address, ctypes.c_size_t(size), found) == 0
        del start
    return sum(each & 1 for each in found)


def cached_bytes(file: Path) -> Any:
    """How many bytes of a file are in the page cache, to compare: the kernel may take back single
    pages at any time."""
    return pytest.approx(cached_pages(file) * PAGE, abs=16 * PAGE)


def drop(file: Path) -> None:
    """Have none of it in the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def on_disk(file: Path, size: int) -> Path:
    """A file of that size that would have to be read from the disk."""
    file.write_bytes(os.urandom(size))
    drop(file)
    if cached_pages(file):
        pytest.skip("this file system has no page cache that can be dropped")
    return file
