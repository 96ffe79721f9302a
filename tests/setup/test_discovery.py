"""Who answers at a port, by what real servers answer; and who is not taken for one of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gpumanager.setup import asking
from gpumanager.setup.discovery import discover
from gpumanager.setup.services import Identity, identify
from tests.gpu.test_attribution import FakeProcesses
from tests.support.ports import free_port

NOT_FOUND = (404, {"detail": "Not Found"})


class Server:
    """Answers as it is told to, by path; `otherwise` for all other paths. A path of None stays
    without an answer."""

    def __init__(self, answers: Mapping[str, Any], otherwise: Any = NOT_FOUND) -> None:
        self.release = threading.Event()
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            server_version, sys_version = "a-server/1", ""

            def do_GET(self) -> None:
                server.asked.append(self.path)
                answer = answers.get(self.path, otherwise)
                if answer is None:
                    server.release.wait(20)
                    return
                status, body = answer if isinstance(answer, tuple) else (200, answer)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def identity(self) -> Identity:
        return identify(f"http://127.0.0.1:{self.port}", self.port)

    @property
    def name(self) -> str | None:
        service = self.identity().service
        return service.service if service else None


@contextmanager
def serving(answers: Mapping[str, Any], otherwise: Any = NOT_FOUND) -> Iterator[Server]:
    server = Server(answers, otherwise)
    server._thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server._http.shutdown()
        server._http.server_close()
        server._thread.join(5)


PIPER_VOICES = {
    "en_US-joe-medium": {
        "audio": {"quality": "medium", "sample_rate": 22050},
        "espeak": {"voice": "en-us"},
        "num_speakers": 1,
        "phoneme_id_map": {" ": [3]},
    }
}
PIPER_INFO = {
    "last": None,
    "voice": {"language": "en-us", "name": "en_US-joe-medium", "num_speakers": 1},
}
LLAMA_PROPS = {
    "default_generation_settings": {"params": {}, "n_ctx": 4096},
    "total_slots": 1,
    "model_path": "m.gguf",
    "is_sleeping": False,
    "build_info": "b1",
}


def openapi(title: str, *paths: str) -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {"title": title},
        "paths": {path: {"get": {}} for path in paths},
    }


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("ollama", {"/": b"Ollama is running"}),
        (
            "ollama-compatible",
            {
                "/": {"message": "a shim"},
                "/api/tags": {"models": []},
                "/api/version": {"version": "1"},
            },
        ),
        ("llama-server", {"/": b"<html>llama.cpp</html>", "/props": LLAMA_PROPS}),
        (
            "llama-server",  # with an API key
            {
                "/props": (401, {"error": {"code": 401}}),
                "/v1/models": {"data": [{"id": "m", "owned_by": "llamacpp"}]},
            },
        ),
        (
            "koboldcpp",  # which speaks ComfyUI's and Ollama's protocols, too
            {
                "/api/extra/version": {"result": "KoboldCpp", "version": "1.98"},
                "/system_stats": {"system": {"python_version": "3.10"}, "devices": [{"index": 0}]},
                "/api/tags": {"models": [{"name": "koboldcpp"}]},
                "/api/version": {"version": "0.7.0"},
            },
        ),
        (
            "chatterbox-tts-api",
            {
                "/openapi.json": openapi("Chatterbox TTS API", "/audio/speech"),
                "/health": {"status": "ready", "model_loaded": False, "initialization_state": "x"},
            },
        ),
        ("chatterbox", {"/openapi.json": openapi("Chatterbox TTS Server", "/tts")}),
        ("orpheus-fastapi", {"/openapi.json": openapi("Orpheus-FASTAPI", "/v1/audio/speech")}),
        (
            "infinity",
            {
                "/openapi.json": openapi(
                    "♾️ Infinity - Embedding Inference Server", "/embeddings", "/rerank"
                )
            },
        ),
        ("whisper-asr", {"/openapi.json": openapi("Whisper Asr Webservice", "/asr")}),
        (
            "llama-cpp-python",
            {
                "/openapi.json": openapi("🦙 llama.cpp Python API", "/v1/chat/completions"),
                "/v1/models": {"data": [{"id": "m", "owned_by": "me"}]},
            },
        ),
        ("piper", {"/": b"<html>", "/voices": PIPER_VOICES, "/info": PIPER_INFO}),
        (
            "faster-whisper-server",
            {"/openapi.json": openapi("faster-whisper-server", "/v1/audio/transcriptions")},
        ),
        (
            "speaches",  # as it was when it was still called faster-whisper-server
            {
                "/openapi.json": openapi(
                    "FastAPI", "/v1/audio/transcriptions", "/api/ps", "/api/ps/{model_name}"
                ),
                "/api/ps": {"models": []},
                "/health": b"OK",
            },
        ),
        (
            "invokeai",
            {
                "/": b"<title>Invoke - Community Edition</title>",
                "/api/v1/app/version": {"version": "6.1.0"},
                "/api/v1/app/invocation_cache/status": {
                    "size": 0,
                    "hits": 0,
                    "misses": 0,
                    "enabled": True,
                    "max_size": 20,
                },
            },
        ),
    ],
)
def test_a_server_is_known_by_all_its_answers(name: str, answers: dict[str, Any]) -> None:
    with serving(answers) as server:
        assert server.name == name


def test_pipers_older_server_gets_its_jobs_where_it_takes_them() -> None:
    with serving({"/": (405, b""), "/voices": PIPER_VOICES}) as server:
        service = server.identity().service
    assert service is not None
    assert service.service == "piper"
    assert service.config["paths"]["tts"]["path"] == "/"


@pytest.mark.parametrize(
    "answers",
    [
        {"/api/v1/app/version": {"version": "1.0"}},
        {"/version": {"version": "1.0"}, "/api/version": {"version": "1.0"}},
        {"/api/tags": {"models": []}},
        {"/openapi.json": openapi("FastAPI", "/v1/audio/transcriptions")},
        {"/info": PIPER_INFO},
    ],
)
def test_half_the_evidence_is_none(answers: dict[str, Any]) -> None:
    with serving(answers) as server:
        identity = server.identity()
    assert identity.service is None
    assert identity.speaks_http


def test_a_server_that_says_the_same_everywhere_is_not_known_by_it() -> None:
    anything = {
        "version": "1.0",
        "model_name": "m",
        "running": [],
        "models": [],
        "loaded_models": [],
        "loaded": True,
        "gpu_resident_mib": 1,
    }
    with serving({}, anything) as server:
        assert server.identity().service is None


def test_a_path_without_an_answer_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """faster-whisper-server asks the internet for its list of models."""
    monkeypatch.setattr(asking, "TIMEOUT_S", 0.3)
    document = openapi("faster-whisper-server", "/v1/audio/transcriptions")
    with serving({"/openapi.json": document, "/v1/models": None, "/": None}) as server:
        assert server.name == "faster-whisper-server"


def test_a_server_that_answers_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "TIMEOUT_S", 0.2)
    with serving({}, None) as server:
        assert server.identity() == Identity()
        assert len(server.asked) == 3


def test_who_is_not_known_is_named() -> None:
    table = FakeProcesses()
    with serving({"/": b"<html><title>\n My  own </title>"}) as server, serving({}) as plain:
        ports = [server.port, plain.port, free_port()]
        seen = discover(only=ports, table=table)
    assert not seen.servers
    told = {each.port: str(each) for each in seen.unknown}
    assert told == {
        server.port: f"port {server.port} (My own)",
        plain.port: f"port {plain.port} (a-server/1)",
    }
