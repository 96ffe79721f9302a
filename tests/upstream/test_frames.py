"""Where frames end, however the bytes come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumanager.upstream.frames import Frames, close_frame
from tests.support.websockets import CLOSE, PONG, TEXT, frame

SIZES = st.sampled_from([0, 1, 2, 125, 126, 127, 300, 65_535, 65_536, 70_000])


@given(
    frames=st.lists(st.tuples(SIZES, st.booleans(), st.sampled_from([TEXT, PONG])), max_size=5),
    cuts=st.lists(st.integers(0, 150_000), max_size=8),
)
def test_it_is_between_two_frames_exactly_where_one_ends(
    frames: list[tuple[int, bool, int]], cuts: list[int]
) -> None:
    pieces = [frame(b"x" * size, opcode, masked=masked) for size, masked, opcode in frames]
    ends = {sum(map(len, pieces[:count])) for count in range(len(pieces) + 1)}
    whole = b"".join(pieces)
    stream, at = Frames(), 0
    for cut in [*sorted({cut for cut in cuts if cut < len(whole)}), len(whole)]:
        stream.advance(memoryview(whole[at:cut]))
        at = cut
        assert stream.between == (at in ends)
        left = stream.until_whole(memoryview(whole[at:]))
        assert at + left == min(end for end in ends if end >= at)
    assert not stream.closed


@pytest.mark.parametrize("masked", [True, False])
def test_a_close_frame_says_going_away(masked: bool) -> None:
    made, stream = close_frame(masked=masked), Frames()
    assert bool(made[1] & 0x80) == masked
    mask = made[2:6] if masked else b"\0\0"
    assert bytes(a ^ b for a, b in zip(made[-2:], mask[:2], strict=True)) == (1001).to_bytes(
        2, "big"
    )
    stream.advance(memoryview(made))
    assert stream.between
    assert stream.closed


def test_nobody_says_goodbye_after_a_close_frame() -> None:
    stream = Frames()
    stream.advance(memoryview(frame(b"", CLOSE) + frame(b"hello")))
    assert stream.closed
