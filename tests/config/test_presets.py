"""Presets: what they fill in; and that their expressions fit the servers' answers, as recorded in
`answers/` from the servers' source and documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import responses
import yaml

from gpumanager.config import Config, ConfigError, ConsumerConfig, parse_config
from gpumanager.config.presets import names
from gpumanager.config.values import DROP_IN_ROUTES
from gpumanager.consumers.registry import Registry
from gpumanager.errors import ConsumerUnreachable
from gpumanager.jobs.polling import job_id
from gpumanager.jobs.routing import Choice, Router
from gpumanager.model import LoadedModel, ModelListing, ProbeReport
from gpumanager.upstream.proxy import Inbound
from gpumanager.web.ways import ModelRequest
from tests.support.calls import CallsOf
from tests.support.clock import FakeClock

URL = "http://127.0.0.1:8188"
ANSWERS = Path(__file__).parent / "answers"
PROMISED = (
    "ollama comfyui a1111 forge llama-server llama-router vllm sglang localai llama-swap tabby "
    "tgwui koboldcpp speaches whispercpp kokoro triton invokeai tgi tei openedai-speech xtts "
    "alltalk lmstudio docker-model-runner mistralrs swarmui sdnext faster-whisper-server piper "
    "sdcpp xinference lemonade chatterbox llama-cpp-python infinity chatterbox-tts-api "
    "orpheus-fastapi whisper-asr"
)


def recorded(preset: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ANSWERS / f"{preset}.yaml").read_text("utf-8"))
    return found


def having(*keys: str) -> list[Any]:
    """A parameter for each preset and each example of it under `keys`."""
    found = []
    for preset in names():
        value: Any = recorded(preset)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        examples = value if isinstance(value, list) else [] if value is None else [value]
        found += [pytest.param(preset, e, id=f"{preset}-{i}") for i, e in enumerate(examples)]
    assert found
    return found


def config_of(preset: str, **keys: Any) -> Config:
    consumer = {"preset": preset, "url": URL, "model": "m/x", **keys}
    return parse_config(yaml.safe_dump({"consumers": {"it": consumer}}))


def consumer(preset: str, **keys: Any) -> ConsumerConfig:
    return config_of(preset, **keys).consumers["it"]


def calls(preset: str) -> CallsOf:
    return CallsOf(config_of(preset))


@pytest.fixture
def server() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


def answer(
    server: responses.RequestsMock, method: str, target: str, body: Any, status: int = 200
) -> None:
    text = "" if body is None else body if isinstance(body, str) else json.dumps(body)
    server.add(method, URL + target, body=text, status=status)


def sent(server: responses.RequestsMock) -> tuple[str | None, str, Any]:
    """Method, target and JSON of the latest call."""
    request = server.calls[-1].request
    target = str(request.url).removeprefix(URL)
    return request.method, target, json.loads(request.body) if request.body else None


# -- what there is -------------------------------------------------------------------------------


def test_every_server_that_was_promised_has_a_preset_and_its_answers() -> None:
    assert sorted(PROMISED.split()) == sorted(names())
    assert sorted(path.stem for path in ANSWERS.iterdir()) == sorted(names())


@pytest.mark.parametrize("preset", names())
def test_a_url_is_enough(preset: str) -> None:
    config = parse_config(yaml.safe_dump({"consumers": {"it": {"preset": preset, "url": URL}}}))
    filled = config.consumers["it"]
    assert filled.health is not None
    assert filled.paths


@pytest.mark.parametrize("preset", names())
def test_whatever_a_preset_has_is_recorded(preset: str) -> None:
    """No expression without an answer that it was tested against."""
    filled, answers = consumer(preset), recorded(preset)
    assert "health" in answers
    for key in ("probe", "session", "unload", "settled", "done", "slots"):
        assert (getattr(filled, key) is None) == (key not in answers), key
    if filled.probe is not None:
        assert (filled.probe.busy is None) == ("busy" not in answers)
        for key in ("items", "on_cpu"):
            recorded_too = any(key in example for example in answers["probe"])
            assert (getattr(filled.probe, key) is None) != recorded_too, key


# -- their expressions, on the answers -----------------------------------------------------------


@pytest.mark.parametrize("preset", names())
def test_the_health_answer_says_nothing_of_the_memory(
    server: responses.RequestsMock, preset: str
) -> None:
    filled = consumer(preset)
    assert filled.health is not None
    answer(server, "GET", filled.health.path, recorded(preset)["health"])
    without_probe = CallsOf(config_of(preset, probe=None, unload=None))
    assert without_probe.probe("it") == ProbeReport()


@pytest.mark.parametrize(("preset", "example"), having("probe"))
def test_the_probe(server: responses.RequestsMock, preset: str, example: dict[str, Any]) -> None:
    filled = consumer(preset)
    assert filled.health is not None
    assert filled.probe is not None
    if filled.health.path != filled.probe.path:
        answer(server, "GET", filled.health.path, None)
    status = example.get("status", 200)
    answer(server, filled.probe.method, filled.probe.path, example["answer"], status)
    on_cpu = tuple(example.get("on_cpu", ()))
    items = tuple(example["items"]) if "items" in example else None
    details = {name: LoadedModel(*said) for name, said in example.get("details", {}).items()}
    expected = ProbeReport(example["loaded"], example["resident_mib"], on_cpu, items, details)
    assert calls(preset).probe("it") == expected
    if "items" in example:
        assert filled.probe.find_items(example["answer"]) == example["items"]


@pytest.mark.parametrize(("preset", "example"), having("busy"))
def test_busy(server: responses.RequestsMock, preset: str, example: dict[str, Any]) -> None:
    answer(server, "GET", example["target"], example["answer"])
    assert calls(preset).busy("it") is example["is"]


@pytest.mark.parametrize(("preset", "example"), having("unload"))
def test_the_unload(server: responses.RequestsMock, preset: str, example: dict[str, Any]) -> None:
    prepare_unload(server, preset, example)
    answer(server, example["method"], example["target"].partition("?")[0], example["answer"])
    calls(preset).unload("it")
    assert sent(server) == (example["method"], example["target"], example["json"])


@pytest.mark.parametrize(("preset", "example"), having("unload"))
def test_an_unload_that_fails_is_noticed(
    server: responses.RequestsMock,
    preset: str,
    example: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpumanager.upstream.calls.UNLOAD_TIMEOUT_S", 0.01)
    prepare_unload(server, preset, example)
    status, body = (200, example["refused"]) if "refused" in example else (500, {"error": "no"})
    answer(server, example["method"], example["target"].partition("?")[0], body, status)
    with pytest.raises(ConsumerUnreachable):
        calls(preset).unload("it")


def prepare_unload(server: responses.RequestsMock, preset: str, example: dict[str, Any]) -> None:
    """What is asked before: a session, and what there is to unload."""
    filled, answers = consumer(preset), recorded(preset)
    if "session" in answers:
        session = answers["session"]
        answer(server, session["method"], session["target"], session["answer"])
    assert filled.unload is not None
    if filled.unload.for_each is not None:
        assert filled.probe is not None
        first = answers["probe"][0]
        kept = json.loads(json.dumps(first["answer"]))
        answer(server, filled.probe.method, filled.probe.path, _only(kept, example["item"], first))


def _only(body: Any, item: str, example: dict[str, Any]) -> Any:
    """The probe's answer with one item instead of all of them."""
    text = json.dumps(body)
    for other in example["items"]:
        text = text.replace(json.dumps(other), json.dumps(item))
    return json.loads(text)


