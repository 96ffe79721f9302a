"""What it costs to find the model in a request, and to give it another name:
`python -m benchmarks.routing [--rounds N]`.

One broker, one upstream. Every round measures, in a new order, the same requests on a route where
the model need not be known (`/v1/plain`, `/v1/plainform`) and on the drop-in routes, where the
consumer has models: under the client's name, and under another one (`served_as`). Ratios are taken
within a round.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import time
from statistics import median
from typing import Any

from benchmarks import running
from benchmarks.performance import client

MIB = 1024 * 1024
FORM_MIB = 64


def chat(model: str) -> bytes:
    """A chat request of 2 kB."""
    said = {"model": model, "messages": [{"role": "user", "content": "words " * 310}]}
    return json.dumps(said).encode()


def config(port: int) -> dict[str, Any]:
    """Two consumers at one upstream: one whose model nobody needs to know, and one with models."""
    url = f"http://127.0.0.1:{port}"
    models = ["it", {"name": "other", "served_as": "it"}]
    routes = {
        "/v1/chat/completions": "/v1/chat/completions",
        "/v1/audio/transcriptions": "/upload",
    }
    return {
        "health_interval": 1000,
        "gpu": {"sample_interval": 1000},
        "log": {"level": "warning"},
        "routing": {"plain": "one", "plainform": "one", "llm": "two", "stt": "two"},
        "consumers": {
            "one": {
                "url": url,
                "paths": {"plain": "/v1/chat/completions", "plainform": "/upload"},
            },
            "two": {"url": url, "models": models, "routes": routes},
        },
    }


def upload(port: int, path: str, model: str, block: bytes) -> float:
    """Seconds until a form of 64 MiB, the model behind its file, was answered."""
    before = b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    after = b'\r\n--xYz\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
    after += model.encode() + b"\r\n--xYz--\r\n"
    size = len(before) + FORM_MIB * MIB + len(after)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n"
        "Content-Type: multipart/form-data; boundary=xYz\r\n\r\n"
    )
    with client.connect(port) as sock:
        began = time.perf_counter()
        sock.sendall(head.encode() + before)
        for _ in range(FORM_MIB):
            sock.sendall(block)
        sock.sendall(after)
        _await_answer(sock)
        return time.perf_counter() - began


def _await_answer(sock: socket.socket) -> None:
    reader = client.Reader()
    while not reader.complete(sock.recv(65536)):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=600, help="small requests in a round")
    options = parser.parse_args()
    chance = random.Random(4)
    block = chance.randbytes(MIB)
    small = {
        "plain": client.request("/v1/plain", chat("it")),
        "by model": client.request("/v1/chat/completions", chat("it")),
        "served_as": client.request("/v1/chat/completions", chat("other")),
    }
    forms = {
        "plain": ("/v1/plainform", "it"),
        "by model": ("/v1/audio/transcriptions", "it"),
        "served_as": ("/v1/audio/transcriptions", "other"),
    }
    added: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    with running.upstream() as port, running.serving(config(port)) as broker:
        for data in small.values():
            client.one_by_one(broker.port, data, 200)
        for _ in range(options.rounds):
            times = {
                name: median(client.one_by_one(broker.port, small[name], options.count))
                for name in chance.sample(sorted(small), len(small))
            }
            took = {
                name: median(upload(broker.port, *forms[name], block) for _ in range(3))
                for name in chance.sample(sorted(forms), len(forms))
            }
            for name in ("by model", "served_as"):
                added.setdefault(name, []).append(1000 * (times[name] - times["plain"]))
                ratios.setdefault(name, []).append(took[name] / took["plain"])
    print("| | 2 kB of JSON: added p50 ms | form of 64 MiB: × without |")
    print("|---|---|---|")
    for name in ("by model", "served_as"):
        print(f"| {name} | {_spread(added[name], 3)} | {_spread(ratios[name], 2)} |")


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
