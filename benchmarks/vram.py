"""Does anybody run out of memory? 2,000 mixed jobs over five consumers that never all fit.

    python -m benchmarks.vram [--jobs 2000] [--seed N] [--modes clean,laggy,...]

The consumers are processes of their own (fakes of Ollama, ComfyUI, vLLM and two plain servers)
whose models take memory of a simulated card; the broker is `waitress-serve wsgi:app`. Modes:

- clean: declarations are right, a release is immediate.
- laggy: freed memory shows as free 0.3 s later.
- totals: as laggy, and the card gives no figures per process.
- leaking: one consumer gives nothing back when it unloads; its next rung restarts it.
- foreign: a process of nobody's takes and frees up to a fifth of the card, all the time.
- wrong: as totals, without the lag, and every declaration is 40 % too low; once with healing, once
  with `retry: false`.

Prints its figures as JSON, and exits with 1 if anybody ran out of memory through the broker where
nobody should. Loops are bounded in count and time.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
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

import psutil
import requests

from benchmarks.running import Broker, serving
from gpumanager.simulation.card import OutOfMemory, SimulatedCard
from tests.support.fake_servers import command, fake_server
from tests.support.sockets import free_port

CARD_MIB = 12_000
NEEDS = {"voice": 3000, "whisper": 2500, "ollama": 6000, "comfyui": 5000, "vllm": 5500}
FAKES = {"voice": "plain", "whisper": "plain", "ollama": "ollama", "comfyui": "comfyui"}
KINDS = {"voice": "tts", "whisper": "stt", "ollama": "llm", "comfyui": "image"}
BODIES: dict[str, Any] = {
    "ollama": {"model": "llama3:8b"},
    "comfyui": {"prompt": {"1": {"class_type": "KSampler"}}},
}
CLIENTS = 8
LONGEST_S = 1200.0
MODES = ("clean", "laggy", "totals", "leaking", "foreign", "wrong", "wrong, not healed")
DECLARED_SHARE = 0.6
"""Of what it really needs, in the modes that are wrong."""


@dataclass
class Tally:
    """What came of the jobs."""

    statuses: Counter[str] = field(default_factory=Counter)
    out_of_memory: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, answer: requests.Response) -> None:
        word = str(answer.status_code)
        body = answer.text
        if answer.status_code == 503:
            word += " " + str(answer.json().get("error"))
        with self.lock:
            self.statuses[word] += 1
            if answer.status_code >= 500 and "out of memory" in body.lower():
                self.out_of_memory += 1


def run(mode: str, jobs: int, seed: int) -> dict[str, Any]:
    """One mode; its figures."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        card = SimulatedCard.create(folder / "card.json", CARD_MIB)
        config = _config(stack, card, mode)
        if mode in ("laggy", "totals"):
            card.misbehave(release_lag_s=0.3)
        if mode == "totals" or mode.startswith("wrong"):
            card.misbehave(per_process=False)
        broker = stack.enter_context(serving(config))
        tally = Tally()
        began = time.monotonic()
        if mode == "leaking":
            card.misbehave(leaks={"voice": 1.0})
        if mode == "foreign":
            stack.enter_context(_foreigner(card, seed))
        _send_all(broker, _mixed(jobs, seed), tally, began)
        broker.await_idle()
        took = time.monotonic() - began
        return _figures(mode, jobs, broker, tally, took)


