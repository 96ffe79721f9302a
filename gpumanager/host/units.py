"""systemd units, by way of systemctl."""

from __future__ import annotations

from typing import Literal

from gpumanager.host import commands

CALL_TIMEOUT_S = 10.0

Scope = Literal["user", "system"]


def stop(unit: str, scope: Scope, grace_s: float) -> None:
    """Stop the unit; returns when systemd says it is stopped. Raises ReclaimFailed."""
    _systemctl(scope, "stop", unit, timeout=grace_s + CALL_TIMEOUT_S)


def start(unit: str, scope: Scope, timeout_s: float) -> None:
    """Start the unit; returns when systemd says it is started. Raises ReclaimFailed."""
    _systemctl(scope, "start", unit, timeout=timeout_s)


def _systemctl(scope: Scope, verb: str, unit: str, *, timeout: float) -> None:
    command = ["systemctl", f"--{scope}", "--no-ask-password", verb, "--", unit]
    commands.run(f"systemctl --{scope} {verb} {unit}", command, timeout)
