"""The SDKs of OpenAI, Anthropic and Ollama, through the broker, with real servers behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from ollama import ResponseError

from tests.support.real_servers import LLM, STT, RealBroker
from tests.support.sdk_calls import Clients, clients
from tests.support.threads import Outcome, eventually

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(180),
    # What the SDKs' authors call deprecated is still called.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),
]

SENTENCE = "The weather is nice today, so we went to the park."
BEGUN = "The days of the week are Monday, Tuesday,"
ASK: Any = [{"role": "user", "content": BEGUN}]


@pytest.fixture
def sdk(broker: RealBroker) -> Iterator[Clients]:
    with clients(broker.url, timeout=120) as made:
        yield made


def test_openai_chats(sdk: Clients) -> None:
    create = sdk.openai.chat.completions.create
    whole = create(model=LLM, messages=ASK, temperature=0, max_tokens=8)
    assert whole.model == LLM
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in create(model=LLM, messages=ASK, temperature=0, max_tokens=8, stream=True)
        if chunk.choices
    ]
    assert len(pieces) >= 8
    assert "".join(pieces) == whole.choices[0].message.content


def test_openai_completes_and_responds(sdk: Clients) -> None:
    completed = sdk.openai.completions.create(model=LLM, prompt=BEGUN, temperature=0, max_tokens=4)
    assert "Wednesday" in completed.choices[0].text
    asked: Any = {"model": LLM, "input": BEGUN, "max_output_tokens": 6, "temperature": 0}
    assert sdk.openai.responses.create(**asked).output_text
    happened = [each.type for each in sdk.openai.responses.create(**asked, stream=True)]
    assert (happened[0], happened[-1]) == ("response.created", "response.completed")


def test_anthropic_chats_and_counts(sdk: Clients) -> None:
    messages = sdk.anthropic.messages
    asked: Any = {"model": LLM, "messages": ASK, "max_tokens": 6}
    asked["extra_body"] = {"temperature": 0}
    whole = messages.create(**asked)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 6)
    (block,) = whole.content
    assert block.type == "text"
    with messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == block.text
    counted = messages.count_tokens(model=LLM, messages=ASK)
    assert counted.input_tokens > len(BEGUN.split())


def test_openai_transcribes_what_piper_said(sdk: Clients, broker: RealBroker) -> None:
    recording = broker.post("/v1/tts", json={"text": SENTENCE}).content
    audio = sdk.openai.audio
    heard = audio.transcriptions.create(model=STT, file=("said.wav", recording))
    assert re.findall(r"[a-z]+", heard.text.lower()) == re.findall(r"[a-z]+", SENTENCE.lower())
    timed = audio.transcriptions.create(
        model=STT, file=("said.wav", recording), response_format="verbose_json"
    )
    assert timed.text == heard.text
    assert timed.duration > 1
    english = audio.translations.create(model=STT, file=("said.wav", recording))
    assert isinstance(english.text, str)
    assert "weather" in english.text.lower()


def test_models_are_listed_to_each_in_its_own_way(sdk: Clients) -> None:
    assert [each.id for each in sdk.openai.models.list()] == [LLM]
    assert sdk.openai.models.retrieve(LLM).id == LLM
    assert [each.id for each in sdk.anthropic.models.list()] == [LLM]
    assert [each.model for each in sdk.ollama.list().models] == [LLM]


def test_what_no_server_has_is_refused_in_the_clients_own_way(sdk: Clients) -> None:
    with pytest.raises(openai.InternalServerError, match="piper") as lacking:
        sdk.openai.audio.speech.create(model="tts-1", voice="alloy", input="Hello.")
    assert (lacking.value.status_code, lacking.value.code) == (501, "no_consumer")
    with pytest.raises(ResponseError) as refused:
        sdk.ollama.chat(LLM, ASK)
    assert refused.value.status_code == 501
    with pytest.raises(openai.APIStatusError, match="--embeddings") as own:
        sdk.openai.embeddings.create(model=LLM, input="It was not started for that.")
    assert own.value.status_code == 501  # llama.cpp's own words


def test_an_sdk_that_stops_reading_gives_the_gpu_back(sdk: Clients, broker: RealBroker) -> None:
    stream = sdk.openai.chat.completions.create(
        model=LLM, messages=ASK, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    assert next(iter(stream)).choices
    heard = Outcome(lambda: broker.post("/v1/tts", json={"text": SENTENCE}).status_code)
    eventually(lambda: broker.scheduler["queue_depth"] == 1)
    stream.close()
    assert heard.result(30) == 200
    broker.await_idle()
