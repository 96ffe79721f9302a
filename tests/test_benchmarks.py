"""What can be known of the benchmarks without running them."""

from __future__ import annotations

import argparse
import re
import sys

import pytest

from benchmarks import vram


def test_modes_are_separated_by_commas() -> None:
    assert vram.modes("clean, laggy,wrong-not-healed") == ["clean", "laggy", "wrong-not-healed"]
    assert all(vram.modes(name) == [name] for name in vram.MODES)


@pytest.mark.parametrize("text", ["nope", "clean;laggy", "clean,nope", "clean,", ""])
def test_an_unknown_mode_is_told_with_those_there_are(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"there is no mode .*; known: clean, "):
        vram.modes(text)


def test_the_command_line_tells_it_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vram", "--modes", "nope"])
    with pytest.raises(SystemExit) as ended:
        vram.main()
    assert ended.value.code == 2
    assert (
        "argument --modes: there is no mode 'nope'; known: clean, laggy" in capsys.readouterr().err
    )


def test_every_mode_says_what_it_is() -> None:
    told = re.findall(r"^- ([\w, -]+):", vram.__doc__ or "", re.MULTILINE)
    assert [name for names in told for name in names.split(", ")] == list(vram.MODES)
