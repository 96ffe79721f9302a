"""What a server answers to the calls of OpenAI's, Anthropic's and Ollama's clients: the shapes that
their SDKs parse, with nothing in them that changes from call to call."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from typing import Any

from tests.support.protocol_server import Answer, Request

CREATED = 1_764_000_000
STAMP = "2026-11-24T12:00:00Z"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
WORDS = ("Blue", " light", " – scattered")
TEXT = "".join(WORDS)
VECTOR = (0.25, -0.5, 1.0)
MODELS = ("qwen3:8b", "whisper-1", "kokoro", "bge-m3", "sdxl")
DIGEST = hashlib.sha256(b"model").hexdigest()

ODD_HEADERS = (
    ("Content-Type", "application/json"),
    ("X-RateLimit-Remaining", "41"),
    ("Set-Cookie", "a=1; Path=/"),
    ("Set-Cookie", "b=2; Path=/"),
)
"""Headers that have to come through as they are, one of them twice."""


def whole(said: object) -> Answer:
    return Answer(json.dumps(said, indent=1, ensure_ascii=False).encode() + b"\n", 200, ODD_HEADERS)


def server_sent(events: Iterable[tuple[str | None, object]]) -> Answer:
    """A stream of events: each with its name, or without one, and its data."""
    pieces = []
    for name, said in events:
        data = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        head = f"event: {name}\n" if name else ""
        pieces.append(f"{head}data: {data}\n\n".encode())
    return Answer(pieces, 200, (("Content-Type", "text/event-stream; charset=utf-8"),))


def lines(said: Iterable[object]) -> Answer:
    """A stream of JSON, a line each."""
    pieces = [json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in said]
    return Answer(pieces, 200, (("Content-Type", "application/x-ndjson"),))


def failed(status: int, message: str) -> Answer:
    """A failure as OpenAI words it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "odd"}
    return Answer(json.dumps({"error": error}).encode(), status)


# -- OpenAI --------------------------------------------------------------------------------------


def _chat(request: Request) -> Answer:
    asked = request.json
    about = {"id": "chatcmpl-1", "created": CREATED, "model": asked["model"]}
    if not asked.get("stream"):
        message = {"role": "assistant", "content": TEXT, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return whole({**about, "object": "chat.completion", "choices": [choice], "usage": USAGE})

    def chunk(delta: object, finish: str | None = None, **more: object) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**about, "object": "chat.completion.chunk", "choices": [choice], **more}

    events: list[tuple[None, object]] = [(None, chunk({"role": "assistant", "content": ""}))]
    events += [(None, chunk({"content": word})) for word in WORDS]
    events += [(None, chunk({}, "stop", usage=USAGE)), (None, "[DONE]")]
    return server_sent(events)


def _completions(request: Request) -> Answer:
    asked = request.json
    about = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": CREATED,
        "model": asked["model"],
    }

    def choice(text: str, finish: str | None) -> dict[str, object]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    if not asked.get("stream"):
        return whole({**about, "choices": [choice(TEXT, "stop")], "usage": USAGE})
    events = [(None, {**about, "choices": [choice(word, None)]}) for word in WORDS]
    return server_sent([*events, (None, "[DONE]")])


def _responses(request: Request) -> Answer:
    asked = request.json
    part = {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    response = {
        "id": "resp_1",
        "object": "response",
        "created_at": CREATED,
        "status": "completed",
        "model": asked["model"],
        "output": [{**item, "content": [part]}],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    if not asked.get("stream"):
        return whole(response)
    begun = {**response, "status": "in_progress", "output": []}
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    said: list[dict[str, object]] = [
        {"type": "response.created", "response": begun},
        *(
            {"type": "response.output_text.delta", **place, "delta": w, "logprobs": []}
            for w in WORDS
        ),
        {"type": "response.output_text.done", **place, "text": TEXT, "logprobs": []},
        {"type": "response.completed", "response": response},
    ]
    return server_sent(
        (str(each["type"]), {**each, "sequence_number": n}) for n, each in enumerate(said)
    )


def _embeddings(request: Request) -> Answer:
    asked = request.json
    texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
    vector: object = VECTOR
    if asked.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, _ in enumerate(texts)]
    usage = {"prompt_tokens": 4, "total_tokens": 4}
    return whole({"object": "list", "data": data, "model": asked["model"], "usage": usage})


def _rerank(request: Request) -> Answer:
    asked = request.json
    found = [{"index": n, "relevance_score": 1 / (n + 1)} for n, _ in enumerate(asked["documents"])]
    return whole({"model": asked["model"], "results": found})


def _speech(request: Request) -> Answer:
    sound = hashlib.sha256(request.body).digest() * 2000
    pieces = [
        b"RIFF\xff\xff\xff\xffWAVE",
        *(sound[i : i + 16_000] for i in range(0, 64_000, 16_000)),
    ]
    return Answer(pieces, 200, (("Content-Type", "audio/wav"),))


def _heard(request: Request, task: str) -> Answer:
    fields, files = request.form
    name, content = files["file"]
    text = f"{task} {name}, {hashlib.sha256(content).hexdigest()[:8]}, with {fields['model']}"
    if fields.get("stream") == "true":
        deltas = [{"type": "transcript.text.delta", "delta": word + " "} for word in text.split()]
        return server_sent(
            (None, each) for each in [*deltas, {"type": "transcript.text.done", "text": text}]
        )
    if fields.get("response_format") == "text":
        return Answer(text.encode() + b"\n", 200, (("Content-Type", "text/plain; charset=utf-8"),))
    return whole({"text": text})


def _picture(request: Request) -> Answer:
    """Of the request's fields and files, so that a byte that was lost shows."""
    seed: Any = request.json if request.content_type == "application/json" else request.form
    digest = hashlib.sha256(repr(seed).encode()).digest()
    picture = base64.b64encode(b"\x89PNG" + digest * 500).decode()
    return whole({"created": CREATED, "data": [{"b64_json": picture}]})


def _models() -> list[dict[str, object]]:
    about = {"object": "model", "created": CREATED, "owned_by": "studio"}
    return [{"id": name, **about} for name in MODELS]


# -- Anthropic -----------------------------------------------------------------------------------


def _messages(request: Request) -> Answer:
    asked = request.json
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": asked["model"],
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "output_tokens": 3},
    }
    if not asked.get("stream"):
        return whole(message)
    begun = {**message, "content": [], "stop_reason": None}
    block = {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    said: list[dict[str, Any]] = [
        {"type": "message_start", "message": begun},
        block,
        {"type": "ping"},
        *(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": word},
            }
            for word in WORDS
        ),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": ended, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    return server_sent((each["type"], each) for each in said)


# -- Ollama --------------------------------------------------------------------------------------

TIMES = {
    "total_duration": 5_000_000,
    "load_duration": 1_000_000,
    "prompt_eval_count": 7,
    "prompt_eval_duration": 1_000_000,
    "eval_count": 3,
    "eval_duration": 3_000_000,
}
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "qwen3",
    "families": ["qwen3"],
    "parameter_size": "8.2B",
    "quantization_level": "Q4_K_M",
}


