"""Asynchronous jobs on disk: a SQLite database, and files beside it for what is large.

Whoever is told that something was kept can rely on it: `synchronous=FULL` has every transaction
synced before its caller goes on, and files are synced before a row names them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

from gpumanager.asyncjobs.files import Draft, Files
from gpumanager.asyncjobs.model import AsyncJob, Callback, Ended, Result, Submission
from gpumanager.asyncjobs.writer import Writer
from gpumanager.errors import BrokerError, IdempotencyMismatch, JobsFull, QueueFull

T = TypeVar("T")

VERSION = 2
_DATABASE = "jobs.sqlite3"
_FOLDER = "files"
_RETRY_S = 30.0

_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    kind TEXT NOT NULL,
    consumer TEXT NOT NULL,
    urgency INTEGER NOT NULL,
    requester TEXT NOT NULL,
    key TEXT,
    role TEXT NOT NULL,
    created REAL NOT NULL,
    environ TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT NOT NULL,
    callback TEXT,
    body BLOB,
    body_file TEXT,
    body_size INTEGER NOT NULL,
    started REAL,
    ended REAL,
    cancelling INTEGER NOT NULL DEFAULT 0,
    failure TEXT,
    status INTEGER,
    reason TEXT,
    headers TEXT,
    result BLOB,
    result_file TEXT,
    result_size INTEGER NOT NULL DEFAULT 0,
    callback_state TEXT NOT NULL DEFAULT 'pending',
    callback_attempts INTEGER NOT NULL DEFAULT 0,
    callback_due REAL,
    callback_failure TEXT,
    model TEXT
);
CREATE INDEX waiting ON jobs (urgency, number, consumer, state) WHERE state = 'waiting';
CREATE INDEX running ON jobs (number) WHERE state = 'running';
CREATE INDEX over ON jobs (ended, state) WHERE ended IS NOT NULL;
CREATE INDEX calling ON jobs (coalesce(callback_due, ended))
    WHERE callback IS NOT NULL AND callback_state = 'pending' AND ended IS NOT NULL;
CREATE INDEX theirs ON jobs (key, number);
CREATE UNIQUE INDEX submitted ON jobs (requester, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
"""
_COLUMNS = (
    "number, id, state, kind, consumer, urgency, requester, key, role, created, environ, "
    "idempotency_key, fingerprint, callback, started, ended, cancelling, failure, status, reason, "
    "headers, result_size, callback_state, callback_attempts, callback_due, callback_failure, model"
)


