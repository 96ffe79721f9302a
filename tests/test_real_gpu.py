"""What can be known of `benchmarks.real_gpu` without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import real_gpu, torch_server
from benchmarks.deviations import Deviations, table
from gpumanager.gpu.device import GpuUnavailable, SimulatedMemory
from gpumanager.gpu.simulated import SimulatedCard
from tests.support.fake_servers import fake_server
from tests.support.threads import eventually

LLAMA_SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
sys.path.insert(0, {root!r})
from gpumanager.gpu.simulated import SimulatedCard
SimulatedCard({card!r}).allocate("llama", 2500)
class Handler(BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = {{
            "/health": {{"status": "ok"}},
            "/props": {{"total_slots": 1, "is_sleeping": False}},
            "/slots": [],
            "/v1/models": {{"data": [{{"id": "llama"}}]}},
        }}.get(self.path, {{"choices": []}})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())
    do_GET = do_POST = answer
    def log_message(self, *args):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class NoCard:
    def read(self) -> Any:
        raise GpuUnavailable("NVML: Driver Not Loaded")

    def close(self) -> None:
        pass


@pytest.fixture
def card(tmp_path: Path) -> SimulatedCard:
    return SimulatedCard.create(tmp_path / "card.json", 12_000)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["real_gpu", *words])
    return real_gpu.main()


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_gpu, "open_card", lambda _: NoCard())
    assert run(monkeypatch) == 0
    assert capsys.readouterr().out == ("nothing was compared: no GPU: NVML: Driver Not Loaded\n")


def test_with_nothing_to_run_it_says_so(
    card: SimulatedCard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_gpu, "open_card", lambda _: SimulatedMemory(str(card.path)))
    assert run(monkeypatch, "--python", "/nowhere/python", "--llama-server", "") == 0
    said = capsys.readouterr().out
    assert "/nowhere/python has no torch that sees the card (--python), and there is no" in said


def test_where_the_driver_tells_nothing_of_processes_it_says_so(card: SimulatedCard) -> None:
    card.misbehave(per_process=False)
    with pytest.raises(real_gpu.NothingToRun, match="no figures per process"):
        real_gpu.measured(SimulatedMemory(str(card.path)), [])


def test_a_server_holds_what_its_descendants_hold(card: SimulatedCard) -> None:
    card.allocate("game", 700)
    with fake_server("ollama", card.path, "ollama", {"a:1b": 1000, "b:7b": 5000}) as ollama:
        ollama.set(unload_lag_s=0)
        server = real_gpu.Server("ollama", ollama.port, {}, ("a:1b", "b:7b"))
        stopped = real_gpu.Server("stopped", 1, {}, ())
        for model, holds in (("a:1b", 1000), ("b:7b", 6000)):
            ollama.ask("POST", "/api/chat", {"model": model})
            found = real_gpu.measured(SimulatedMemory(str(card.path)), [server, stopped])
            assert found == {"ollama": holds, "stopped": 0}
        ollama.ask("POST", "/api/generate", {"model": "b:7b", "keep_alive": 0})
        memory = SimulatedMemory(str(card.path))
        eventually(lambda: real_gpu.measured(memory, [server]) == {"ollama": 1000})


def test_what_status_tells_of_consumers_and_models() -> None:
    needed = {"needed": {"mib": 6000, "source": "measured"}}
    models = [{"name": "m:8b", "held_mib": 5000, "learned": needed}]
    consumer = {"name": "it", "gpu_resident_mib": 5300, "learned": needed, "models": models}
    assert real_gpu.believed({"consumers": [consumer, {"name": "new"}]}) == {
        "it": real_gpu.Figures(5300, 6000),
        "it/m:8b": real_gpu.Figures(5000, 6000),
        "new": real_gpu.Figures(None, None),
    }


def test_deviations() -> None:
    assert Deviations().summary() == {}
    deviations = Deviations()
    for believed in range(100, 120):
        deviations.add("a", believed, 100)  # 0 to 19 too much
    deviations.add("b", 50, 350)
    summary = deviations.summary()
    assert summary["a"] == {"pairs": 20, "median": 9.5, "p95": 18, "worst": 19}
    assert summary["b"] == {"pairs": 1, "median": 300, "p95": 300, "worst": -300}
    assert summary["all"] == {"pairs": 21, "median": 10, "p95": 19, "worst": -300}
    assert table("Held", summary).splitlines()[-1] == ("| all | 21 | 10 MiB | 19 MiB | -300 MiB |")


def test_the_torch_server_caches_as_torch_does(card: SimulatedCard) -> None:
    context = torch_server.Simulated.CONTEXT_MIB
    sizes = {"small": 1000, "large": 9000, "larger": 9000}
    server = torch_server.Server(torch_server.Simulated(str(card.path)), sizes, job_s=0)

    def asked(path: str, **body: Any) -> int:
        return server.handle(path, body)[0]

    def held() -> int:
        return card.memory().used_mib - context

    assert asked("/v1/chat/completions", model="small", max_tokens=4096) == 200
    assert held() == 1000 + 512  # the cache of its tokens stays
    assert asked("/v1/chat/completions", model="small", max_tokens=2048) == 200
    assert held() == 1000 + 512
    assert asked("/empty_cache") == 200
    assert held() == 1000
    assert asked("/v1/chat/completions", model="large") == 200
    status, said = server.handle("/v1/chat/completions", {"model": "larger"})
    assert (status, "CUDA out of memory" in said["error"]["message"]) == (500, True)
    assert asked("/unload", model="large") == 200
    assert held() == 1000
    assert asked("/unload", model="nobody") == 404


def test_the_whole_of_it_on_a_simulated_card(
    tmp_path: Path,
    card: SimulatedCard,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a llama-server that the broker stops and starts again."""
    program = tmp_path / "llama-server"
    root = str(Path(__file__).parent.parent)
    script = LLAMA_SERVER.format(python=sys.executable, root=root, card=str(card.path))
    program.write_text(script)
    program.chmod(0o755)
    words = ["--device", f"simulated:{card.path}", "--jobs", "14"]
    assert run(monkeypatch, *words, "--llama-server", str(program), "--model", "x.gguf") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[0])
    assert figures["answers"] == {"200": 14}
    assert figures["held"]["all"] == {"pairs": 42, "median": 0, "p95": 0, "worst": 0}
    assert figures["evictions"] > 1
    assert set(figures["outcomes"]) <= {"released", "partial"}
    eventually(lambda: card.holders() == ())  # all that ran has ended
