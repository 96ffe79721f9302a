"""A voice that needs no model, and the speech service with it: `python -m tests.demo.fakes`."""

from __future__ import annotations

import array
import math
import os
import subprocess
import sys
import threading
import wave
from typing import Any

from gpumanager.demo import speech

RATE = 8000
WAIT_S = 10.0


class FakeVoice:
    """Hums for 10 ms a character. `UNSPEAKABLE` makes it silent, `BROKEN` fail, and `SLOW` say
    so and wait for `go`."""

    sample_rate = RATE

    def __init__(self) -> None:
        self.rendering = threading.Event()
        self.go = threading.Event()

    def synthesize(self, text: str, wav_file: wave.Wave_write, speed: float) -> None:
        if text == "UNSPEAKABLE":
            return
        count = int(len(text) * RATE / 100 / speed)
        wave_form = (int(9000 * math.sin(at / 5)) for at in range(count))
        wav_file.writeframes(array.array("h", wave_form).tobytes())
        if text == "BROKEN":
            raise RuntimeError("the model broke")
        if text == "SLOW":
            self.rendering.set()
            print("rendering", file=sys.stderr, flush=True)
            assert self.go.wait(WAIT_S)


def environment() -> dict[str, str]:
    """What a child process needs to find the package and the tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def put_away(child: subprocess.Popen[Any]) -> None:
    """End a child and close its pipes, in whatever state it is."""
    child.kill()
    child.wait(WAIT_S)
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


if __name__ == "__main__":
    speech.leave(speech.main(make_voice=FakeVoice))
