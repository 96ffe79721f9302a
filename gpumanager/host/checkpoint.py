"""CUDA checkpoint and restore: the driver takes a process's memory from the card to the host's, and
brings it back. The process knows nothing of it.

The calls run in a helper process of their own, `python -m gpumanager.host.checkpoint`: one that
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

from gpumanager.host import commands
from gpumanager.host.errors import ReclaimFailed

HELPER = (sys.executable, "-m", "gpumanager.host.checkpoint")
START_S = 15.0
"""What the helper may take beside the driver's own work: Python, and CUDA's start."""

RUNNING = "running"

INSTALL = "pip install 'mgpumanager[checkpoint]'"
STEPS = 2
"""Lock and checkpoint; restore and unlock."""


def suspend(pids: Sequence[int], step_s: float) -> None:
    """Take the memory of every one of the processes, or of none: where one fails, those that
    were suspended already are resumed. `step_s` is the longest a step may take, in seconds.
    Raises ReclaimFailed."""
    done: list[int] = []
    for pid in pids:
        try:
            _run("suspend", pid, step_s)
        except ReclaimFailed:
            for each in reversed(done):
                with contextlib.suppress(ReclaimFailed):  # the first failure is the one to tell
                    _run("resume", each, step_s)
            raise
        done.append(pid)


def resume(pids: Sequence[int], step_s: float) -> None:
    """Give the processes their memory back. Raises ReclaimFailed."""
    for pid in pids:
        _run("resume", pid, step_s)


def run_on(pids: Sequence[int], step_s: float) -> bool:
    """Whether the driver says of all the processes that they run. Raises ReclaimFailed."""
    return all(_run("state", pid, step_s).strip() == RUNNING for pid in pids)


def _run(what: str, pid: int, step_s: float) -> str:
    limit = START_S + STEPS * step_s
    command = [*HELPER, what, str(pid), str(round(step_s * 1000))]
    return commands.run(f"checkpoint: {what} of {pid}", command, limit)


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
    state = _state(cuda, pid)
    if state == cuda.CUprocessState.CU_PROCESS_STATE_CHECKPOINTED:
        _checked(cuda, "restore", cuda.cuCheckpointProcessRestore(pid, None))
        state = cuda.CUprocessState.CU_PROCESS_STATE_LOCKED
    if state == cuda.CUprocessState.CU_PROCESS_STATE_LOCKED:
        _checked(cuda, "unlock", cuda.cuCheckpointProcessUnlock(pid, None))


def is_running(cuda: Any, pid: int) -> bool:
    """Whether it is neither locked nor checkpointed."""
    running: bool = _state(cuda, pid) == cuda.CUprocessState.CU_PROCESS_STATE_RUNNING
    return running


def _state(cuda: Any, pid: int) -> Any:
    return _checked(cuda, "state", cuda.cuCheckpointProcessGetState(pid))


def _checked(cuda: Any, what: str, result: Any) -> Any:
    """What a call returned beside its status."""
    status, *rest = result
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{what}: {getattr(status, 'name', status)}")
    return rest[0] if rest else None


def main(arguments: Sequence[str]) -> int:
    """`suspend PID MS`, `resume PID MS`, or `state PID MS`, which says on stdout whether it runs;
    the reason of a failure goes to stderr."""
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
        elif what == "state":
            sys.stdout.write(RUNNING if is_running(cuda, pid) else "stopped")
        else:
            resume_process(cuda, pid)
    except Exception as error:  # noqa: BLE001  # a driver too old lacks the functions
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
