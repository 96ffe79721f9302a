"""Bodies in chunks, taken apart however they arrive."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waitress.buffers import OverflowableBuffer

from gpumanager.web.parsing import ChunkedBody

GOOD = b'3\r\nabc\r\nA;name="va;lue";b\r\n0123456789\r\n00001\r\n\n\r\n0;x\r\nA: b\r\nC:\r\n\r\n'
CONTENT = b"abc0123456789\n"


class CountingBuffer(OverflowableBuffer):
    """Counts what is appended to it."""

    appended = 0

    def append(self, s: Any) -> None:
        self.appended += 1
        super().append(s)


def feed(pieces: list[bytes]) -> tuple[ChunkedBody, int]:
    body, taken = ChunkedBody(CountingBuffer(1 << 20)), 0
    for piece in pieces:
        taken += body.received(piece)
    return body, taken


def content(body: ChunkedBody) -> bytes:
    return bytes(body.getbuf().getfile().read())


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 10_000), max_size=20))
def test_it_does_not_matter_how_it_arrives(cuts: list[int]) -> None:
    body, taken = feed(pieces_of(GOOD + b"POST /next", cuts))
    assert (body.completed, body.error) == (True, None)
    assert (taken, content(body), len(body)) == (len(GOOD), CONTENT, len(CONTENT))


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n",
        b"-5\r\nabcde\r\n0\r\n\r\n",
        b"+5\r\nabcde\r\n0\r\n\r\n",
        b"0x5\r\nabcde\r\n0\r\n\r\n",
        b" 5\r\nabcde\r\n0\r\n\r\n",
        b"5 \r\nabcde\r\n0\r\n\r\n",
        b"5_0\r\nabcde\r\n0\r\n\r\n",
        b"zz\r\n",
        b"3\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nabcXX0\r\n\r\n",
        b"3\r\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\r\n\r\n0\r\n\r\n",
        b"3;\x00\r\nabc\r\n0\r\n\r\n",
        b"3;=\r\nabc\r\n0\r\n\r\n",
        b"0\r\nno trailer\r\n\r\n",
        b"0\r\nA : b\r\n\r\n",
        b"0\r\n\n",
        b"1" * 17 + b"\r\n",
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_what_is_not_to_the_letter_is_refused(sent: bytes, one_by_one: bool) -> None:
    body, _ = feed([bytes([byte]) for byte in sent] if one_by_one else [sent])
    assert body.error is not None
    assert not body.completed


@pytest.mark.parametrize("end", range(len(GOOD)))
def test_less_than_all_of_it_is_not_complete(end: int) -> None:
    body, _ = feed([GOOD[:end]])
    assert (body.completed, body.error) == (False, None)


def test_small_chunks_are_written_together() -> None:
    sent = b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n"
    body, _ = feed(pieces_of(sent, list(range(0, len(sent), 8192))))
    assert content(body) == b"x" * 10_000
    assert body.buf.appended <= len(sent) // 8192 + 2  # type: ignore[attr-defined]
