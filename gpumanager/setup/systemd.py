"""systemd's units, as setup reads and changes them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpumanager.folders import config_folder

SYSTEMCTL_TIMEOUT_S = 30
SYSTEM_UNITS = Path("/etc/systemd/system")


class ServiceError(Exception):
    """A unit could not be read, written or started; the text says why."""


Scope = Literal["user", "system"]


@dataclass(frozen=True, slots=True)
class Systemd:
    """The user's systemd, or the system's, as the user whose `environ` this is sees it."""

    environ: Mapping[str, str]
    scope: Scope = "user"
    system_units: Path = SYSTEM_UNITS
    user_id: int = field(default_factory=os.geteuid)

    @property
    def units(self) -> Path:
        """The folder of the units that somebody wrote for this machine."""
        if self.scope == "system":
            return self.system_units
        return config_folder(self.environ) / "systemd" / "user"

    @property
    def may_change(self) -> bool:
        """Whether this user may change and restart its units."""
        return self.scope == "user" or self.user_id == 0

    def call(self, *words: str) -> str:
        """What systemctl prints. Raises ServiceError."""
        command = ["systemctl", f"--{self.scope}", "--no-pager", *words]
        told = f"systemctl --{self.scope} {' '.join(words)}"
        try:
            done = subprocess.run(
                command,
                env=dict(self.environ),
                capture_output=True,
                text=True,
                timeout=SYSTEMCTL_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceError(f"{told}: {error}") from None
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
            raise ServiceError(f"{told}: {said}")
        return done.stdout

    def is_active(self, unit: str) -> bool:
        """Whether a unit runs."""
        try:
            self.call("is-active", unit)
        except ServiceError:
            return False
        return True

    def main_pid(self, unit: str) -> int | None:
        """The main process of a unit; None where there is none, or nobody says."""
        try:
            pid = int(self.call("show", "--property=MainPID", "--value", unit))
        except (ServiceError, ValueError):
            return None
        return pid or None

    def command(self, unit: str) -> str | None:
        """What a unit starts, as it stands in its file; None where that cannot be told."""
        try:
            text = self.call("cat", unit)
        except ServiceError:
            return None
        found = None
        for line in text.replace("\\\n", " ").splitlines():
            key, equals, value = line.partition("=")
            if equals and key.strip() == "ExecStart":
                found = value.strip() or None
        return found
