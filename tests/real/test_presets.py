"""What presets and `setup` say of real servers."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import requests

from gpumanager.clock import SystemClock
from gpumanager.config import parse_config
from gpumanager.config.values import DROP_IN_ROUTES
from gpumanager.setup.discovery import discover
from gpumanager.upstream.calls import ControlCalls
from gpumanager.upstream.watcher import Watcher
from tests.support.real_servers import LLM, RealServer

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

PRESETS = {"llama": "llama-server", "piper": "piper", "whisper": "faster-whisper-server"}


def config_of(preset: str, url: str) -> Any:
    return parse_config(json.dumps({"consumers": {"it": {"preset": preset, "url": url}}}))


@pytest.mark.parametrize("name", PRESETS)
def test_it_has_the_routes_of_its_preset_and_no_others(
    real_servers: dict[str, RealServer], name: str
) -> None:
    """It refuses an empty body, or lacks a model for it, where it has a route."""
    url = real_servers[name].url
    consumer = config_of(PRESETS[name], url).consumers["it"]
    assert consumer.routes is not None
    paths = {*(each.path for each in consumer.routes.values()), *(DROP_IN_ROUTES)}
    paths |= {each.path for each in consumer.paths.values()}
    there = {path for path in paths if requests.post(url + path, timeout=60).status_code != 404}
    expected = {each.path for each in (*consumer.routes.values(), *consumer.paths.values())}
    assert there == expected


@pytest.mark.parametrize("name", PRESETS)
def test_it_is_looked_at_as_its_preset_says(real_servers: dict[str, RealServer], name: str) -> None:
    consumer = config_of(PRESETS[name], real_servers[name].url).consumers["it"]
    calls = ControlCalls(Watcher(), SystemClock())
    report = calls.probe("it", consumer)
    if name == "llama":
        assert report.loaded is True
        assert calls.busy("it", consumer) is False
        listed = calls.models("it", consumer)
        assert listed is not None
        assert listed.names == (LLM,)


class Shim(BaseHTTPRequestHandler):
    """Speaks Ollama's protocol, and says nothing at its root."""

    def do_GET(self) -> None:
        found: dict[str, Any] = {"/api/tags": {"models": []}, "/api/version": {"version": "0.1"}}
        body = json.dumps(found.get(self.path, {"error": "not found"})).encode()
        self.send_response(200 if self.path in found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_setup_finds_all_of_them(real_servers: dict[str, RealServer]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Shim) as shim:
        thread = Thread(target=shim.serve_forever, args=(0.05,))
        thread.start()
        try:
            ports = {server.port: PRESETS[name] for name, server in real_servers.items()}
            ports[shim.server_address[1]] = "ollama"
            seen = discover(only=ports)
        finally:
            shim.shutdown()
            thread.join(5)
    assert {each.port: each.service.preset for each in seen.servers} == ports
    assert not seen.unknown
