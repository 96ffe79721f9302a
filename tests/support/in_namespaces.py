"""Programs for tests in namespaces of their own, made by `unshare` without any right but to make a
user namespace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent.parent
OWN_PIDS = ("-Urpf", "--mount-proc", "--kill-child")
"""A PID namespace of its own, as a container has."""


@contextmanager
def running_inside(program: str, *options: str) -> Iterator[tuple[int, str]]:
    """Have the Python `program` run there until the block is left: its pid out here, and the first
    line that it prints. It has to end with its standard input; skips where that may not be."""
    if reason := _refused(options):
        pytest.skip(f"no namespaces here: {reason}")
    with subprocess.Popen(
        [str(shutil.which("unshare")), *options, sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as outer:
        assert outer.stdin is not None
        assert outer.stdout is not None
        assert outer.stderr is not None
        try:
            line = outer.stdout.readline().strip()
            if not line:
                _skip_if_refused(outer.stderr.read())
            # `unshare --fork` stays in front of what it runs.
            inner = psutil.Process(outer.pid).children()
            yield (inner[0].pid if inner else outer.pid), line
        finally:
            outer.stdin.close()


def _skip_if_refused(said: str) -> None:
    """Some systems let a user make namespaces, and do nothing in them."""
    if "Permission" in said or "not permitted" in said:
        pytest.skip(f"nothing may be done in namespaces here: {said.splitlines()[-1]}")
    pytest.fail(said)


@cache
def _refused(options: tuple[str, ...]) -> str:
    unshare = shutil.which("unshare")
    if unshare is None:
        return "there is no unshare"
    command = [unshare, *options, "true"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return tried.stderr.strip() if tried.returncode else ""


def run_inside(program: str, *words: str, options: tuple[str, ...] = OWN_PIDS) -> Any:
    """What the Python `program` prints as JSON, run there; skips where that may not be."""
    if reason := _refused(options):
        pytest.skip(f"no namespaces here: {reason}")
    done = subprocess.run(
        [str(shutil.which("unshare")), *options, sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        _skip_if_refused(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
