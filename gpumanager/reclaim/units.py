"""systemd units, by way of systemctl."""

from __future__ import annotations

import subprocess
from typing import Literal

from gpumanager.reclaim.errors import ReclaimFailed

CALL_TIMEOUT_S = 10.0
_LONGEST_REASON = 200

Scope = Literal["user", "system"]


def stop(unit: str, scope: Scope, grace_s: float) -> None:
    """Stop the unit; returns when systemd says it is stopped. Raises ReclaimFailed."""
    _systemctl(scope, "stop", unit, timeout=grace_s + CALL_TIMEOUT_S)


def start(unit: str, scope: Scope, timeout_s: float) -> None:
    """Start the unit; returns when systemd says it is started. Raises ReclaimFailed."""
    _systemctl(scope, "start", unit, timeout=timeout_s)


def _systemctl(scope: Scope, verb: str, unit: str, *, timeout: float) -> None:
    command = ["systemctl", f"--{scope}", "--no-ask-password", verb, "--", unit]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ReclaimFailed(f"systemctl {verb} {unit} took more than {timeout:g} s") from None
    except OSError as error:
        raise ReclaimFailed(f"systemctl cannot be run: {error.strerror or error}") from None
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())[:_LONGEST_REASON]
        raise ReclaimFailed(
            f"systemctl --{scope} {verb} {unit}: {reason or f'exit code {done.returncode}'}"
        )
