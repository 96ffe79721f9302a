"""Programs that are run for their effect, with a bound."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from gpumanager.host.errors import ReclaimFailed

_LONGEST_REASON = 200


def run(what: str, command: Sequence[str], timeout_s: float) -> str:
    """Run the command, without a shell and without input; returns what it said on stdout. Raises
    ReclaimFailed, with the last line it said on stderr, if it fails, cannot be run, or takes longer
    than `timeout_s` seconds; it is killed then. `what` names it in the message."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise ReclaimFailed(f"{what} took more than {timeout_s:g} s") from None
    except OSError as error:
        raise ReclaimFailed(f"{what} cannot be run: {error.strerror or error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        reason = " ".join(said.split())[:_LONGEST_REASON] or f"exit code {done.returncode}"
        raise ReclaimFailed(f"{what}: {reason}")
    return done.stdout.decode(errors="replace")
