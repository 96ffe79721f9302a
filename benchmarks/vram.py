"""Does anybody run out of memory, or is refused what would have fitted? Mixed jobs over five
consumers that never all fit.

    python -m benchmarks.vram [--jobs 2000] [--seed N] [--modes clean,laggy,...] [--policy affinity]

The consumers are processes of their own (fakes of Ollama, ComfyUI, vLLM and two plain servers)
whose models take memory of a simulated card; the broker is `waitress-serve wsgi:app`. Modes:

- clean: declarations are right, a release is immediate.
- laggy: freed memory shows as free 0.3 s later.
- totals: as laggy, and the card gives no figures per process.
- leaking: one consumer gives nothing back when it unloads; its next eviction method restarts it.
- foreign: a process of nobody's takes and frees up to a fifth of the card, all the time.
- two-steps: a fifth of what is freed comes back at once, the rest 1.2 s later.
- late: freed memory shows as free 12 s later (a fiftieth of the jobs).
- beside: somebody uses ComfyUI and the speech server directly, now for a second, now for three.
- desktop: a desktop holds 600 MiB, all the time.
- oversize: one in forty jobs of the speech server needs 9,000 MiB, which fits when nobody else is
  there, and one in forty 14,000 MiB, which never does.
- blind: every few seconds the card does not answer for half a second.
- high: one consumer declares three times what it needs.
- wrong, wrong-not-healed: as totals, without the lag, and every declaration is 40 % too low; with
  healing, and with `retry: false`.
- models: other consumers, three servers with three models each, of which nothing is declared.
- models-one-figure: the same trace, with one figure for each server.

Prints its figures as JSON, and exits with 1 if any job failed or was refused, for want of memory or
else, that would have fitted (in the wrong modes and with one figure that is expected; one that asks
for more than the card has may be told so), or if `models` has the broker unload more than half as
many models as `models-one-figure`. Loops are bounded in count and time.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks import vram_models
from benchmarks.running import Broker, serving
from benchmarks.tally import Tally
from gpumanager.gpu.simulated import OutOfMemory, SimulatedCard
from tests.support.fake_servers import command, fake_server
from tests.support.ports import free_port

CARD_MIB = 12_000
NEEDS = {"voice": 3000, "whisper": 2500, "ollama": 6000, "comfyui": 5000, "vllm": 5500}
FAKES = {"voice": "plain", "whisper": "plain", "ollama": "ollama", "comfyui": "comfyui"}
KINDS = {"voice": "tts", "whisper": "stt", "ollama": "llm", "comfyui": "image"}
BODIES: dict[str, Any] = {
    "ollama": {"model": "llama3:8b"},
    "comfyui": {"prompt": {"1": {"class_type": "KSampler"}}},
}
CLIENTS = 8
DESKTOP_MIB = 600
LONGEST_S = 1200.0
ENOUGH_JOBS = 1000
"""After so many, first meetings do not count for much."""

MOST_SHARE = 0.5
"""Of the models that are unloaded where there is one figure for each server, are unloaded where
there is one for each model."""

DECLARED_SHARE = 0.6
"""Of what it really needs, in the modes that are wrong."""

OVERSIZE = {39: 9_000, 19: 14_000}
"""MiB of one in forty jobs, by the rest of its number."""


@dataclass(frozen=True)
class Mode:
    """What is wrong: how the card behaves (as `SimulatedCard.misbehave` has it), by how much each
    consumer's declaration is off, and what goes on beside the broker."""

    card: dict[str, Any] = field(default_factory=dict)
    declared: dict[str, float] = field(default_factory=dict)
    retry: bool = True
    jobs_share: float = 1.0
    release_timeout: float = 10.0
    expected: bool = False
    """Whether jobs may run out of memory, or be refused."""


_WRONG = dict.fromkeys(NEEDS, DECLARED_SHARE)
MODES = {
    "clean": Mode(release_timeout=3),
    "laggy": Mode({"release_lag_s": 0.3}, release_timeout=3),
    "totals": Mode({"release_lag_s": 0.3, "per_process": False}, release_timeout=3),
    "leaking": Mode(release_timeout=3),
    "foreign": Mode(release_timeout=3),
    "two-steps": Mode({"release_lag_s": 1.2, "prompt_share": 0.2}, jobs_share=0.2),
    "late": Mode({"release_lag_s": 12.0}, jobs_share=0.02),
    "beside": Mode(),
    "desktop": Mode(),
    "oversize": Mode(),
    "blind": Mode(),
    "high": Mode(declared={"whisper": 3.0}),
    "wrong": Mode({"per_process": False}, _WRONG, release_timeout=3, expected=True),
    "wrong-not-healed": Mode(
        {"per_process": False}, _WRONG, retry=False, release_timeout=3, expected=True
    ),
    "models": Mode(),
    "models-one-figure": Mode(expected=True),
}


