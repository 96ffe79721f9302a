"""What is expected of the line: pure arithmetic."""

from __future__ import annotations

import pytest

from gpumanager.model import Job
from gpumanager.scheduling.estimate import FIRST_HOLD_S, HoldTimes, until_granted
from gpumanager.scheduling.policy import Running, Waiting


def waiting(name: str) -> Waiting:
    return Waiting(1, Job(name, "tts"), since=0, deadline=100)


def test_before_any_job_a_guess() -> None:
    assert HoldTimes().expected("mvoice") == FIRST_HOLD_S


def test_each_consumer_is_known_by_its_own_jobs() -> None:
    holds = HoldTimes()
    holds.learn("mvoice", 2)
    holds.learn("comfyui", 30)
    assert holds.expected("mvoice") == 2
    assert holds.expected("comfyui") == 30
    assert 2 < holds.expected("whisper") < 30


def test_the_mean_follows() -> None:
    holds = HoldTimes()
    for _ in range(50):
        holds.learn("mvoice", 2)
    for _ in range(50):
        holds.learn("mvoice", 8)
    assert holds.expected("mvoice") == pytest.approx(8, rel=0.01)


def test_an_empty_line_is_done() -> None:
    assert until_granted([], [], 0, lambda _: 5) == [0]


def test_a_job_that_overruns_is_expected_to_end_now() -> None:
    running = [Running(1, Job("mvoice", "tts"), since=0)]
    assert until_granted([waiting("a"), waiting("b")], running, 99, lambda _: 5) == [0, 5, 10]
