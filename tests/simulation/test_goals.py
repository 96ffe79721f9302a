"""What the policies are meant to be worth, with a few of the seeds of `benchmarks/policies.py`."""

from __future__ import annotations

import sys

import pytest

from benchmarks import policies

pytestmark = pytest.mark.untraced


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["policies", *words])
    return policies.main()


def test_affinity_meets_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = run(monkeypatch, "--seeds", "3")
    shown = capsys.readouterr()
    assert not failed, shown.err
    assert "| alternating | affinity | 0." in shown.out


@pytest.mark.parametrize(
    ("policy", "missed"),
    [
        ("fifo", ["agent-fleet: 1.", "only 1.0 times fewer swaps", "image-night: p99 of people 1"]),
        ("one-model", ["mixed: makespan 1.", "alternating: "]),
    ],
)
def test_what_does_not_meet_them_is_told(
    policy: str,
    missed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "--seeds", "1", "--policy", policy) == 1
    told = capsys.readouterr().err
    assert all(each in told for each in missed), told