def run(
    name: str, jobs: int, seed: int, policy: str = "fifo", load_s: float = 0.0
) -> dict[str, Any]:
    """One mode; its figures."""
    if name.startswith("models"):
        return {"mode": name} | vram_models.run(name != "models", jobs, seed, policy, load_s)
    mode = MODES[name]
    jobs = max(1, round(jobs * mode.jobs_share))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        card = SimulatedCard.create(folder / "card.json", CARD_MIB)
        if name == "desktop":
            card.allocate("desktop", DESKTOP_MIB)
        config = _config(stack, card, name, load_s) | {"scheduler": {"policy": policy}}
        card.misbehave(**mode.card)
        broker = stack.enter_context(serving(config))
        tally = Tally()
        began = time.monotonic()
        if name == "leaking":
            card.misbehave(leaks={"voice": 1.0})
        beside = _BESIDE.get(name)
        if beside is not None:
            stack.enter_context(
                _going_on(partial(beside, World(card, config, random.Random(seed))))
            )
        _send_all(broker, _mixed(jobs, seed), tally, began, oversize=name == "oversize")
        broker.await_idle()
        took = time.monotonic() - began
        return _figures(name, jobs, broker, tally, took)


def _config(stack: ExitStack, card: SimulatedCard, mode: str, load_s: float) -> dict[str, Any]:
    consumers: dict[str, Any] = {}
    for name, kind in FAKES.items():
        if name == "voice" and mode == "leaking":
            consumers[name] = _restartable(stack, card, name)
        else:
            fake = stack.enter_context(fake_server(kind, card.path, name, NEEDS[name]))
            fake.set(load_s=load_s)
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
        consumer["vram_resident_mib"] = round(NEEDS[name] * MODES[mode].declared.get(name, 1.0))
        consumer["oom"] = {"retry": MODES[mode].retry}
    return {
        "gpu": {
            "device": f"simulated:{card.path}",
            "release_timeout": MODES[mode].release_timeout,
        },
        "health_interval": 1,
        "routing": {kind: name for name, kind in KINDS.items()},
        "log": {"format": "json"},
        "consumers": consumers,
    }


def _restartable(stack: ExitStack, card: SimulatedCard, name: str) -> dict[str, Any]:
    """A consumer whose next eviction method ends it, and starts it again."""
    port = free_port()
    start = [*command("plain", card.path, name, NEEDS[name], port), "detached"]
    first = subprocess.Popen(start, stdout=subprocess.DEVNULL, start_new_session=True)
    stack.callback(_end_all, start)
    stack.callback(first.wait, 10)
    stack.callback(first.kill)
    restart = {"signal": "TERM", "grace": 3, "start": start}
    return {"url": f"http://127.0.0.1:{port}", "evict": ["http", restart]}


def _end_all(start: list[str]) -> None:
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == start:
            process.kill()


def _mixed(jobs: int, seed: int) -> list[str]:
    return random.Random(seed).choices([*FAKES, "vllm"], weights=[4, 4, 4, 4, 1], k=jobs)


def _send_all(
    broker: Broker, names: list[str], tally: Tally, began: float, *, oversize: bool
) -> None:
    def send(job: tuple[int, str]) -> None:
        number, name = job
        if time.monotonic() - began > LONGEST_S:
            return
        path = f"/v1/{KINDS[name]}" if name in KINDS else f"/v1/consumers/{name}/load"
        body, label = BODIES.get(name, {}), ""
        mib = OVERSIZE.get(number % 40) if oversize and name == "voice" else None
        if mib is not None:
            body, label = {"needs": mib}, f"{mib} MiB: " if mib > CARD_MIB else ""
        with requests.Session() as session:
            session.trust_env = False
            url = f"http://127.0.0.1:{broker.port}{path}"
            tally.count(session.post(url, json=body, timeout=300), label)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(send, enumerate(names)))


# -- what goes on beside the broker ---------------------------------------------------------------

