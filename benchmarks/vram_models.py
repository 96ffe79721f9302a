"""The modes `models` and `models-one-figure` of `benchmarks.vram`: three servers with three models
each, of which nothing is declared.

The servers are fakes of Ollama, LocalAI and llama.cpp's router, each with the children that hold
its models' memory. Jobs name their models; which model a job wants is drawn from a seed by Zipf's
law: the smaller a model, the more often, as with embeddings and titles beside an agent's coder. In
`models` the servers' presets are as they come, so the broker knows each model's memory by
itself; in `models-one-figure` the presets' `items` are taken away, so that there is one figure for
a server, and all of its models go at once.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from benchmarks.running import Broker, serving
from benchmarks.tally import Tally, ran_out
from gpumanager.gpu.simulated import SimulatedCard
from tests.support.fake_servers import Running, fake_server

CARD_MIB = 12_000
CLIENTS = 8
LONGEST_S = 1200.0

SERVERS: dict[str, dict[str, int]] = {
    "ollama": {"titles:1b": 1000, "chat:8b": 5200, "coder:14b": 9000},
    "localai": {"embedder": 500, "voice": 1900, "painter": 6500},
    "llama-router": {"reranker": 700, "qwen-4b": 3100, "gemma-12b": 7600},
}
"""MiB of each model."""

_SPEECH, _CHAT = "/v1/audio/speech", "/v1/chat/completions"
PATHS = {
    "titles:1b": "/api/chat",
    "chat:8b": _CHAT,
    "coder:14b": "/api/generate",
    "embedder": "/v1/embeddings",
    "voice": _SPEECH,
    "painter": "/v1/images/generations",
    "reranker": "/v1/rerank",
    "qwen-4b": _CHAT,
    "gemma-12b": _CHAT,
}
ROUTING = {
    "llm": ["ollama", "llama-router"],
    "embed": "localai",
    "tts": "localai",
    "image": "localai",
    "rerank": "llama-router",
}

ONE_FIGURE: dict[str, dict[str, Any]] = {
    "ollama": {
        "probe": {
            "path": "/api/ps",
            "loaded": "length(models) > `0`",
            "resident": "sum(models[].size_vram)",
            "unit": "B",
        },
        "unload": {"path": "/_fake/unload_all", "when_busy": "drains"},
    },
    "localai": {
        "probe": {"path": "/system", "loaded": "length(loaded_models) > `0`"},
        "unload": {"path": "/_fake/unload_all", "when_busy": "drains"},
    },
    "llama-router": {
        "probe": {
            "path": "/models",
            "loaded": "length(data[?status.value == 'loaded']) > `0`",
        },
        "unload": {"path": "/_fake/unload_all", "when_busy": "aborts"},
    },
}
"""What replaces the presets' keys, so that no model is told from another."""


@dataclass
class Meetings:
    """Which model has been met: a job of it was answered, well or not, before another was sent."""

    met: set[str] = field(default_factory=set)
    at_first: Counter[str] = field(default_factory=Counter)
    later: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def knows(self, model: str) -> bool:
        """Whether it has been met by now."""
        with self.lock:
            return model in self.met

    def came_of(self, model: str, known: bool, out_of_memory: bool) -> None:
        """Take in an answer; `known` is what `knows` said when its job was sent."""
        with self.lock:
            self.met.add(model)
            if out_of_memory:
                (self.later if known else self.at_first)[model] += 1


def trace(jobs: int, seed: int) -> list[str]:
    """The model of each job."""
    sizes = {model: mib for models in SERVERS.values() for model, mib in models.items()}
    models = sorted(sizes, key=lambda model: sizes[model])
    weights = [1 / rank for rank in range(1, len(models) + 1)]
    return random.Random(seed).choices(models, weights, k=jobs)


