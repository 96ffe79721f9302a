"""Real servers, and a broker in front of them. `make test-real` installs what this needs; where it
is missing, every test here is skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_servers import (
    RealBroker,
    RealServer,
    real_broker,
    servers,
    versions,
)
from tests.support.threads import eventually

MODELS = Path(sys.prefix) / "models"
"""Where the models' files are put together: beside the packages that they come from."""


def pytest_report_header() -> list[str]:
    return [f"{name} {version or 'is not installed'}" for name, version in versions().items()]


NOT_TRIED = {
    "a GPU": "the servers run on the CPU; what they take of a card is simulated",
    "images, ComfyUI": "no server and model for them on PyPI that draws within minutes on a CPU",
    "Ollama's own server": "it is not on PyPI; its client asks the broker in front of llama.cpp",
    "embeddings, rerank": "the one model of llama.cpp here is for chats",
    "OpenAI's speech": "Piper has a protocol of its own",
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("not tried here")
    for what, why in NOT_TRIED.items():
        terminalreporter.write_line(f"{what}: {why}")


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    if missing := [name for name, version in versions().items() if version is None]:
        pytest.skip(f"real servers: make test-real installs {', '.join(missing)}")


@pytest.fixture(scope="session")
def real_servers(
    installed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, RealServer]]:
    """All of them, by the names that the config gives them; they run."""
    found = servers(MODELS)
    logs = tmp_path_factory.mktemp("servers")
    try:
        for name, server in found.items():
            server.start(logs / f"{name}.log")
        yield found
    finally:
        for server in found.values():
            server.end()


MIB = {"llama": 600, "whisper": 500}
"""What they are said to need, and take of a simulated card."""


def config_of(servers: dict[str, RealServer], **gpu: Any) -> dict[str, Any]:
    """A config as somebody would write it who has these servers. They have no unload call, so that
    the broker has to end them to make room, and to start them again. Piper stays on the CPU."""

    def consumer(name: str, **more: Any) -> dict[str, Any]:
        return {"url": servers[name].url, **more}

    def evicted(name: str) -> dict[str, Any]:
        signal = {"signal": "TERM", "grace": 10, "start": servers[name].starting}
        return {"vram_resident_mib": MIB[name], "evict": [signal], "ready_timeout": 60}

    return {
        "gpu": {"reserved_mib": 0, **gpu},
        "health_interval": 0.5,
        "routing": {"llm": "llama", "tts": "piper", "stt": "whisper"},
        "consumers": {
            "llama": consumer("llama", preset="llama-server", **evicted("llama")),
            "piper": consumer("piper", preset="piper", vram_resident_mib=0),
            "whisper": consumer("whisper", preset="faster-whisper-server", **evicted("whisper")),
        },
    }


@pytest.fixture(scope="session")
def roomy(
    real_servers: dict[str, RealServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealBroker]:
    """On a card on which all of them fit."""
    with real_broker(
        tmp_path_factory.mktemp("broker"), config_of(real_servers, total_mib=4000)
    ) as running:
        yield running


@pytest.fixture
def broker(roomy: RealBroker) -> RealBroker:
    """The same, once it knows that all of them run: a test may have ended some."""
    eventually(roomy.all_healthy, 30)
    return roomy
