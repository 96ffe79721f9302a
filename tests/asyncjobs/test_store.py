"""Asynchronous jobs on disk: what was kept is there again, and nothing else."""

from __future__ import annotations

import io
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gpumanager.asyncjobs.files import pieces
from gpumanager.asyncjobs.model import SMALL_BYTES, AsyncJob, Result, Submission
from gpumanager.asyncjobs.store import Store
from gpumanager.errors import IdempotencyMismatch, JobsFull, QueueFull, ShuttingDown

LARGE = bytes(SMALL_BYTES + 1)


def make(folder: Path, most_bytes: int = 2**30, most_waiting: int = 100) -> Store:
    store = Store(folder, most_bytes=most_bytes, most_waiting=most_waiting)
    try:
        store.open()
    except JobsFull:
        store.close()
        raise
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = make(tmp_path)
    yield made
    made.close()


def submission(**changes: Any) -> Submission:
    said = {
        "kind": "tts",
        "consumer": "voice",
        "urgency": 5,
        "requester": "me",
        "key": None,
        "role": "admin",
        "environ": {"PATH_INFO": "/v1/tts", "HTTP_X": "\xe9"},
    }
    return Submission(**{**said, **changes})


def submit(store: Store, body: bytes = b"it", at: float = 1.0, **changes: Any) -> AsyncJob:
    draft = store.draft()
    try:
        for piece in pieces(io.BytesIO(body), len(body)):
            draft.write(piece)
        return store.submit(submission(**changes), draft, at)[0]
    finally:
        draft.close()


def end(store: Store, job: AsyncJob, body: bytes = b"said", at: float = 2.0) -> AsyncJob | None:
    draft = store.result_draft(job)
    draft.write(body)
    headers = (("X-It", "\xe9"), ("X-It", "2"))
    return store.ended(job, "done", at, result=Result(200, "OK", headers), body=draft)


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in (folder / "files").iterdir())


def read(kept: Any) -> bytes:
    if isinstance(kept, bytes):
        return kept
    with kept:
        return bytes(kept.read())


@pytest.mark.parametrize("body", [b"", b"it", LARGE])
def test_a_job_and_its_result_are_there_again(tmp_path: Path, body: bytes) -> None:
    first = make(tmp_path)
    job = submit(first, body)
    first.close()
    second = make(tmp_path)
    assert second.find(job.id) == job
    data, size = second.body(job)
    assert (read(data), size) == (body, len(body))
    assert second.sending(job, "other", 1.5)
    over = end(second, job, body)
    second.close()
    third = make(tmp_path)
    again = third.find(job.id)
    assert again == over
    assert again is not None
    assert (again.state, again.consumer, again.started, again.ended) == ("done", "other", 1.5, 2.0)
    assert again.result is not None
    assert again.result.headers == (("X-It", "\xe9"), ("X-It", "2"))
    assert read(third.result(again)) == body
    assert third.bytes_kept == len(body)  # the request's is needed no more
    assert third.waiting == 0
    third.close()
    assert files(tmp_path) == ([f"{job.id}.result"] if len(body) > SMALL_BYTES else [])


def test_the_next_ones_are_the_most_urgent_then_as_they_came(store: Store) -> None:
    names = {submit(store, urgency=u, consumer=c).id: n for n, u, c in ORDER}
    assert [names[job.id] for job in store.next_ones(10)] == ["c", "a", "d", "b"]
    assert [names[job.id] for job in store.next_ones(10, ["voice"])] == ["d"]
    assert [names[job.id] for job in store.next_ones(2)] == ["c", "a"]
    last = store.next_ones(4)[-1]
    assert store.ahead(last) == {"voice": 2, "draw": 1}
    first = store.next_ones(1)[0]
    assert store.ahead(last, [first.id]) == {"voice": 1, "draw": 1}


