"""Jobs that nobody waits for any more: the GPU goes on only when it is settled what becomes of
them, however the request ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gpumanager.keys import ApiKey
from tests.support import faults
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually

HEAD = faults.HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
TOLD = {"on_disconnect": {"path": "/interrupt"}}
ASKED = {"on_disconnect": "none", "probe": {"path": "/state", "busy": "busy", "loaded": "busy"}}
WAYS: list[Any] = [
    pytest.param({}, id="native"),
    pytest.param({"on_disconnect": "none"}, id="none"),
    pytest.param(ASKED, id="asked"),
    pytest.param(TOLD, id="told"),
]


class Studio:
    """A consumer whose LLM job begins to answer at `begin`, and works until `finish`; or, if it is
    of that kind, until its client goes. It takes other jobs at once. `happened` is what it saw,
    in order."""

    def __init__(self, *, aborts: bool) -> None:
        self.begin, self.finish = threading.Event(), threading.Event()
        self.happened: list[str] = []
        self.aborts = aborts
        self._busy = False

    def __call__(self, peer: Connection, request: Received) -> None:
        what = request.line.split()[1].decode().rpartition("/")[2]
        if what == "state":
            peer.send(answer(b'{"busy": true}' if self._busy else b'{"busy": false}'))
            return
        self.happened.append(what)
        if what == "llm":
            self._work(peer)
        else:
            peer.send(answer())

    def _work(self, peer: Connection) -> None:
        self._busy = True
        try:
            if self.begin.wait(PATIENCE_S):
                peer.send(HEAD)
            if self.aborts:
                peer.wait_closed()
            else:
                self.finish.wait(PATIENCE_S)
        finally:
            # Before its last byte, with which the next job may come.
            self.happened.append("over")
            self._busy = False
        peer.send(b"0\r\n\r\n")


class Setting:
    """A broker, and that consumer with one of the ways of `on_disconnect`."""

    def __init__(self, studio: Studio, broker: LiveBroker, *, is_told: bool) -> None:
        self.studio, self.broker = studio, broker
        self.is_told = is_told

    def next_job(self) -> Outcome[Any]:
        """One more, which waits."""
        job = Outcome(lambda: self.broker.post("/v1/tts", data=b"{}"))
        self.broker.await_waiting(1)
        return job

    def see_it_out(self, next_one: Outcome[Any]) -> None:
        """The next job begins when the first is over, and not before; who has to be told was."""
        studio = self.studio
        if not studio.aborts:
            assert not studio.finish.wait(0.3)
            assert studio.happened == (["llm", "interrupt"] if self.is_told else ["llm"])
            studio.finish.set()
        assert next_one.result().status_code == 200
        if studio.aborts:  # it sees its client go when it sees it
            eventually(lambda: "over" in studio.happened)
            studio.happened.remove("over")
            studio.happened.insert(1, "over")
        told = ["interrupt"] if self.is_told else []
        assert studio.happened == ["llm", *told, "over", "tts"]
        self.broker.await_idle()


def setting(consumer_config: dict[str, Any], **timeouts: float) -> Iterator[Setting]:
    studio = Studio(aborts="on_disconnect" not in consumer_config)
    limits = {"connect": 2, "first_byte": 5, "idle": 5, "total": 20, **timeouts}
    with ScriptedConsumer(studio) as consumer:
        settings = {**consumer_config, "timeouts": limits}
        with live_broker(config_for(consumer.url, consumer=settings, health_interval=60)) as broker:
            try:
                yield Setting(studio, broker, is_told=consumer_config is TOLD)
            finally:
                studio.begin.set()
                studio.finish.set()


@pytest.fixture
def patient(request: pytest.FixtureRequest) -> Iterator[Setting]:
    yield from setting(request.param)


@pytest.fixture
def hasty(request: pytest.FixtureRequest) -> Iterator[Setting]:
    yield from setting(request.param, first_byte=0.3, idle=0.3)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The broker's own; waitress tells of each answer that is cut short, which no user sees."""
    found = (r for r in caplog.records if r.name.startswith("gpumanager"))
    return [record.message for record in found if record.levelname == "ERROR"]


def logged(caplog: pytest.LogCaptureFixture, path: str) -> dict[str, Any]:
    """The one line of the access log for a path, which its thread writes when all else is done."""

    def lines() -> list[dict[str, Any]]:
        access = (r for r in list(caplog.records) if r.name == "gpumanager.access")
        return [each for each in map(vars, access) if each["path"] == path]

    eventually(lambda: bool(lines()))
    (line,) = lines()
    return line


