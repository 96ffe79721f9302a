"""Another config while jobs run and wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from gpumanager.config import Config, load_config
from gpumanager.config.live import LiveConfig, changes
from gpumanager.consumers.admission import Admission
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.snapshot import Snapshot
from tests.integration.test_serving import serving
from tests.support import faults
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.ports import free_port
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import Outcome, eventually

NOBODY: dict[str, Any] = {"consumers": {}, "routing": {}}


class Setting:
    """A live broker whose config lies in a file."""

    def __init__(
        self,
        file: Path,
        broker: LiveBroker,
        consumer: ScriptedConsumer,
        go_on: threading.Event,
    ) -> None:
        self.file = file
        self.broker = broker
        self.consumer = consumer
        self.go_on = go_on

    def change(self, edit: Any) -> requests.Response:
        data = yaml.safe_load(self.file.read_text())
        edit(data)
        self.file.write_text(yaml.safe_dump(data))
        return self.broker.post("/v1/reload")


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with set_up(tmp_path) as made:
        yield made


@contextmanager
def set_up(tmp_path: Path, **config: Any) -> Iterator[Setting]:
    """The consumer answers a job with its path, once it may go on."""
    go_on = threading.Event()

    def script(peer: Connection, request: Received) -> None:
        if request.line.startswith(b"POST"):
            go_on.wait(10)
        peer.send(answer(request.line.split()[1] + b"\n"))

    file = tmp_path / "broker.yaml"
    with ScriptedConsumer(script) as consumer:
        file.write_text(config_for(consumer.url, audio_proxy=None, **config))
        with live_broker(file.read_text()) as broker:
            broker.broker.reloading.read = lambda: load_config(str(file))
            try:
                yield Setting(file, broker, consumer, go_on)
            finally:
                go_on.set()


def test_the_line_stays_and_what_comes_after_sees_the_new_config(setting: Setting) -> None:
    broker = setting.broker
    before = [Outcome(lambda: broker.post("/v1/tts", data=b"{}")) for _ in range(3)]
    broker.await_waiting(2)

    def edit(data: Any) -> None:
        data["consumers"]["mvoice"]["paths"]["tts"] = "/new"
        data["consumers"]["mvoice"]["priority"] = 7

    told = setting.change(edit)
    assert told.status_code == 200
    assert told.json() == {"added": [], "removed": [], "changed": ["mvoice"], "keys": []}
    setting.go_on.set()
    assert [job.result().text for job in before] == ["/api/tts\n"] * 3
    assert broker.post("/v1/tts", data=b"{}").text == "/new\n"
    assert broker.get("/v1/status").json()["consumers"][0]["priority"] == 7
    events = [e["event"] for e in broker.get("/v1/events").json()["events"]]
    assert "config_reloaded" in events


def test_a_consumer_can_come_and_go(setting: Setting) -> None:
    setting.go_on.set()
    broker = setting.broker

    def come(data: Any) -> None:
        new = {**data["consumers"]["mvoice"], "paths": {"llm": "/chat"}, "health": "/health"}
        data["consumers"]["ollama"] = new
        data["routing"]["llm"] = "ollama"

    assert setting.change(come).json()["added"] == ["ollama"]
    assert broker.post("/v1/llm", data=b"{}").text == "/chat\n"
    # It is probed from now on.
    eventually(lambda: broker.get("/v1/status").json()["consumers"][1]["probed"])

    def go(data: Any) -> None:
        del data["consumers"]["ollama"]
        data["routing"]["llm"] = "mvoice"

    assert setting.change(go).json()["removed"] == ["ollama"]
    assert [c["name"] for c in broker.get("/v1/status").json()["consumers"]] == ["mvoice"]
    assert broker.post("/v1/llm", data=b"{}").text == "/api/llm\n"


def test_status_says_since_when_and_why_a_consumer_is_down_and_a_move_is_a_new_start(
    setting: Setting,
) -> None:
    setting.go_on.set()
    setting.consumer.script = faults.resets
    broker = setting.broker

    def seen() -> Any:
        return broker.get("/v1/status").json()["consumers"][0]

    for _ in range(3):
        assert broker.post("/v1/tts", data=b"{}").status_code == 502
    down = seen()
    assert down["breaker"] == "open"
    assert down["breaker_since"] <= broker.get("/v1/status").json()["time"]
    assert "mvoice" in down["last_error"]
    with ScriptedConsumer(lambda peer, _: peer.send(answer())) as another:
        moved = setting.change(lambda data: data["consumers"]["mvoice"].update(url=another.url))
        assert moved.status_code == 200
        assert (seen()["breaker"], seen().get("last_error")) == ("closed", None)
        assert broker.post("/v1/tts", data=b"{}").status_code == 200


def test_a_consumer_in_use_is_not_taken_away(setting: Setting) -> None:
    broker = setting.broker
    job = Outcome(lambda: broker.post("/v1/tts", data=b"{}"))
    broker.await_line(1)

    def edit(data: Any) -> None:
        data.update(consumers={}, routing={}, audio_proxy=None)

    def move(data: Any) -> None:
        data["consumers"]["mvoice"]["url"] = "http://127.0.0.1:1"

    text = setting.file.read_text()
    refused = setting.change(move)
    assert refused.status_code == 400
    assert "mvoice is in use" in refused.json()["message"]
    setting.file.write_text(text)
    setting.go_on.set()
    assert job.result().status_code == 200


def test_a_consumer_is_not_taken_away_between_a_jobs_route_and_its_place_in_the_queue(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.go_on.set()
    said: list[requests.Response] = []
    check = Admission.check

    def reload_meanwhile(admission: Admission, name: str) -> None:
        if not said:
            said.append(setting.change(lambda data: data.update(NOBODY)))
        check(admission, name)

    monkeypatch.setattr(Admission, "check", reload_meanwhile)
    assert setting.broker.post("/v1/tts", data=b"{}").status_code == 200
    assert said[0].status_code == 400
    assert "mvoice is in use" in said[0].json()["message"]
    assert setting.broker.post("/v1/reload").status_code == 200  # now it may go
    gone = setting.broker.post("/v1/tts", data=b"{}")
    assert (gone.status_code, gone.json()["error"]) == (501, "no_consumer")


def test_a_job_is_prepared_by_the_settings_of_its_admission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reload comes between its admission and its preparation."""
    said: list[requests.Response] = []
    check = Admission.check
    hasty = {"connect": 2, "first_byte": 0.05, "idle": 0.05, "total": 0.05}
    with set_up(tmp_path, scheduler={"kind": "passthrough"}) as made:

        def reload_meanwhile(admission: Admission, name: str) -> None:
            if not said:
                said.append(
                    made.change(lambda data: data["consumers"]["mvoice"].update(timeouts=hasty))
                )
            check(admission, name)

        monkeypatch.setattr(Admission, "check", reload_meanwhile)
        before = Outcome(lambda: made.broker.post("/v1/tts", data=b"{}"))
        made.broker.await_line(1)
        after = made.broker.post("/v1/stt", data=b"{}")
        assert after.json()["error"] == "consumer_timeout"
        made.go_on.set()  # so the one before has taken longer
        assert before.result().text == "/api/tts\n"
    assert said[0].status_code == 200