def config(
    card: SimulatedCard, fakes: dict[str, Running], one_figure: bool, policy: str
) -> dict[str, Any]:
    """The broker's, in front of them."""
    consumers = {
        name: {"preset": name, "url": fake.url} | (ONE_FIGURE[name] if one_figure else {})
        for name, fake in fakes.items()
    }
    return {
        "gpu": {"device": f"simulated:{card.path}", "release_timeout": 3},
        "health_interval": 1,
        "routing": ROUTING,
        "scheduler": {"policy": policy},
        "log": {"format": "json"},
        "consumers": consumers,
    }


def beside(by_model: dict[str, Any], one_figure: dict[str, Any]) -> dict[str, float]:
    """The figures of the first as shares of the second's."""
    counted = ("unloaded_by_the_broker", "loads", "evictions")
    return {what: round(by_model[what] / max(1, one_figure[what]), 2) for what in counted}


@contextmanager
def servers(card: SimulatedCard, load_s: float) -> Iterator[dict[str, Running]]:
    """All of them, until the block is left; a load takes `load_s`."""
    with ExitStack() as stack:
        fakes = {
            name: stack.enter_context(fake_server(name, card.path, name, sizes))
            for name, sizes in SERVERS.items()
        }
        for fake in fakes.values():
            fake.set(job_s=0.005, load_s=load_s, unload_lag_s=0.1, overhead_mib=200)
        yield fakes


def run(
    one_figure: bool, jobs: int, seed: int, policy: str = "fifo", load_s: float = 0.0
) -> dict[str, Any]:
    """One mode; its figures."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        card = SimulatedCard.create(folder / "card.json", CARD_MIB)
        fakes = stack.enter_context(servers(card, load_s))
        broker = stack.enter_context(serving(config(card, fakes, one_figure, policy)))
        tally, meetings = Tally(), Meetings()
        began = time.monotonic()
        _send_all(broker, trace(jobs, seed), tally, meetings, began)
        broker.await_idle()
        took = time.monotonic() - began
        return _figures(broker, fakes, tally, meetings, jobs, took)


def _send_all(
    broker: Broker, models: list[str], tally: Tally, meetings: Meetings, began: float
) -> None:
    def send(model: str) -> None:
        if time.monotonic() - began > LONGEST_S:
            return
        known = meetings.knows(model)
        with requests.Session() as session:
            session.trust_env = False
            url = f"http://127.0.0.1:{broker.port}{PATHS[model]}"
            answer = session.post(url, json={"model": model, "prompt": "Hello."}, timeout=300)
        tally.count(answer)
        meetings.came_of(model, known, ran_out(answer))

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(send, models))


def _figures(
    broker: Broker,
    fakes: dict[str, Running],
    tally: Tally,
    meetings: Meetings,
    jobs: int,
    took: float,
) -> dict[str, Any]:
    scheduler = broker.stats()
    counts = {name: fake.ask("POST", "/_fake", {}) for name, fake in fakes.items()}
    spilled: Counter[str] = Counter()
    for each in counts.values():
        spilled.update(each["spills_of"])
    answered = tally.statuses.total()
    return {
        "jobs": jobs,
        "answers": dict(tally.statuses),
        "out_of_memory_at_first_meetings": dict(meetings.at_first),
        "out_of_memory_seen_by_clients": meetings.later.total(),
        "out_of_memory_later": dict(meetings.later),
        "refused": tally.statuses["503 insufficient_vram"],
        "failed_otherwise": answered
        - tally.statuses["200"]
        - tally.statuses["503 insufficient_vram"]
        - tally.out_of_memory,
        "healed": scheduler["out_of_memory"]["healed"],
        "evictions": scheduler["evictions"],
        # Ollama's own way not to run out of memory: it says nothing, and is slow.
        "went_to_the_cpu": dict(spilled),
        "loads": sum(each["loads"] for each in counts.values()),
        "unloaded_by_the_broker": sum(each["unloads"] for each in counts.values()),
        "unloaded_by_the_servers": sum(each["own_unloads"] for each in counts.values()),
        "seconds": round(took, 1),
        "ms_per_job": round(took / jobs * 1000, 1),
    }