Stop = threading.Event
"""Set when the clients are done; its `wait` is how those beside the broker pass the time."""


@dataclass(frozen=True)
class World:
    """What those beside the broker have to do with."""

    card: SimulatedCard
    config: dict[str, Any]
    chance: random.Random


def _game(world: World, stop: Stop) -> None:
    """A process of nobody's takes memory, and frees it again."""
    while not stop.wait(world.chance.uniform(0.05, 0.5)):
        try:
            world.card.allocate("game", world.chance.randint(100, CARD_MIB // 5))
        except OutOfMemory:
            continue
        stop.wait(world.chance.uniform(0.05, 0.5))
        world.card.free("game")


def _another_user(world: World, stop: Stop) -> None:
    """Somebody asks a server directly, as from its own page."""
    with requests.Session() as session:
        session.trust_env = False
        while not stop.wait(world.chance.uniform(0.5, 3.0)):
            seconds = world.chance.choice([1.0, 3.0])
            name, path, body = world.chance.choice(
                [
                    ("comfyui", "/prompt", {"prompt": {"1": {"seconds": seconds}}}),
                    ("voice", "/job", {}),
                ]
            )
            session.post(world.config["consumers"][name]["url"] + path, json=body, timeout=60)


def _blinking(world: World, stop: Stop) -> None:
    """The card does not answer for a while, now and then."""
    while not stop.wait(world.chance.uniform(1.0, 4.0)):
        world.card.misbehave(blind_s=0.5)


_BESIDE: dict[str, Callable[[World, Stop], None]] = {
    "foreign": _game,
    "beside": _another_user,
    "blind": _blinking,
}


@contextmanager
def _going_on(act: Callable[[Stop], None]) -> Iterator[None]:
    """Have it go on until the block is left."""
    stop = Stop()
    thread = threading.Thread(target=act, args=(stop,), name="beside", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


def _figures(mode: str, jobs: int, broker: Broker, tally: Tally, took: float) -> dict[str, Any]:
    status = broker.get("/v1/status").json()
    failures = status["scheduler"]["out_of_memory"]
    outcomes = Counter(re.findall(r'"outcome": "(\w+)"', broker.log()))
    return {
        "mode": mode,
        "jobs": jobs,
        "answers": dict(tally.statuses),
        "out_of_memory_seen_by_clients": tally.out_of_memory,
        "refused": tally.statuses["503 insufficient_vram"],
        "failed_otherwise": sum(
            count
            for word, count in tally.statuses.items()
            if word not in ("200", "503 insufficient_vram") and "MiB" not in word
        ),
        # ComfyUI's come after its answer; they are in here, and cannot be healed.
        "out_of_memory_seen_by_the_broker": failures["seen"],
        "healed": failures["healed"],
        "evictions": status["scheduler"]["evictions"],
        "releases": dict(outcomes),
        "quarantined": [c["name"] for c in status["consumers"] if "quarantine" in c],
        "seconds": round(took, 1),
        "ms_per_job": round(took / jobs * 1000, 1),
    }


def modes(text: str) -> list[str]:
    """The modes named in `text`, separated by commas. Raises argparse.ArgumentTypeError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MODES:
            known = ", ".join(MODES)
            raise argparse.ArgumentTypeError(f"there is no mode {name!r}; known: {known}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument(
        "--load-s", type=float, default=0.0, help="how long each load takes, in seconds"
    )
    parser.add_argument("--policy", choices=["fifo", "affinity"], default="fifo")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument(
        "--modes", type=modes, default=list(MODES), metavar="A,B", help="default: all of them"
    )
    options = parser.parse_args()
    broken = False
    of_models: dict[str, dict[str, Any]] = {}
    for name in options.modes:
        figures = run(name, options.jobs, options.seed, options.policy, options.load_s)
        print(json.dumps(figures), flush=True)
        if name.startswith("models"):
            of_models[name] = figures
        if not MODES[name].expected:
            broken |= figures["refused"] > 0 or figures["failed_otherwise"] > 0
            broken |= name == "models" and figures["out_of_memory_seen_by_clients"] > 0
    if len(of_models) == 2:
        shares = vram_models.beside(of_models["models"], of_models["models-one-figure"])
        print(json.dumps({"models beside one figure": shares}), flush=True)
        broken |= options.jobs >= ENOUGH_JOBS and shares["unloaded_by_the_broker"] > MOST_SHARE
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