def _config(stack: ExitStack, card: SimulatedCard, mode: str) -> dict[str, Any]:
    share = DECLARED_SHARE if mode.startswith("wrong") else 1.0
    oom = {"retry": mode != "wrong, not healed"}
    consumers: dict[str, Any] = {}
    for name, kind in FAKES.items():
        if name == "voice" and mode == "leaking":
            consumers[name] = _restartable(stack, card, name)
        else:
            fake = stack.enter_context(fake_server(kind, card.path, name, NEEDS[name]))
            consumers[name] = {"url": fake.url}
        if kind == "plain":
            consumers[name] |= {
                "health": "/health",
                "unload": "/unload",
                "paths": {KINDS[name]: "/job"},
            }
        else:
            consumers[name]["preset"] = kind
            if name == "comfyui":
                fake.set(job_s=0.005)
    # The fifth has no kind of its own: it comes and goes by the operator's requests. It loads when
    # it starts, so it starts while there is room.
    fake = stack.enter_context(fake_server("vllm", card.path, "vllm", NEEDS["vllm"]))
    consumers["vllm"] = {"preset": "vllm", "url": fake.url}
    for name, consumer in consumers.items():
        consumer["vram_resident_mib"] = round(NEEDS[name] * share)
        consumer["oom"] = oom
    return {
        "gpu": {"device": f"simulated:{card.path}", "release_timeout": 3},
        "health_interval": 1,
        "routing": {kind: name for name, kind in KINDS.items()},
        "log": {"format": "json"},
        "consumers": consumers,
    }


def _restartable(stack: ExitStack, card: SimulatedCard, name: str) -> dict[str, Any]:
    """A consumer whose next rung ends it, and starts it again."""
    port = free_port()
    start = [*command("plain", card.path, name, NEEDS[name], port), "detached"]
    first = subprocess.Popen(start, stdout=subprocess.DEVNULL, start_new_session=True)
    stack.callback(_end_all, start)
    stack.callback(first.wait, 10)
    stack.callback(first.kill)
    rung = {"signal": "TERM", "grace": 3, "start": start}
    return {"url": f"http://127.0.0.1:{port}", "evict": ["http", rung]}


def _end_all(start: list[str]) -> None:
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == start:
            process.kill()


def _mixed(jobs: int, seed: int) -> list[str]:
    return random.Random(seed).choices([*FAKES, "vllm"], weights=[4, 4, 4, 4, 1], k=jobs)


def _send_all(broker: Broker, names: list[str], tally: Tally, began: float) -> None:
    def send(name: str) -> None:
        if time.monotonic() - began > LONGEST_S:
            return
        path = f"/v1/{KINDS[name]}" if name in KINDS else f"/v1/consumers/{name}/load"
        with requests.Session() as session:
            session.trust_env = False
            url = f"http://127.0.0.1:{broker.port}{path}"
            tally.count(session.post(url, json=BODIES.get(name, {}), timeout=300))

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(send, names))


@contextmanager
def _foreigner(card: SimulatedCard, seed: int) -> Iterator[None]:
    """This process takes memory and frees it again, until the block is left."""
    stop = threading.Event()
    chance = random.Random(seed)

    def come_and_go() -> None:
        while not stop.wait(chance.uniform(0.05, 0.5)):
            try:
                card.allocate("game", chance.randint(100, CARD_MIB // 5))
            except OutOfMemory:
                continue
            stop.wait(chance.uniform(0.05, 0.5))
            card.free("game")
        card.free("game")

    thread = threading.Thread(target=come_and_go, name="foreigner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)


def _figures(mode: str, jobs: int, broker: Broker, tally: Tally, took: float) -> dict[str, Any]:
    status = broker.get("/v1/status").json()
    failures = status["scheduler"]["out_of_memory"]
    outcomes = Counter(re.findall(r'"outcome": "(\w+)"', broker.log()))
    return {
        "mode": mode,
        "jobs": jobs,
        "answers": dict(tally.statuses),
        "out_of_memory_seen_by_clients": tally.out_of_memory,
        # ComfyUI's come after its answer; they are in here, and cannot be healed.
        "out_of_memory_seen_by_the_broker": failures["seen"],
        "healed": failures["healed"],
        "evictions": status["scheduler"]["evictions"],
        "releases": dict(outcomes),
        "quarantined": [c["name"] for c in status["consumers"] if "quarantine" in c],
        "seconds": round(took, 1),
        "ms_per_job": round(took / jobs * 1000, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--modes", default=";".join(MODES), help="separated by ;")
    options = parser.parse_args()
    broken = False
    for mode in options.modes.split(";"):
        figures = run(mode, options.jobs, options.seed)
        print(json.dumps(figures), flush=True)
        if not mode.startswith("wrong"):
            broken |= figures["out_of_memory_seen_by_clients"] > 0
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