def test_the_ones_before_several_are_counted_once(store: Store) -> None:
    urgencies = [5, 5, 3, 5, 7, 5]
    jobs = [submit(store, consumer="ab"[n % 2], urgency=u) for n, u in enumerate(urgencies)]
    in_order = sorted(jobs, key=lambda job: (job.urgency, job.number))
    for without in ([], [jobs[0].id], [jobs[2].id, jobs[5].id, "gone"]):
        summed: Counter[str] = Counter()
        before = None
        for job in in_order:
            summed.update(store.ahead(job, without, before))
            assert summed == store.ahead(job, without)
            before = job
    assert summed.total() == len(jobs) - 3


def test_it_counts_those_in_each_state(store: Store) -> None:
    assert store.counts() == {}
    jobs = [submit(store) for _ in range(6)]
    assert store.sending(jobs[0], "voice", 2)
    assert store.sending(jobs[1], "voice", 2)
    store.ended(jobs[1], "done", 3)
    store.ended(jobs[2], "cancelled", 3)
    store.again(jobs[0])
    assert store.sending(jobs[3], "voice", 4)
    assert store.counts() == {"waiting": 3, "running": 1, "done": 1, "cancelled": 1}
    store.sweep(5)
    assert store.counts() == {"waiting": 3, "running": 1}
    store.close()
    assert store.counts() == {}


def test_places_and_counts_come_from_indexes(store: Store) -> None:
    """What pages that are open ask for every two seconds, whatever waits."""
    looked: list[str] = []
    with closing(sqlite3.connect(store._folder / "jobs.sqlite3")) as database:

        def explained(query: str, *values: object) -> list[tuple[Any, ...]]:
            plan = database.execute(f"EXPLAIN QUERY PLAN {query}", values)
            looked.extend(step for *_, step in plan if "jobs" in step)
            return []

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "_all", explained)
            first, last = AsyncJob(**FIELDS, number=1), AsyncJob(**FIELDS, number=9)
            store.ahead(last)
            store.ahead(last, ["x"], first)
            store.counts()
            store.next_ones(3)
    assert looked
    assert all("INDEX" in step for step in looked), looked
    counted = [step for step in looked if "urgency" in step and "COVERING" in step]
    assert len(counted) == 2


FIELDS: dict[str, Any] = {
    "id": "x", "state": "waiting", "kind": "tts", "consumer": "voice", "urgency": 5,
    "requester": "me", "key": None, "role": "admin", "created": 1.0,
}  # fmt: skip


ORDER = [("a", 5, "voice"), ("b", 6, "voice"), ("c", 1, "voice"), ("d", 5, "draw")]


def test_one_that_is_sent_again_keeps_its_place(store: Store) -> None:
    first, second = submit(store), submit(store)
    store.sending(first, "voice", 2.0)
    assert [each.id for each in store.next_ones(9)] == [second.id]
    assert (store.waiting, len(store.unfinished())) == (1, 1)
    store.again(first)
    assert [each.id for each in store.next_ones(9)] == [first.id, second.id]
    assert store.waiting == 2


def test_one_that_waits_and_was_cancelled_is_never_sent(store: Store) -> None:
    job = submit(store)
    over = store.cancel(job, 2.0)
    assert over is not None
    assert over.state == "cancelled"
    assert not store.sending(job, "voice", 3.0)
    assert store.cancel(job, 4.0) is None
    assert end(store, job) is None
    assert store.waiting == 0


def test_one_that_runs_and_was_cancelled_is_noted(store: Store) -> None:
    job = submit(store)
    assert store.sending(job, "voice", 2.0)
    noted = store.cancel(job, 3.0)
    assert noted is not None
    assert (noted.state, noted.cancelling) == ("running", True)


def test_the_same_key_is_the_same_job_of_one_requester(store: Store) -> None:
    one = submit(store, idempotency_key="k", fingerprint="x")
    assert submit(store, LARGE, idempotency_key="k", fingerprint="x").id == one.id
    assert submit(store, idempotency_key="k", fingerprint="y", requester="you").id != one.id
    with pytest.raises(IdempotencyMismatch):
        submit(store, LARGE, idempotency_key="k", fingerprint="y")
    assert store.waiting == 2


def test_what_does_not_become_a_job_leaves_no_file(store: Store, tmp_path: Path) -> None:
    submit(store, idempotency_key="k", fingerprint="x")
    submit(store, LARGE, idempotency_key="k", fingerprint="x")
    draft = store.draft()
    draft.write(LARGE)
    assert len(files(tmp_path)) == 1
    draft.close()  # its client went away
    assert files(tmp_path) == []


