"""The user's folders, as the XDG Base Directory Specification has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def config_folder(environ: Mapping[str, str]) -> Path:
    """Where the configs of the user's programs lie."""
    return Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "/") / ".config")


def state_folder(environ: Mapping[str, str]) -> Path:
    """Where the broker keeps what is to outlive it."""
    home = Path(environ.get("HOME") or "/tmp")  # noqa: S108  # a service may have no home
    return Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "gpumanager"
