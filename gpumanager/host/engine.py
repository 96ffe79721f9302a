"""Containers, through the socket of Docker or Podman (Docker's API, which both speak)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpumanager.host.errors import ReclaimFailed

CALL_TIMEOUT_S = 10.0
INSPECT_TIMEOUT_S = 1.0
_LONGEST_ANSWER = 4 * 1024 * 1024
_NOT_MODIFIED = 304
"""It is stopped, or started, already."""


def stop(container: str, socket_path: str | None, grace_s: float) -> None:
    """Stop the container: it is given `grace_s` seconds to end, then killed. Raises
    ReclaimFailed."""
    seconds = max(1, round(grace_s))
    _post(container, f"stop?t={seconds}", socket_path, timeout=grace_s + CALL_TIMEOUT_S)


def start(container: str, socket_path: str | None, timeout_s: float) -> None:
    """Start the container. Raises ReclaimFailed."""
    _post(container, "start", socket_path, timeout=timeout_s)


def default_sockets() -> tuple[str, ...]:
    """Where the engines listen: Docker, then Podman, the system's and the user's."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    return (
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/run/podman/podman.sock",
        f"{runtime}/docker.sock",
        f"{runtime}/podman/podman.sock",
    )


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def inspect(container: str, socket_path: str | None) -> Mapping[str, Any]:
    """What the engine knows of a container (`State.Pid`: its main process, by the engine's host).
    Raises ReclaimFailed."""
    found = _call("GET", f"containers/{container}/json", socket_path, INSPECT_TIMEOUT_S)
    return found if isinstance(found, dict) else {}


def _post(container: str, what: str, socket_path: str | None, *, timeout: float) -> None:
    _call("POST", f"containers/{container}/{what}", socket_path, timeout)


def _call(method: str, what: str, socket_path: str | None, timeout: float) -> Any:
    """The engine's answer, None if it is no JSON. Raises ReclaimFailed."""
    path = socket_path or next(filter(os.path.exists, default_sockets()), None)
    if path is None:
        raise ReclaimFailed("no socket of Docker or Podman was found; set `socket`")
    connection = _UnixConnection(path, timeout)
    try:
        # Docker's API has been at 1.24 or later since 2016; without a version Podman differs.
        connection.request(method, f"/v1.24/{what}")
        answer = connection.getresponse()
        body = answer.read(_LONGEST_ANSWER)
    except TimeoutError:
        raise ReclaimFailed(f"{Path(path).name} gave no answer within {timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ReclaimFailed(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        connection.close()
    said = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(body)
    if answer.status >= 400 or (answer.status >= 300 and answer.status != _NOT_MODIFIED):
        reason = body.decode(errors="replace")
        if isinstance(said, dict) and "message" in said:
            reason = str(said["message"])
        _, container, verb = what.partition("?")[0].split("/")
        verb = {"json": "inspect"}.get(verb, verb)
        raise ReclaimFailed(f"container {container}, {verb}: {answer.status} {reason[:200]}")
    return said
