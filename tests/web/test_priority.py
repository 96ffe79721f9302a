"""The `Priority` header of RFC 9218."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumanager.web.priority import urgency_of


@pytest.mark.parametrize(
    ("header", "urgency"),
    [
        ("u=0", 0),
        ("u=7", 7),
        ("u=5, i", 5),
        ("i, u=5", 5),
        ("i=?0,\tu=2", 2),
        ("  u=1  ", 1),
        ("u=-0", 0),
        ("u=007", 7),
        ("u=1;x;y=2", 1),  # parameters that nobody knows
        ("u=1, u=2", 2),  # the last counts
        ("u=1, u=9", None),
        ('a="u=1, u=2", u=4', 4),
        ('a="\\"", u=4', 4),
        ("a=( 1;b  2 )  , u=3", 3),
        ("a=(1 2 3);u=5, u=6", 6),
        ("a=();u=5", None),
        ("a=:AAA=:, b=@-1659578233, c=1.125, d=tok/en:*, u=1", 1),
        ('a=%"f%c3%bc", u=1', 1),
        ("", None),
        ("i", None),
        # Out of range, or of another type: as if it were not there.
        ("u=8", None),
        ("u=-1", None),
        ("u=3.0", None),
        ("u", None),
        ("u=?1", None),
        ('u="3"', None),
        ("u=(3)", None),
        # Not readable: ignored as a whole.
        ("u=1,", None),
        ("u=1,,i", None),
        ("u=1 i", None),
        ("u = 1", None),
        ("U=1", None),
        ("u=1 ; x", None),
        ("u=1, a=(1(2))", None),
        ('u=1, a=(1"x")', None),
        ('u=1, a="', None),
        ('u=1, a="ü"', None),
        ("u=1, a=%", None),
        ("u=1, a=1.", None),
        ("u=0000000000000001", None),  # more digits than an integer has
        ("1", None),
    ],
)
def test_what_a_priority_header_says(header: str, urgency: int | None) -> None:
    assert urgency_of(header) == urgency


@given(st.text('u=0179,; i()"\\:?@%-.a*\té', max_size=40))
def test_any_text_is_an_urgency_or_none(header: str) -> None:
    said = urgency_of(header)
    assert said is None or (0 <= said <= 7 and f"{said}" in header)


@pytest.mark.parametrize(
    "header",
    [
        "a," * 30_000,
        "u=1" + " " * 60_000 + "x",
        "a=(" + "1 " * 30_000,
        "a=(" * 20_000,
        'a="' + "x" * 60_000,
        "a=1" + ";a" * 30_000 + "!",
        "a=1;" + " " * 60_000,
    ],
)
def test_a_long_header_is_read_in_no_time(header: str) -> None:
    """A quadratic reader would take minutes."""
    began = time.process_time()
    assert urgency_of(header) is None
    assert time.process_time() - began < 1
