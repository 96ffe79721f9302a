"""The simulated card: its arithmetic, and its use by several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumanager.gpu import simulated as card_module
from gpumanager.gpu.simulated import CardLost, CardMemory, Holder, OutOfMemory, SimulatedCard
from gpumanager.host import procfs

WAIT_S = 10.0

HOLD = """
import sys
from gpumanager.gpu.simulated import SimulatedCard
SimulatedCard(sys.argv[1]).allocate(sys.argv[2], int(sys.argv[3]))
print("held", flush=True)
sys.stdin.read()
"""

CHURN = """
import sys
from gpumanager.gpu.simulated import SimulatedCard
card = SimulatedCard(sys.argv[1])
for _ in range(100):
    card.allocate(sys.argv[2], 10)
    card.free(sys.argv[2])
card.allocate(sys.argv[2], 7)
print("done", flush=True)
sys.stdin.read()
"""

ALIVE = """
import os
from gpumanager.host.procfs import born
print(born(os.getpid()) is not None)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "card.json"


@pytest.fixture
def card(path: Path) -> SimulatedCard:
    return SimulatedCard.create(path, 8192)


class Processes:
    """Child processes that run until their input ends."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[str]] = []

    def start(self, script: str, *arguments: object) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._all.append(child)
        return child

    def end(self) -> None:
        for child in self._all:
            child.kill()
            child.communicate(timeout=WAIT_S)


@pytest.fixture
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.end()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_an_empty_card(card: SimulatedCard) -> None:
    assert card.memory() == CardMemory(total_mib=8192, used_mib=0, free_mib=8192)
    assert card.holders() == ()


def test_allocations_add_up_and_go_with_their_owner(card: SimulatedCard, path: Path) -> None:
    card.allocate("mvoice", 2800)
    card.allocate("mvoice", 200)
    SimulatedCard(path).allocate("ollama", 5000)
    assert card.memory() == CardMemory(8192, 8000, 192)
    assert card.holders() == (
        Holder("mvoice", os.getpid(), 2800),
        Holder("mvoice", os.getpid(), 200),
        Holder("ollama", os.getpid(), 5000),
    )
    assert card.free("mvoice") == 3000
    assert card.memory().used_mib == 5000
    assert card.free("mvoice") == 0


def test_what_does_not_fit_is_refused_and_changes_nothing(card: SimulatedCard) -> None:
    card.allocate("ollama", 8000)
    with pytest.raises(OutOfMemory, match=r"asked for 193 MiB, 192 MiB free") as caught:
        card.allocate("mvoice", 193)
    assert (caught.value.asked_mib, caught.value.free_mib) == (193, 192)
    assert card.memory().used_mib == 8000
    card.allocate("mvoice", 192)
    assert card.memory().free_mib == 0


@pytest.mark.parametrize("mib", [0, -1])
def test_an_allocation_of_nothing_is_a_mistake(card: SimulatedCard, mib: int) -> None:
    with pytest.raises(ValueError, match="allocation"):
        card.allocate("mvoice", mib)


@pytest.mark.parametrize(("total_mib", "lag_s"), [(0, 0.0), (-1, 0.0), (1, -1.0)])
def test_an_impossible_card_is_a_mistake(path: Path, total_mib: int, lag_s: float) -> None:
    with pytest.raises(ValueError, match="card"):
        SimulatedCard.create(path, total_mib, release_lag_s=lag_s)


def test_creating_anew_empties_the_card(card: SimulatedCard, path: Path) -> None:
    card.allocate("mvoice", 100)
    SimulatedCard.create(path, 1000)
    assert card.memory() == CardMemory(1000, 0, 1000)


def test_freed_memory_lingers_for_the_lag(path: Path) -> None:
    now = 50.0
    SimulatedCard.create(path, 1000, release_lag_s=2.0)
    card = SimulatedCard(path, monotonic=lambda: now)
    card.allocate("mvoice", 700)
    assert card.free("mvoice") == 700
    assert card.memory() == CardMemory(1000, 700, 300)
    assert card.holders() == ()
    with pytest.raises(OutOfMemory, match="300 MiB free"):
        card.allocate("ollama", 400)
    now += 1.9
    assert card.memory().used_mib == 700
    now += 0.2
    assert card.memory().used_mib == 0
    card.allocate("ollama", 1000)


def test_another_process_is_seen_and_cannot_be_freed_from_here(
    card: SimulatedCard, path: Path, processes: Processes
) -> None:
    child = processes.start(HOLD, path, "ollama", 5000)
    assert said(child) == "held"
    assert card.holders() == (Holder("ollama", child.pid, 5000),)
    with pytest.raises(OutOfMemory):
        card.allocate("mvoice", 4000)
    assert card.free("ollama") == 0
    assert card.memory().used_mib == 5000


def test_a_killed_process_gives_its_memory_back_even_before_it_is_reaped(
    card: SimulatedCard, path: Path, processes: Processes
) -> None:
    child = processes.start(HOLD, path, "ollama", 5000)
    assert said(child) == "held"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert card.memory() == CardMemory(8192, 0, 8192)
    card.allocate("mvoice", 8192)
    child.wait(WAIT_S)
    assert card.holders() == (Holder("mvoice", os.getpid(), 8192),)


def test_a_process_that_got_the_pid_of_a_dead_one_holds_nothing(
    card: SimulatedCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.allocate("mvoice", 100)
    born = procfs.born(os.getpid())
    assert born is not None
    monkeypatch.setattr(card_module, "started", lambda _pid: born + 1)
    assert card.memory().used_mib == 0
    assert card.free("mvoice") == 0


def test_a_process_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 ("
    program.symlink_to(sys.executable)
    born = subprocess.run(
        [program, "-c", ALIVE],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert born.stdout.strip() == "True"


def test_processes_and_threads_at_once_lose_nothing(
    card: SimulatedCard, path: Path, processes: Processes
) -> None:
    children = [processes.start(CHURN, path, f"process-{number}") for number in range(3)]

    def churn(owner: str) -> None:
        for _ in range(100):
            card.allocate(owner, 10)
            card.free(owner)
        card.allocate(owner, 7)

    threads = [
        threading.Thread(target=churn, args=(f"thread-{number}",), name=f"churn-{number}")
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert [said(child) for child in children] == ["done"] * 3
    assert card.memory().used_mib == 6 * 7
    assert len(card.holders()) == 6


def test_a_missing_card_is_lost(tmp_path: Path) -> None:
    for card in (SimulatedCard(tmp_path / "none"), SimulatedCard(tmp_path / "no" / "none")):
        with pytest.raises(CardLost, match="no simulated card"):
            card.memory()
        with pytest.raises(CardLost, match="no simulated card"):
            card.allocate("mvoice", 1)
        with pytest.raises(CardLost, match="no simulated card"):
            card.free("mvoice")
    with pytest.raises(CardLost):
        SimulatedCard.create(tmp_path / "no" / "none", 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"total_mib": null, "release_lag_s": 0, "blocks": [], "releasing": []}',
        b'{"total_mib": 1e999, "release_lag_s": 0, "blocks": [], "releasing": []}',
        b'{"total_mib": 1, "release_lag_s": 0, "blocks": [{"pid": 1}], "releasing": []}',
    ],
)
def test_what_is_no_card_is_lost(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CardLost, match="no simulated card"):
        SimulatedCard(path).memory()


def test_a_card_that_cannot_be_written_is_lost_and_unchanged(
    card: SimulatedCard, path: Path
) -> None:
    path.with_name(path.name + ".new").mkdir()
    with pytest.raises(CardLost, match="cannot write"):
        card.allocate("mvoice", 1)
    assert card.memory().used_mib == 0


def test_a_lock_that_is_never_let_go_of_is_not_waited_for_forever(
    card: SimulatedCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_module, "LOCK_TIMEOUT_S", 0.02)
    with card._locked(), pytest.raises(CardLost, match="stays locked"):
        card.allocate("mvoice", 1)


# -- misbehaviour --------------------------------------------------------------------------------


def test_a_leak_stays_until_the_process_ends(card: SimulatedCard, processes: Processes) -> None:
    script = """
