"""A faithful fake of Ollama, with as many models as one likes."""

from __future__ import annotations

import threading
from typing import Any

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.fake import MIB, Answer
from tests.support.fake_models import DEFAULT_CONTEXT, Loaded, Models, Sizes


class Ollama(Models):
    """/api/ps is empty before the memory is back, and blocks while a model loads; what does not fit
    has its own idle models unloaded, and goes to the CPU without a word if that is not enough.
    It lists a model that is asked for as `x` as `x:latest`.
    A request with another `num_ctx` than a model is loaded with has it loaded anew.
    `deleted` names a model that was, but is still loaded. A model stays for as long after its last
    job as that job's `keep_alive` says, else for `keep_alive_s` (below 0: for ever). `overhead_mib`
    is what a runner holds beside what /api/ps says."""

    JOBS = (
        "/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/v1/chat/completions",
        "/v1/completions", "/v1/embeddings",
    )  # fmt: skip

    def __init__(self, card: SimulatedCard, name: str, sizes: Sizes) -> None:
        super().__init__(card, name, sizes)
        self.ending = set[int | None]()

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if path == "/":
            return 200, "Ollama is running"
        if path == "/api/version":
            return 200, {"version": "0.33.0"}
        if path == "/api/ps":
            return 200, {"models": self._ps()}
        if path == "/api/tags" and self.sizes:
            return 200, {"models": [self._tag(name) for name in self.sizes]}
        if path in self.JOBS:
            name = self._find(body.get("model", "llama3:8b"))
            if name is None or name == self.settings.get("deleted", ""):
                return 404, {"error": f"model '{body['model']}' not found"}
            return self._asked(path, name, body)
        return 404, {"error": "not found"}

    def _asked(self, path: str, name: str, body: Any) -> Answer:
        keeps_s = _seconds(body.get("keep_alive", self.settings.get("keep_alive_s", 300)))
        only_loads = path == "/api/generate" and not body.get("prompt")
        if only_loads and keeps_s == 0:
            return self._unload(name)
        context = body.get("options", {}).get("num_ctx")
        with self.changed:
            loaded = self._ready(name, context or self.settings.get("context", DEFAULT_CONTEXT))
            self._expires_after(loaded, None)
            self._begin(loaded)
        if not only_loads:
            self.work()
        with self.changed:
            self._done(loaded)
            if not loaded.jobs and (keeps_s == 0 or loaded.leaving):
                self._let_go(loaded)
            elif not loaded.jobs and keeps_s > 0:
                self._expires_after(loaded, keeps_s)
        if only_loads:
            return 200, {"model": name, "response": "", "done": True, "done_reason": "load"}
        if path.startswith("/v1/"):
            return 200, {"model": name, "choices": [{"message": {"content": "hello"}}]}
        return 200, {"model": name, "message": {"content": "hello"}, "done": True}

    def _unload(self, name: str) -> Answer:
        with self.changed:
            if name in self.loaded:
                self._count("unloads", name)
                self._let_go(self.loaded[name])
        return 200, {"model": name, "response": "", "done": True, "done_reason": "unload"}

    def _size(self, sizes: Sizes) -> None:
        if not isinstance(sizes, int):
            sizes = {_with_tag(name): size for name, size in sizes.items()}
        super()._size(sizes)

    def _find(self, name: object) -> str | None:
        return super()._find(_with_tag(name) if isinstance(name, str) else name)

    def _ps(self) -> list[dict[str, Any]]:
        deleted = self.settings.get("deleted")
        rows = [{"name": deleted, "size": 0, "size_vram": 0}] if deleted else []
        with self.changed:
            for each in self.loaded.values():
                row = {"name": each.name, "model": each.name, "context_length": each.context}
                rows.append(row | {"size": each.mib * MIB, "size_vram": each.on_card * MIB})
        return rows

    def _tag(self, name: str) -> dict[str, Any]:
        return {"name": name, "model": name, "size": self._size_of(name).mib * MIB}

    def _ready(self, name: str, context: int) -> Loaded:
        """Have it loaded with so much context, whatever of its own has to go for it."""
        while True:
            loaded = self.loaded.get(name)
            if loaded is not None and loaded.context == context and not loaded.leaving:
                return loaded
            if loaded is not None:
                self._gone(loaded)
            elif len(self.loaded) >= self.settings.get("max_loaded", 3):
                self._gone(self._least_needed())
            else:
                mib = self._size_of(name).with_context(context)
                if started := self._started(name, mib, context):
                    return started
                if not self.loaded:
                    return self._spilled(name, mib, context)
                self._gone(self._least_needed())

    def _started(self, name: str, mib: int, context: int) -> Loaded | None:
        overhead = self.settings.get("overhead_mib", 0)
        started = self._start(name, mib + overhead, context)
        if started is not None:
            started.mib = started.on_card = mib
        return started

    def _spilled(self, name: str, mib: int, context: int) -> Loaded:
        """The half of it on the card, or nothing, and the rest on the CPU."""
        self._count("spills", name)
        loaded = self._started(name, mib // 2, context)
        if loaded is None:
            self._count("loads", name)
            loaded = self.loaded[name] = Loaded(name, None, mib, 0, context)
        loaded.mib = mib
        return loaded

    def _least_needed(self) -> Loaded:
        """The one to go if one must: idle rather than working, then the least recently used."""
        return min(self.loaded.values(), key=lambda each: (each.jobs > 0, each.used))

    def _gone(self, loaded: Loaded) -> None:
        """Unload one of its own, and wait until its memory is back."""
        pid = loaded.pid
        self._count("own_unloads", loaded.name)
        self._let_go(loaded)
        while self.loaded.get(loaded.name) is loaded or pid in self.ending:
            self.changed.wait()

    def _let_go(self, loaded: Loaded) -> None:
        """Unload it, once it has done what it is at."""
        self._expires_after(loaded, None)
        if loaded.jobs:
            loaded.leaving = True
        elif self.loaded.get(loaded.name) is loaded:
            del self.loaded[loaded.name]
            if loaded.pid is not None:
                self.ending.add(loaded.pid)
            self._end_after(float(self.settings.get("unload_lag_s", 0.2)), loaded)

    def _end(self, loaded: Loaded) -> None:
        super()._end(loaded)
        with self.changed:
            self.ending.discard(loaded.pid)
            self.changed.notify_all()

    def _expired(self, loaded: Loaded) -> None:
        with self.changed:
            if not loaded.jobs:
                self._let_go(loaded)

    def _expires_after(self, loaded: Loaded, seconds: float | None) -> None:
        if loaded.expiry is not None:
            loaded.expiry.cancel()
        loaded.expiry = None
        if seconds is not None:
            loaded.expiry = threading.Timer(seconds, self._expired, (loaded,))
            loaded.expiry.daemon = True
            loaded.expiry.start()


def _with_tag(name: str) -> str:
    """As it lists a model that was asked for without one."""
    return name if ":" in name else f"{name}:latest"


def _seconds(keep_alive: float | str) -> float:
    """As Ollama reads it: seconds, or a text such as `5m`."""
    if isinstance(keep_alive, str):
        number, unit = keep_alive.rstrip("smh"), keep_alive[-1:]
        return float(number) * {"m": 60, "h": 3600}.get(unit, 1)
    return keep_alive
