"""Which jobs are run, and what becomes of each, whatever their run comes to."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from gpumanager.asyncjobs import executor as executing
from gpumanager.asyncjobs.executor import Executor
from gpumanager.asyncjobs.files import Draft
from gpumanager.asyncjobs.model import SMALL_BYTES, AsyncJob, Result, Submission
from gpumanager.asyncjobs.run import Outcome, Run
from gpumanager.asyncjobs.store import Store
from gpumanager.errors import ConsumerUnreachable, JobsFull
from tests.support.clock import FakeClock
from tests.support.threads import PATIENCE_S, eventually

Play = Callable[[AsyncJob, Run], Outcome]
OK = Outcome(Result(200, "OK"))


def refused(code: str) -> Outcome:
    return Outcome(Result(503, "Service Unavailable"), code)


class Scene:
    """An executor over a real store; `play` says what becomes of each job."""

    def __init__(self, folder: Path, play: Play, feeders: int = 1) -> None:
        self.store = Store(folder, most_bytes=2**30, most_waiting=100)
        self.store.open()
        self.clock = FakeClock()
        self.ended: list[AsyncJob] = []
        self.draining = threading.Event()
        self.order: list[str] = []
        self._told = play
        self.executor = Executor(
            self.store,
            self._play,
            self.clock,
            feeders=feeders,
            keep_s=100.0,
            draining=self.draining.is_set,
            ended=self.ended.append,
            changed=lambda: None,
        )

    def _play(self, job: AsyncJob, body: IO[bytes], length: int, run: Run) -> Outcome:
        self.order.append(body.read(length).decode())
        return self._told(job, run)

    def submit(self, body: bytes = b"it", consumer: str = "voice") -> AsyncJob:
        draft = self.store.draft()
        draft.write(body)
        said = Submission("tts", consumer, 5, "me", None, "admin", {})
        job, _ = self.store.submit(said, draft, self.clock.now().timestamp())
        self.executor.wake()
        return job

    def state(self, job: AsyncJob) -> str:
        found = self.store.find(job.id)
        assert found is not None
        return found.state


@contextmanager
def scene(folder: Path, play: Play, feeders: int = 1) -> Iterator[Scene]:
    made = Scene(folder, play, feeders)
    try:
        yield made
    finally:
        made.executor.stop()
        made.store.close()


def sent(job: AsyncJob, run: Run) -> Outcome:
    run.joined()
    run.sending(job.consumer)
    run.write(b"said")
    return OK


def test_those_that_wait_are_run_in_their_order(tmp_path: Path) -> None:
    with scene(tmp_path, sent) as it:
        jobs = [it.submit(b"%d" % number) for number in range(5)]
        it.executor.start()
        eventually(lambda: len(it.ended) == 5)
        assert [each.id for each in it.ended] == [each.id for each in jobs]
        assert it.order == ["0", "1", "2", "3", "4"]
        assert it.store.result(it.ended[0]) == b"said"


def test_a_later_one_does_not_join_the_queue_before_an_earlier_one(tmp_path: Path) -> None:
    joined: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def play(job: AsyncJob, run: Run) -> Outcome:
        if job.number == 1:
            begun.set()
            go_on.wait(PATIENCE_S)
        joined.append(job.number)
        return sent(job, run)

    with scene(tmp_path, play, feeders=4) as it:
        for _ in range(3):
            it.submit()
        it.executor.start()
        assert begun.wait(PATIENCE_S)
        assert it.executor.taken() == {it.store.page(9, None)[-1].id}
        go_on.set()
        eventually(lambda: len(it.ended) == 3)
        assert joined == [1, 2, 3]


@pytest.mark.parametrize("code", ["queue_full", "consumer_unreachable", "queue_timeout"])
def test_one_that_the_broker_cannot_run_now_waits_and_is_tried_again(
    tmp_path: Path, code: str
) -> None:
    outcomes: list[Any] = [refused(code)]

    def play(job: AsyncJob, run: Run) -> Outcome:
        return outcomes.pop() if outcomes else sent(job, run)

    with scene(tmp_path, play) as it:
        job = it.submit()
        it.executor.start()
        eventually(lambda: not outcomes and not it.executor.taken())
        other = it.submit(consumer="draw")  # its consumer may well be there
        eventually(lambda: it.state(other) == "done")
        assert it.state(job) == "waiting"
        it.clock.advance(1.0)
        eventually(lambda: it.state(job) == "done")


def test_one_without_room_holds_up_no_other_of_its_consumer(tmp_path: Path) -> None:
    def play(job: AsyncJob, run: Run) -> Outcome:
        return refused("insufficient_vram") if job.number == 1 else sent(job, run)

    with scene(tmp_path, play) as it:
        large, small = it.submit(), it.submit()
        it.executor.start()
        eventually(lambda: it.state(small) == "done")
        assert it.state(large) == "waiting"
        it.clock.advance(101.0)  # it was tried for as long as it would be kept
        eventually(lambda: len(it.ended) == 2)
        assert it.state(large) == "failed"
        assert it.ended[-1].failure == "insufficient_vram"


def test_what_shuts_it_down_leaves_it_to_the_next_broker(tmp_path: Path) -> None:
    def play(job: AsyncJob, run: Run) -> Outcome:
        run.joined()
        if job.number == 1:
            run.sending("voice")
        else:
            it.draining.set()
        return refused("shutting_down")

    with scene(tmp_path, play) as it:
        cut_off, not_sent, not_tried = it.submit(), it.submit(), it.submit()
        it.executor.start()
        eventually(lambda: it.draining.is_set() and not it.executor.taken())
        assert it.state(cut_off) == "running"
        assert it.state(not_sent) == it.state(not_tried) == "waiting"
        assert it.ended == []
        assert len(it.order) == 2


def test_a_broken_answer_is_told_as_the_result(tmp_path: Path) -> None:
    def play(job: AsyncJob, run: Run) -> Outcome:
        sent(job, run)
        error = ConsumerUnreachable("it broke off")
        return Outcome(OK.answer, error.code, broke_off=error)

    with scene(tmp_path, play) as it:
        it.submit()
        it.executor.start()
        eventually(lambda: it.ended)
        (job,) = it.ended
        assert (job.state, job.failure) == ("failed", "consumer_unreachable")
        assert it.store.result(job) == ConsumerUnreachable("it broke off").payload()


def test_a_fault_of_the_brokers_own_ends_the_job_only(tmp_path: Path) -> None:
    def play(job: AsyncJob, run: Run) -> Outcome:
        if job.number == 1:
            raise ZeroDivisionError
        return sent(job, run)

    with scene(tmp_path, play) as it:
        it.submit()
        it.submit()
        it.executor.start()
        eventually(lambda: len(it.ended) == 2)
        assert [each.failure for each in it.ended] == ["internal_error", None]


def test_a_result_that_the_full_disk_cannot_hold_fails_and_the_job_is_seen_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_out = threading.Event()

    def play(_: AsyncJob, run: Run) -> Outcome:
        run.sending("voice")
        monkeypatch.setattr(Draft, "write", full)
        for _piece in range(3):
            run.write(bytes(SMALL_BYTES))
        monkeypatch.undo()
        seen_out.set()
        return OK

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with scene(tmp_path, play) as it:
        it.submit()
        it.executor.start()
        eventually(lambda: it.ended)
        assert seen_out.is_set()
        assert (it.ended[0].state, it.ended[0].failure) == ("failed", "jobs_full")


def test_the_end_is_kept_as_soon_as_the_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executing, "KEEP_AGAIN_S", 0.01)
    tries: list[int] = []
    with scene(tmp_path, sent) as it:
        as_it_is = it.store.ended

        def at_first_full(*args: Any, **named: Any) -> Any:
            tries.append(1)
            if len(tries) < 3:
                raise JobsFull("the disk is full")
            return as_it_is(*args, **named)

        monkeypatch.setattr(it.store, "ended", at_first_full)
        it.submit()
        it.executor.start()
        eventually(lambda: it.ended)
        assert len(tries) == 3
        assert it.store.result(it.ended[0]) == b"said"


def test_one_that_goes_on_is_over_when_it_is_told_so(tmp_path: Path) -> None:
    runs: list[Run] = []

    def play(job: AsyncJob, run: Run) -> Outcome:
        outcome = sent(job, run)
        run.goes_on()
        runs.append(run)
        return outcome

    with scene(tmp_path, play) as it:
        job = it.submit()
        it.executor.start()
        eventually(lambda: runs)
        assert it.state(job) == "running"
        runs[0].over(None)
        eventually(lambda: it.state(job) == "done")
        other = it.submit()
        eventually(lambda: len(runs) == 2)
        it.executor.stop()  # nobody follows it any more
        runs[1].over(None)
        assert it.state(other) == "running"