import sys
from gpumanager.gpu.simulated import SimulatedCard
card = SimulatedCard(sys.argv[1])
card.allocate("tts", 1000)
print(card.free("tts"), card.free("tts"), flush=True)
sys.stdin.read()
"""
    card.misbehave(leaks={"tts": 0.75})
    child = processes.start(script, card.path)
    assert child.stdout is not None
    assert child.stdout.readline() == "250 0\n"
    assert card.memory().used_mib == 750
    assert card.holders() == (Holder("tts", child.pid, 750, leaked=True),)
    child.kill()
    child.wait(WAIT_S)
    assert card.memory().used_mib == 0


def test_some_of_it_may_be_kept(card: SimulatedCard) -> None:
    card.allocate("tts", 700)
    card.allocate("tts", 300)
    assert card.free("tts", keep_mib=200) == 800
    assert card.memory().used_mib == 200
    assert card.free("tts", keep_mib=200) == 0
    assert card.free("tts") == 200


def test_the_view_by_process_counts_what_is_still_being_released(path: Path) -> None:
    now = [100.0]
    SimulatedCard.create(path, 8192, release_lag_s=2)
    card = SimulatedCard(path, monotonic=lambda: now[0])
    card.allocate("tts", 1000)
    card.allocate("llm", 500)
    card.free("tts")
    assert card.view() == (CardMemory(8192, 1500, 6692), {os.getpid(): 1500})
    now[0] += 3
    assert card.view() == (CardMemory(8192, 500, 7692), {os.getpid(): 500})


def test_a_card_may_keep_its_processes_to_itself(card: SimulatedCard) -> None:
    card.allocate("tts", 1000)
    card.misbehave(per_process=False)
    assert card.view() == (CardMemory(8192, 1000, 7192), None)
    card.misbehave(per_process=True, release_lag_s=0.0)
    assert card.view()[1] == {os.getpid(): 1000}


def test_a_release_in_two_steps(path: Path) -> None:
    now = 50.0
    card = SimulatedCard(path, monotonic=lambda: now)
    SimulatedCard.create(path, 8192, release_lag_s=1.2)
    card.misbehave(prompt_share=0.2)
    card.allocate("tts", 1000)
    assert card.free("tts") == 1000
    assert card.view() == (CardMemory(8192, 800, 7392), {os.getpid(): 800})
    now += 1.3
    assert card.memory().used_mib == 0


def test_a_blind_card_goes_on_but_does_not_tell(path: Path) -> None:
    now = 50.0
    SimulatedCard.create(path, 8192)
    card = SimulatedCard(path, monotonic=lambda: now)
    card.misbehave(blind_s=0.5)
    card.allocate("tts", 1000)
    with pytest.raises(CardLost, match="does not answer"):
        card.view()
    assert card.memory().used_mib == 1000
    now += 0.6
    assert card.view()[1] == {os.getpid(): 1000}
