"""A fake server whose model is on several worker processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.fake import Answer, Fake

ROOT = Path(__file__).parent.parent.parent


class Workers(Fake):
    """Two worker processes hold a half each (tensor parallelism); one that ends while the model is
    loaded is replaced. After an unload they end so many seconds later (`unload_lag_s`); with
    `replace` one of them is replaced meanwhile, with all that it held. Where a worker gets no
    memory, the model is not loaded."""

    def __init__(self, card: SimulatedCard, name: str, mib: int) -> None:
        super().__init__(card, name, mib)
        self.lock = threading.RLock()
        self.loaded = False
        self.workers: list[subprocess.Popen[str]] = []

    def configure(self, settings: dict[str, Any]) -> Answer:
        super().configure(settings)
        with self.lock:
            return 200, {"pids": [each.pid for each in self.workers]}

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if path == "/health":
            return 200, {"loaded": self.loaded}
        if path == "/unload":
            with self.lock:
                self.loaded = False
                if self.workers and self.settings.get("replace"):
                    _end([self.workers.pop()])
                    self._start()
                lag = self.settings.get("unload_lag_s", 0.2)
                threading.Timer(lag, _end, (self.workers,)).start()
                self.workers = []
            return 200, {"loaded": False}
        with self.lock:
            if not self.workers and not (self._start() and self._start()):
                _end(self.workers)
                return 500, {"error": "CUDA out of memory."}
            self.loaded = True
        self.work()
        return 200, {"done_by": self.name}

    def _start(self) -> bool:
        """Whether a new worker has its half."""
        command = [sys.executable, "-m", "tests.support.families", "holder"]
        worker = subprocess.Popen(
            [*command, self.card.path, str(self.needs // 2), "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert worker.stdout is not None
        holds = "holds" in worker.stdout.readline()
        self.workers.append(worker)
        threading.Thread(target=self._replace, args=(worker,), daemon=True).start()
        return holds

    def _replace(self, worker: subprocess.Popen[str]) -> None:
        worker.wait()
        with self.lock:
            if self.loaded and worker in self.workers:
                self.workers.remove(worker)
                self._start()


def _end(workers: list[subprocess.Popen[str]]) -> None:
    while workers:
        worker = workers.pop()
        worker.kill()
        worker.wait(10)
