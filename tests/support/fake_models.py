"""Faithful fakes of servers that keep several models loaded, each in a child process of its own:
LocalAI, and llama.cpp's llama-server as a router (Ollama has a file of its own)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.fake import Answer, Fake
from tests.support.runners import Runners

DEFAULT_CONTEXT = 4096
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate {} MiB."

Sizes = int | Mapping[str, int | Mapping[str, int]]
"""What models take of the card, in MiB: any of them the same, or by name. In place of a number may
stand `{mib, kv_kib, grows_mib, grows_to_mib}`: the weights, what each token of its context takes on
top of them, and by how much each job has it grow, up to how much."""


@dataclass(frozen=True)
class Size:
    """What one model takes."""

    mib: int
    kv_kib: int = 0
    grows_mib: int = 0
    grows_to_mib: int = 0

    def with_context(self, tokens: int) -> int:
        """MiB of the weights and of so much context."""
        return self.mib + tokens * self.kv_kib // 1024


@dataclass
class Loaded:
    """A model that is loaded: `mib` is all of it, `on_card` what of it is on the card, `jobs` how
    many work with it. One that is `leaving` goes as soon as none does."""

    name: str
    pid: int | None
    mib: int
    on_card: int
    context: int = DEFAULT_CONTEXT
    jobs: int = 0
    leaving: bool = False
    used: int = 0
    expiry: threading.Timer | None = None


class Models(Fake):
    """What the three have in common: the models by name, and how often each was loaded, unloaded
    because somebody asked, or for reasons of the server's own, found no room, or went to the CPU
    in part. `/_fake/unload_all` unloads all of them, as a server might have it. A load takes
    `load_s`; `models` in the settings replaces the sizes."""

    def __init__(self, card: SimulatedCard, name: str, sizes: Sizes) -> None:
        super().__init__(card, name, sizes if isinstance(sizes, int) else 0)
        self.runners = Runners(card.path, name)
        self.changed = threading.Condition(threading.RLock())
        self.sizes: dict[str, Size] = {}
        self._size(sizes)
        self.loaded: dict[str, Loaded] = {}
        self.used = 0
        self.counts = {
            word: Counter[str]()
            for word in ("loads", "unloads", "own_unloads", "out_of_memory", "spills")
        }

    def configure(self, settings: dict[str, Any]) -> Answer:
        super().configure(settings)
        self._size(settings.get("models", {}))
        told: dict[str, Any] = {f"{word}_of": dict(each) for word, each in self.counts.items()}
        told |= {word: each.total() for word, each in self.counts.items()}
        return 200, told | {"context": {each.name: each.context for each in self._listed()}}

    def unload_all(self) -> Answer:
        """As if each had been asked for."""
        for each in self._listed():
            self._unload(each.name)
        return 200, {}

    def _unload(self, name: str) -> Answer:
        """Unload one, as its own call has it."""
        raise NotImplementedError

    def _size(self, sizes: Sizes) -> None:
        for name, size in {} if isinstance(sizes, int) else sizes.items():
            self.sizes[name] = Size(size) if isinstance(size, int) else Size(**size)

    def _find(self, name: object) -> str | None:
        """The name that it goes by here, None if there is no such model."""
        if not self.sizes:
            return str(name)
        return name if isinstance(name, str) and name in self.sizes else None

    def _size_of(self, name: str) -> Size:
        return self.sizes.get(name) or Size(self.needs)

    def _listed(self) -> list[Loaded]:
        """Those that are loaded, without waiting for one that loads."""
        return list(self.loaded.values())

    def _count(self, word: str, name: str) -> None:
        self.counts[word][name] += 1

    def _start(self, name: str, mib: int, context: int = DEFAULT_CONTEXT) -> Loaded | None:
        """Load a model wholly, or not at all."""
        pid = self.runners.start(mib)
        if pid is None:
            return None
        self.pause.wait(self.settings.get("load_s", 0.0))
        self._count("loads", name)
        self.loaded[name] = Loaded(name, pid, mib, mib, context)
        return self.loaded[name]

    def _end(self, loaded: Loaded) -> None:
        """Its process ends, and is gone from the list, if another has not taken its place."""
        if loaded.pid is not None:
            self.runners.end(loaded.pid)
        with self.changed:
            if self.loaded.get(loaded.name) is loaded:
                del self.loaded[loaded.name]
            self.changed.notify_all()

    def _end_after(self, lag: float, loaded: Loaded) -> None:
        timer = threading.Timer(lag, self._end, (loaded,))
        timer.daemon = True
        timer.start()

    def _begin(self, loaded: Loaded) -> None:
        """A job of it begins; with `changed` held."""
        self.used += 1
        loaded.used = self.used
        loaded.jobs += 1

    def _done(self, loaded: Loaded) -> None:
        """A job of it has ended; with `changed` held."""
        loaded.jobs -= 1
        self.changed.notify_all()


class LocalAI(Models):
    """Each model is a backend's process. It is shut down while the caller waits, after what runs,
    for which it waits `patience_s`. What does not fit is a 500; with `mute` one that does not say
    why, as llama.cpp's backend has it."""

    JOBS = (
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank",
        "/v1/audio/speech", "/v1/audio/transcriptions", "/v1/images/generations",
    )  # fmt: skip

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if path == "/readyz":
            return 200, None
        if path == "/system":
            loaded = [{"id": each.name} for each in self._listed()]
            return 200, {"backends": ["llama-cpp", "diffusers"], "loaded_models": loaded}
        if path == "/v1/models":
            rows = [{"id": name, "object": "model"} for name in self.sizes]
            return 200, {"object": "list", "data": rows}
        if path == "/backend/shutdown":
            return self._unload(body.get("model"))
        if path in self.JOBS or path == "/backend/load":
            name = self._find(body.get("model"))
            if name is None:
                return _error(404, f"model {body.get('model')!r} not found")
            return self._job(name, path == "/backend/load")
        return 404, {"error": "not found"}

    def _job(self, name: str, only_loads: bool) -> Answer:
        with self.changed:
            size = self._size_of(name)
            loaded = self.loaded.get(name) or self._start(name, size.mib)
            if loaded is None:
                return self._no_room(name, size.mib, "could not load model: rpc error: code = ")
            if only_loads:
                return 200, {"message": "model loaded"}
            self._begin(loaded)
            more = min(size.grows_mib, size.grows_to_mib - loaded.mib)
            if more > 0 and loaded.pid is not None:
                if not self.runners.take(loaded.pid, more):
                    self._done(loaded)
                    return self._no_room(name, more, "rpc error: code = ")
                loaded.mib = loaded.on_card = loaded.mib + more
        self.work()
        with self.changed:
            self._done(loaded)
        return 200, {"model": name, "choices": [{"message": {"content": "hello"}}]}

    def _no_room(self, name: str, mib: int, what: str) -> Answer:
        self._count("out_of_memory", name)
        mute = self.settings.get("mute", False)
        said = "Canceled desc = " if mute else f"Unknown desc = {OUT_OF_MEMORY.format(mib)}"
        return _error(500, what + said)

    def _unload(self, name: str) -> Answer:
        with self.changed:
            loaded = self.loaded.get(name)
            if loaded is None:
                return _error(404, "model not found")
            patience = self.settings.get("patience_s", 30.0)
            if not self.changed.wait_for(lambda: loaded.jobs == 0, patience):
                return _error(500, f"model is still busy: {name}")
            self._count("unloads", loaded.name)
            self._end(loaded)
        return 200, {"message": "backend shut down"}


