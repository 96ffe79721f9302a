"""The real SDKs of OpenAI, Anthropic and Ollama, with the broker for their base URL: what they get
is what the consumer itself would have given them, to the byte."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.support import protocol_answers, sdk_calls
from tests.support.broker import LiveBroker, live_broker
from tests.support.protocol_server import Misbehaviour, ProtocolServer, Request
from tests.support.sdk_calls import CALLS, Clients, clients
from tests.support.sockets import Answer, RawClient
from tests.support.threads import Outcome

pytestmark = [
    pytest.mark.timeout(60),
    # What the SDKs' authors call deprecated is still called.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),
]

OURS = {"x-request-id", "server-timing"}
"""Headers that the broker adds to every answer."""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "via"}
NO_GPU = {"/api/show", "/api/pull", "/api/ps", "/api/version"}
"""What of this is no job, and does not wait."""


@dataclass
class Box:
    """A broker in front of two servers, and clients of all three."""

    broker: LiveBroker
    studio: ProtocolServer
    ollama: ProtocolServer
    through: Clients
    to_studio: Clients
    to_ollama: Clients

    def behind(self, call: str) -> tuple[ProtocolServer, Clients]:
        """The server that answers a call, and its clients."""
        if call.startswith("ollama"):
            return self.ollama, self.to_ollama
        return self.studio, self.to_studio


def config(studio: str, ollama: str, **top: Any) -> str:
    return yaml.safe_dump(
        {
            "gpu": {"total_mib": 16_000},
            "routing": {
                "llm": ["studio", "ollama"],
                "embed": ["studio", "ollama"],
                **dict.fromkeys(("tts", "stt", "image", "rerank"), "studio"),
            },
            "consumers": {
                "studio": {
                    "url": studio,
                    "health": "/health",
                    "routes": [
                        path for method, path in protocol_answers.ROUTES if method == "POST"
                    ],
                    "vram_resident_mib": 3000,
                },
                "ollama": {"preset": "ollama", "url": ollama, "vram_resident_mib": 6000},
            },
            **top,
        }
    )


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with (
        ProtocolServer(protocol_answers.openai_and_anthropic) as studio,
        ProtocolServer(protocol_answers.ollama) as ollama,
        live_broker(config(studio.url, ollama.url)) as broker,
        clients(broker.url) as through,
        clients(studio.url) as to_studio,
        clients(ollama.url) as to_ollama,
    ):
        yield Box(broker, studio, ollama, through, to_studio, to_ollama)


def again(request: Request, port: int) -> Answer:
    """Send to `port` what arrived, byte for byte, and see what comes back."""
    lines = [
        f"{request.method} {request.path}{'?' if request.query else ''}{request.query} HTTP/1.1",
        *(f"{name}: {value}" for name, value in request.headers),
    ]
    with RawClient(port) as client:
        return client.send("\r\n".join([*lines, "", ""]).encode() + request.body).answer()


def kept(answer: Answer, without: set[str]) -> list[tuple[str, str]]:
    """The headers of an answer that are for its reader, in their order."""
    return [
        (name.lower(), value)
        for name, value in answer.headers
        if name.lower() not in HOP_BY_HOP | without
    ]


def compare(box: Box, server: ProtocolServer, request: Request, *, job: bool = True) -> None:
    """The broker and the server behind it answer `request` alike, to the byte. Only of a `job`
    there is a time to tell."""
    direct, through = again(request, server.port), again(request, box.broker.port)
    assert (through.status, through.complete) == (direct.status, True)
    assert through.body == direct.body
    assert sorted(kept(through, OURS)) == sorted(kept(direct, set()))
    assert {n.lower() for n, _ in through.headers} & OURS == (OURS if job else {"x-request-id"})


@pytest.mark.parametrize("call", CALLS)
def test_an_answer_is_the_consumers_own(box: Box, call: str) -> None:
    """As the SDK reads it, and on the wire; and what the consumer was asked is what the SDK sent,
    but for the boundary of a form, which is drawn anew for each."""
    server, directly = box.behind(call)
    server.behave()
    direct, through = CALLS[call](directly), CALLS[call](box.through)
    assert through == direct
    sent, arrived = server.requests
    assert (arrived.method, arrived.path, arrived.query) == (sent.method, sent.path, sent.query)
    if sent.content_type.startswith("multipart/"):
        assert arrived.form == sent.form
        assert len(arrived.body) == len(sent.body)
    else:
        assert arrived.body == sent.body
    compare(box, server, sent, job=sent.path not in NO_GPU)


def test_the_calls_that_no_sdk_makes(box: Box) -> None:
    headers = [("Host", "localhost"), ("Content-Type", "application/json")]
    body = b'{"model": "bge-m3", "query": "sky", "documents": ["blue", "green"]}'
    compare(
        box,
        box.studio,
        Request("POST", "/v1/rerank", "", [*headers, ("Content-Length", str(len(body)))], body),
    )
    for path in ("/api/version", "/api/ps"):
        compare(box, box.ollama, Request("GET", path, "", headers, b""), job=False)


@pytest.mark.parametrize(
    "call", ["ollama show", "ollama pull, streamed", "ollama ps", "openai models"]
)
def test_what_needs_no_gpu_does_not_wait_for_it(box: Box, call: str) -> None:
    held = Misbehaviour(held=True)
    box.studio.behave(held)
    job = Outcome(lambda: CALLS["openai chat"](box.through))
    try:
        box.broker.await_line(1)
        assert {**CALLS, **sdk_calls.LISTS}[call](box.through)
        assert box.broker.stats.in_flight == 1
    finally:
        held.release.set()
    assert job.result()


def test_models_of_all_consumers_are_listed(box: Box) -> None:
    for call in ("openai models", "anthropic models"):
        listed = sdk_calls.LISTS[call](box.through)
        assert set(listed) == {*protocol_answers.MODELS, "llama3.2:3b", "nomic:latest"}
    assert set(sdk_calls.LISTS["ollama list"](box.through)) == set(listed)
    assert sdk_calls.LISTS["openai one model"](box.through) == sdk_calls.LLM
    assert sdk_calls.LISTS["ollama ps"](box.through) == ["llama3.2:3b"]


ALIASES = {
    "openai chat, streamed": sdk_calls.LLM,
    "openai embeddings": sdk_calls.EMBED,
    "openai transcriptions": sdk_calls.STT,
    "openai image edits": sdk_calls.IMAGE,
    "anthropic messages": sdk_calls.LLM,
    "ollama chat, streamed": sdk_calls.OLLAMA,
}
"""Calls in JSON and in forms, and the models that they name."""


@pytest.mark.parametrize("call", ALIASES)
def test_a_model_goes_by_another_name_at_its_consumer(call: str) -> None:
    """Nothing else of the request changes."""
    model, other = ALIASES[call], "org/another-name:Q4 “é”"
    with ProtocolServer(protocol_answers.every_protocol) as server:
        models = [{"name": model, "served_as": other}]
        consumer = {"url": server.url, "models": models}
        routing = dict.fromkeys(("llm", "embed", "stt", "image"), "it")
        text = yaml.safe_dump({"routing": routing, "consumers": {"it": consumer}})
        with (
            live_broker(text) as broker,
            clients(broker.url) as through,
            clients(server.url) as directly,
        ):
            CALLS[call](directly)
            CALLS[call](through)
    sent, arrived = server.requests
    if sent.content_type.startswith("multipart/"):
        (fields, files), (arrived_fields, arrived_files) = sent.form, arrived.form
        assert arrived_fields == {**fields, "model": other}
        assert arrived_files == files
    else:
        assert arrived.json == {**sent.json, "model": other}
        assert list(arrived.json) == list(sent.json)


def test_asynchronous_clients_take_turns(box: Box) -> None:
    async def ask_all() -> list[Any]:
        from anthropic import AsyncAnthropic
        from ollama import AsyncClient
        from openai import AsyncOpenAI

        url = box.broker.url
        async with (
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai,
            AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as anthropic,
            AsyncClient(url) as ollama,
        ):
            asked = {"model": sdk_calls.LLM, "messages": sdk_calls.ASK}
            return await asyncio.gather(
                *(openai.chat.completions.create(**asked) for _ in range(4)),
                *(anthropic.messages.create(**asked, max_tokens=9) for _ in range(4)),
                *(ollama.chat(sdk_calls.OLLAMA, sdk_calls.ASK) for _ in range(4)),
            )

    for server in (box.studio, box.ollama):
        server.behave()
    answers = asyncio.run(ask_all())
    said = [each.choices[0].message.content for each in answers[:4]]
    said += [each.content[0].text for each in answers[4:8]]
    said += [each.message.content for each in answers[8:]]
    assert said == [protocol_answers.TEXT] * 12
    assert (len(box.studio.requests), len(box.ollama.requests)) == (8, 4)
