"""Processes without a supervisor: ended by a signal to their group, started by a command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence

import psutil

from gpumanager.host.errors import ReclaimFailed

POLL_S = 0.02
KILL_WAIT_S = 5.0
"""How long a killed process may take to be gone: a driver frees its memory meanwhile."""


def end(pids: Iterable[int], signal_name: str, grace_s: float) -> None:
    """End the processes, their descendants and their groups: with the signal, and after
    `grace_s` seconds with KILL. The broker's own group is left alone: only the processes
    themselves are ended then. Raises ReclaimFailed if anything is left."""
    chosen = _with_descendants(pids)
    if not chosen:
        raise ReclaimFailed("its processes cannot be seen, so there is nobody to signal")
    groups = {group for process in chosen if (group := _group(process)) is not None}
    members = _unique([*chosen, *_in_groups(groups)])
    number = getattr(signal, f"SIG{signal_name}")
    _send(members, groups, number)
    if alive := _await_end(members, grace_s):
        _send(alive, groups, signal.SIGKILL)
        alive = _await_end(alive, KILL_WAIT_S)
    if alive:
        listed = ", ".join(str(process.pid) for process in alive)
        raise ReclaimFailed(f"could not be ended: process {listed}")


def start(command: Sequence[str]) -> None:
    """Start the command in a session of its own, so that it outlives the broker. Raises
    ReclaimFailed."""
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ReclaimFailed(f"{command[0]} cannot be started: {reason}") from None
    # Somebody has to take note of its end, or it stays in the process table.
    threading.Thread(target=child.wait, name=f"child-{child.pid}", daemon=True).start()


def _await_end(processes: Iterable[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Those that have not ended after `limit_s` seconds. One that its parent has yet to take note
    of has ended: its memory is free."""
    deadline = time.monotonic() + limit_s
    pause = threading.Event()
    while alive := [process for process in processes if not _has_ended(process)]:
        if time.monotonic() >= deadline:
            break
        pause.wait(POLL_S)
        processes = alive
    return alive


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _with_descendants(pids: Iterable[int]) -> list[psutil.Process]:
    """Never the broker, nor what it runs under: their descendants are everybody's processes."""
    spared = {1, os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found: list[psutil.Process] = []
    for pid in set(pids) - spared:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return [each for each in _unique(found) if each.pid not in spared]


def _group(process: psutil.Process) -> int | None:
    """The process's group, if it may be signalled as a whole."""
    try:
        group = os.getpgid(process.pid)
    except OSError:
        return None
    return None if group in (os.getpgrp(), 0, 1) else group


def _in_groups(groups: set[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.getpgid(process.pid) in groups:
                found.append(process)
    return found


def _unique(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return list({process.pid: process for process in processes}.values())


def _send(processes: Iterable[psutil.Process], groups: set[int], number: int) -> None:
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, number)
    for process in processes:
        if _group(process) not in groups:
            with contextlib.suppress(psutil.Error):  # checks that the pid is still the same one
                process.send_signal(number)
