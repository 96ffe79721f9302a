"""One thread that makes every change of the database, in the order in which they are asked for."""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from gpumanager.errors import ShuttingDown
from gpumanager.worker import JOIN_TIMEOUT_S

T = TypeVar("T")

MOST_AT_ONCE = 256
"""Changes in one transaction."""

LONGEST_WAIT_S = 60.0
"""For a disk that hangs: whoever waits is told."""

Change = tuple[Callable[[sqlite3.Connection], Any], "Future[Any]"]


class Writer:
    """Owns the connection of `connect`, which is called on its thread. Changes that come while the
    disk works on earlier ones go to it together, so that many clients at once wait for few syncs;
    each is still all or nothing."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._changes: queue.SimpleQueue[Change | None] = queue.SimpleQueue()
        self._opened: Future[None] = Future()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="async-writer", daemon=True)

    def start(self) -> None:
        """Open the database. Raises what `connect` raises."""
        self._thread.start()
        self._opened.result(LONGEST_WAIT_S)

    def do(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Have `change` made in a transaction, and return what it returns once that is on disk.
        Raises what it raises, sqlite3.Error if it cannot be kept, or ShuttingDown."""
        made: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise ShuttingDown("the broker shuts down", retry_after=1)
            self._changes.put((change, made))
        try:
            return made.result(LONGEST_WAIT_S)
        except TimeoutError:
            raise sqlite3.OperationalError("the disk did not answer") from None

    def stop(self) -> None:
        """Make the changes that were asked for already, and close the database. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._changes.put(None)
        if self._thread.ident is not None:
            self._thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            connection = self._connect()
        except BaseException as error:  # noqa: BLE001  # whoever starts it is told
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        try:
            while (first := self._changes.get()) is not None:
                changes, last = [first], False
                while len(changes) < MOST_AT_ONCE and not self._changes.empty():
                    another = self._changes.get()
                    if another is None:
                        last = True
                        break
                    changes.append(another)
                _make(connection, changes)
                if last:
                    break
        finally:
            connection.close()


def _make(connection: sqlite3.Connection, changes: list[Change]) -> None:
    outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for change, made in changes:
            connection.execute("SAVEPOINT one")
            try:
                outcomes.append((made, change(connection), None))
            except Exception as error:  # whoever asked for it is told
                outcomes.append((made, None, error))
                if not connection.in_transaction:  # a full disk rolls back all of it
                    raise
                connection.execute("ROLLBACK TO one")
            connection.execute("RELEASE one")
        connection.execute("COMMIT")
    except Exception as error:  # noqa: BLE001
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        for _, made in changes:
            made.set_exception(error)
        return
    for made, value, failed in outcomes:
        if failed is None:
            made.set_result(value)
        else:
            made.set_exception(failed)