def _generated(request: Request, said: Callable[[str], dict[str, object]]) -> Answer:
    """Ollama streams unless it is told not to."""
    asked = request.json
    about = {"model": asked["model"], "created_at": STAMP}
    end = {"done": True, "done_reason": "stop", **TIMES}
    if asked.get("stream", True) is False:
        return whole({**about, **said(TEXT), **end})
    pieces = [{**about, **said(word), "done": False} for word in WORDS]
    return lines([*pieces, {**about, **said(""), **end}])


def _listed() -> list[dict[str, object]]:
    about = {"modified_at": STAMP, "size": 5_200_000_000, "digest": DIGEST, "details": DETAILS}
    return [{"name": name, "model": name, **about} for name in ("llama3.2:3b", "nomic:latest")]


def _pull() -> Answer:
    done = [
        {"status": "downloading", "digest": DIGEST, "total": 100, "completed": n} for n in (50, 100)
    ]
    return lines([{"status": "pulling manifest"}, *done, {"status": "success"}])


ROUTES: dict[tuple[str, str], Callable[[Request], Answer]] = {
    ("GET", "/health"): lambda _: whole({"status": "ok"}),
    ("GET", "/v1/models"): lambda _: whole({"object": "list", "data": _models()}),
    ("POST", "/v1/chat/completions"): _chat,
    ("POST", "/v1/completions"): _completions,
    ("POST", "/v1/responses"): _responses,
    ("POST", "/v1/embeddings"): _embeddings,
    ("POST", "/v1/rerank"): _rerank,
    ("POST", "/v1/audio/speech"): _speech,
    ("POST", "/v1/audio/transcriptions"): lambda request: _heard(request, "heard"),
    ("POST", "/v1/audio/translations"): lambda request: _heard(request, "translated"),
    ("POST", "/v1/images/generations"): _picture,
    ("POST", "/v1/images/edits"): _picture,
    ("POST", "/v1/images/variations"): _picture,
    ("POST", "/v1/messages"): _messages,
    ("POST", "/v1/messages/count_tokens"): lambda _: whole({"input_tokens": 7}),
}
OLLAMA_ROUTES: dict[tuple[str, str], Callable[[Request], Answer]] = {
    ("GET", "/v1/models"): lambda _: whole(
        {
            "object": "list",
            "data": [
                {"id": each["name"], "object": "model", "created": CREATED, "owned_by": "library"}
                for each in _listed()
            ],
        }
    ),
    ("GET", "/api/version"): lambda _: whole({"version": "0.33.0"}),
    ("GET", "/api/tags"): lambda _: whole({"models": _listed()}),
    ("GET", "/api/ps"): lambda _: whole(
        {"models": [{**_listed()[0], "size_vram": 5_200_000_000, "expires_at": STAMP}]}
    ),
    ("POST", "/api/show"): lambda _: whole(
        {
            "modelfile": "FROM it",
            "details": DETAILS,
            "model_info": {"general.architecture": "qwen3"},
        }
    ),
    ("POST", "/api/chat"): lambda request: _generated(
        request, lambda text: {"message": {"role": "assistant", "content": text}}
    ),
    ("POST", "/api/generate"): lambda request: _generated(request, lambda text: {"response": text}),
    ("POST", "/api/embed"): lambda request: whole(
        {"model": request.json["model"], "embeddings": [VECTOR], "prompt_eval_count": 4}
    ),
    ("POST", "/api/embeddings"): lambda _: whole({"embedding": VECTOR}),
    ("POST", "/api/pull"): lambda _: _pull(),
}


def openai_and_anthropic(request: Request) -> Answer | None:
    """A server as LocalAI or llama-server: both protocols."""
    if request.method == "GET" and request.path.startswith("/v1/models/"):
        named = [each for each in _models() if each["id"] == request.path[11:]]
        return whole(named[0]) if named else failed(404, "no such model")
    found = ROUTES.get((request.method, request.path))
    return None if found is None else found(request)


def ollama(request: Request) -> Answer | None:
    found = OLLAMA_ROUTES.get((request.method, request.path))
    return None if found is None else found(request)


def every_protocol(request: Request) -> Answer | None:
    """One server that speaks all three."""
    return openai_and_anthropic(request) or ollama(request)  # the first one's list of models
