"""CUDA checkpoint and restore: the driver takes a process's memory from the card to the host's, and
brings it back. The process knows nothing of it.

The calls run in a helper process of their own, `python -m gpumanager.reclaim.checkpoint`: one that
hangs in the driver can be ended, and the broker never loads CUDA. They need Linux on x86-64, a
driver of 570 or later, the right to ptrace the process, and as much free memory on the host as it
holds on the card. See CUDA's driver API, "CUDA Checkpointing".
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from gpumanager.reclaim import commands
from gpumanager.reclaim.errors import ReclaimFailed

HELPER = (sys.executable, "-m", "gpumanager.reclaim.checkpoint")
START_S = 15.0
"""What the helper may take beside the driver's own work: Python, and CUDA's start."""

INSTALL = "pip install 'mgpumanager[checkpoint]'"
STEPS = 2
"""Lock and checkpoint; restore and unlock."""


def suspend(pids: Sequence[int], step_s: float, helper: Sequence[str] = HELPER) -> None:
    """Take the memory of every one of the processes, or of none: where one fails, those that
    were suspended already are resumed. `step_s` is the longest a step may take, in seconds.
    Raises ReclaimFailed."""
    done: list[int] = []
    for pid in pids:
        try:
            _run(helper, "suspend", pid, step_s)
        except ReclaimFailed:
            for each in reversed(done):
                with contextlib.suppress(ReclaimFailed):  # the first failure is the one to tell
                    _run(helper, "resume", each, step_s)
            raise
        done.append(pid)


def resume(pids: Sequence[int], step_s: float, helper: Sequence[str] = HELPER) -> None:
    """Give the processes their memory back. Raises ReclaimFailed."""
    for pid in pids:
        _run(helper, "resume", pid, step_s)


def _run(helper: Sequence[str], what: str, pid: int, step_s: float) -> None:
    limit = START_S + STEPS * step_s
    commands.run(
        f"checkpoint: {what} of {pid}", [*helper, what, str(pid), str(round(step_s * 1000))], limit
    )


# -- in the helper -------------------------------------------------------------------------------


class CudaError(Exception):
    """A call of the driver that did not return CUDA_SUCCESS."""


def suspend_process(cuda: Any, pid: int, lock_ms: int) -> None:
    """Lock the process, with a time-out, and checkpoint it; if that fails it runs on."""
    args = cuda.CUcheckpointLockArgs()
    args.timeoutMs = lock_ms
    _checked(cuda, "lock", cuda.cuCheckpointProcessLock(pid, args))
    try:
        _checked(cuda, "checkpoint", cuda.cuCheckpointProcessCheckpoint(pid, None))
    except CudaError:
        cuda.cuCheckpointProcessUnlock(pid, None)
        raise


def resume_process(cuda: Any, pid: int) -> None:
    """Restore the process and let it run; from whatever state a suspension was left in."""
    state = _checked(cuda, "state", cuda.cuCheckpointProcessGetState(pid))
    if state == cuda.CUprocessState.CU_PROCESS_STATE_CHECKPOINTED:
        _checked(cuda, "restore", cuda.cuCheckpointProcessRestore(pid, None))
        state = cuda.CUprocessState.CU_PROCESS_STATE_LOCKED
    if state == cuda.CUprocessState.CU_PROCESS_STATE_LOCKED:
        _checked(cuda, "unlock", cuda.cuCheckpointProcessUnlock(pid, None))


def _checked(cuda: Any, what: str, result: Any) -> Any:
    """What a call returned beside its status."""
    status, *rest = result
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{what}: {getattr(status, 'name', status)}")
    return rest[0] if rest else None


def main(arguments: Sequence[str]) -> int:
    """`suspend PID MS` or `resume PID MS`; the reason of a failure goes to stderr."""
    what, pid, milliseconds = arguments[0], int(arguments[1]), int(arguments[2])
    try:
        cuda: Any = import_module("cuda.bindings.driver")
    except ImportError:
        sys.stderr.write(f"needs cuda-bindings: {INSTALL}\n")
        return 1
    try:
        _checked(cuda, "cuInit", cuda.cuInit(0))  # a restore needs it
        if what == "suspend":
            suspend_process(cuda, pid, milliseconds)
        else:
            resume_process(cuda, pid)
    except Exception as error:  # noqa: BLE001  # a driver too old lacks the functions
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
