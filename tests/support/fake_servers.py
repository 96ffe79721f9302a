"""Faithful fakes of real servers, each as its own process, whose models take memory of a simulated
card: with the traps that the real ones have.

`python -m tests.support.fake_servers KIND CARD NAME MIB` prints its port and serves until its
standard input ends. MIB may be a JSON object, by model, for a server that has several.
`POST /_fake` with JSON sets how it behaves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gpumanager.gpu.simulated import OutOfMemory, SimulatedCard
from tests.support.comfyui import ComfyUI
from tests.support.fake import Answer, Fake, Page
from tests.support.fake_models import LlamaRouter, LocalAI, Models, Sizes
from tests.support.fake_workers import Workers
from tests.support.ollama import Ollama

ROOT = Path(__file__).parent.parent.parent


class Plain(Fake):
    """A server of the contract: health with figures, a job that loads, an unload. With `steps:
    [share, seconds]` it gives that share back at once, and the rest so much later; with `answer:
    [status, body]` it answers every job so, and does nothing. `suspended` is what a checkpoint of
    the driver does to it: its memory is elsewhere, its jobs stand still, and /health goes on
    answering. A job with `needs` takes so many MiB for itself, and gives back what is more than
    usual. With `caches_mib` the first job leaves so much behind until a trim, with `leaks_mib` each
    job does until the unload, and with `leaves_mib` each unload until the process ends."""

    def __init__(self, card: SimulatedCard, name: str, mib: int) -> None:
        super().__init__(card, name, mib)
        self.lock = threading.Lock()
        self.held = 0
        self.left = self.leaked = self.cached = 0
        self.running = threading.Event()
        self.running.set()

    def configure(self, settings: dict[str, Any]) -> Answer:
        if (suspended := settings.pop("suspended", None)) is not None:
            self.suspend() if suspended else self.resume()
        super().configure(settings)
        return 200, {"running": self.running.is_set()}

    def suspend(self) -> None:
        self.running.clear()
        self.card.free(self.name)

    def resume(self) -> None:
        if not self.running.is_set():
            self.card.allocate(self.name, self.held)
            self.running.set()

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if path == "/quiet":
            return 200, {"status": "ok"}
        if path == "/health":
            return 200, {"loaded": self.held > 0, "gpu_resident_mib": self.held}
        self.running.wait()
        if path == "/job" and "answer" in self.settings:
            status, said = self.settings["answer"]
            return status, said
        with self.lock:
            if path == "/trim":
                self.cached = 0
                self.card.free(self.name, keep_mib=self.held + self.left + self.leaked)
                return 200, {"trimmed": True}
            if path == "/unload":
                share, seconds = self.settings.get("steps", (1.0, 0.0))
                if self.held:
                    self.left += self.settings.get("leaves_mib", 0)
                kept = round(self.held * (1 - share)) + self.left
                self.card.free(self.name, keep_mib=kept)
                if share < 1:
                    threading.Timer(seconds, self.card.free, (self.name,)).start()
                self.held = self.leaked = self.cached = 0
                return 200, {"loaded": False}
            more = (body or {}).get("needs", 0) - self.needs
            try:
                if self.needs > self.held:
                    self.card.allocate(self.name, self.needs - self.held)
                    self.held = self.needs
                    self.pause.wait(self.settings.get("load_s", 0.0))
                if more > 0:
                    self.card.allocate(self.name, more)
            except OutOfMemory as error:
                return 500, {"error": f"CUDA out of memory. {error}"}
            self.work()
            if more > 0:
                self.card.free(
                    self.name, keep_mib=self.held + self.left + self.leaked + self.cached
                )
            if (caches := self.settings.get("caches_mib", 0)) > self.cached:
                self.card.allocate(self.name, caches - self.cached)
                self.cached = caches
            if leaks := self.settings.get("leaks_mib", 0):
                self.card.allocate(self.name, leaks)
                self.leaked += leaks
            return 200, {"done_by": self.name}


class Vllm(Fake):
    """Asleep it keeps a residue, and queues requests without a word. It may say that it sleeps
    `sleep_lag_s` before its memory comes back."""

    RESIDUE = 1200

    def __init__(self, card: SimulatedCard, name: str, mib: int) -> None:
        super().__init__(card, name, mib)
        self.awake = threading.Event()
        self.aborted = 0
        self.active = 0
        card.allocate(name, mib)
        self.awake.set()

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "it", "owned_by": "vllm"}]}
        if path == "/is_sleeping":
            return 200, {"is_sleeping": not self.awake.is_set()}
        if path == "/sleep":
            if query.get("mode") != ["wait"]:
                self.aborted += self.active
            self.awake.clear()
            if lag := self.settings.get("sleep_lag_s"):
                threading.Timer(
                    lag, self.card.free, (self.name,), {"keep_mib": self.RESIDUE}
                ).start()
            else:
                self.card.free(self.name, keep_mib=self.RESIDUE)
            return 200, None
        if path == "/wake_up":
            if not self.awake.is_set():
                try:
                    self.card.allocate(self.name, self.needs - self.RESIDUE)
                except OutOfMemory as error:
                    return 500, {"error": f"CUDA out of memory: {error}"}
                self.awake.set()
            return 200, None
        if path == "/v1/chat/completions":
            self.awake.wait()
            self.active += 1
            self.work()
            self.active -= 1
            return 200, {"choices": [{"message": {"content": "hello"}}]}
        return 404, {"error": "not found"}


class Sglang(Fake):
    """To use it asleep ends it, to wake it awake does, too; and it does not tell which it is."""

    RESIDUE = 1000

    def __init__(self, card: SimulatedCard, name: str, mib: int) -> None:
        super().__init__(card, name, mib)
        self.awake = True
        card.allocate(name, mib)

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        wakes, works = path == "/resume_memory_occupation", path == "/v1/chat/completions"
        if path == "/get_model_info":
            return 200, {"model_path": "it", "is_generation": True}
        if path == "/release_memory_occupation":
            self.awake = False
            self.card.free(self.name, keep_mib=self.RESIDUE)
            return 200, None
        if (wakes and self.awake) or (works and not self.awake):
            os._exit(1)
        if wakes:
            self.card.allocate(self.name, self.needs - self.RESIDUE)
            self.awake = True
            return 200, None
        if works:
            self.work()
            return 200, {"choices": [{"message": {"content": "hello"}}]}
        return 404, {"error": "not found"}


class Pair(Plain):
    """One process with two servers on a port each, with a model each: `/_fake` tells the other's
    port."""

    def __init__(self, card: SimulatedCard, name: str, mib: int) -> None:
        super().__init__(card, name, mib)
        self.other = serve(Plain(card, f"{name}-other", mib), 0)

    def configure(self, settings: dict[str, Any]) -> Answer:
        super().configure(settings)
        return 200, {"other": self.other}


FAKES: dict[str, Callable[[SimulatedCard, str, Any], Fake]] = {
    "plain": Plain,
    "sglang": Sglang,
    "ollama": Ollama,
    "localai": LocalAI,
    "llama-router": LlamaRouter,
    "comfyui": ComfyUI,
    "vllm": Vllm,
    "workers": Workers,
    "pair": Pair,
}


def main() -> None:
    kind, path, name, mib = sys.argv[1:5]
    # Before there is a thread or a socket: see Runners.
    fake = FAKES[kind](SimulatedCard(path), name, json.loads(mib))
    print(serve(fake, _port(kind)), flush=True)
    if "detached" in sys.argv[6:]:
        threading.Event().wait()
    sys.stdin.read()


def serve(fake: Fake, port: int) -> int:
    """On a thread of its own, for as long as the process runs; returns the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            if "websocket" in self.headers.get("Upgrade", "") and fake.switch(self):
                return
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            body = json.loads(raw) if raw else {}
            if parts.path == "/_fake":
                status, said = fake.configure(body)
            elif parts.path == "/_fake/unload_all" and isinstance(fake, Models):
                status, said = fake.unload_all()
            else:
                query = parse_qs(parts.query)
                status, said = fake.refuses(self.headers) or fake.handle(
                    self.command, parts.path, query, body
                )
            if isinstance(said, Page):
                data = said.content
            else:
                text = said if isinstance(said, str) else json.dumps(said)
                data = b"" if said is None else text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if isinstance(said, Page):
                self.send_header("Content-Type", said.content_type)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer  # noqa: N815  # http.server's names

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, name="server", daemon=True).start()
    return server.server_port