def test_a_job_goes_where_its_kind_is_routed_after_a_reload_that_came_in_between(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.go_on.set()
    enter = Registry.enter

    def rename(data: Any) -> None:
        consumers = data["consumers"]
        consumers["voice"] = {**consumers.pop("mvoice"), "paths": {"tts": "/renamed"}}
        data.update(routing={"tts": "voice"}, audio_proxy=None)

    def reload_meanwhile(registry: Registry, name: str) -> Snapshot:
        if name == "mvoice":
            assert setting.change(rename).status_code == 200
        return enter(registry, name)

    monkeypatch.setattr(Registry, "enter", reload_meanwhile)
    assert setting.broker.post("/v1/tts", data=b"{}").text == "/renamed\n"


def test_a_client_that_still_reads_its_answer_is_no_reason_to_keep_a_consumer(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gpumanager.access")
    size = 16 * 1024 * 1024
    setting.consumer.script = lambda peer, _: peer.send(answer(bytes(size)))
    with setting.broker.raw() as client:
        client.request("POST", "/v1/tts", b"{}")
        eventually(lambda: setting.broker.stats.total_jobs == 1)
        setting.broker.await_idle()
        assert setting.change(lambda data: data.update(NOBODY)).json()["removed"] == ["mvoice"]
        assert len(client.answer().body) == size
    eventually(lambda: any(r.name == "gpumanager.access" for r in caplog.records))
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == []


def test_a_probe_that_is_under_way_ends_before_its_consumer_is_removed(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    asked, say = threading.Event(), threading.Event()

    def script(peer: Connection, request: Received) -> None:
        if request.line.startswith(b"GET /health"):
            asked.set()
            say.wait(10)
        peer.send(answer())

    setting.consumer.script = script

    def come(data: Any) -> None:
        data["consumers"]["new"] = {**data["consumers"]["mvoice"], "health": "/health"}

    assert setting.change(come).status_code == 200
    assert asked.wait(10)
    going = Outcome(lambda: setting.change(lambda data: data["consumers"].pop("new")))
    say.set()
    assert going.result().json()["removed"] == ["new"]
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == []


def test_the_drain_takes_the_time_that_is_configured_when_it_begins(setting: Setting) -> None:
    broker = setting.broker
    job = Outcome(lambda: broker.post("/v1/tts", data=b"{}"))
    broker.await_line(1)
    told = setting.change(lambda data: data.update(drain_timeout=0.05))
    assert told.json()["keys"] == ["drain_timeout"]
    draining = Outcome(broker.broker.lifecycle.drain)
    assert draining.result() is False  # and not only after the 30 s from before
    assert job.result().json()["error"] == "shutting_down"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"listen": "127.0.0.1:1"}, "listen need a restart"),
        ({"scheduler": {"kind": "passthrough"}}, "scheduler need a restart"),
        ({"gpu": {"device": 1}}, "gpu.device need a restart"),
        ({"routing": {"tts": "nobody"}}, "unknown consumer 'nobody'"),
        ({"heath_interval": 5}, "heath_interval"),
    ],
)
def test_what_cannot_be_applied_is_refused_with_the_reason_and_changes_nothing(
    setting: Setting, change: dict[str, Any], said: str
) -> None:
    setting.go_on.set()
    before = setting.broker.broker.config
    refused = setting.change(lambda data: data.update(change))
    assert refused.status_code == 400
    assert said in refused.json()["message"]
    assert setting.broker.broker.config is before


