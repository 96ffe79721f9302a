"""How far one job travels through the package, and how large the package is:
`python -m benchmarks.structure`.

It sends POSTs that nobody else waits for through a broker and its consumer, one by one, and
follows every thread of the broker until it is at rest again: calls of the package's own functions,
and moves from one of its files to another (by a call, or back by a return). The median is told,
since a watcher's sweep may fall into any of them. The rest is read from the source: lines, the
longest function, and the places that give the GPU back.
"""

from __future__ import annotations

import ast
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import gpumanager
from benchmarks import running
from benchmarks.performance import client
from tests.support.broker import live_broker

PACKAGE = Path(gpumanager.__file__).parent
ROOT = PACKAGE.parent
GIVE_BACK = "_give_back"
"""How the one way is called in which a job's hold on the GPU ends; it is `jobs.hold`'s own."""

POSTS = 15
REST_S = 0.05
"""Before and after each, for what the broker does once the client has its answer."""


class Journey:
    """Follows every thread that is started after `threading.setprofile(journey)`."""

    def __init__(self) -> None:
        self.calls = 0
        self.moves = 0
        self.files: set[str] = set()
        self.following = False
        self._where: defaultdict[int, list[str]] = defaultdict(list)

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:  # noqa: ARG002
        if not self.following or event not in ("call", "return"):
            return
        name = frame.f_code.co_filename
        if not name.startswith(str(PACKAGE)) or frame.f_code.co_name.startswith("<"):
            return
        stack = self._where[threading.get_ident()]
        before = stack[-1] if stack else None
        if event == "call":
            self.calls += 1
            self.files.add(name)
            stack.append(name)
        elif stack:
            stack.pop()
        after = stack[-1] if stack else None
        if before is not None and after is not None and before != after:
            self.moves += 1


def follow_one_post() -> tuple[int, int, int]:
    """The calls, the moves and the files of one POST /v1/llm: the median of `POSTS`, after twenty
    that warmed the broker up."""
    journey = Journey()
    counts: list[tuple[int, int]] = []
    with running.upstream() as port:
        threading.setprofile(journey)
        try:
            with live_broker(running.one_consumer(port)) as broker:
                data = client.request("/v1/llm")
                client.one_by_one(broker.port, data, 20)
                for _ in range(POSTS):
                    time.sleep(REST_S)
                    journey.calls = journey.moves = 0
                    journey.following = True
                    client.one_by_one(broker.port, data, 1)
                    time.sleep(REST_S)
                    journey.following = False
                    counts.append((journey.calls, journey.moves))
        finally:
            threading.setprofile(None)
    calls, moves = (round(median(each)) for each in zip(*counts, strict=True))
    return calls, moves, len(journey.files)


def functions() -> Iterator[tuple[int, str]]:
    """Every function of the package: its lines, and where it is."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                where = f"{path.relative_to(PACKAGE)}:{node.name}"
                yield node.end_lineno - node.lineno + 1, where


def give_back_sites() -> list[str]:
    """Where the package calls what gives the GPU back."""
    return [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute | ast.Name)
        and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) == GIVE_BACK
    ]


def main() -> None:
    logging.getLogger("gpumanager.access").setLevel(logging.WARNING)
    calls, moves, files_seen = follow_one_post()
    files = [path.read_text("utf-8") for path in PACKAGE.rglob("*.py")]
    longest, where = max(functions())
    sites = give_back_sites()
    print(f"one POST: {calls} own calls, {moves} moves, {files_seen} files")
    print(f"package: {sum(text.count(chr(10)) for text in files)} lines in {len(files)} files")
    print(f"longest function: {longest} lines, {where}")
    print(f"calls of {GIVE_BACK}: {len(sites)}: {', '.join(sites)}")


if __name__ == "__main__":
    main()
