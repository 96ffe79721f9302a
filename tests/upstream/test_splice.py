"""A body with a piece replaced is the same bytes but for that piece, however it is read."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from gpumanager.upstream.splice import Spliced


@given(
    st.binary(max_size=60),
    st.binary(max_size=20),
    st.binary(max_size=60),
    st.binary(max_size=20),
    st.lists(st.integers(1, 25), max_size=30),
)
def test_it_reads_as_if_the_bytes_had_come_so(
    head: bytes, old: bytes, tail: bytes, new: bytes, sizes: list[int]
) -> None:
    lead = b"not part of it"
    file = io.BytesIO(lead + head + old + tail)
    file.seek(len(lead))
    whole = head + new + tail
    spliced = Spliced(file, len(head + old + tail), start=len(head), end=len(head + old), piece=new)
    assert spliced.size == len(whole)
    read = b"".join(spliced.read(size) for size in sizes)
    assert read == whole[: len(read)]
    assert read + spliced.read() == whole
    assert spliced.read(1) == b""
    spliced.seek(0)
    assert spliced.read() == whole


def test_a_file_that_is_shorter_than_was_said_ends_it() -> None:
    spliced = Spliced(io.BytesIO(b"abc"), 10, start=1, end=2, piece=b"X")
    assert spliced.read() == b"aXc"
