"""The broker as a service of the user's own: a systemd unit, or, where there is no systemd, a
process in the background."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpumanager.setup.systemd import ServiceError, Systemd

UNIT = "gpumanager.service"
MARK = "# made by `gpumanager setup`"

TEMPLATE = """\
{mark}; setup rewrites it only while this line is here
[Unit]
Description=gpumanager: one queue in front of the AI services that share a GPU
After=network.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={python} -m gpumanager serve --config {config}
ExecReload=kill -HUP $MAINPID
# SIGTERM drains: the running job is finished first.
TimeoutStopSec={stop_s}
WatchdogSec=30
Restart=on-failure
RestartSec=2
# Exit code 2: a fault in the config, which starting again does not mend.
RestartPreventExitStatus=2
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


@dataclass(frozen=True, slots=True)
class UserService:
    """The unit of the user whose `environ` this is."""

    environ: Mapping[str, str]

    @property
    def available(self) -> bool:
        """Whether the user has a systemd that answers."""
        if shutil.which("systemctl", path=self.environ.get("PATH")) is None:
            return False
        try:
            self._systemctl("show-environment")
        except ServiceError:
            return False
        return True

    @property
    def file(self) -> Path:
        """The path of the unit's file, whether it is there or not."""
        return Systemd(self.environ).units / UNIT

    def text(self, config: Path, drain_s: float) -> str:
        """The text of a unit that serves a config."""
        return TEMPLATE.format(
            mark=MARK,
            python=_quoted(sys.executable),
            config=_quoted(str(config)),
            stop_s=round(drain_s) + 15,
        )

    @property
    def active(self) -> bool:
        """Whether systemd says that the unit is active."""
        return Systemd(self.environ).is_active(UNIT)

    def is_ours(self) -> bool:
        """Whether the unit may be written: there is none, or setup made it."""
        return not self.file.exists() or self._text().startswith(MARK)

    def has(self, text: str) -> bool:
        """Whether the unit is there, with this text."""
        return self.file.exists() and self._text() == text

    def _text(self) -> str:
        try:
            return self.file.read_text("utf-8", errors="replace")
        except OSError:
            return ""

    def install(self, text: str) -> None:
        """Write the unit and start it, now and at every login. Raises ServiceError."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(text, "utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise ServiceError(f"{self.file} cannot be written: {reason}") from None
        self._systemctl("daemon-reload")
        self._systemctl("enable", UNIT)
        self._systemctl("restart", UNIT)

    def reload(self) -> None:
        """Have the running service read its config anew. Raises ServiceError."""
        self._systemctl("reload", UNIT)

    def _systemctl(self, *words: str) -> str:
        return Systemd(self.environ).call(*words)


def start_in_background(config: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the broker detached from this terminal. Raises OSError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "gpumanager", "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=os.path.sep,
        )


def _quoted(word: str) -> str:
    """As systemd reads it back: specifiers doubled, and in quotes."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'
