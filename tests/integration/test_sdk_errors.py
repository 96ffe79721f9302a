"""What the real SDKs make of the broker's errors: the exception that their authors meant for it,
and their own retries, which never run a job twice that may have run."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import yaml

from gpumanager.keys import ApiKey
from tests.support import protocol_answers
from tests.support.broker import LiveBroker, live_broker
from tests.support.protocol_answers import failed
from tests.support.protocol_server import Misbehaviour, ProtocolServer
from tests.support.sdk_calls import CALLS, LLM, OLLAMA, Clients, clients
from tests.support.threads import PATIENCE_S, Outcome, eventually

pytestmark = pytest.mark.timeout(60)

KEY = "sk-a-key-of-enough-characters"
SDKS = ("openai", "anthropic", "ollama")
RETRYING = ("openai", "anthropic")  # Ollama's does not
PATHS = {
    "openai": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "ollama": "/api/chat",
}


@dataclass
class Box:
    """A broker in front of one server, and the SDKs' clients."""

    broker: LiveBroker
    server: ProtocolServer
    sdk: Clients

    @property
    def runs(self) -> int:
        """How many jobs the server has begun."""
        return len(self.server.requests)

    @property
    def consumers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.broker.get("/v1/status").json()["consumers"]
        return found

    def ask(self, sdk: str, model: str = "", text: str = "Why?") -> Any:
        """A chat, whole."""
        model = model or (OLLAMA if sdk == "ollama" else LLM)
        messages: Any = [{"role": "user", "content": text}]
        if sdk == "openai":
            return self.sdk.openai.chat.completions.create(model=model, messages=messages)
        if sdk == "anthropic":
            return self.sdk.anthropic.messages.create(model=model, max_tokens=9, messages=messages)
        return self.sdk.ollama.chat(model, messages)


@contextmanager
def boxed(
    *,
    max_retries: int = 0,
    keys: tuple[ApiKey, ...] = (),
    key: str = "none",
    consumer: dict[str, Any] | None = None,
    **top: Any,
) -> Iterator[Box]:
    with ExitStack() as stack:
        server = stack.enter_context(ProtocolServer(protocol_answers.every_protocol))
        paths = {"llm": "/v1/chat/completions"}
        about = {"url": server.url, "paths": paths, "models": [LLM, OLLAMA], **(consumer or {})}
        text = yaml.safe_dump(
            {
                "routing": {"llm": "it"},
                **top,
                "consumers": {"it": about, **top.get("consumers", {})},
            }
        )
        broker = stack.enter_context(live_broker(text, keys=keys))
        sdk = stack.enter_context(clients(broker.url, key=key, max_retries=max_retries))
        yield Box(broker, server, sdk)


def refused(call: Callable[[], Any]) -> Any:
    """The exception that a call raises: an SDK's own."""
    try:
        call()
    except Exception as error:
        if type(error).__module__.split(".")[0] in SDKS:
            return error
        raise
    pytest.fail("it was not refused")


def check(error: Any, sdk: str, name: str, status: int, code: str) -> None:
    """It is the class that the SDK has for this status, with our code in its protocol's place."""
    assert error.status_code == status
    if sdk == "ollama":
        assert type(error).__name__ == "ResponseError"
        assert isinstance(error.error, str)
        return
    assert type(error).__name__ == name
    if sdk == "openai":
        assert error.code == code
        assert error.type
    else:
        assert error.body["type"] == "error"
        assert error.body["error"]["code"] == code
        assert error.body["error"]["type"]


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch, sdk: str) -> SimpleNamespace:
    """The SDK does not sleep before it tries again; `seconds` says for how long it would have,
    and `then` is done meanwhile."""
    noted = SimpleNamespace(seconds=[], then=lambda: None)

    def sleep(seconds: float) -> None:
        noted.seconds.append(seconds)
        noted.then()

    if sdk in RETRYING:
        module = importlib.import_module(f"{sdk}._base_client")
        monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": sleep}))
    return noted


# -- not retried ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sdk", SDKS)
def test_an_unknown_model_is_not_found(sdk: str, slept: SimpleNamespace) -> None:
    with boxed(max_retries=2) as box:
        error = refused(lambda: box.ask(sdk, "qwen3:8bb"))
        check(error, sdk, "NotFoundError", 404, "model_not_found")
        assert LLM in str(error)  # the nearest that there is
        assert (box.runs, slept.seconds) == (0, [])


@pytest.mark.parametrize("sdk", SDKS)
def test_a_body_that_is_no_json_is_a_bad_request(sdk: str) -> None:
    with boxed() as box:
        body = b'{"model": "' + LLM.encode() + b'", '
        if sdk == "ollama":  # its SDK sends JSON only
            answer = requests.post(box.broker.url + PATHS[sdk], body, timeout=PATIENCE_S)
            assert answer.status_code == 400
            assert isinstance(answer.json()["error"], str)
            assert answer.json()["code"] == "bad_request"
        else:
            client: Any = getattr(box.sdk, sdk)
            path = PATHS[sdk].removeprefix("/v1" if sdk == "openai" else "")
            error = refused(lambda: client.post(path, cast_to=object, content=body))
            check(error, sdk, "BadRequestError", 400, "bad_request")
        assert box.runs == 0


@pytest.mark.parametrize("sdk", SDKS)
def test_a_wrong_key_is_refused_and_the_right_one_goes_no_further(sdk: str) -> None:
    with boxed(keys=(ApiKey("alice", KEY),), key=KEY) as box:
        assert box.ask(sdk)
        sent = str(box.server.requests[0].headers).lower()
        assert KEY not in sent
        box.server.behave()
        with clients(box.broker.url, key="sk-wrong") as wrong:
            other = Box(box.broker, box.server, wrong)
            error = refused(lambda: other.ask(sdk))
        check(error, sdk, "AuthenticationError", 401, "unauthorized")
        assert box.runs == 0