@pytest.mark.parametrize(("preset", "example"), having("session"))
def test_a_session_that_is_not_opened_is_noticed(
    server: responses.RequestsMock, preset: str, example: dict[str, Any]
) -> None:
    answer(server, example["method"], example["target"], example["refused"])
    with pytest.raises(ConsumerUnreachable, match="opened no session"):
        calls(preset).unload("it")
    assert sent(server) == (example["method"], example["target"], example["json"])


@pytest.mark.parametrize("key", ["load", "warm", "trim"])
@pytest.mark.parametrize("preset", names())
def test_load_warm_and_trim(server: responses.RequestsMock, preset: str, key: str) -> None:
    example = recorded(preset).get(key)
    if getattr(consumer(preset), key) is None:
        assert example is None
        server.reset()
        return
    assert example is not None
    answer(server, example["method"], example["target"], example.get("answer"))
    getattr(calls(preset), key)("it")
    assert sent(server) == (example["method"], example["target"], example["json"])


@pytest.mark.parametrize(("preset", "example"), having("settled"))
def test_settled(server: responses.RequestsMock, preset: str, example: dict[str, Any]) -> None:
    settled = consumer(preset).settled
    assert settled is not None
    answer(server, settled.method, settled.path, example["answer"])
    assert calls(preset).settled("it") is example["is"]


