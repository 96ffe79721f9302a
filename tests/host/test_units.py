"""systemd units, with a stand-in for systemctl on the path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpumanager.host import units
from gpumanager.host.errors import ReclaimFailed


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its file; what it is called with goes to `calls` beside it."""
    script = tmp_path / "bin" / "systemctl"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/calls\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return script


def test_a_unit_is_stopped_and_started(systemctl: Path, tmp_path: Path) -> None:
    units.stop("comfyui.service", "user", 10)
    units.start("whisper@1.service", "system", 60)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "--user --no-ask-password stop -- comfyui.service",
        "--system --no-ask-password start -- whisper@1.service",
    ]


def test_systemds_own_words_are_told(systemctl: Path) -> None:
    systemctl.write_text("#!/bin/sh\necho 'Unit x.service not loaded.' >&2\nexit 5\n")
    words = r"systemctl --user stop x.service: Unit x.service not loaded\."
    with pytest.raises(ReclaimFailed, match=words):
        units.stop("x.service", "user", 10)


def test_one_that_hangs_is_not_waited_for_for_ever(
    systemctl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemctl.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(units, "CALL_TIMEOUT_S", 0.1)
    with pytest.raises(ReclaimFailed, match="took more than"):
        units.stop("x.service", "user", 0.1)


def test_a_box_without_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReclaimFailed, match="cannot be run"):
        units.start("x.service", "user", 10)
