"""A broker with something to see: three faithful fakes on a simulated card, and jobs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests
import yaml

from gpumanager.gpu.device import SimulatedMemory
from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.keys import ApiKey
from gpumanager.model import MemoryReading
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import Running, fake_server
from tests.support.threads import eventually

CARD_MIB = 12_000
BODIES: dict[str, Any] = {
    "tts": {"text": "Hello."},
    "stt": {"file": "hello.wav"},
    "llm": {"model": "llama3:8b"},
    "image": {"prompt": {"1": {"class_type": "KSampler"}}},
}


LONG_NAME = "speech-of-the-hotline-german-tiny-v3-turbo-int8-2026-release"
"""As long as anybody would make one: 60 characters."""

CROWD_CARD_MIB = 24_000
CROWD = {
    "comfyui": 5000,
    "embedder": 700,
    "florence": 1600,
    "musicgen": 3300,
    "ollama": 6000,
    "reranker": 900,
    "sam": 1100,
    LONG_NAME: 1900,
    "vllm-coder": 7000,
    "voice": 2800,
    "whisper": 1700,
    "xtts": 2300,
}


class SensingCard(SimulatedMemory):
    """A simulated card with sensors, and a process that is nobody's, if there is one."""

    def __init__(self, path: str, busy: Callable[[], bool] = lambda: False) -> None:
        super().__init__(path)
        self.busy = busy
        self._load = 0.0

    def read(self) -> MemoryReading:
        self._load += 0.25 * ((0.97 if self.busy() else 0.02) - self._load)
        return replace(
            super().read(),
            utilization_percent=round(100 * self._load),
            power_w=38.0 + 290 * self._load,
            power_limit_w=350.0,
            temperature_c=round(41 + 32 * self._load),
        )


class Scene:
    """The broker, its fakes by name, and clients that send jobs in the background."""

    def __init__(
        self, broker: LiveBroker, fakes: dict[str, Running], clients: Any, card: SimulatedCard
    ) -> None:
        self.broker = broker
        self.card = card
        self.fakes = fakes
        self._clients: ThreadPoolExecutor = clients

    def job(
        self, kind: str, *, key: str | None = None, **headers: str
    ) -> Future[requests.Response]:
        """Send a job, and do not wait for it."""
        return self._clients.submit(
            requests.post,
            f"{self.broker.url}/v1/{kind}",
            json=BODIES[kind],
            headers={**headers, **({} if key is None else {"X-Api-Key": key})},
            timeout=300,
        )

    def chat(self, model: str) -> Future[requests.Response]:
        """Send Ollama's chat a job with that model, and do not wait for it."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        url = f"{self.broker.url}/api/chat"
        return self._clients.submit(requests.post, url, json=body, timeout=300)

    def used(self, *models: str) -> None:
        """Have each of them do a job, and wait until what it holds is seen."""
        for model in models:
            assert self.chat(model).result(60).status_code == 200
            self.await_held(model)

    def await_held(self, model: str) -> None:
        """Return once a model is seen to hold memory."""
        eventually(lambda: self.shown(model).get("held_mib", 0) > 0)

    def shown(self, model: str, consumer: str = "ollama") -> dict[str, Any]:
        """A model as the status has it."""
        for each in self.broker.get("/v1/status").json()["consumers"]:
            for its in each.get("models", ()) if each["name"] == consumer else ():
                if its["name"] == model:
                    return dict(its)
        return {}

    def jobs(self, kind: str, count: int) -> list[Future[requests.Response]]:
        """Send so many, one after the other into the queue."""
        sent = []
        for _ in range(count):
            before = len(self.broker.broker.card.scheduler.queue())
            sent.append(self.job(kind))
            self.broker.await_line(before + 1)
        return sent

    def pace(self, **seconds: float) -> None:
        """How long each fake's jobs take from now on."""
        for name, job_s in seconds.items():
            self.fakes[name].set(job_s=job_s)


