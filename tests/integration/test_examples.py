"""What stands in examples/ does what it says, against a real broker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tests.support import protocol_answers, sdk_calls
from tests.support.broker import live_broker
from tests.support.comfyui import picture
from tests.support.protocol_server import ProtocolServer
from tests.support.scene import scene
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
WAV = b"RIFF\x04\x00\x00\x00WAVE"

pytestmark = pytest.mark.timeout(60)


def run(name: str, *words: str, url: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = EXAMPLES / name
    command = [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]
    return subprocess.run(
        [*command, *words],
        env={**os.environ, "GPUMANAGER_URL": url, "NO_PROXY": "127.0.0.1", **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=45,
        check=False,
    )


def config(url: str, *, jobs: str | None = None, **paths: str) -> str:
    consumer = {"url": url, "paths": paths}
    routing = dict.fromkeys(paths, "it")
    found = {"audio_proxy": "it", "routing": routing, "consumers": {"it": consumer}}
    return yaml.safe_dump(found if jobs is None else {**found, "jobs": {"dir": jobs}})


def test_the_shell_speaks_a_sentence(tmp_path: Path) -> None:
    asked: list[Received] = []

    def speak(peer: Connection, request: Received) -> None:
        asked.append(request)
        if request.line.startswith(b"GET /audio/it.wav"):
            peer.send(answer(WAV, headers=("Content-Type: audio/wav",)))
        else:
            peer.send(answer(b'{"audio_url":"/audio/it.wav","duration_s":1}'))

    out = tmp_path / "it.wav"
    sentence = 'She said "no\\yes"\nand left'
    with (
        ScriptedConsumer(speak) as consumer,
        live_broker(config(consumer.url, tts="/api/tts")) as broker,
    ):
        done = run("speak.sh", "-o", str(out), sentence, url=broker.url)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == WAV
    assert json.loads(asked[0].body) == {"text": sentence.replace("\n", " ")}


def test_the_shell_takes_audio_as_it_comes_and_plays_it(tmp_path: Path) -> None:
    played = tmp_path / "played"
    player = tmp_path / "pw-play"
    player.write_text(f'#!/bin/sh\ncp "$1" {played}\n')
    player.chmod(0o755)
    with (
        ScriptedConsumer(
            lambda peer, _: peer.send(answer(WAV, headers=("Content-Type: audio/wav",)))
        ) as consumer,
        live_broker(config(consumer.url, tts="/v1/audio/speech")) as broker,
    ):
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = run("speak.sh", "Hello", url=broker.url, PATH=path)
    assert done.returncode == 0, done.stderr
    assert played.read_bytes() == WAV


def test_the_shell_says_what_the_broker_said() -> None:
    with live_broker("{}") as broker:
        done = run("speak.sh", "-o", "/dev/null", "Hello", url=broker.url)
    assert done.returncode == 1
    assert "no_consumer" in done.stderr
    assert run("speak.sh", url="http://127.0.0.1:1").returncode == 2


def test_the_shell_transcribes_a_recording(tmp_path: Path) -> None:
    asked: list[Received] = []

    def transcribe(peer: Connection, request: Received) -> None:
        asked.append(request)
        peer.send(answer(b"Hello.\n", headers=("Content-Type: text/plain",)))

    recording = tmp_path / "a, b;c.wav"
    recording.write_bytes(WAV)
    with (
        ScriptedConsumer(transcribe) as consumer,
        live_broker(config(consumer.url, stt="/inference")) as broker,
    ):
        done = run("transcribe.sh", str(recording), url=broker.url, MODEL="small")
    assert (done.returncode, done.stdout) == (0, "Hello.\n"), done.stderr
    for part in (b'name="file"', b"\r\n\r\n" + WAV, b'name="model"\r\n\r\nsmall'):
        assert part in asked[0].body


def test_the_shell_says_why_it_cannot_transcribe(tmp_path: Path) -> None:
    done = run("transcribe.sh", str(tmp_path / "none.wav"), url="http://127.0.0.1:1")
    assert (done.returncode, "none.wav cannot be read" in done.stderr) == (1, True)
    with live_broker("{}") as broker:
        done = run("transcribe.sh", str(EXAMPLES / "ask.py"), url=broker.url)
    assert (done.returncode, "no_consumer" in done.stderr) == (1, True)


def test_python_streams_an_answer() -> None:
    lines = b"".join(
        json.dumps({"message": {"content": word}}).encode() + b"\n" for word in ("Blue", " light")
    )
    with (
        ScriptedConsumer(lambda peer, _: peer.send(answer(lines))) as consumer,
        live_broker(config(consumer.url, llm="/api/chat")) as broker,
    ):
        done = run("ask.py", "Why?", url=broker.url)
    assert (done.returncode, done.stdout) == (0, "Blue light\n"), done.stderr


def test_python_does_not_try_again_what_cannot_get_better() -> None:
    with live_broker("{}") as broker:
        done = run("ask.py", "Why?", url=broker.url)
    assert done.returncode == 1
    assert "no_consumer" in done.stderr


DROP_IN = {
    "openai_sdk.py": ("/v1/chat/completions", sdk_calls.LLM),
    "anthropic_sdk.py": ("/v1/messages", sdk_calls.LLM),
    "ollama_sdk.py": ("/api/chat", sdk_calls.OLLAMA),
    "chat.sh": ("/v1/chat/completions", sdk_calls.LLM),
}
"""What asks over a protocol that its users know already: its path, and a model."""

needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_jq) if n.endswith(".sh") else n for n in DROP_IN]
)
def test_a_program_that_people_have_already_goes_through_the_broker(name: str) -> None:
    path, model = DROP_IN[name]
    with (
        ProtocolServer(protocol_answers.every_protocol) as server,
        live_broker(
            yaml.safe_dump(
                {
                    "routing": {"llm": "it"},
                    "consumers": {"it": {"url": server.url, "paths": {"llm": path}}},
                }
            )
        ) as broker,
    ):
        done = run(name, "Why?", url=broker.url, MODEL=model)
        assert (done.returncode, done.stdout) == (0, f"{protocol_answers.TEXT}\n"), done.stderr
        (asked,) = server.requests
        assert (asked.path, asked.json["model"]) == (path, model)
        assert asked.json["messages"] == [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_jq) if n.endswith(".sh") else n for n in DROP_IN]
)
def test_a_program_says_what_the_broker_said(name: str) -> None:
    with live_broker("{}") as broker:
        done = run(name, "Why?", url=broker.url)
    assert done.returncode == 1
    assert "no consumer" in done.stderr, done.stderr


@needs_jq
def test_a_comfyui_workflow_is_rendered_and_fetched(tmp_path: Path) -> None:
    workflow = tmp_path / "workflow.json"
    workflow.write_text('{"1": {"class_type": "KSampler"}}')
    with scene() as it:
        comfyui = it.fakes["comfyui"].url
        done = run(
            "comfyui.sh", str(workflow), str(tmp_path), url=it.broker.url, COMFYUI_URL=comfyui
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "it_00001_.png").read_bytes() == picture(1)


@needs_jq
def test_jobs_are_left_overnight_and_fetched_in_the_morning(tmp_path: Path) -> None:
    asked: list[bytes] = []
    free = threading.Event()

    def speak(peer: Connection, request: Received) -> None:
        asked.append(request.body)
        free.wait(40)
        bad = b"bad" in request.body
        peer.send(answer(b"no such voice", "422 No") if bad else answer(WAV + request.body))

    lines = [b'{"input": "%d\\n"}' % number for number in range(3)]
    file = tmp_path / "jobs.jsonl"
    file.write_bytes(b"\n".join(lines))
    out = tmp_path / "out"
    words = ("overnight.sh", "tts", str(file), str(out), "wav")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (
        ScriptedConsumer(speak) as consumer,
        live_broker(config(consumer.url, tts="/tts", jobs=str(tmp_path / "kept"))) as broker,
    ):
        evening = run(*words, url=broker.url, PATH=path)
        assert (evening.returncode, list(out.iterdir())) == (5, []), evening.stderr
        assert "3 jobs: 3 not over yet, 0 failed" in evening.stdout
        free.set()
        ids = [each["id"] for each in broker.get("/v1/jobs").json()["jobs"]]
        for each in ids:
            assert broker.get(f"/v1/jobs/{each}?wait=20").json()["state"] == "done"
        morning = run(*words, url=broker.url, PATH=path)
        assert morning.returncode == 0, morning.stderr
        for number, line in enumerate(lines, 1):
            assert (out / f"{number}.wav").read_bytes() == WAV + line
        file.write_bytes(b"\n".join([*lines, b'"bad"', b"no JSON"]))
        refused = run(*words, url=broker.url, PATH=path)
        assert (refused.returncode, "line 5 was not taken" in refused.stderr) == (1, True)
        file.write_bytes(b"\n".join([*lines, b'"bad"']))
        (bad, *_) = broker.get("/v1/jobs").json()["jobs"]
        assert broker.get(f"/v1/jobs/{bad['id']}?wait=20").json()["state"] == "failed"
        failed = run(*words, url=broker.url, PATH=path)
        assert (failed.returncode, "no such voice" in failed.stderr) == (1, True), failed.stderr
    assert asked == [*lines, b'"bad"']
