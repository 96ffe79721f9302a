"""A simulated card that several processes share through one file.

Every write replaces the file as a whole under a lock beside it, so a process that is killed in
the middle of one leaves the card intact, and readers need no lock.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gpumanager.host.procfs import born as started

LOCK_TIMEOUT_S = 5.0
_LOCK_POLL_S = 0.001


class CardLost(OSError):
    """There is no card in the file: it is missing, or not readable as one."""


class OutOfMemory(Exception):
    """The card has not enough free memory for an allocation."""

    def __init__(self, asked_mib: int, free_mib: int) -> None:
        super().__init__(f"out of memory: asked for {asked_mib} MiB, {free_mib} MiB free")
        self.asked_mib = asked_mib
        self.free_mib = free_mib


@dataclass(frozen=True, slots=True)
class CardMemory:
    """What the card's memory looks like at one moment."""

    total_mib: int
    used_mib: int
    free_mib: int


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds how much of the card. `leaked`: it was freed, but did not come back."""

    owner: str
    pid: int
    mib: int
    leaked: bool = False


@dataclass(frozen=True, slots=True)
class _Block:
    owner: str
    pid: int
    born: int
    mib: int
    leaked: bool = False


@dataclass(frozen=True, slots=True)
class _Releasing:
    pid: int
    born: int
    mib: int
    until: float


@dataclass(frozen=True, slots=True)
class _State:
    total_mib: int
    release_lag_s: float
    per_process: bool = True
    leaks: dict[str, float] = field(default_factory=dict)
    prompt_share: float = 0.0
    blind_until: float = 0.0
    blocks: tuple[_Block, ...] = ()
    releasing: tuple[_Releasing, ...] = ()

    def memory(self) -> CardMemory:
        used = sum(block.mib for block in self.blocks) + sum(each.mib for each in self.releasing)
        return CardMemory(self.total_mib, used, self.total_mib - used)


_SAVED = TypeAdapter(_State)


class SimulatedCard:
    """The card in the file at `path`; any number of processes and threads may use it at once.

    Memory belongs to the process that allocated it: only that process can free it, and its end,
    however it comes, gives it back. Every method raises CardLost where there is no card.
    `monotonic` has to be the same clock in all of them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        self._monotonic = monotonic

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], total_mib: int, *, release_lag_s: float = 0.0
    ) -> SimulatedCard:
        """Put an empty card into the file at `path`, in place of what is there.

        Freed memory counts as used for another `release_lag_s` seconds, as with real drivers.
        """
        if total_mib <= 0 or release_lag_s < 0:
            raise ValueError("a card needs memory, and a lag cannot be negative")
        card = cls(path)
        with card._locked():
            card._write(_State(total_mib, release_lag_s))
        return card

    def misbehave(
        self,
        *,
        release_lag_s: float | None = None,
        leaks: Mapping[str, float] | None = None,
        per_process: bool | None = None,
        prompt_share: float | None = None,
        blind_s: float | None = None,
    ) -> None:
        """Change how the card behaves from now on; what is None stays.

        `prompt_share` (0 to 1) of what is freed comes back at once, and only the rest after
        `release_lag_s`. For `blind_s` seconds the card does not tell who is on it (`view` raises
        CardLost), as when a driver's call fails; all else goes on.
        `leaks` gives, by owner, the share (0 to 1) of what it frees that stays taken until its
        process ends; with `per_process` False nobody can tell which process holds what, as on
        WSL2 or in a container without the host's processes.
        """
        changes: dict[str, Any] = {
            "release_lag_s": release_lag_s,
            "leaks": leaks,
            "per_process": per_process,
            "prompt_share": prompt_share,
            "blind_until": None if blind_s is None else self._monotonic() + blind_s,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        with self._locked():
            self._write(replace(self._read(), **given))

    def allocate(self, owner: str, mib: int) -> None:
        """Take `mib` for `owner` in this process, beside what it has. Raises OutOfMemory."""
        if mib <= 0:
            raise ValueError(f"an allocation of {mib} MiB")
        pid = os.getpid()
        born = started(pid)
        if born is None:
            raise RuntimeError("/proc does not tell of this process")
        with self._locked():
            state = self._read()
            free = state.memory().free_mib
            if mib > free:
                raise OutOfMemory(mib, free)
            block = _Block(owner, pid, born, mib)
            self._write(replace(state, blocks=(*state.blocks, block)))

    def free(self, owner: str, *, keep_mib: int = 0) -> int:
        """Give back all that `owner` holds in this process, but `keep_mib`; returns the MiB that
        come back, less what leaks."""
        pid = os.getpid()
        with self._locked():
            state = self._read()
            freed = [
                each
                for each in state.blocks
                if (each.owner, each.pid) == (owner, pid) and not each.leaked
            ]
            back = sum(block.mib for block in freed) - keep_mib
            if back <= 0:
                return 0
            born = freed[0].born
            lost = round(back * state.leaks.get(owner, 0.0))
            blocks = [block for block in state.blocks if block not in freed]
            if keep_mib:
                blocks.append(_Block(owner, pid, born, keep_mib))
            if lost:
                blocks.append(_Block(owner, pid, born, lost, leaked=True))
            releasing = list(state.releasing)
            late = round((back - lost) * (1 - state.prompt_share))
            if state.release_lag_s and late > 0:
                until = self._monotonic() + state.release_lag_s
                releasing.append(_Releasing(pid, born, late, until))
            self._write(replace(state, blocks=tuple(blocks), releasing=tuple(releasing)))
        return back - lost

    def memory(self) -> CardMemory:
        """The memory as it is now."""
        return self._read().memory()

    def holders(self) -> tuple[Holder, ...]:
        """Who holds memory now, a row for each allocation, oldest first."""
        return tuple(
            Holder(block.owner, block.pid, block.mib, block.leaked) for block in self._read().blocks
        )

    def view(self) -> tuple[CardMemory, dict[int, int] | None]:
        """The memory, and the MiB of each process by pid, as of one moment; None for the latter
        where the card does not tell. Raises CardLost while the card is blind."""
        state = self._read()
        if self._monotonic() < state.blind_until:
            raise CardLost("the simulated card does not answer")
        if not state.per_process:
            return state.memory(), None
        held: dict[int, int] = {}
        shares = [(each.pid, each.mib) for each in state.blocks]
        shares += [(each.pid, each.mib) for each in state.releasing]
        for pid, mib in shares:
            held[pid] = held.get(pid, 0) + mib
        return state.memory(), held

    def _read(self) -> _State:
        """The state, without what ended since it was written."""
        try:
            state = _SAVED.validate_json(self.path.read_bytes())
        except (OSError, ValidationError) as error:
            why = error if isinstance(error, OSError) else error.errors()[0]["msg"]
            raise CardLost(f"no simulated card in {self.path}: {why}") from error
        now = self._monotonic()
        return replace(
            state,
            blocks=tuple(each for each in state.blocks if started(each.pid) == each.born),
            releasing=tuple(
                each
                for each in state.releasing
                if now < each.until and started(each.pid) == each.born
            ),
        )

    def _write(self, state: _State) -> None:
        draft = self.path.with_name(self.path.name + ".new")
        try:
            draft.write_bytes(_SAVED.dump_json(state))
            draft.replace(self.path)
        except OSError as error:
            raise CardLost(f"cannot write the simulated card: {error}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclusive among processes, and among threads too: every use opens the lock anew."""
        try:
            lock = os.open(
                self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600
            )
        except OSError as error:
            raise CardLost(f"no simulated card in {self.path}: {error}") from error
        try:
            self._wait_for(lock)
            yield
        finally:
            os.close(lock)

    def _wait_for(self, lock: int) -> None:
        # flock itself has no time-out, and its holder may be a process that was stopped.
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CardLost(f"{self.path} stays locked by another process") from None
                time.sleep(_LOCK_POLL_S)
            else:
                return