@pytest.mark.parametrize(("preset", "example"), having("done"))
def test_asynchronous_jobs(
    server: responses.RequestsMock, preset: str, example: dict[str, Any]
) -> None:
    filled = consumer(preset)
    done, asked = filled.done, calls(preset)
    assert done is not None
    (route,) = filled.paths.values()
    path = example.get("path", route.path)
    assert done.matches(route.method or "POST", path)
    assert not done.matches("GET", path)
    assert job_id(done, json.dumps(example["taken"]).encode()) == example["id"]
    assert job_id(done, json.dumps(example["refused"]).encode()) is None
    answer(server, "GET", example["poll"], example["working"])
    assert asked.job_result("it", done, example["id"]) is None
    answer(server, "GET", example["poll"], example["over"])
    assert asked.job_result("it", done, example["id"]) is not None
    assert (done.failure is None) == ("failed" not in example)
    if done.failure is not None:
        assert not done.find_failure(example["over"])
        said = json.dumps(done.find_failure(example["failed"])).encode()
        assert filled.out_of_memory.said_in(said)
        assert b"masterpiece" not in said  # the client's words
    if done.lost is not None:
        answer(server, "GET", example["listed"]["target"], example["listed"]["with"])
        assert asked.job_listed("it", done.lost, example["id"])
        answer(server, "GET", example["listed"]["target"], example["listed"]["without"])
        assert not asked.job_listed("it", done.lost, example["id"])
    for call in example["cancel"]:
        answer(server, call["method"], call["target"], None)
    asked.cancel_job("it", done, example["id"])
    made = [call.request for call in server.calls][-len(example["cancel"]) :]
    assert [(each.method, json.loads(each.body or b"null")) for each in made] == [
        (call["method"], call["json"]) for call in example["cancel"]
    ]


# -- the routes of other protocols, and their models ----------------------------------------------


@pytest.mark.parametrize("preset", names())
def test_the_routes_are_those_that_the_server_has(preset: str) -> None:
    """Nothing that it does not have, and all that it has."""
    routes, posts = consumer(preset).routes, recorded(preset)["posts"]
    assert routes is not None
    goes_to = {route.path for route in routes.values()}
    assert goes_to <= set(posts)
    assert {path for path in posts if path in DROP_IN_ROUTES} <= goes_to | set(routes)


@pytest.mark.parametrize("preset", names())
def test_a_kind_that_its_routes_serve_has_a_path_too(preset: str) -> None:
    """So that it can be routed, and /v1/{kind} works."""
    filled = consumer(preset)
    kinds = {
        "/v1/chat/completions": "llm",
        "/v1/embeddings": "embed",
        "/v1/rerank": "rerank",
        "/v1/audio/speech": "tts",
        "/v1/audio/transcriptions": "stt",
        "/v1/images/generations": "image",
    }
    assert filled.routes is not None
    assert {kinds[path] for path in filled.routes if path in kinds} <= set(filled.paths) | {
        "llm" if preset == "speaches" else ""  # it passes chats on to another server
    }


@pytest.mark.parametrize("preset", names())
def test_the_list_of_models_finds_their_names(server: responses.RequestsMock, preset: str) -> None:
    call, example = consumer(preset).list_models, recorded(preset).get("models")
    assert (call is None) == (example is None)
    if call is None or example is None:
        return
    answer(server, "GET", call.path, example["answer"])
    found = calls(preset).models("it")
    assert found is not None
    assert list(found.names) == example["names"]
    assert found.sizes == example.get("sizes", {})
    assert found.aliases == example.get("aliases", {})


@pytest.mark.parametrize(("preset", "example"), having("slots"))
def test_how_many_jobs_it_works_on_at_once(
    server: responses.RequestsMock, preset: str, example: dict[str, Any]
) -> None:
    answer(server, "GET", example["target"].partition("?")[0], example["answer"])
    assert calls(preset).slots("it") == example["count"]
    assert sent(server) == ("GET", example["target"], None)


@pytest.mark.parametrize("preset", names())
def test_auto_is_for_those_that_tell(preset: str) -> None:
    if "slots" in recorded(preset):
        assert consumer(preset, max_parallel="auto").slots is not None
        return
    with pytest.raises(ConfigError, match="max_parallel"):
        consumer(preset, max_parallel="auto")


class Listed:
    """A catalogue that has whatever model is asked for."""

    def __init__(self, model: str | None) -> None:
        self._model = model

    def listed(self, name: str, *, wanted: str | None = None) -> ModelListing:
        return ModelListing(() if self._model is None else (self._model,))


