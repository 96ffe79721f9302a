"""Is what the broker believes what NVML says? On a machine with an NVIDIA GPU.

    python -m benchmarks.real_gpu [--jobs 60] [--seed N] [--device 0] [--budget MIB]
        [--python PYTHON_WITH_TORCH] [--llama-server FILE --model GGUF]

Starts two servers that keep tensors on the card as models (`benchmarks/torch_server.py`), where the
interpreter has torch, and llama.cpp's `llama-server` with the model that is given, if it is on PATH
or named; and the broker in front of them. The tensors are sized so that not all of them fit (into
`--budget`, or what is free). Then it sends jobs, one after the other, and compares after each one
what `/v1/status` tells of each consumer with what NVML lists for the consumer's processes, and what
it tells of each model with the tensors that the server has for it.

Prints the deviations, the evictions and what became of them, as JSON and as a table; exits with 1
if a job failed. Where there is no GPU, or neither torch nor llama-server, it says so and exits with
0. `--device simulated` tries the script itself out, on a simulated card.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.deviations import Deviations, table
from benchmarks.running import Broker, serving
from gpumanager.gpu.device import Card, GpuUnavailable, open_card
from gpumanager.gpu.simulated import SimulatedCard
from tests.support.ports import free_port
from tests.support.threads import eventually

SIMULATED_MIB = 12_000
SHARES = ({"a-small": 0.08, "a-large": 0.4}, {"b-small": 0.15, "b-large": 0.5})
"""Of the memory that is to be used: the models of the two torch servers. They never all fit."""

FRESH_S = 10.0
"""How long status may take to tell of a reading that is younger than the job."""

CHAT = "/v1/chat/completions"


class NothingToRun(Exception):
    """The text says what is missing."""


@dataclass(frozen=True)
class Server:
    """One that runs: the port that it listens on, what the broker is told of it, its models."""

    name: str
    port: int
    config: dict[str, Any]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """What the broker believes of one consumer, or model of one (`consumer/model`), in MiB."""

    held: int | None
    needed: int | None


def believed(status: dict[str, Any]) -> dict[str, Figures]:
    """What `/v1/status` tells of each."""
    found: dict[str, Figures] = {}
    for consumer in status["consumers"]:
        found[consumer["name"]] = _figures(consumer)
        for model in consumer.get("models", ()):
            found[f"{consumer['name']}/{model['name']}"] = _figures(model)
    return found


def _figures(told: dict[str, Any]) -> Figures:
    needed = told.get("learned", {}).get("needed", {}).get("mib")
    return Figures(told.get("gpu_resident_mib", told.get("held_mib")), needed)


def measured(card: Card, servers: list[Server]) -> dict[str, int]:
    """What the card lists for each server's processes, in MiB. Raises NothingToRun where it does
    not tell."""
    processes = card.read().processes
    if processes is None:
        raise NothingToRun("the driver gives no figures per process (WSL2, WDDM, MIG)")
    listening = {
        each.laddr.port: each.pid
        for each in psutil.net_connections("tcp")
        if each.laddr and each.status == psutil.CONN_LISTEN and each.pid is not None
    }
    found = {}
    for server in servers:
        pids = _tree(listening.get(server.port))
        found[server.name] = sum(each.mib for each in processes if each.pid in pids)
    return found


def _tree(pid: int | None) -> set[int]:
    """A process and its descendants; nobody, if the broker has stopped it."""
    if pid is None:
        return set()
    return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}


def by_their_own_word(servers: list[Server]) -> dict[str, int]:
    """MiB of the tensors of each model that is loaded, where a server tells."""
    found = {}
    for server in servers:
        if server.config.get("preset") is None:
            models = requests.get(server.config["url"] + "/models", timeout=20).json()["models"]
            for each in models:
                if each["loaded"]:
                    found[f"{server.name}/{each['name']}"] = each["mib"]
    return found


def has_torch(python: str) -> bool:
    """Whether that interpreter has torch, with a card."""
    asks = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        return (
            subprocess.run([python, "-c", asks], capture_output=True, check=False).returncode == 0
        )
    except OSError:
        return False


@contextmanager
def torch_server(name: str, python: str, device: str, sizes: dict[str, int]) -> Iterator[Server]:
    """One of them, until the block is left."""
    script = Path(__file__).with_name("torch_server.py")
    process = subprocess.Popen(
        [python, str(script), device, json.dumps(sizes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},  # as NVML counts
    )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        config = {
            "url": f"http://127.0.0.1:{port}",
            "health": "/health",
            "paths": {"llm": CHAT},
            "routes": [CHAT],
            "list_models": {"path": "/models", "items": "models[].name"},
            "probe": {
                "path": "/models",
                "items": "models[?loaded].name",
                "loaded": "length(models[?loaded]) > `0`",
            },
            "unload": {
                "for_each": "items",
                "path": "/unload",
                "json": {"model": "{item}"},
                "when_busy": "drains",
            },
            "trim": "/empty_cache",
        }
        yield Server(name, port, config, tuple(sizes))
    finally:
        process.kill()
        process.communicate(timeout=20)


@contextmanager
def llama_server(program: str, model: str) -> Iterator[Server]:
    """llama.cpp's own, with one model; the broker may end it, and starts it again."""
    port = free_port()
    start = [program, "-m", model, "--port", str(port), "-ngl", "999", "-c", "4096"]
    start += ["--alias", "llama"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(start, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: process.poll() is not None or _answers(url + "/health"), timeout=300)
        if process.poll() is not None:
            raise NothingToRun(f"{program} ended with {process.returncode}")
        ends = {"signal": "TERM", "grace": 10, "start": start}
        config = {"preset": "llama-server", "url": url, "evict": [ends]}
        yield Server("llama-server", port, config, ("llama",))
    finally:
        process.kill()
        process.wait(20)
        for each in psutil.process_iter(["cmdline"]):
            if (each.info["cmdline"] or [])[-len(start) :] == start:  # whom the broker started
                each.kill()


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def start(stack: ExitStack, options: argparse.Namespace, device: str, card: Card) -> list[Server]:
    """All that can run here. Raises NothingToRun."""
    simulated = device.startswith("simulated:")
    free = card.read().free_mib
    budget = min(options.budget or free, free) - 1200  # contexts, and the reserve
    servers: list[Server] = []
    if options.llama_server is not None and options.model is not None:
        servers.append(stack.enter_context(llama_server(options.llama_server, options.model)))
    if simulated or has_torch(options.python):
        on = device if simulated else f"cuda:{device}"
        for name, shares in zip(("torch-a", "torch-b"), SHARES, strict=True):
            sizes = {model: round(budget * share) for model, share in shares.items()}
            servers.append(stack.enter_context(torch_server(name, options.python, on, sizes)))
    if not servers:
        raise NothingToRun(
            f"{options.python} has no torch that sees the card (--python), and there is no"
            " llama-server with a model (--llama-server, --model)"
        )
    return servers


def compare(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """All of it; the figures. Raises NothingToRun."""
    card = open_card(int(device) if device.isdigit() else device)
    try:
        before = card.read()
    except GpuUnavailable as error:
        raise NothingToRun(f"no GPU: {error}") from error
    with ExitStack() as stack:
        servers = start(stack, options, device, card)
        config = {
            "gpu": {
                "device": int(device) if device.isdigit() else device,
                "sample_interval": 0.2,
                "reserved_mib": 256 + max(0, before.free_mib - (options.budget or 10**9)),
            },
            "health_interval": 1,
            "log": {"format": "json"},
            "routing": {"llm": [server.name for server in servers]},
            "consumers": {server.name: server.config for server in servers},
        }
        broker = stack.enter_context(serving(config))
        watch = Watch(broker, card, servers)
        watch.run(options.jobs, options.seed)
        return {"device": before.name or device, "total_mib": before.total_mib} | watch.figures()


class Watch:
    """Sends jobs, and compares after each."""

    def __init__(self, broker: Broker, card: Card, servers: list[Server]) -> None:
        self.broker, self.card, self.servers = broker, card, servers
        self.held, self.models, self.needed = Deviations(), Deviations(), Deviations()
        self.answers: Counter[str] = Counter()
        self.stale = 0

    def run(self, jobs: int, seed: int) -> None:
        chance = random.Random(seed)
        models = [model for server in self.servers for model in server.models]
        for _ in range(jobs):
            body = {
                "model": chance.choice(models),
                "messages": [{"role": "user", "content": "Hello."}],
                "max_tokens": chance.choice([16, 16, 512]),
            }
            answer = self.broker.session.post(
                f"http://127.0.0.1:{self.broker.port}{CHAT}", json=body, timeout=300
            )
            self.answers[str(answer.status_code)] += 1
            self._compare()

    def _compare(self) -> None:
        status = self._fresh_status()
        really = measured(self.card, self.servers)
        told = believed(status)
        for name, mib in really.items():
            self.held.add(name, told[name].held or 0, mib)
        for name, mib in by_their_own_word(self.servers).items():
            figures = told.get(name, Figures(None, None))
            self.models.add(name, figures.held or 0, mib)
            if figures.needed:
                self.needed.add(name, figures.needed, mib)

    def _fresh_status(self) -> dict[str, Any]:
        """One with a reading of the card that is younger than now."""
        now = datetime.now(UTC)
        deadline = time.monotonic() + FRESH_S
        while True:
            status: dict[str, Any] = self.broker.get("/v1/status").json()
            sampled = status["gpu"].get("last_sample")
            if sampled and datetime.fromisoformat(sampled) > now:
                return status
            if time.monotonic() > deadline:
                self.stale += 1
                return status
            time.sleep(0.05)

    def _outcomes(self, message: str) -> dict[str, int]:
        """What became of the evictions, or of the trims."""
        said = re.findall(rf'"msg": "{message}".*?"outcome": "(\w+)"', self.broker.log())
        return dict(Counter(said))

    def figures(self) -> dict[str, Any]:
        scheduler = self.broker.stats()
        return {
            "jobs": self.answers.total(),
            "answers": dict(self.answers),
            "held": self.held.summary(),
            "models": self.models.summary(),
            "needed": self.needed.summary(),
            "evictions": scheduler["evictions"],
            "outcomes": self._outcomes("evicted"),
            "trims": self._outcomes("trimmed"),
            "out_of_memory": scheduler["out_of_memory"],
            "compared_with_an_old_reading": self.stale,
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--device", default="0", metavar="INDEX", help="NVML's, or `simulated`")
    parser.add_argument(
        "--budget", type=int, default=0, metavar="MIB", help="use no more than that"
    )
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), metavar="FILE")
    parser.add_argument("--model", metavar="GGUF")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        device = options.device
        if device == "simulated":
            SimulatedCard.create(Path(folder) / "card.json", SIMULATED_MIB)
            device = f"simulated:{folder}/card.json"
        try:
            figures = compare(options, device)
        except NothingToRun as missing:
            print(f"nothing was compared: {missing}")
            return 0
    print(json.dumps(figures))
    print(f"\n{table('Held: believed, less what NVML says', figures['held'])}")
    print(f"\n{table('Models: believed to hold, less their tensors', figures['models'])}")
    print(f"\n{table('Models: believed to need, less their tensors', figures['needed'])}")
    print(f"\n{figures['evictions']} evictions: {figures['outcomes']}; trims: {figures['trims']}")
    return int(set(figures["answers"]) != {"200"})


if __name__ == "__main__":
    sys.exit(main())
