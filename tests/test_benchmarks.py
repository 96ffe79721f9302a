"""What can be known of the benchmarks without running them."""

from __future__ import annotations

import argparse
import re
import sys

import pytest

from benchmarks import vram, vram_models


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


def test_the_models_trace_is_the_same_each_time_and_skewed() -> None:
    models = vram_models.trace(2000, 4)
    assert models == vram_models.trace(2000, 4) != vram_models.trace(2000, 5)
    often = sorted((models.count(model) for model in vram_models.PATHS), reverse=True)
    assert sum(often) == 2000
    assert often[0] > 4 * often[-1] > 0


def test_all_that_the_models_need_is_far_more_than_the_card_and_each_fits() -> None:
    sizes = [mib for server in vram_models.SERVERS.values() for mib in server.values()]
    assert (min(sizes), max(sizes), len(sizes)) == (500, 9000, 9)
    assert sum(sizes) > 2.5 * vram_models.CARD_MIB
    assert list(vram_models.PATHS) == [m for each in vram_models.SERVERS.values() for m in each]


def test_only_who_was_met_before_is_to_fit() -> None:
    meetings = vram_models.Meetings()
    first, second = meetings.knows("a"), meetings.knows("a")  # both sent before an answer
    meetings.came_of("a", first, out_of_memory=True)
    third = meetings.knows("a")
    meetings.came_of("a", second, out_of_memory=True)
    meetings.came_of("a", third, out_of_memory=True)
    assert (meetings.at_first["a"], meetings.later["a"]) == (2, 1)


def test_the_two_modes_are_compared() -> None:
    by_model = {"unloaded_by_the_broker": 532, "loads": 536, "evictions": 532}
    one_figure = {"unloaded_by_the_broker": 1131, "loads": 1149, "evictions": 736}
    assert vram_models.beside(by_model, one_figure) == {
        "unloaded_by_the_broker": 0.47,
        "loads": 0.47,
        "evictions": 0.72,
    }
