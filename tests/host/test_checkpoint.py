"""CUDA checkpoints, with a stand-in for the driver and for the helper process."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpumanager.host import checkpoint
from gpumanager.host.errors import ReclaimFailed

# -- the broker's side ---------------------------------------------------------------------------


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has a helper note what it is asked, and then do as a script says."""

    def install(script: str = "") -> None:
        monkeypatch.setattr(checkpoint, "HELPER", scripted(tmp_path, script))

    install()
    return install


def scripted(folder: Path, script: str) -> list[str]:
    file = folder / "helper.py"
    note = (
        f"import sys\nopen({str(folder / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    )
    file.write_text(note + script)
    return [sys.executable, str(file)]


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


Helper = Callable[[str], None]


def test_every_process_is_suspended_and_resumed(tmp_path: Path, helper: Helper) -> None:
    checkpoint.suspend([11, 12], 2.5)
    checkpoint.resume([11, 12], 2.5)
    assert calls(tmp_path) == [
        "suspend 11 2500",
        "suspend 12 2500",
        "resume 11 2500",
        "resume 12 2500",
    ]


def test_all_or_none(tmp_path: Path, helper: Helper) -> None:
    fails = "if sys.argv[1:3] == ['suspend', '12']:\n    sys.exit('no\\nlock: NOT_SUPPORTED')\n"
    helper(fails)
    with pytest.raises(ReclaimFailed, match="suspend of 12: lock: NOT_SUPPORTED"):
        checkpoint.suspend([11, 12, 13], 1)
    assert calls(tmp_path) == ["suspend 11 1000", "suspend 12 1000", "resume 11 1000"]


def test_a_helper_that_hangs_in_the_driver_is_ended(
    helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "START_S", 0.5)
    helper("import time\ntime.sleep(60)\n")
    with pytest.raises(ReclaimFailed, match="resume of 11 took more than"):
        checkpoint.resume([11], 0.1)


def test_a_helper_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "HELPER", ["/nowhere/at/all"])
    with pytest.raises(ReclaimFailed, match="No such file"):
        checkpoint.resume([11], 1)


@pytest.mark.parametrize(("stopped", "run_on"), [("", True), ("12", False)])
def test_a_consumer_runs_if_all_its_processes_do(
    helper: Helper, stopped: str, run_on: bool
) -> None:
    helper(f"print('stopped' if sys.argv[2] == {stopped!r} else 'running')")
    assert checkpoint.run_on([11, 12], 1) is run_on


# -- the helper's side ---------------------------------------------------------------------------


class State(enum.Enum):
    CU_PROCESS_STATE_RUNNING = 0
    CU_PROCESS_STATE_LOCKED = 1
    CU_PROCESS_STATE_CHECKPOINTED = 2


class Result(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeCuda:
    """As much of the driver as is used, with one process."""

    CUprocessState = State
    CUresult = Result

    def __init__(self, state: State = State.CU_PROCESS_STATE_RUNNING) -> None:
        self.state = state
        self.failing = ""
        self.lock_ms = 0

    def CUcheckpointLockArgs(self) -> Any:  # noqa: N802
        return SimpleNamespace(timeoutMs=0)

    def _move(self, what: str, before: State, after: State) -> tuple[Result]:
        if self.failing == what or self.state is not before:
            return (Result.CUDA_ERROR_NOT_SUPPORTED,)
        self.state = after
        return (Result.CUDA_SUCCESS,)

    def cuInit(self, flags: int) -> tuple[Result]:  # noqa: N802
        failed = self.failing == "init"
        return (Result.CUDA_ERROR_NOT_SUPPORTED if failed else Result.CUDA_SUCCESS,)

    def cuCheckpointProcessGetState(self, pid: int) -> tuple[Result, State]:  # noqa: N802
        return Result.CUDA_SUCCESS, self.state

    def cuCheckpointProcessLock(self, pid: int, args: Any) -> tuple[Result]:  # noqa: N802
        self.lock_ms = args.timeoutMs
        return self._move("lock", State.CU_PROCESS_STATE_RUNNING, State.CU_PROCESS_STATE_LOCKED)

    def cuCheckpointProcessCheckpoint(self, pid: int, args: Any) -> tuple[Result]:  # noqa: N802
        before, after = State.CU_PROCESS_STATE_LOCKED, State.CU_PROCESS_STATE_CHECKPOINTED
        return self._move("checkpoint", before, after)

    def cuCheckpointProcessRestore(self, pid: int, args: Any) -> tuple[Result]:  # noqa: N802
        before, after = State.CU_PROCESS_STATE_CHECKPOINTED, State.CU_PROCESS_STATE_LOCKED
        return self._move("restore", before, after)

    def cuCheckpointProcessUnlock(self, pid: int, args: Any) -> tuple[Result]:  # noqa: N802
        return self._move("unlock", State.CU_PROCESS_STATE_LOCKED, State.CU_PROCESS_STATE_RUNNING)


def test_there_and_back() -> None:
    cuda = FakeCuda()
    checkpoint.suspend_process(cuda, 11, 700)
    assert (cuda.state, cuda.lock_ms) == (State.CU_PROCESS_STATE_CHECKPOINTED, 700)
    checkpoint.resume_process(cuda, 11)
    assert cuda.state is State.CU_PROCESS_STATE_RUNNING
    checkpoint.resume_process(cuda, 11)  # it runs already


def test_a_checkpoint_that_fails_leaves_the_process_running() -> None:
    cuda = FakeCuda()
    cuda.failing = "checkpoint"
    with pytest.raises(checkpoint.CudaError, match="checkpoint: CUDA_ERROR_NOT_SUPPORTED"):
        checkpoint.suspend_process(cuda, 11, 700)
    assert cuda.state is State.CU_PROCESS_STATE_RUNNING


def test_a_helper_that_was_ended_in_the_middle_is_made_up_for() -> None:
    cuda = FakeCuda(State.CU_PROCESS_STATE_LOCKED)
    checkpoint.resume_process(cuda, 11)
    assert cuda.state is State.CU_PROCESS_STATE_RUNNING


@pytest.mark.parametrize(
    ("failing", "code", "words"),
    [
        ("", 0, ""),
        ("init", 1, "cuInit: CUDA_ERROR_NOT_SUPPORTED"),
        ("lock", 1, "lock: CUDA_ERROR_NOT_SUPPORTED"),
    ],
)
def test_the_helper_tells_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
    code: int,
    words: str,
) -> None:
    cuda = FakeCuda()
    cuda.failing = failing
    monkeypatch.setattr(checkpoint, "import_module", lambda name: cuda)
    assert checkpoint.main(["suspend", "11", "700"]) == code
    assert words in capsys.readouterr().err
    if not code:
        assert checkpoint.main(["resume", "11", "700"]) == 0


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (State.CU_PROCESS_STATE_RUNNING, "running"),
        (State.CU_PROCESS_STATE_LOCKED, "stopped"),
        (State.CU_PROCESS_STATE_CHECKPOINTED, "stopped"),
    ],
)
def test_the_helper_says_whether_a_process_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: State, said: str
) -> None:
    monkeypatch.setattr(checkpoint, "import_module", lambda name: FakeCuda(state))
    assert checkpoint.main(["state", "11", "700"]) == 0
    assert capsys.readouterr().out == said


def test_without_the_extra_the_helper_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(checkpoint, "import_module", missing)
    assert checkpoint.main(["suspend", "11", "700"]) == 1
    assert "mgpumanager[checkpoint]" in capsys.readouterr().err
