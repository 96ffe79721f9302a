"""`gpumanager demo`: a simulated card, the speech service on it, and the broker in front."""

from __future__ import annotations

import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import OK, HTTPConnection, HTTPException
from io import BufferedReader
from pathlib import Path
from types import FrameType
from typing import cast
from urllib.parse import urlsplit

import yaml

from gpumanager.demo import speech, studio
from gpumanager.gpu.simulated import SimulatedCard

CARD_MIB = 8192
SPEECH_MIB = 1200
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 5.0
HEALTH_POLL_S = 0.05
EXIT_CONFIG = 2
_ANNOUNCED = "listening on "
_LONGEST_LINE = 200

SPEECH_COMMAND = (sys.executable, "-m", "gpumanager.demo.speech")


class StartFailed(Exception):
    """The speech service did not come up. `code` is the exit code that the demo ends with."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def run_demo(
    listen: str = "127.0.0.1:8770", *, speech_command: Sequence[str] = SPEECH_COMMAND
) -> int:
    """Run the demo until the broker is told to end; returns the exit code.

    To be called from the main thread. `speech_command` starts the speech service, for tests.
    """
    from gpumanager.config import ConfigError, parse_config
    from gpumanager.serving import serve  # not needed to say what is missing

    if speech_command is SPEECH_COMMAND and (missing := studio.missing_packages()):
        _say(f"The demo speaks with piper; not installed: {', '.join(missing)}")
        _say(f"Try: {studio.INSTALL}")
        return speech.EXIT_MISSING
    with (
        _sigterm_raises(),
        tempfile.TemporaryDirectory(prefix="gpumanager-demo-", ignore_cleanup_errors=True) as made,
    ):
        folder = Path(made)
        card = SimulatedCard.create(folder / "card.json", CARD_MIB)
        try:
            with _speech_service(speech_command, card, folder / "audio") as url:
                config = parse_config(config_text(listen, card, url))
                _say(banner(listen))
                return serve(config)
        except StartFailed as error:
            _say(str(error))
            return error.code
        except ConfigError as error:
            _say(str(error))
            return EXIT_CONFIG


def config_text(listen: str, card: SimulatedCard, speech_url: str) -> str:
    """The broker's config, as YAML."""
    return yaml.safe_dump(
        {
            "listen": listen,
            "state_file": str(card.path.with_name("state.json")),
            "audio_proxy": "mvoice",
            "gpu": {"device": f"simulated:{card.path}", "sample_interval": 1},
            "routing": {"tts": "mvoice"},
            "consumers": {
                "mvoice": {
                    "url": speech_url,
                    "health": {"path": "/health"},
                    "paths": {"tts": {"path": "/api/tts", "method": "POST"}},
                    "routes": ["/v1/audio/speech"],
                    "any_model": True,
                    "vram_resident_mib": SPEECH_MIB,
                    "load": {"method": "POST", "path": "/api/admin/load"},
                    "unload": {"method": "POST", "path": "/api/admin/unload"},
                    "on_disconnect": "none",
                }
            },
        },
        sort_keys=False,
        allow_unicode=True,
    )


def banner(listen: str) -> str:
    """The lines that the demo prints: its address, and commands to try."""
    url = f"http://{listen}"
    return f"""
The broker is on {url}. In another terminal:

  curl -s {url}/v1/tts -H 'Content-Type: application/json' \\
       -d '{{"text": "One card, one queue, and nobody in the way."}}'
  curl -s {url}/audio/FILE.wav -o speech.wav      # the audio_url of that answer

Ctrl-C ends it.
"""


@contextmanager
def _speech_service(command: Sequence[str], card: SimulatedCard, audio: Path) -> Iterator[str]:
    """The speech service as a child, running and healthy; its URL. Ended on the way out."""
    child = subprocess.Popen(
        [
            *command,
            *("--port", "0", "--exit-with-parent", "--audio-dir", str(audio)),
            *("--card", str(card.path), "--vram-mib", str(SPEECH_MIB)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Its stderr is ours, so whatever it says is seen, its last words included. A session of
        # its own keeps a Ctrl-C from ending it while the broker still drains.
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        url = _announced_url(child, deadline)
        _wait_until_healthy(child, url, deadline)
        yield url
    finally:
        _end(child)


def _announced_url(child: subprocess.Popen[bytes], deadline: float) -> str:
    output = cast(BufferedReader, child.stdout)
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise StartFailed("The speech service said nothing in time.")
            got = output.read1(_LONGEST_LINE)
            if not got:
                raise _died(child)
            line += got
            if len(line) > _LONGEST_LINE:
                break
    text = line.decode(errors="replace").strip()
    if not text.startswith(_ANNOUNCED):
        raise StartFailed(f"The speech service said {text!r} in place of its address.")
    return text.removeprefix(_ANNOUNCED)


def _wait_until_healthy(child: subprocess.Popen[bytes], url: str, deadline: float) -> None:
    while True:
        if child.poll() is not None:
            raise _died(child)
        try:
            status = _health_status(url)
            if status == OK:
                return
            reason = f"its /health answers {status}"
        except (OSError, HTTPException, ValueError) as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise StartFailed(f"The speech service did not come up in time: {reason}")
        time.sleep(HEALTH_POLL_S)


def _health_status(url: str) -> int:
    address = urlsplit(url)
    connection = HTTPConnection(address.hostname or "", address.port, timeout=HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def _died(child: subprocess.Popen[bytes]) -> StartFailed:
    try:
        code = child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return StartFailed("The speech service closed its output.")
    return StartFailed(
        f"The speech service ended with exit code {code}; it has said why above.",
        speech.EXIT_MISSING if code == speech.EXIT_MISSING else 1,
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    for stop in (child.terminate, child.kill):
        stop()
        try:
            child.wait(STOP_TIMEOUT_S)
            break
        except subprocess.TimeoutExpired:
            continue
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Until the broker sets its own handlers, and after it is done with them, SIGTERM has to
    unwind the stack, or the child's folder would stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
