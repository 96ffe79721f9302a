"""A consumer as its own process, whose model takes memory of a simulated card.

`python -m tests.support.gpu_consumer CARD NAME MIB` prints its port and serves until its
standard input ends. A job loads the model if it is not loaded, and fails, as CUDA would make it
fail, if the card is full.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gpumanager.simulation.card import OutOfMemory, SimulatedCard

ROOT = Path(__file__).parent.parent.parent


class Consumer:
    def __init__(self, card: SimulatedCard, name: str, mib: int) -> None:
        self.card, self.name, self.mib = card, name, mib
        self.lock = threading.Lock()
        self.loaded = False

    def handle(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/health":
            held = self.mib if self.loaded else 0
            return 200, {"status": "ok", "loaded": self.loaded, "gpu_resident_mib": held}
        with self.lock:
            if path == "/unload":
                if self.loaded:
                    self.card.free(self.name)
                    self.loaded = False
                return 200, {"loaded": False}
            if not self.loaded:
                try:
                    self.card.allocate(self.name, self.mib)
                except OutOfMemory as error:
                    return 500, {"error": f"CUDA out of memory: {error}"}
                self.loaded = True
            return 200, {"done_by": self.name}


def main() -> None:
    path, name, mib = sys.argv[1:]
    consumer = Consumer(SimulatedCard(path), name, int(mib))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = consumer.handle(self.path)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer  # noqa: N815  # http.server's names

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, name="server", daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


@contextmanager
def gpu_consumer(card: Path, name: str, mib: int) -> Iterator[str]:
    """Run one; yields its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.gpu_consumer", str(card), name, str(mib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


if __name__ == "__main__":
    main()