def _port(kind: str) -> int:
    """As the real ones are told theirs, or as the fifth word; 0: whichever is free."""
    if kind == "ollama" and (address := os.environ.get("OLLAMA_HOST")):
        return int(address.rpartition(":")[2])
    if kind == "comfyui" and "--port" in sys.argv:
        return int(sys.argv[sys.argv.index("--port") + 1])
    return int(sys.argv[5]) if sys.argv[5:] else 0


@dataclass
class Running:
    """A fake that runs."""

    url: str
    pid: int
    port: int

    def set(self, **settings: Any) -> None:
        """Change how it behaves."""
        self.ask("POST", "/_fake", settings)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask it directly, as a user beside the broker."""
        import requests  # not at the top: the fakes themselves start the sooner

        with requests.Session() as session:
            session.trust_env = False
            answer = session.request(method, self.url + path, json=body, timeout=20)
            return answer.json() if answer.content else None


def command(kind: str, card: Path, name: str, mib: Sizes, port: int = 0) -> list[str]:
    """How to start one. Those with several models may be told the size of each."""
    module = "tests.support.fake_servers"
    return [sys.executable, "-m", module, kind, str(card), name, json.dumps(mib), str(port)]


def unmeasured() -> dict[str, str]:
    """The environment of a process whose coverage nobody asks for: a third of its start."""
    return {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}


@contextmanager
def fake_server(kind: str, card: Path, name: str, mib: Sizes) -> Iterator[Running]:
    """Run one until the block is left."""
    process = subprocess.Popen(
        command(kind, card, name, mib),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=unmeasured(),
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        yield Running(f"http://127.0.0.1:{port}", process.pid, port)
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


if __name__ == "__main__":
    main()
