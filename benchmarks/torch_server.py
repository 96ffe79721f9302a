"""A small HTTP server that keeps models (tensors of so many MiB) on the card with torch.

    python torch_server.py DEVICE '{"small": 1000, "large": 8000}'

prints its port, and serves until its standard input ends. DEVICE is torch's (`cuda:0`), or
`simulated:FILE` for a simulated card, on which it behaves as torch does: what is freed stays in its
cache, and a context stays until the process ends. With torch it needs nothing but the standard
library, so that it runs with any interpreter that has torch.

- POST /v1/chat/completions {model, max_tokens}: loads the model if it is not loaded, and takes
  128 KiB for each token, which stay in torch's cache. 500 with torch's words if that does not fit.
- GET /models: which there are, and which are loaded. POST /unload {model}. POST /empty_cache: gives
  the card back what is in the cache.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

MIB = 1024 * 1024
KV_KIB = 128
"""For each token: what an 8B model with grouped attention takes."""


class OutOfMemory(Exception):
    """The card has not so much; the text is torch's."""


class Memory(Protocol):
    """What torch does."""

    def take(self, mib: int) -> Any:
        """So much of the card; to be given back by `give`. Raises OutOfMemory."""

    def give(self, block: Any) -> None:
        """Back into the cache."""

    def empty_cache(self) -> None:
        """What is in the cache is the card's again."""


class Torch:
    """The real one."""

    def __init__(self, device: str) -> None:
        self.torch: Any = import_module("torch")
        self.device = self.torch.device(device)

    def take(self, mib: int) -> Any:
        try:
            # Filled, as memory that nobody has written may not be there yet.
            block = self.torch.ones(mib * MIB, dtype=self.torch.uint8, device=self.device)
            self.torch.cuda.synchronize(self.device)
        except self.torch.cuda.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from error
        return [block]

    def give(self, block: Any) -> None:
        block.clear()
        gc.collect()

    def empty_cache(self) -> None:
        self.torch.cuda.empty_cache()


class Simulated:
    """As torch behaves, on a simulated card."""

    CONTEXT_MIB = 300

    def __init__(self, file: str) -> None:
        # Only here: with torch it may run where the package is not installed.
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        self.simulated: Any = import_module("gpumanager.gpu.simulated")
        self.card: Any = self.simulated.SimulatedCard(file)
        self.used = self.cached = 0
        self.context = 0

    def take(self, mib: int) -> int:
        more = max(0, mib - self.cached) + (self.CONTEXT_MIB - self.context)
        try:
            if more:
                self.card.allocate("torch", more)
        except self.simulated.OutOfMemory as error:
            raise OutOfMemory(f"CUDA out of memory. Tried to allocate {mib} MiB") from error
        self.context = self.CONTEXT_MIB
        self.cached = max(0, self.cached - mib)
        self.used += mib
        return mib

    def give(self, block: int) -> None:
        self.used -= block
        self.cached += block

    def empty_cache(self) -> None:
        self.card.free("torch", keep_mib=self.used + self.context)
        self.cached = 0


class Server:
    """The models, one request at a time."""

    def __init__(self, memory: Memory, sizes: dict[str, int], job_s: float = 0.02) -> None:
        self.memory, self.sizes, self.job_s = memory, sizes, job_s
        self.lock = threading.Lock()
        self.loaded: dict[str, Any] = {}

    def handle(self, path: str, body: Any) -> tuple[int, Any]:
        """The answer to a request."""
        if path == "/health":
            return 200, {"status": "ok"}
        if path == "/models":
            models = [
                {"name": name, "loaded": name in self.loaded, "mib": mib}
                for name, mib in self.sizes.items()
            ]
            return 200, {"models": models}
        with self.lock:
            if path == "/empty_cache":
                self.memory.empty_cache()
                return 200, {}
            model = body.get("model")
            if model not in self.sizes:
                return 404, {"error": f"no model {model!r}"}
            if path == "/unload":
                self._unload(model)
                return 200, {}
            if path == "/v1/chat/completions":
                return self._chat(model, body.get("max_tokens") or 0)
        return 404, {"error": "not found"}

    def _chat(self, model: str, tokens: int) -> tuple[int, Any]:
        try:
            if model not in self.loaded:
                self.loaded[model] = self.memory.take(self.sizes[model])
            cache = self.memory.take(tokens * KV_KIB // 1024) if tokens * KV_KIB >= 1024 else None
        except OutOfMemory as error:
            self.memory.empty_cache()
            return 500, {"error": {"message": str(error), "type": "server_error"}}
        time.sleep(self.job_s)
        if cache is not None:
            self.memory.give(cache)
        return 200, {"model": model, "choices": [{"message": {"content": "hello"}}]}

    def _unload(self, model: str) -> None:
        if model in self.loaded:
            self.memory.give(self.loaded.pop(model))
            self.memory.empty_cache()


def serve(server: Server) -> ThreadingHTTPServer:
    """It listens on a free port of loopback, on threads of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = server.handle(self.path, json.loads(raw) if raw else {})
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer  # noqa: N815  # http.server's names

        def log_message(self, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, name="server", daemon=True).start()
    return listening


def main() -> None:
    device, sizes = sys.argv[1], json.loads(sys.argv[2])
    simulated = device.partition("simulated:")[2]
    memory: Memory = Simulated(simulated) if simulated else Torch(device)
    print(serve(Server(memory, sizes)).server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
