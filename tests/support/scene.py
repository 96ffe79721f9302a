"""A broker with something to see: three faithful fakes on a simulated card, and jobs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from gpumanager.keys import ApiKey
from gpumanager.simulation.card import SimulatedCard
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import Running, fake_server

CARD_MIB = 12_000
BODIES: dict[str, Any] = {
    "tts": {"text": "Hello."},
    "llm": {"model": "llama3:8b"},
    "image": {"prompt": {"1": {"class_type": "KSampler"}}},
}


class Scene:
    """The broker, its fakes by name, and clients that send jobs in the background."""

    def __init__(self, broker: LiveBroker, fakes: dict[str, Running], clients: Any) -> None:
        self.broker = broker
        self.fakes = fakes
        self._clients: ThreadPoolExecutor = clients

    def job(self, kind: str) -> Future[requests.Response]:
        """Send a job, and do not wait for it."""
        return self._clients.submit(
            requests.post, f"{self.broker.url}/v1/{kind}", json=BODIES[kind], timeout=60
        )

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
        broker = stack.enter_context(live_broker(yaml.safe_dump(config), keys=keys))
        clients = ThreadPoolExecutor(20, "scene-client")
        stack.callback(clients.shutdown, wait=True)
        yield Scene(broker, fakes, clients)