class LlamaRouter(Models):
    """Each model is a llama-server of its own. An unload is answered at once, and the model is
    listed as loaded until its process has ended, `unload_lag_s` later; what it works at then is
    aborted. If there are `models_max` already, the least recently used one goes. A load that fails
    is a 500 that does not say why. `aliases` in the settings are other names of models, which the
    list has unless `tells_aliases` is false, as with llama-swap."""

    JOBS = (
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/responses",
        "/v1/messages", "/v1/audio/transcriptions", "/completion", "/infill",
    )  # fmt: skip

    def __init__(self, card: SimulatedCard, name: str, sizes: Sizes) -> None:
        super().__init__(card, name, sizes)
        self.loading = set[str]()
        self.failed = set[str]()

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if path == "/health":
            return 200, {"status": "ok"}
        if path in ("/models", "/v1/models") and method == "GET":
            return 200, {"object": "list", "data": [self._row(name) for name in self.sizes]}
        if path not in (*self.JOBS, "/models/load", "/models/unload"):
            return 404, {"error": {"code": 404, "message": "File Not Found"}}
        asked = body.get("model")
        name = self._find(self.settings.get("aliases", {}).get(asked, asked))
        if name is None:
            return _error(400, f"model '{body.get('model')}' not found", "invalid_request_error")
        if path == "/models/unload":
            return self._unload(name)
        if path == "/models/load":
            if name in self.loaded or name in self.loading:
                return _error(400, "model is already running", "invalid_request_error")
            self.loading.add(name)
            threading.Thread(target=self._load, args=(name,), daemon=True).start()
            return 200, {"success": True}
        return self._job(name)

    def _row(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = {"value": "unloaded", "args": ["llama-server", "--alias", name]}
        if name in self.loaded:
            status["value"] = "loaded"
        elif name in self.loading:
            status["value"] = "loading"
        elif name in self.failed:
            status |= {"failed": True, "exit_code": 1}
        aliases = [
            alias
            for alias, model in self.settings.get("aliases", {}).items()
            if model == name and self.settings.get("tells_aliases", True)
        ]
        row = {"id": name, "aliases": aliases, "object": "model", "owned_by": "llamacpp"}
        return row | {"status": status}

    def _load(self, name: str) -> None:
        with self.changed:
            loaded = self._ready(name)
            if loaded is not None:
                self._done(loaded)

    def _job(self, name: str) -> Answer:
        loaded = self._ready(name)
        if loaded is None:
            return _error(500, f"model name={name} failed to load")
        self.work()
        with self.changed:
            self._done(loaded)
            if self.loaded.get(name) is not loaded:
                return _error(500, "proxy error: Failed to read connection")
        return 200, {"model": name, "choices": [{"message": {"content": "hello"}}]}

    def _ready(self, name: str) -> Loaded | None:
        """Have it loaded, and a job of it begin; None if it fails to load."""
        with self.changed:
            self.loading.add(name)
            self.failed.discard(name)
            if name not in self.loaded and len(self.loaded) >= self.settings.get("models_max", 4):
                oldest = min(self.loaded.values(), key=lambda each: each.used)
                self._unload(oldest.name, "own_unloads")
                self.changed.wait_for(lambda: self.loaded.get(oldest.name) is not oldest)
            size = self._size_of(name)
            loaded = self.loaded.get(name) or self._start(
                name, size.with_context(self.settings.get("context", DEFAULT_CONTEXT))
            )
            self.loading.discard(name)
            if loaded is None:
                self.failed.add(name)
                self._count("out_of_memory", name)
            else:
                self._begin(loaded)
            return loaded

    def _unload(self, name: str, word: str = "unloads") -> Answer:
        with self.changed:
            loaded = self.loaded.get(name)
            if loaded is None:
                return _error(400, "model is not running", "invalid_request_error")
            if not loaded.leaving:
                loaded.leaving = True
                self._count(word, name)
                self._end_after(float(self.settings.get("unload_lag_s", 0.2)), loaded)
        return 200, {"success": True}


def _error(status: int, message: str, kind: str = "server_error") -> Answer:
    return status, {"error": {"code": status, "message": message, "type": kind}}