@contextmanager
def scene(*, keys: tuple[ApiKey, ...] = ()) -> Iterator[Scene]:
    """Speech, an LLM and images, which never all fit."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        card = SimulatedCard.create(folder / "card.json", CARD_MIB)
        fakes = {
            name: stack.enter_context(fake_server(kind, card.path, name, mib))
            for name, kind, mib in (
                ("voice", "plain", 2800),
                ("ollama", "ollama", 6000),
                ("comfyui", "comfyui", 5000),
            )
        }
        config = {
            "gpu": {"device": f"simulated:{card.path}", "sample_interval": 0.2},
            "health_interval": 0.5,
            "jobs": {"dir": str(folder / "jobs")},
            "routing": {"tts": "voice", "llm": "ollama", "image": "comfyui"},
            "consumers": {
                "voice": {
                    "url": fakes["voice"].url,
                    "health": "/health",
                    "unload": "/unload",
                    "paths": {"tts": "/job"},
                    "vram_resident_mib": 2800,
                },
                "ollama": {
                    "preset": "ollama",
                    "url": fakes["ollama"].url,
                    "vram_resident_mib": 6000,
                },
                "comfyui": {
                    "preset": "comfyui",
                    "url": fakes["comfyui"].url,
                    "vram_resident_mib": 5000,
                },
            },
        }
        sensing = SensingCard(str(card.path))
        broker = stack.enter_context(live_broker(yaml.safe_dump(config), card=sensing, keys=keys))
        sensing.busy = lambda: broker.stats.in_flight > 0
        clients = ThreadPoolExecutor(20, "scene-client")
        stack.callback(clients.shutdown, wait=True)
        yield Scene(broker, fakes, clients, card)


@contextmanager
def crowd(consumers: Mapping[str, int] = CROWD, card_mib: int = CROWD_CARD_MIB) -> Iterator[Scene]:
    """Many consumers, by name with the MiB that each one needs, on a card with sensors."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        card = SimulatedCard.create(folder / "card.json", card_mib)
        fakes = {
            name: stack.enter_context(fake_server("plain", card.path, name, mib))
            for name, mib in consumers.items()
        }
        speech = LONG_NAME if LONG_NAME in consumers else "voice"
        config = {
            "gpu": {"device": f"simulated:{card.path}", "sample_interval": 0.2},
            "health_interval": 0.5,
            "jobs": {"dir": str(folder / "jobs")},
            "routing": {"tts": speech, "stt": "whisper", "llm": "ollama", "image": "comfyui"},
            "consumers": {
                name: {
                    "url": fakes[name].url,
                    "health": "/health",
                    "load": "/job",
                    "unload": "/unload",
                    "paths": dict.fromkeys(("tts", "stt", "llm", "image"), "/job"),
                    "vram_resident_mib": mib,
                }
                for name, mib in consumers.items()
            },
        }
        sensing = SensingCard(str(card.path))
        broker = stack.enter_context(live_broker(yaml.safe_dump(config), card=sensing, threads=64))
        sensing.busy = lambda: broker.stats.in_flight > 0
        clients = ThreadPoolExecutor(40, "scene-client")
        stack.callback(clients.shutdown, wait=True)
        yield Scene(broker, fakes, clients, card)


@contextmanager
def models(
    sizes: Mapping[str, int], *, card_mib: int = CARD_MIB, voice_mib: int = 2800
) -> Iterator[Scene]:
    """Ollama with models of those sizes in MiB, which count by themselves, beside speech."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        card = SimulatedCard.create(folder / "card.json", card_mib)
        fakes = {
            "ollama": stack.enter_context(fake_server("ollama", card.path, "ollama", dict(sizes))),
            "voice": stack.enter_context(fake_server("plain", card.path, "voice", voice_mib)),
        }
        fakes["ollama"].set(max_loaded=len(sizes))
        config = {
            "gpu": {"device": f"simulated:{card.path}", "sample_interval": 0.1},
            "health_interval": 0.2,
            "jobs": {"dir": str(folder / "jobs")},
            "routing": {"llm": "ollama", "tts": "voice"},
            "consumers": {
                "ollama": {"preset": "ollama", "url": fakes["ollama"].url},
                "voice": {
                    "url": fakes["voice"].url,
                    "health": "/health",
                    "unload": "/unload",
                    "paths": {"tts": "/job"},
                    "models": ["voice"],
                    "vram_resident_mib": voice_mib,
                },
            },
        }
        broker = stack.enter_context(
            live_broker(yaml.safe_dump(config), card=SensingCard(str(card.path)), threads=64)
        )
        clients = ThreadPoolExecutor(40, "scene-client")
        stack.callback(clients.shutdown, wait=True)
        yield Scene(broker, fakes, clients, card)
