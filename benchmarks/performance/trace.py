"""A mixed trace of jobs with swaps: how long all of it takes, against what the jobs and the loads
themselves take."""

from __future__ import annotations

import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import requests

from benchmarks.performance.measures import Figures
from benchmarks.running import serving
from gpumanager.gpu.simulated import SimulatedCard
from tests.support.fake_servers import fake_server

CARD_MIB = 10_000
CONSUMERS = {"tts": (3000, 0.05), "stt": (2500, 0.08), "llm": (6000, 0.2), "image": (5000, 0.3)}
"""Each kind's MiB and seconds of work."""

LOAD_S = 0.3
RELEASE_S = 0.1
CLIENTS = 8


def makespan(jobs: int, seed: int) -> Figures:
    """Run the trace once. `ideal_s` is the sum of the work and of the loads and releases that
    came of the order of arrival; `ratio` what it really took by that."""
    kinds = _trace(jobs, seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        card = SimulatedCard.create(folder / "card.json", CARD_MIB, release_lag_s=RELEASE_S)
        consumers = {}
        for kind, (mib, work) in CONSUMERS.items():
            fake = stack.enter_context(fake_server("plain", card.path, kind, mib))
            fake.set(job_s=work, load_s=LOAD_S)
            consumers[f"it-{kind}"] = {
                "url": fake.url,
                "health": "/health",
                "unload": "/unload",
                "paths": {kind: "/job"},
                "vram_resident_mib": mib,
            }
        config = {
            "gpu": {"device": f"simulated:{card.path}"},
            "routing": {kind: f"it-{kind}" for kind in CONSUMERS},
            "consumers": consumers,
            "log": {"format": "json"},
        }
        broker = stack.enter_context(serving(config))
        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(lambda kind: _post(broker.port, kind), kinds))
        took = time.perf_counter() - began
        evictions = broker.stats()["evictions"]
    work = sum(CONSUMERS[kind][1] for kind in kinds)
    loads = evictions + sum(1 for kind in CONSUMERS if kind in kinds)
    ideal = work + loads * LOAD_S + evictions * RELEASE_S
    return {
        "seconds": took,
        "ideal_s": ideal,
        "ratio": took / ideal,
        "evictions": float(evictions),
    }


def _trace(jobs: int, seed: int) -> list[str]:
    """Kinds in runs of one to five, as people work."""
    chance = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < jobs:
        kinds += [chance.choice(list(CONSUMERS))] * chance.randint(1, 5)
    return kinds[:jobs]


def _post(port: int, kind: str) -> None:
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(f"http://127.0.0.1:{port}/v1/{kind}", data=b"{}", timeout=120)
        answer.raise_for_status()