def test_a_broker_without_a_file_says_so() -> None:
    with live_broker(config_for("http://127.0.0.1:1")) as broker:
        refused = broker.post("/v1/reload")
        assert broker.get("/v1/status").json()["config_file"] is None
    assert refused.status_code == 400
    assert "not started from a config file" in refused.json()["message"]
    assert "gpumanager serve --config" in refused.json()["message"]


def test_sighup_reloads(tmp_path: Path) -> None:
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b"{}"))) as consumer:
        port = free_port()
        text = config_for(consumer.url, listen=f"127.0.0.1:{port}")
        with serving(tmp_path, "gpumanager serve", text, port) as process:
            file = tmp_path / "broker.yaml"
            file.write_text(text + "eviction: cost\n")
            process.popen.send_signal(signal.SIGHUP)
            eventually(lambda: "config reloaded" in process.log.read_text())
            file.write_text(text + "evicton: cost\n")
            process.popen.send_signal(signal.SIGHUP)
            eventually(lambda: "config not reloaded" in process.log.read_text())
            assert process.get("/healthz").status_code == 200


def test_a_live_config_reads_like_the_one_it_holds() -> None:
    first, second = Config(listen="127.0.0.1:1"), Config(listen="127.0.0.1:2")
    current = first
    live = LiveConfig(lambda: current)
    assert live.seen.port == 1
    current = second
    assert (live.seen.listen, live.seen.port) == ("127.0.0.1:2", 2)
    with pytest.raises(AttributeError):
        live.seen.nothing  # type: ignore[attr-defined]  # noqa: B018
    assert changes(first, second).fixed == ("listen",)