@pytest.mark.parametrize(("preset", "example"), having("job"))
def test_what_a_job_says_of_the_memory_that_it_needs(preset: str, example: dict[str, Any]) -> None:
    body = json.dumps(example["body"]).encode()
    headers = [("Content-Type", "application/json")]
    inbound = Inbound("POST", "", headers, BytesIO(body), len(body), "r-1")
    router = Router(Registry(config_of(preset), FakeClock()), Listed(example["model"]))
    choice = ModelRequest(inbound, "/consumers/it/x", strict=False).said_of(
        Choice("llm", "it"), router
    )
    assert (choice.model, choice.context) == (example["model"], example["context"])


def test_every_way_in_which_a_job_says_that_is_recorded() -> None:
    for preset in names():
        filled = consumer(preset)
        says = (filled.request_model, filled.request_context) != (None, None)
        assert says == ("job" in recorded(preset)), preset


def test_who_unloads_one_model_alone() -> None:
    alone = {preset for preset in names() if consumer(preset).tells_models_apart}
    assert alone == {
        *("docker-model-runner", "lemonade", "llama-router", "llama-swap", "lmstudio", "localai"),
        *("mistralrs", "ollama", "speaches"),
    }
    assert consumer("triton").unload is not None  # all of it, as its parts need each other


def test_who_lists_nothing_takes_any_name_or_none() -> None:
    """A client that names a model is not refused by a server that does not care."""
    for preset in names():
        filled = consumer(preset)
        assert not filled.routes or filled.list_models is not None or filled.any_model, preset


@pytest.mark.parametrize(("preset", "call"), having("calls"))
def test_which_calls_take_their_turn(preset: str, call: tuple[str, str, bool | None]) -> None:
    method, path, expected = call
    assert consumer(preset).is_gpu_work(method, path) is expected


@pytest.mark.parametrize("preset", names())
def test_no_call_that_the_broker_makes_to_look_is_gpu_work(preset: str) -> None:
    """What it asks every few seconds, a page may ask, too."""
    filled = consumer(preset)
    for call in (filled.health, filled.probe, filled.settled, filled.list_models, filled.slots):
        if call is not None:
            assert not filled.is_gpu_work(call.method, call.path.partition("?")[0]), call.path


# -- overriding ----------------------------------------------------------------------------------


def test_any_key_can_be_overridden() -> None:
    ollama = consumer(
        "ollama",
        health="/",
        paths={"llm": "/v1/chat/completions", "tts": "/x"},
        unload=None,
        probe=None,
    )
    assert ollama.health is not None
    assert ollama.health.path == "/"
    assert ollama.paths["llm"].path == "/v1/chat/completions"
    assert ollama.paths["tts"].path == "/x"
    assert ollama.unload is None


def test_a_path_of_ones_own_leaves_the_presets_others() -> None:
    assert set(consumer("piper", paths={"image": "/x"}).paths) == {"image", "tts"}


def test_routes_of_ones_own_add_to_the_presets_and_a_list_replaces_them() -> None:
    preset = consumer("tabby").routes
    assert preset is not None
    more = consumer("tabby", routes={"/v1/responses": "/r"}).routes
    assert more is not None
    assert set(more) == {*preset, "/v1/responses"}
    only = consumer("tabby", routes=["/v1/completions"]).routes
    assert only is not None
    assert set(only) == {"/v1/completions"}


def test_what_is_about_a_model_needs_one() -> None:
    text = yaml.safe_dump({"consumers": {"it": {"preset": "ollama", "url": URL}}})
    assert parse_config(text).consumers["it"].warm is None
    own = {"url": URL, "load": {"path": "/load", "json": {"name": "{model}"}}}
    with pytest.raises(ConfigError, match=r"holds \{model\}, but the consumer has no 'model'"):
        parse_config(yaml.safe_dump({"consumers": {"it": own}}))


@pytest.mark.parametrize(
    ("path", "body", "jobs"),
    [
        ("/queue", {"delete": ["a"]}, ["a"]),
        ("/queue", {"delete": ["a", "b"]}, ["a", "b"]),
        ("/queue", {"delete": ["a"], "clear": False}, ["a"]),
        ("/queue", {"delete": ["a"], "clear": True}, None),
        ("/queue", {"delete": ["a", 7]}, None),
        ("/queue", {"delete": []}, None),
        ("/queue", {"clear": True}, None),
        ("/queue", [], None),
        ("/api/interrupt", {"prompt_id": "a"}, ["a"]),
        ("/api/interrupt", {"prompt_id": None}, None),
        ("/api/interrupt", {}, None),
    ],
)
def test_which_jobs_a_call_to_comfyui_stops(path: str, body: Any, jobs: list[str] | None) -> None:
    (call,) = (each for each in consumer("comfyui").stops if each.matches("POST", path))
    assert call.jobs(body) == jobs