@pytest.mark.parametrize("patient", WAYS, indirect=True)
def test_a_client_that_leaves_before_the_head_of_a_streamed_answer(
    patient: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gpumanager.access")
    broker, studio = patient.broker, patient.studio
    with broker.raw() as client:
        client.request("POST", "/v1/llm", b"{}")
        eventually(lambda: studio.happened)
        next_one = patient.next_job()
        connection = broker.connection_of(client)
    eventually(lambda: not connection.connected)
    studio.begin.set()
    patient.see_it_out(next_one)
    assert errors(caplog) == []
    line = logged(caplog, "/v1/llm")
    assert (line["status"], line["failure"]) == (499, "client_gone")
    events = broker.get("/v1/events").json()["events"]
    (event,) = [each for each in events if each["event"] == "job" and each["kind"] == "llm"]
    assert event["failure"] == "client_gone"


@pytest.mark.parametrize("patient", WAYS, indirect=True)
def test_a_client_that_leaves_in_mid_answer(
    patient: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gpumanager.access")
    patient.studio.begin.set()
    with patient.broker.raw() as client:
        client.request("POST", "/v1/llm", b"{}").until(b"\r\n\r\n")
        next_one = patient.next_job()
    patient.see_it_out(next_one)
    assert errors(caplog) == []
    line = logged(caplog, "/v1/llm")
    assert line["status"] == 200


@pytest.mark.parametrize("hasty", WAYS, indirect=True)
@pytest.mark.parametrize("answers", [False, True], ids=["no first byte", "nothing more"])
def test_after_a_time_out_the_gpu_is_held_until_the_consumer_is_at_rest(
    hasty: Setting, answers: bool
) -> None:
    if answers:
        hasty.studio.begin.set()
    with hasty.broker.raw() as client:
        client.request("POST", "/v1/llm", b"{}")
        eventually(lambda: hasty.studio.happened)
        next_one = hasty.next_job()
        got = client.answer()  # at once, whatever becomes of the job
    assert (got.status, got.complete) == ((200, False) if answers else (504, True))
    hasty.studio.begin.set()
    hasty.see_it_out(next_one)


ASYNCHRONOUS = {
    "done": {
        "match": {"path": "/api/image"},
        "id": "id",
        "poll": {"path": "/jobs/{id}", "every": 0.02},
        "until": "over",
    }
}


def asynchronous(over: threading.Event) -> ScriptedConsumer:
    """Takes jobs, and works on them until `over`."""

    def script(peer: Connection, request: Received) -> None:
        if request.line.startswith(b"GET /jobs/"):
            peer.send(answer(b'{"over": true}' if over.is_set() else b'{"over": false}'))
        else:
            peer.send(answer(b'{"id": "j1"}'))

    return ScriptedConsumer(script)


def test_a_job_whose_follower_cannot_start_is_followed_by_the_requests_own_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()
    start = threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if thread.name.startswith("done-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    with (
        asynchronous(over) as consumer,
        live_broker(config_for(consumer.url, consumer=ASYNCHRONOUS)) as broker,
    ):
        got = broker.post("/v1/image", data=b"{}")  # has its answer, whatever becomes of the job
        assert (got.json(), got.headers["Connection"]) == ({"id": "j1"}, "close")
        assert broker.stats.in_flight == 1
        next_one = Outcome(lambda: broker.post("/v1/tts", data=b"{}"))
        broker.await_waiting(1)
        over.set()
        assert next_one.result().status_code == 200
        broker.await_idle()
    assert "no thread" in caplog.text


ALICE = "alice-has-a-long-key"


def test_a_keys_limit_counts_jobs_that_are_followed_and_operators_calls() -> None:
    over = threading.Event()
    consumer_config = {**ASYNCHRONOUS, "load": "/load", "unload": "/unload"}
    with asynchronous(over) as consumer:
        config = config_for(consumer.url, consumer=consumer_config)
        keys = [ApiKey("alice", ALICE, max_queued=2)]
        with live_broker(config, keys=keys) as broker:
            shown = {"X-Api-Key": ALICE}

            def post(path: str) -> Any:
                return broker.post(path, data=b"{}", headers=shown)

            assert post("/v1/image").status_code == 200
            broker.await_line(1)  # its answer is there, its place is still taken
            unload = Outcome(lambda: post("/v1/consumers/mvoice/unload"))
            broker.await_waiting(1)
            for path in ("/v1/tts", "/v1/consumers/mvoice/load", "/v1/consumers/mvoice/unload"):
                refused = post(path)
                assert (refused.status_code, refused.json()["error"]) == (503, "queue_full")
                assert "key 'alice'" in refused.json()["message"]
            over.set()
            assert unload.result().status_code == 200
            broker.await_idle()
            assert post("/v1/tts").status_code == 200
