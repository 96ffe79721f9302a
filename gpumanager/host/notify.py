"""Telling systemd how the service is, where it wants to know (`Type=notify`).

Source: sd_notify(3): datagrams to the socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

READY = "READY=1"
STOPPING = "STOPPING=1"
ALIVE = "WATCHDOG=1"


class Notifier:
    """Sends states, if anybody asked for them. Never raises."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = _watchdog_s(environ)

    def tell(self, state: str) -> None:
        """Send one of the states above, if systemd asked for them."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(state.encode(), self._address)
        except OSError as error:
            log.warning("systemd not told", extra={"state": state, "reason": str(error)})


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Seconds between two signs of life, half of what systemd waits; None if it does not."""
    interval, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not interval.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(interval) / 2e6
