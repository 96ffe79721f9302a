"""The routes of OpenAI's, Anthropic's and Ollama's protocols, through a broker that runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gpumanager.cli import main
from gpumanager.keys import ApiKey
from gpumanager.model import StoppedBy
from gpumanager.web import connection as web_connection
from gpumanager.web.ways import DROP_IN
from tests.support.broker import LiveBroker, live_broker
from tests.support.ports import free_port
from tests.support.sockets import Connection, Received, Script, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

TAGS = {
    "models": [
        {"name": "qwen3:8b", "model": "qwen3:8b", "digest": "5a", "size": 5_000, "details": {}},
        {"name": "gemma3:latest", "digest": "5b", "size": 1_000, "details": {}},
    ]
}
PS = {"models": [{"name": "gemma3:latest", "size_vram": 1024**3}]}


def says(connection: Connection, received: Received) -> None:
    """Who was asked what."""
    method, path, _ = received.line.decode().split(" ")
    found: Any = {"method": method, "path": path, "body": received.body.decode("latin-1")}
    if path == "/api/tags":
        found = TAGS
    elif path == "/api/ps":
        found = PS
    elif path == "/v1/models":
        found = {"object": "list", "data": [{"id": "tts-1", "created": 7, "owned_by": "me"}]}
    connection.send(answer(json.dumps(found).encode()))


@pytest.fixture
def consumers() -> Iterator[dict[str, ScriptedConsumer]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(ScriptedConsumer(says))
            for name in ("ollama", "vllm", "voice", "whisper", "paint", "tei")
        }


def config(consumers: dict[str, ScriptedConsumer], **changes: Any) -> str:
    own: dict[str, dict[str, Any]] = {
        "ollama": {
            "list_models": {"path": "/api/tags", "items": "models[].name"},
            "probe": {"path": "/api/ps", "items": "models[].name", "loaded": "`true`"},
            "routes": ["/api/chat", "/api/generate", "/api/embed", "/v1/chat/completions"],
        },
        "vllm": {
            "models": ["big", "llama*", {"name": "gpt-4o", "served_as": "big", "vram_mib": 9}],
            "routes": {"/v1/chat/completions": "/openai/chat", "/v1/messages": "/v1/messages"},
        },
        "voice": {"paths": {"tts": "/api/tts"}},
        "whisper": {"models": [{"name": "*", "served_as": "base.en"}]},
        "tei": {"paths": {"rerank": "/rerank"}},
    }
    return yaml.safe_dump(
        {
            "routing": {
                "llm": ["ollama", "vllm"],
                "tts": "voice",
                "stt": "whisper",
                "image": "paint",
                "rerank": "tei",
                "video": "paint",
            },
            "consumers": {
                name: {"url": each.url, **own.get(name, {})} for name, each in consumers.items()
            },
            **changes,
        }
    )


@pytest.fixture
def broker(consumers: dict[str, ScriptedConsumer]) -> Iterator[LiveBroker]:
    with live_broker(config(consumers)) as running:
        yield running


def asked(broker: LiveBroker, path: str, **body: Any) -> dict[str, Any]:
    found = broker.post(path, json=body)
    assert found.status_code == 200, found.text
    said: dict[str, Any] = found.json()
    return said


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "model", "name", "at", "served_as"),
    [
        (CHAT, "qwen3:8b", "ollama", CHAT, "qwen3:8b"),
        (CHAT, "gemma3", "ollama", CHAT, "gemma3"),
        (CHAT, "llama3.2", "vllm", "/openai/chat", "llama3.2"),
        (CHAT, "gpt-4o", "vllm", "/openai/chat", "big"),
        (CHAT, None, "ollama", CHAT, None),
        ("/v1/messages", "gpt-4o", "vllm", "/v1/messages", "big"),
        ("/api/chat", "qwen3:8b", "ollama", "/api/chat", "qwen3:8b"),
        ("/api/embed", "gemma3", "ollama", "/api/embed", "gemma3"),
        ("/v1/audio/speech", "tts-1", "voice", "/v1/audio/speech", "tts-1"),
        ("/v1/images/generations", "x", "paint", "/v1/images/generations", "x"),
        ("/v1/rerank", "bge", "tei", "/rerank", "bge"),
        ("/v1/llm", "gpt-4o", "vllm", "/gen", "big"),
    ],
)
def test_a_job_goes_to_the_consumer_that_has_its_model(
    consumers: dict[str, ScriptedConsumer],
    path: str,
    model: str | None,
    name: str,
    at: str,
    served_as: str | None,
) -> None:
    with live_broker(
        config(consumers).replace("  vllm:\n", "  vllm:\n    paths: {llm: /gen}\n")
    ) as it:
        said = asked(it, path, **({} if model is None else {"model": model}), n=1.0)
    assert said["path"] == at
    expected = {"n": 1.0} if served_as is None else {"model": served_as, "n": 1.0}
    assert json.loads(said["body"]) == expected
    (request,) = [each for each in consumers[name].requests if each.line.startswith(b"POST")]
    assert request.header("content-length") == str(len(request.body))


def test_a_form_is_given_the_consumers_name_for_its_model(
    broker: LiveBroker, consumers: dict[str, ScriptedConsumer]
) -> None:
    found = broker.post(
        "/v1/audio/transcriptions", files={"file": b"RIFF" * 1000}, data={"model": "whisper-1"}
    )
    assert found.status_code == 200
    assert 'name="model"\r\n\r\nbase.en\r\n' in found.json()["body"]
    assert "RIFF" * 1000 in found.json()["body"]


def test_every_drop_in_route_takes_its_turn(broker: LiveBroker) -> None:
    for way in DROP_IN:
        found = broker.post(way.path, json={"model": "qwen3:8b"})
        assert found.status_code in (200, 404, 501), way.path
        assert broker.get(way.path).status_code == 405
    assert broker.stats.total_jobs >= 10


OPENAI = {
    "error": {
        "message": "no consumer has the model 'qwen3:8'; there are qwen3:8b",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
        "retryable": False,
    }
}


def test_an_unknown_model_is_told_in_the_words_of_each_protocol(broker: LiveBroker) -> None:
    found = broker.post(CHAT, json={"model": "qwen3:8"})
    assert (found.status_code, found.json()) == (404, OPENAI)
    assert found.headers["X-Should-Retry"] == "false"
    found = broker.post("/v1/messages", json={"model": "qwen3:8"})
    assert found.status_code == 404
    assert found.json() == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "no consumer has the model 'qwen3:8'; there are big, gpt-4o, llama*",
            "code": "model_not_found",
            "retryable": False,
        },
    }
    found = broker.post("/api/chat", json={"model": "qwen3:8"})
    assert found.status_code == 404
    assert found.json() == {
        "error": "no consumer has the model 'qwen3:8'; there are qwen3:8b",
        "code": "model_not_found",
        "retryable": False,
    }


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat"])
def test_what_is_no_json_reaches_nobody(
    broker: LiveBroker, consumers: dict[str, ScriptedConsumer], path: str
) -> None:
    found = broker.post(path, data=b"{", headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert "the body is no JSON" in found.text
    assert not any(each.line.startswith(b"POST") for each in consumers["ollama"].requests)


def test_half_a_surrogate_pair_is_a_name_like_any_other(
    broker: LiveBroker, consumers: dict[str, ScriptedConsumer]
) -> None:
    found = broker.post(CHAT, data=b'{"model": "\\ud800"}')
    assert found.status_code == 404
    assert "the model '\ud800'" in found.json()["error"]["message"]

    def odd(connection: Connection, _: Received) -> None:
        connection.send(answer(b'{"data": [{"id": "\\ud800"}, {"id": "tts-1"}]}'))

    consumers["voice"].script = odd
    for path, key, name in [("/v1/models", "data", "id"), ("/api/tags", "models", "name")]:
        names = [each[name] for each in broker.get(path).json()[key]]
        assert ("\ud800" in names, "tts-1" in names) == (True, True)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("Content-Length: 0\r\nX: " + "x" * 70_000 + "\r\n\r\n", 431),
        ("X" * 70_000, 431),
        ("Bad Header : x\r\n\r\n", 400),
        ("Content-Length: +1\r\n\r\n", 400),
        ("X: never ends", 408),
    ],
)
@pytest.mark.parametrize(
    ("path", "where"),
    [
        (CHAT, lambda said: said["error"]["code"]),
        ("http://localhost/v1/messages", lambda said: said["error"]["code"]),
        ("/api/chat?x", lambda said: said["code"]),
        ("/v1/tts", lambda said: said["error"]),
    ],
)
def test_a_head_that_is_refused_is_so_in_the_words_of_its_protocol(
    broker: LiveBroker,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    where: Callable[[Any], str],
    head: str,
    status: int,
) -> None:
    monkeypatch.setattr(web_connection, "HEAD_S", 0.1)
    monkeypatch.setattr(web_connection, "LOOK_S", 0.05)
    with broker.raw() as client:
        client.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{head}".encode())
        found = client.answer()
    codes = {431: "headers_too_large", 400: "bad_request", 408: "request_timeout"}
    assert (found.status, where(json.loads(found.body))) == (status, codes[status])


def test_what_a_consumer_does_not_serve_is_a_501(broker: LiveBroker) -> None:
    found = broker.post("/api/generate", json={"model": "big"})
    assert found.status_code == 404  # of those that speak Ollama's protocol nobody has it
    found = broker.post("/v1/responses", json={"model": "big"})
    assert found.status_code == 501
    assert found.json()["error"]["code"] == "no_consumer"


def test_a_kind_that_the_operator_named_has_a_route(
    consumers: dict[str, ScriptedConsumer],
) -> None:
    text = config(consumers).replace("  paint:\n", "  paint:\n    paths: {video: /render}\n")
    with live_broker(text) as broker:
        assert broker.post("/v1/video", data=b"x").json()["path"] == "/render"
        assert broker.get("/v1/video").status_code == 405
        assert broker.get("/v1/plan/video").json()["consumer"] == "paint"
        assert broker.post("/v1/music").status_code == 404


def test_every_consumer_of_a_kind_is_shown(broker: LiveBroker) -> None:
    metrics = broker.get("/metrics")
    assert metrics.status_code == 200
    for name, kind in [("ollama", "llm"), ("vllm", "llm"), ("paint", "image"), ("paint", "video")]:
        assert f'gpumanager_queue_depth{{consumer="{name}",kind="{kind}"}} 0.0' in metrics.text
    shown = CliRunner().invoke(main, ["status", "--url", broker.url], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert {"ollama (llm)", "vllm (llm)", "paint (image, video)"} <= {
        line.partition("  ")[0].strip(" │") for line in shown.output.splitlines()
    }, shown.output


def test_the_models_of_all_consumers_are_one_list(broker: LiveBroker) -> None:
    eventually(lambda: broker.broker.registry.get("ollama").items == ("gemma3:latest",))
    found = broker.get("/v1/models").json()
    names = {each["id"]: each for each in found["data"]}
    assert sorted(names) == ["big", "gemma3:latest", "gpt-4o", "qwen3:8b", "tts-1"]
    assert names["gemma3:latest"]["loaded"] is True
    assert names["qwen3:8b"]["loaded"] is False
    assert (names["gpt-4o"]["vram_mib"], names["gpt-4o"]["vram_source"]) == (9, "declared")
    assert (names["tts-1"]["created"], names["tts-1"]["owned_by"]) == (7, "me")
    assert names["big"]["consumer"] == names["big"]["owned_by"] == "vllm"
    assert names["big"]["kinds"] == ["llm"]
    assert broker.get("/v1/models/gpt-4o").json() == names["gpt-4o"]
    assert broker.get("/v1/models/gemma3").json() == names["gemma3:latest"]
    missing = broker.get("/v1/models/gema3")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    tags = {each["name"]: each for each in broker.get("/api/tags").json()["models"]}
    assert list(tags) == list(names)
    assert (tags["qwen3:8b"]["size"], tags["qwen3:8b"]["consumer"]) == (5_000, "ollama")
    assert tags["big"]["details"]["family"] == ""


def lists(*models: Any) -> Script:
    body = json.dumps({"data": list(models)}).encode()
    return lambda connection, _: connection.send(answer(body))


def test_what_a_pattern_lets_through_is_listed(
    broker: LiveBroker, consumers: dict[str, ScriptedConsumer]
) -> None:
    consumers["vllm"].script = lists({"id": "llama-9", "owned_by": "me"}, {"id": "hidden"})
    names = {each["id"]: each for each in broker.get("/v1/models").json()["data"]}
    assert (names["llama-9"]["consumer"], names["llama-9"]["owned_by"]) == ("vllm", "me")
    assert not {"hidden", "llama*", "base.en", "*"} & set(names)
    assert broker.get("/v1/models/llama-9").json() == names["llama-9"]


def test_a_model_that_only_a_pattern_names_can_be_asked_for(broker: LiveBroker) -> None:
    found = broker.get("/v1/models/llama-of/anybody").json()
    assert (found["id"], found["consumer"], found["kinds"]) == (
        "llama-of/anybody",
        "vllm",
        ["llm"],
    )


def test_an_odd_list_does_not_spoil_that_of_all(
    broker: LiveBroker, consumers: dict[str, ScriptedConsumer]
) -> None:
    consumers["voice"].script = lists(
        None, 5, {"id": 5}, {"id": "a", "created": "x", "owned_by": None, "digest": float("nan")}
    )
    strict = partial(json.loads, parse_constant=pytest.fail)
    (found,) = [each for each in strict(broker.get("/v1/models").text)["data"] if each["id"] == "a"]
    assert (found["created"], found["owned_by"]) == (0, "voice")
    (tag,) = [
        each for each in strict(broker.get("/api/tags").text)["models"] if each["name"] == "a"
    ]
    assert tag["digest"] == ""


def test_who_is_known_to_be_down_is_not_asked_for_its_models(
    consumers: dict[str, ScriptedConsumer],
) -> None:
    def ill(connection: Connection, received: Received) -> None:
        connection.send(answer(b"{}", "500 Internal Server Error"))

    consumers["voice"].script = ill
    text = config(consumers).replace("  voice:\n", "  voice:\n    health: /health\n")
    with live_broker(text) as broker:
        eventually(lambda: broker.broker.registry.get("voice").healthy is False)
        assert broker.get("/v1/models").status_code == 200
    assert {each.line.split()[1] for each in consumers["voice"].requests} == {b"/health"}


def test_whom_the_broker_has_stopped_is_not_asked_for_its_models(
    broker: LiveBroker, consumers: dict[str, ScriptedConsumer]
) -> None:
    broker.broker.registry.mark_stopped("voice", StoppedBy("signal"))
    assert broker.get("/v1/models").status_code == 200
    assert consumers["voice"].requests == []


def test_ollamas_other_calls_name_the_model_as_it_does(
    consumers: dict[str, ScriptedConsumer],
) -> None:
    own: Any = {
        "vllm": {"routes": ["/v1/chat/completions"]},
        "ollama": {"models": [{"name": "gpt-4o", "served_as": "qwen3:8b"}]},
    }
    for name, more in own.items():
        more["url"] = consumers[name].url
    text = yaml.safe_dump({"routing": {"llm": "vllm", "embed": "ollama"}, "consumers": own})
    with live_broker(text) as broker:  # only the consumer for embeddings is an Ollama
        assert json.loads(asked(broker, "/api/show", model="gpt-4o")["body"]) == {
            "model": "qwen3:8b"
        }
        assert broker.get("/api/version").json()["path"] == "/api/version"
        assert broker.post("/api/show", json={"model": "other"}).status_code == 404
    own["vllm"] |= {"routes": ["/api/chat"], "models": ["big"]}
    text = yaml.safe_dump({"routing": {"llm": "vllm", "embed": "ollama"}, "consumers": own})
    with live_broker(text) as broker:  # both are
        assert "qwen3:8b" in asked(broker, "/api/show", model="gpt-4o")["body"]


def test_lists_and_ollamas_other_calls_do_not_wait(
    consumers: dict[str, ScriptedConsumer],
) -> None:
    release = threading.Event()

    def hold(connection: Connection, received: Received) -> None:
        release.wait(PATIENCE_S)
        says(connection, received)

    consumers["voice"].script = hold
    with live_broker(config(consumers)) as broker:
        job = threading.Thread(
            target=broker.post, args=("/v1/audio/speech",), kwargs={"json": {}}, daemon=True
        )
        job.start()
        broker.await_line(1)
        release.set()
        job.join(PATIENCE_S)
        for method, path in [("get", "/api/version"), ("post", "/api/show"), ("get", "/api/ps")]:
            found = getattr(broker, method)(path, **({"json": {}} if method == "post" else {}))
            assert found.status_code == 200
            assert path == "/api/ps" or found.json()["path"] == path
        assert broker.stats.total_jobs == 1


def test_ollamas_other_calls_are_given_the_consumers_name_for_a_model(
    consumers: dict[str, ScriptedConsumer],
) -> None:
    text = config(consumers).replace(
        "  ollama:\n", "  ollama:\n    models: [{name: alias, served_as: 'qwen3:8b'}]\n"
    )
    with live_broker(text) as broker:
        shown = broker.post("/api/show", json={"model": "alias", "verbose": True})
        assert json.loads(shown.json()["body"]) == {"model": "qwen3:8b", "verbose": True}
        assert broker.post("/api/show", json={"model": "other"}).status_code == 404


def test_a_job_that_surely_never_ran_may_be_run_again(
    consumers: dict[str, ScriptedConsumer],
) -> None:
    text = config(consumers).replace(consumers["vllm"].url, f"http://127.0.0.1:{free_port()}")
    with live_broker(text) as broker:
        found = broker.post(CHAT, json={"model": "big"})
    assert found.status_code in (502, 503)  # the probe may have noticed first
    assert found.headers["X-Should-Retry"] == "true"


def test_a_key_is_taken_as_each_sdk_sends_it_and_goes_no_further(
    consumers: dict[str, ScriptedConsumer],
) -> None:
    secret = "0123456789abcdef"
    key = ApiKey("alice", secret, role="client")
    with live_broker(config(consumers), keys=[key]) as broker:
        for headers in ({"Authorization": f"Bearer {secret}"}, {"X-Api-Key": secret}):
            found = broker.post(CHAT, json={"model": "big"}, headers=headers)
            assert found.status_code == 200
            sent = consumers["vllm"].requests[-1]
            assert (sent.header("authorization"), sent.header("x-api-key")) == (None, None)
            assert broker.post("/api/show", json={}, headers=headers).status_code == 200
            refused = broker.post("/api/pull", json={}, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        unknown = broker.post("/v1/messages", json={"model": "big"})
        assert unknown.status_code == 401
        assert unknown.json()["error"]["type"] == "authentication_error"
