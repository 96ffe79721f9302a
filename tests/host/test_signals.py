"""Processes are really ended and really started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gpumanager.host import signals
from gpumanager.host.errors import ReclaimFailed
from tests.support.threads import eventually

STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
ENDS = """
import time
print("up", flush=True)
time.sleep(60)
"""


@contextmanager
def running(script: str, *, own_group: bool = True) -> Iterator[tuple[int, str]]:
    """A process and the first line it says."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
    )
    assert process.stdout is not None
    try:
        yield process.pid, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(5)
        process.stdout.close()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_process_and_its_children_are_ended() -> None:
    with running(PARENT) as (pid, child):
        signals.end([pid], "TERM", 5)
        assert gone(pid)
        assert gone(int(child))


def test_one_that_ignores_the_signal_is_killed_after_its_grace() -> None:
    with running(STUBBORN) as (pid, _):
        signals.end([pid], "TERM", 0.2)
        assert gone(pid)


def test_in_the_brokers_own_group_only_the_process_is_ended() -> None:
    with running(ENDS, own_group=False) as (pid, _), running(ENDS, own_group=False) as (other, _):
        assert os.getpgid(pid) == os.getpgrp()
        signals.end([pid], "TERM", 5)
        assert gone(pid)
        assert not gone(other)


def test_the_broker_and_what_it_runs_under_are_never_signalled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All processes descend from one of them."""
    monkeypatch.setattr(signals, "_send", pytest.fail)
    with running(ENDS), pytest.raises(ReclaimFailed, match="nobody to signal"):
        signals.end([1, os.getpid(), os.getppid()], "TERM", 0.1)


@pytest.mark.parametrize("pids", [[], [2**22 + 7]])
def test_nobody_to_signal_is_told(pids: list[int]) -> None:
    with pytest.raises(ReclaimFailed, match="nobody to signal"):
        signals.end(pids, "TERM", 0.1)


def test_a_command_is_started_in_a_session_of_its_own(tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    script = f"import os; open({str(sign)!r}, 'w').write(str(os.getsid(0) == os.getpid()))"
    signals.start([sys.executable, "-c", script])
    eventually(lambda: sign.exists() and sign.read_text() != "")
    assert sign.read_text() == "True"


def test_a_command_that_is_not_there_is_told() -> None:
    with pytest.raises(ReclaimFailed, match="cannot be started: No such file"):
        signals.start(["/nowhere/at/all"])