class Store:
    """Those of one broker, in `folder`. `open` before all else; safe from any thread then.

    Once `most_bytes` of bodies and results are kept, or the disk is full, it takes no new jobs
    (JobsFull), nor while `most_waiting` wait (QueueFull); what it has taken it keeps.
    """

    def __init__(self, folder: Path, *, most_bytes: int, most_waiting: int) -> None:
        self._folder = folder
        self._files = Files(folder / _FOLDER)
        self._most_bytes = most_bytes
        self._most_waiting = most_waiting
        self._writer = Writer(self._connect)
        self._reading = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._only: IO[bytes] | None = None
        self._counts = threading.Lock()
        self._bytes = 0
        self._waiting = 0

    @staticmethod
    def is_there(folder: Path) -> bool:
        """Whether a broker has kept jobs in this folder."""
        return (folder / _DATABASE).exists()

    def open(self) -> int:
        """Open it, and sweep the files that no row names: returns how many there were. Raises
        JobsFull if it cannot be opened or made."""
        try:
            self._files.make_folder()
            self._only = _alone(self._folder)
            self._writer.start()
            self._reader = self._connect()
        except (OSError, sqlite3.Error) as error:
            raise JobsFull(
                f"asynchronous jobs cannot be kept in {self._folder}: {_said(error)}"
            ) from error
        (self._bytes,) = self._one("SELECT coalesce(sum(body_size + result_size), 0) FROM jobs")
        (self._waiting,) = self._one("SELECT count(*) FROM jobs WHERE state = 'waiting'")
        named = self._all(
            "SELECT body_file FROM jobs WHERE body_file IS NOT NULL UNION ALL "
            "SELECT result_file FROM jobs WHERE result_file IS NOT NULL"
        )
        return self._files.sweep(frozenset(name for (name,) in named))

    def close(self) -> None:
        """Finish what was asked for, and close it. Idempotent."""
        self._writer.stop()
        with self._reading:
            if self._reader is not None:
                self._reader.close()
        if self._only is not None:
            self._only.close()

    # -- changes ---------------------------------------------------------------------------

    def draft(self) -> Draft:
        """For the body of a job that is to be submitted. Its `write` raises JobsFull."""

        def room(more: int) -> None:
            if self._bytes + more > self._most_bytes:
                raise self._full(f"{self._most_bytes // 2**20} MiB (jobs.max_mib) are spent")

        return Draft(self._files, f"{secrets.token_hex(16)}.body", room)

    def short(self, data: bytes) -> Draft:
        """A few bytes, for a result that the broker makes itself."""
        return Draft.of(self._files, data)

    def result_draft(self, job: AsyncJob) -> Draft:
        """For the result of a job: what was taken is kept, whatever has been spent."""
        return Draft(self._files, f"{job.id}.result", lambda _: None)

    def submit(self, submission: Submission, body: Draft, at: float) -> tuple[AsyncJob, bool]:
        """Keep a job: when this returns, it is on disk. True if it is a new one; False if its
        requester has submitted the same already under the same key. Raises IdempotencyMismatch,
        QueueFull, JobsFull."""
        new = False
        try:
            data, file = self._kept(body.finish)

            def insert(to: sqlite3.Connection) -> tuple[AsyncJob, bool]:
                known = _submitted(to, submission)
                if known is not None:
                    return known, False
                self._check_room(body.size)
                number = to.execute(
                    "INSERT INTO jobs (id, state, kind, consumer, urgency, requester, key, role, "
                    "created, environ, idempotency_key, fingerprint, callback, body, body_file, "
                    "body_size, model) "
                    "VALUES (?, 'waiting', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        secrets.token_hex(16),
                        submission.kind,
                        submission.consumer,
                        submission.urgency,
                        submission.requester,
                        submission.key,
                        submission.role,
                        at,
                        json.dumps(dict(submission.environ)),
                        submission.idempotency_key,
                        submission.fingerprint,
                        submission.callback,
                        data,
                        file,
                        body.size,
                        submission.model,
                    ),
                ).lastrowid
                self._count(waiting=1, size=body.size)
                made = to.execute(f"SELECT {_COLUMNS} FROM jobs WHERE number = ?", (number,))  # noqa: S608
                return _job(made.fetchone()), True

            job, new = self._changed(insert)
        finally:
            if not new:
                body.drop()
        return job, new

    def known(self, submission: Submission) -> AsyncJob | None:
        """The job that its requester has submitted under the same key. Raises
        IdempotencyMismatch if that was another one."""
        with self._reading:
            return _submitted(self._connection, submission)

    def sending(self, job: AsyncJob, consumer: str, at: float) -> bool:
        """It may be sent to the consumer from now on. False if somebody has cancelled it."""

        def change(to: sqlite3.Connection) -> bool:
            begun = to.execute(
                "UPDATE jobs SET state = 'running', started = ?, consumer = ? "
                "WHERE number = ? AND state = 'waiting' AND NOT cancelling",
                (at, consumer, job.number),
            ).rowcount
            self._count(waiting=-begun)
            return bool(begun)

        return self._changed(change)

    def again(self, job: AsyncJob) -> None:
        """It was not sent, or may be sent twice: it waits again, in its old place."""

        def change(to: sqlite3.Connection) -> None:
            back = to.execute(
                "UPDATE jobs SET state = 'waiting', started = NULL "
                "WHERE number = ? AND state = 'running'",
                (job.number,),
            ).rowcount
            self._count(waiting=back)

        self._changed(change)

    def ended(
        self,
        job: AsyncJob,
        state: Ended,
        at: float,
        *,
        failure: str | None = None,
        result: Result | None = None,
        body: Draft | None = None,
    ) -> AsyncJob | None:
        """It is over, with `result` and its `body`, if it has one. None if it was over already.
        Raises JobsFull, and can be called again then."""
        data, file = (None, None) if body is None else self._kept(body.finish)
        size = 0 if body is None else body.size

        def change(to: sqlite3.Connection) -> tuple[AsyncJob | None, str | None]:
            before = to.execute(
                "SELECT state, body_size, body_file FROM jobs WHERE number = ? AND ended IS NULL",
                (job.number,),
            ).fetchone()
            if before is None:
                return None, None
            to.execute(
                "UPDATE jobs SET state = ?, ended = ?, failure = ?, status = ?, reason = ?, "
                "headers = ?, result = ?, result_file = ?, result_size = ?, "
                "body = NULL, body_file = NULL, body_size = 0 WHERE number = ?",
                (
                    state,
                    at,
                    failure,
                    None if result is None else result.status,
                    None if result is None else result.reason,
                    None if result is None else json.dumps(result.headers),
                    data,
                    file,
                    size,
                    job.number,
                ),
            )
            self._count(waiting=-(before[0] == "waiting"), size=size - before[1])
            row = to.execute(f"SELECT {_COLUMNS} FROM jobs WHERE number = ?", (job.number,))  # noqa: S608
            return _job(row.fetchone()), before[2]

        new, left = self._changed(change)
        if left is not None:
            self._files.remove([left])
        if new is None and body is not None:
            body.drop()
        return new

    def cancel(self, job: AsyncJob, at: float) -> AsyncJob | None:
        """Somebody cancels it: one that waits is over, of one that runs that is noted. None if it
        was over already."""

        def change(to: sqlite3.Connection) -> None:
            to.execute(
                "UPDATE jobs SET cancelling = 1 WHERE number = ? AND ended IS NULL", (job.number,)
            )

        self._changed(change)
        now = self.find(job.id)
        if now is None or now.over:
            return None
        return self.ended(now, "cancelled", at) if now.state == "waiting" else now

    def called_back(self, job: AsyncJob, callback: Callback) -> None:
        """An attempt to tell of its end was made: keep how far that is now. Raises JobsFull."""

        def change(to: sqlite3.Connection) -> None:
            to.execute(
                "UPDATE jobs SET callback_state = ?, callback_attempts = ?, callback_due = ?, "
                "callback_failure = ? WHERE number = ?",
                (
                    callback.state,
                    callback.attempts,
                    callback.due,
                    callback.failure,
                    job.number,
                ),
            )

        self._changed(change)

    def sweep(self, before: float, most: int = 1000) -> int:
        """Forget those that ended before then; returns how many."""
        removed = 0
        while True:

            def change(to: sqlite3.Connection) -> list[tuple[Any, ...]]:
                gone = to.execute(
                    "DELETE FROM jobs WHERE number IN (SELECT number FROM jobs WHERE ended < ? "
                    "LIMIT ?) RETURNING result_file, body_size + result_size",
                    (before, most),
                ).fetchall()
                self._count(size=-sum(size for _, size in gone))
                return gone

            gone = self._changed(change)
            self._files.remove(name for name, _ in gone if name is not None)
            removed += len(gone)
            if len(gone) < most:
                break
        if removed:
            self._changed(lambda to: to.execute("PRAGMA incremental_vacuum").fetchall())
        return removed

    # -- looks -----------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    @property
    def bytes_kept(self) -> int:
        """Of bodies and results."""
        return self._bytes

    def find(self, name: str) -> AsyncJob | None:
        """The job with this id; None if there is none (any more)."""
        return next(iter(self._jobs("WHERE id = ?", name)), None)

    def next_ones(self, most: int, without: Collection[str] = ()) -> list[AsyncJob]:
        """The first of those that wait: the more urgent first, then as they came. `without`: not
        those for these consumers."""
        marks = ", ".join("?" * len(without))
        where = f"AND consumer NOT IN ({marks})" if without else ""
        return self._jobs(
            f"WHERE state = 'waiting' {where} ORDER BY urgency, number LIMIT ?", *without, most
        )

    def unfinished(self) -> list[AsyncJob]:
        """Those that run, or ran when a broker was killed."""
        return self._jobs("WHERE state = 'running' ORDER BY number")

    def cancelling(self) -> list[AsyncJob]:
        """Those that wait, although somebody has cancelled them."""
        return self._jobs("WHERE state = 'waiting' AND cancelling ORDER BY number")

    def next_callback(self, without: Collection[str] = ()) -> AsyncJob | None:
        """Of those that are over and of whose end somebody is to be told, the one that is due
        first, or will be; `without`: not of these URLs."""
        marks = ", ".join("?" * len(without))
        found = self._jobs(
            "WHERE callback IS NOT NULL AND callback_state = 'pending' AND ended IS NOT NULL "
            f"AND callback NOT IN ({marks}) ORDER BY coalesce(callback_due, ended) LIMIT 1",
            *without,
        )
        return next(iter(found), None)

    def counts(self) -> dict[str, int]:
        """How many there are in each state, but for those states that none is in; nothing while
        the database cannot be read: the status tells of more than these."""
        rows: list[tuple[Any, ...]] = []
        with contextlib.suppress(sqlite3.Error):
            rows = self._all(
                "SELECT 'waiting', count(*) FROM jobs WHERE state = 'waiting' UNION ALL "
                "SELECT 'running', count(*) FROM jobs WHERE state = 'running' UNION ALL "
                "SELECT state, count(*) FROM jobs WHERE ended IS NOT NULL GROUP BY state"
            )
        return {state: count for state, count in rows if count}

    def ahead(
        self, job: AsyncJob, without: Collection[str] = (), behind: AsyncJob | None = None
    ) -> dict[str, int]:
        """How many wait before it, by consumer; but for those with these ids. `behind`: only those
        that do not come before this one."""
        # Two queries, so that the first, which counts, finds all that it needs in an index.
        if behind is not None and behind.urgency == job.urgency:
            between = "urgency = ? AND number >= ? AND number < ?"
            limits: tuple[int, ...] = (job.urgency, behind.number, job.number)
        else:
            since = (-1, -1) if behind is None else (behind.urgency, behind.number)
            between = "(urgency, number) >= (?, ?) AND (urgency, number) < (?, ?)"
            limits = (*since, job.urgency, job.number)
        counts = dict(
            self._all(
                "SELECT consumer, count(*) FROM jobs INDEXED BY waiting WHERE state = 'waiting' "  # noqa: S608  # our own words
                f"AND {between} GROUP BY consumer",
                *limits,
            )
        )
        marks = ", ".join("?" * len(without))
        taken = (
            f"SELECT consumer FROM jobs WHERE id IN ({marks}) AND state = 'waiting' AND {between}"  # noqa: S608
        )
        for (consumer,) in self._all(taken, *without, *limits) if without else ():
            counts[consumer] = counts.get(consumer, 0) - 1
        return {consumer: count for consumer, count in counts.items() if count > 0}

    def page(self, most: int, whose: str | None, before: int | None = None) -> list[AsyncJob]:
        """The latest ones, the newest first: those of the key `whose`, None: all; those that came
        before the one with the number `before`."""
        conditions: list[str] = ["1"]
        values: list[object] = []
        if whose is not None:
            conditions.append("key = ?")
            values.append(whose)
        if before is not None:
            conditions.append("number < ?")
            values.append(before)
        where = " AND ".join(conditions)
        return self._jobs(f"WHERE {where} ORDER BY number DESC LIMIT ?", *values, most)

    def body(self, job: AsyncJob) -> tuple[bytes | IO[bytes], int]:
        """Its request's body, and how long it is; a file is the caller's to close."""
        data, file, size = self._one(
            "SELECT body, body_file, body_size FROM jobs WHERE number = ?", job.number
        )
        return (data or b"" if file is None else self._files.open(file)), size

    def result(self, job: AsyncJob) -> bytes | IO[bytes]:
        """The body of its result; a file is the caller's to close. Raises KeyError if it was swept
        meanwhile."""
        found = self._all("SELECT result, result_file FROM jobs WHERE number = ?", job.number)
        if not found:
            raise KeyError(job.id)
        data, file = found[0]
        if file is None:
            return data or b""
        try:
            return self._files.open(file)
        except FileNotFoundError:
            raise KeyError(job.id) from None

    # -- inside ----------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        path = self._folder / _DATABASE
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it holds what people asked for
        connection = sqlite3.connect(
            path, timeout=10, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA temp_store = MEMORY")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;"
                )
            elif version != VERSION:
                raise sqlite3.DatabaseError(
                    f"its version is {version}, and this broker knows {VERSION}"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._reader is not None  # noqa: S101  # opened before all else
        return self._reader

    def _all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._reading:
            return self._connection.execute(query, values).fetchall()

    def _one(self, query: str, *values: object) -> tuple[Any, ...]:
        (row,) = self._all(query, *values)
        return row

    def _jobs(self, rest: str, *values: object) -> list[AsyncJob]:
        rows = self._all(f"SELECT {_COLUMNS} FROM jobs {rest}", *values)  # noqa: S608  # our own words
        return [_job(row) for row in rows]

    def _changed(self, change: Callable[[sqlite3.Connection], T]) -> T:
        return self._kept(lambda: self._writer.do(change))

    def _kept(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except sqlite3.Error as error:
            # A transaction that came to nothing may have counted.
            self._recount()
            raise self._full(f"the database: {_said(error)}") from error
        except OSError as error:
            raise self._full(_said(error)) from error

    def _recount(self) -> None:
        with contextlib.suppress(sqlite3.Error), self._counts:
            (self._bytes,) = self._one("SELECT coalesce(sum(body_size + result_size), 0) FROM jobs")
            (self._waiting,) = self._one("SELECT count(*) FROM jobs WHERE state = 'waiting'")

    def _full(self, why: str) -> BrokerError:
        return JobsFull(f"no room for another asynchronous job: {why}", retry_after=_RETRY_S)

    def _check_room(self, size: int) -> None:
        if self._waiting >= self._most_waiting:
            raise QueueFull(
                f"{self._waiting} asynchronous jobs wait, and no more may (jobs.max_waiting)",
                retry_after=_RETRY_S,
            )
        if self._bytes + size > self._most_bytes:
            raise self._full(f"{self._most_bytes // 2**20} MiB (jobs.max_mib) are spent")

    def _count(self, *, waiting: int = 0, size: int = 0) -> None:
        with self._counts:
            self._waiting += waiting
            self._bytes += size


def _alone(folder: Path) -> IO[bytes]:
    """See that no other broker has these jobs, as long as what is returned is open. Raises
    BlockingIOError."""
    lock = (folder / "lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        lock.close()
        raise
    return lock


def _submitted(to: sqlite3.Connection, submission: Submission) -> AsyncJob | None:
    if submission.idempotency_key is None:
        return None
    row = to.execute(
        f"SELECT {_COLUMNS} FROM jobs WHERE requester = ? AND idempotency_key = ?",  # noqa: S608
        (submission.requester, submission.idempotency_key),
    ).fetchone()
    if row is None:
        return None
    known = _job(row)
    if known.fingerprint != submission.fingerprint:
        raise IdempotencyMismatch(
            f"another request was submitted under this Idempotency-Key: it is job {known.id}"
        )
    return known


def _job(row: Iterable[Any]) -> AsyncJob:
    (
        number, name, state, kind, consumer, urgency, requester, key, role, created, environ,
        idempotency_key, fingerprint, callback, started, ended, cancelling, failure, status,
        reason, headers, size, callback_state, attempts, due, callback_failure, model,
    ) = row  # fmt: skip
    result = None
    if status is not None:
        pairs = tuple((str(k), str(v)) for k, v in json.loads(headers))
        result = Result(status, reason, pairs, size)
    return AsyncJob(
        number=number,
        id=name,
        state=state,
        kind=kind,
        consumer=consumer,
        urgency=urgency,
        requester=requester,
        key=key,
        role=role,
        created=created,
        environ=json.loads(environ),
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
        callback=(
            None
            if callback is None
            else Callback(callback, callback_state, attempts, due, callback_failure)
        ),
        started=started,
        ended=ended,
        cancelling=bool(cancelling),
        failure=failure,
        result=result,
        model=model,
    )


def _said(error: Exception) -> str:
    if isinstance(error, BlockingIOError):
        return "another broker keeps its jobs there"
    if isinstance(error, OSError) and error.errno is not None:
        return "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno)
    return str(error)