@pytest.mark.parametrize("sdk", SDKS)
def test_what_is_too_large_is_refused(sdk: str) -> None:
    with boxed(max_body_mib=1) as box:
        error = refused(lambda: box.ask(sdk, text="x" * 1_200_000))
        name = {"openai": "APIStatusError"}.get(sdk, "ContentTooLargeError")
        check(error, sdk, name, 413, "payload_too_large")
        assert box.runs == 0


@pytest.mark.parametrize("sdk", SDKS)
def test_the_consumers_own_refusal_is_told_in_its_own_words(sdk: str) -> None:
    with boxed() as box:
        box.server.behave(Misbehaviour(says=failed(400, "the context is too long")))
        error = refused(lambda: box.ask(sdk))
        assert error.status_code == 400
        assert "the context is too long" in str(error)


# -- retried, for the job has not run ------------------------------------------------------------


@pytest.mark.parametrize("sdk", RETRYING)
def test_a_full_queue_is_tried_again_when_the_broker_says(sdk: str, slept: SimpleNamespace) -> None:
    """One runs, one waits, no place for a third; while its SDK waits as long as Retry-After said,
    the first one ends."""
    with boxed(max_retries=1, scheduler={"max_queue": 1}) as box:
        held = Misbehaviour(held=True)
        box.server.behave(held)
        busy = [Outcome(lambda: box.ask(sdk))]
        box.broker.await_line(1)
        busy.append(Outcome(lambda: box.ask(sdk)))
        box.broker.await_waiting(1)

        def end_them() -> None:
            held.release.set()
            box.broker.await_idle()

        slept.then = end_them
        assert box.ask(sdk)
        (seconds,) = slept.seconds
        assert seconds >= 1
        assert float(seconds).is_integer()  # the header's, not a guess of the SDK's
        assert [each.result() for each in busy]
        assert box.runs == 3


@pytest.mark.parametrize("sdk", SDKS)
def test_a_full_queue_that_stays_full_is_told(sdk: str, slept: SimpleNamespace) -> None:
    with boxed(max_retries=2, scheduler={"max_queue": 1}) as box:
        box.server.behave(Misbehaviour(held=True))
        busy = [Outcome(lambda: box.ask(sdk))]
        box.broker.await_line(1)
        busy.append(Outcome(lambda: box.ask(sdk)))
        box.broker.await_waiting(1)
        error = refused(lambda: box.ask(sdk))
        name = {"anthropic": "ServiceUnavailableError"}.get(sdk, "InternalServerError")
        check(error, sdk, name, 503, "queue_full")
        assert len(slept.seconds) == (2 if sdk in RETRYING else 0)
        box.server.misbehaves.release.set()
        assert [each.result() for each in busy]
        assert box.runs == 2


@pytest.mark.parametrize("sdk", SDKS)
def test_what_does_not_fit_is_told(sdk: str, slept: SimpleNamespace) -> None:
    """The pinned one says itself that it holds 4959 MiB."""
    with (
        ProtocolServer(protocol_answers.ollama) as pinned,
        boxed(
            max_retries=1,
            gpu={"total_mib": 5500, "reserved_mib": 0},
            consumer={
                "vram_resident_mib": 600,
                "probe": {"path": "/api/ps", "loaded": "models == `[]`"},  # it is not
            },
            consumers={"first": {"preset": "ollama", "url": pinned.url, "pinned": True}},
        ) as box,
    ):
        eventually(lambda: all(each["probed"] for each in box.consumers))
        error = refused(lambda: box.ask(sdk))
        name = {"anthropic": "ServiceUnavailableError"}.get(sdk, "InternalServerError")
        check(error, sdk, name, 503, "insufficient_vram")
        assert "first" in str(error)
        assert len(slept.seconds) == (1 if sdk in RETRYING else 0)
        assert box.runs == 0


# -- never run twice -----------------------------------------------------------------------------


@pytest.mark.parametrize("sdk", SDKS)
def test_a_job_whose_consumer_broke_is_not_run_again(sdk: str, slept: SimpleNamespace) -> None:
    with boxed(max_retries=2) as box:
        box.server.behave(Misbehaviour(drop=True))
        error = refused(lambda: box.ask(sdk))
        check(error, sdk, "InternalServerError", 502, "consumer_unreachable")
        assert (box.runs, slept.seconds) == (1, [])


@pytest.mark.parametrize("sdk", SDKS)
def test_a_job_that_took_too_long_is_not_run_again(sdk: str, slept: SimpleNamespace) -> None:
    timeouts = {"connect": 2, "first_byte": 0.3, "idle": 5, "total": 20}
    with boxed(max_retries=2, consumer={"timeouts": timeouts}) as box:
        box.server.behave(Misbehaviour(held=True))
        error = refused(lambda: box.ask(sdk))
        name = {"anthropic": "GatewayTimeoutError"}.get(sdk, "InternalServerError")
        check(error, sdk, name, 504, "consumer_timeout")
        assert (box.runs, slept.seconds) == (1, [])


@pytest.mark.parametrize("sdk", SDKS)
def test_a_stream_that_breaks_off_is_an_error_and_not_run_again(
    sdk: str, slept: SimpleNamespace
) -> None:
    call = CALLS[f"{sdk} {'messages' if sdk == 'anthropic' else 'chat'}, streamed"]
    with boxed(max_retries=2) as box:
        box.server.behave(Misbehaviour(break_off=True))
        with pytest.raises(Exception, match=r"(?i)incomplete|closed|peer|connection|protocol"):
            call(box.sdk)
        assert (box.runs, slept.seconds) == (1, [])