def test_files_that_no_row_names_are_swept_at_the_start(tmp_path: Path) -> None:
    store = make(tmp_path)
    job = submit(store, LARGE)
    store.close()
    kept = files(tmp_path)
    (tmp_path / "files" / "orphan.body").write_bytes(LARGE)
    again = Store(tmp_path, most_bytes=2**30, most_waiting=100)
    assert again.open() == 1
    assert files(tmp_path) == kept
    assert read(again.body(job)[0]) == LARGE
    again.close()


def test_it_takes_no_more_than_may_wait(tmp_path: Path) -> None:
    store = make(tmp_path, most_waiting=2)
    jobs = [submit(store), submit(store)]
    with pytest.raises(QueueFull, match="max_waiting"):
        submit(store)
    store.sending(jobs[0], "voice", 2.0)
    submit(store)
    with pytest.raises(QueueFull):
        submit(store)
    store.close()


def test_it_takes_no_more_than_may_be_kept_but_every_result(tmp_path: Path) -> None:
    store = make(tmp_path, most_bytes=100)
    job = submit(store, bytes(60))
    with pytest.raises(JobsFull, match="max_mib"):
        submit(store, bytes(41))
    assert submit(store, bytes(40)).number == 2
    assert end(store, job, LARGE) is not None
    assert store.bytes_kept == 40 + len(LARGE)
    with pytest.raises(JobsFull):
        submit(store, b"x")
    assert store.sweep(before=3.0) == 1
    assert store.bytes_kept == 40
    assert files(tmp_path) == []
    assert store.find(job.id) is None
    with pytest.raises(KeyError):
        store.result(job)
    store.close()


def test_a_full_disk_refuses_new_jobs_and_keeps_the_old(store: Store) -> None:
    """The database may not grow any more: as on a disk without a free block."""
    job = submit(store, b"first")
    (pages,) = store._writer.do(lambda to: to.execute("PRAGMA page_count").fetchone())
    store._writer.do(lambda to: to.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    with pytest.raises(JobsFull, match="full"):
        submit(store, bytes(SMALL_BYTES))
    waiting = store.waiting
    assert read(store.body(job)[0]) == b"first"
    assert store.sending(job, "voice", 2.0)
    assert store.waiting == waiting - 1
    store._writer.do(lambda to: to.execute("PRAGMA max_page_count = 1000000").fetchone())
    assert submit(store, bytes(SMALL_BYTES)).number > job.number


def test_changes_that_come_at_once_are_each_all_or_nothing(store: Store) -> None:
    job = submit(store)

    def half(to: sqlite3.Connection) -> None:
        to.execute("UPDATE jobs SET kind = 'x'")
        raise KeyError(job.id)

    with pytest.raises(KeyError):
        store._writer.do(half)
    found = store.find(job.id)
    assert found is not None
    assert found.kind == "tts"


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    store = make(tmp_path / "new")
    submit(store, LARGE)
    store.close()
    modes = {each.name: each.stat().st_mode & 0o777 for each in (tmp_path / "new").rglob("*")}
    assert modes.pop("lock") & 0o022 == 0
    assert modes.pop("files") == 0o700
    assert set(modes.values()) == {0o600}


def test_two_brokers_do_not_have_the_same_jobs(store: Store, tmp_path: Path) -> None:
    with pytest.raises(JobsFull, match="another broker"):
        make(tmp_path)


def test_a_newer_database_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(JobsFull, match="version is 99"):
        make(tmp_path)


def test_after_its_end_it_takes_nothing(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.close()
    store.close()
    with pytest.raises(ShuttingDown):
        submit(store)


def test_pages_are_of_the_newest_first(store: Store) -> None:
    jobs = [submit(store, key=key) for key in ("a", "b", "a")]
    assert [each.number for each in store.page(9, None)] == [3, 2, 1]
    assert [each.number for each in store.page(9, "a")] == [3, 1]
    assert [each.number for each in store.page(1, "a", before=3)] == [jobs[0].number]
