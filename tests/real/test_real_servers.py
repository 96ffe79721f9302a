"""The broker in front of real servers: what a user sees of it."""

from __future__ import annotations

import io
import json
import re
import time
import wave
from pathlib import Path

import pytest
import requests

from gpumanager.gpu.simulated import SimulatedCard
from tests.real.conftest import MIB, MODELS, config_of
from tests.support.real_servers import LLM, STT, RealBroker, RealServer, real_broker, servers
from tests.support.threads import Outcome, eventually

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

SENTENCE = "The quick brown fox jumps over the lazy dog."
QUESTION = {
    "model": LLM,
    "messages": [{"role": "user", "content": "The days of the week are Monday, Tuesday,"}],
    "temperature": 0,
    "max_tokens": 12,
}


def speak(broker: RealBroker) -> bytes:
    answer = broker.post("/v1/tts", json={"text": SENTENCE})
    assert answer.status_code == 200, answer.text
    return answer.content


def transcribe(broker: RealBroker, recording: bytes) -> str:
    file = ("recording.wav", recording, "audio/wav")
    answer = broker.post("/v1/stt", files={"file": file}, data={"model": STT})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["text"])


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_a_chat_is_answered_as_by_the_server_itself(
    broker: RealBroker, real_servers: dict[str, RealServer]
) -> None:
    direct = requests.post(
        f"{real_servers['llama'].url}/v1/chat/completions", json=QUESTION, timeout=60
    )
    through = broker.post("/v1/llm", json=QUESTION)
    assert (through.status_code, direct.status_code) == (200, 200)
    assert through.headers["Content-Type"] == direct.headers["Content-Type"]
    said = through.json()
    assert said["choices"] == direct.json()["choices"]
    assert said["choices"][0]["message"]["content"]
    assert said["usage"]["completion_tokens"] == QUESTION["max_tokens"]
    assert re.fullmatch(
        r"queue;dur=[\d.]+, evict;dur=[\d.]+, upstream;dur=[\d.]+", through.headers["Server-Timing"]
    )


def test_a_chat_streams_piece_by_piece(broker: RealBroker) -> None:
    whole = broker.post("/v1/llm", json=QUESTION).json()["choices"][0]["message"]["content"]
    arrived: list[float] = []
    with broker.post("/v1/llm", json={**QUESTION, "stream": True}, stream=True) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        pieces = []
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                arrived.append(time.monotonic())
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
            elif line:
                assert line == b"data: [DONE]"
    assert "".join(pieces) == whole
    # It makes a token in some tens of ms: had they come together, there would be no time between.
    assert arrived[-1] - arrived[0] > 0.1


def test_a_spoken_sentence_is_transcribed_back_to_itself(broker: RealBroker) -> None:
    recording = speak(broker)
    with wave.open(io.BytesIO(recording)) as opened:
        assert opened.getnframes() / opened.getframerate() > 1.5
    assert words(transcribe(broker, recording)) == words(SENTENCE)


def test_a_client_that_leaves_gives_the_gpu_back(
    broker: RealBroker, real_servers: dict[str, RealServer]
) -> None:
    long = {**QUESTION, "stream": True, "max_tokens": 1900, "ignore_eos": True}
    answer = broker.post("/v1/llm", json=long, stream=True)
    lines = answer.iter_lines()  # held: without it, requests would close the connection
    assert next(lines).startswith(b"data: ")
    spoken = Outcome(lambda: speak(broker))
    eventually(lambda: broker.scheduler["queue_depth"] == 1)
    assert broker.scheduler["in_flight"] == 1
    left = time.monotonic()
    answer.close()
    eventually(lambda: broker.scheduler["queue_depth"] == 0)
    assert time.monotonic() - left < 2.0
    assert spoken.result(30).startswith(b"RIFF")
    broker.await_idle()

    def at_rest() -> bool:
        slots = requests.get(f"{real_servers['llama'].url}/slots", timeout=10).json()
        return not any(slot["is_processing"] for slot in slots)

    eventually(at_rest)  # the server itself has stopped, too
    assert broker.post("/v1/llm", json=QUESTION).status_code == 200


@pytest.mark.timeout(480)  # it starts a server ten times
def test_two_models_that_do_not_fit_take_turns(broker: RealBroker, tmp_path: Path) -> None:
    """On a card of 1200 MiB, of which a process that is nobody's takes 200, there is room for one
    of them, and a server that finds too little does not start. So each is ended for the other's
    jobs, which all are answered."""
    recording = speak(broker)
    card = SimulatedCard.create(tmp_path / "card.json", 1200)
    both = servers(MODELS)
    for name, mib in MIB.items():
        both[name].take(card.path, name, mib)
    config = config_of(both, device=f"simulated:{card.path}", sample_interval=0.2)
    del config["consumers"]["piper"], config["routing"]["tts"]
    try:
        for name in MIB:
            both[name].start(tmp_path / f"{name}.log")
        with real_broker(tmp_path, config) as tight:
            assert tight.post("/v1/consumers/whisper/unload").json()["outcome"] == "released"
            card.allocate("game", 200)
            for _ in range(2):
                assert words(transcribe(tight, recording)) == words(SENTENCE)
                assert tight.consumer("llama")["stopped_by"] == "signal"
                assert not both["llama"].processes()
                assert tight.post("/v1/llm", json=QUESTION).status_code == 200
                assert tight.consumer("whisper")["stopped_by"] == "signal"
                assert not both["whisper"].processes()
            spoken = [Outcome(lambda: words(transcribe(tight, recording))) for _ in range(2)]
            chat = Outcome(lambda: tight.post("/v1/llm", json=QUESTION).status_code)
            assert [each.result(90) for each in spoken] == [words(SENTENCE)] * 2
            assert chat.result(90) == 200
            happened = tight.get("/v1/events").json()["events"]
            evicted = [each for each in happened if each["event"] == "evicted"]
            assert len(evicted) >= 5
            for each in evicted:
                assert (each["outcome"], each["mib"]) == ("released", MIB[each["consumer"]])
    finally:
        for server in both.values():
            server.end()


def test_a_server_that_is_busy_is_not_taken_for_dead(broker: RealBroker) -> None:
    """faster-whisper-server answers nothing else while it transcribes, not even /health."""
    recording = speak(broker)
    jobs = [Outcome(lambda: words(transcribe(broker, recording))) for _ in range(4)]
    assert [job.result(120) for job in jobs] == [words(SENTENCE)] * 4
    assert broker.consumer("whisper")["healthy"]
