"""A reload in the middle of a job, or of a probe: the job goes on by the settings of its admission,
the jobs after it by the new ones, and nothing is held afterwards."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from gpumanager.config import load_config
from tests.support.broker import LiveBroker, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import Outcome, eventually

KINDS = {"tts": "voice", "stt": "other"}
DONE = {
    "match": {"path": "/tts"},
    "id": "id",
    "poll": {"path": "/before/{id}", "every": 0.01},
    "until": "over",
}


class Scene:
    """Two consumers behind one server, and a broker that can be reloaded. A request for one of
    the paths in `stops` waits there until it may `go_on`."""

    def __init__(self, file: Path, says: dict[str, Any]) -> None:
        self.file = file
        self.server: ScriptedConsumer
        self.broker: LiveBroker
        self.stops: dict[str, threading.Event] = {}
        self.says = says

    def script(self, peer: Connection, request: Received) -> None:
        path = request.line.split()[1].decode()
        if path in self.stops:
            self.stops[path].wait(10)
        peer.send(answer(json.dumps(self.says.get(path, {"path": path})).encode()))

    def stop_at(self, path: str) -> threading.Event:
        """Have requests for it wait."""
        return self.stops.setdefault(path, threading.Event())

    def asked(self, path: str) -> int:
        """How often it was requested."""
        return sum(
            request.line.split()[1].decode() == path for request in list(self.server.requests)
        )

    def await_asked(self, path: str, times: int = 1) -> None:
        eventually(lambda: self.asked(path) >= times)

    def job(self, kind: str) -> Outcome[requests.Response]:
        return Outcome(lambda: self.broker.post(f"/v1/{kind}", data=b"{}"))

    def reload(self, **voice: Any) -> requests.Response:
        """With other settings of `voice`."""
        return self.change(lambda data: data["consumers"]["voice"].update(voice))

    def change(self, edit: Callable[[Any], object]) -> requests.Response:
        data = yaml.safe_load(self.file.read_text())
        edit(data)
        self.file.write_text(yaml.safe_dump(data))
        return self.broker.post("/v1/reload")

    def voice(self) -> Any:
        return {each["name"]: each for each in self.broker.get("/v1/status").json()["consumers"]}[
            "voice"
        ]

    def nothing_is_held(self) -> None:
        """Neither the GPU, nor a place in the queue, nor a consumer."""
        self.broker.await_idle()
        registry = self.broker.broker.registry
        assert {state.active for state in registry.now.states.values()} == {0}
        gone = self.change(lambda data: data.update(consumers={}, routing={}))
        assert (gone.status_code, sorted(gone.json()["removed"])) == (200, ["other", "voice"])


@contextmanager
def staged(tmp_path: Path, says: dict[str, Any] | None = None, **voice: Any) -> Iterator[Scene]:
    """The scene, with these settings of `voice`."""
    file = tmp_path / "broker.yaml"
    scene = Scene(file, {} if says is None else says)
    with ScriptedConsumer(scene.script) as server:
        scene.server = server
        consumers: dict[str, Any] = {
            name: {"url": server.url, "paths": {kind: f"/{kind}"}} for kind, name in KINDS.items()
        }
        consumers["voice"].update(voice)
        file.write_text(yaml.safe_dump({"consumers": consumers, "routing": KINDS}))
        with live_broker(file.read_text()) as broker:
            broker.broker.reloading.read = lambda: load_config(str(file))
            scene.broker = broker
            try:
                yield scene
            finally:
                for stop in scene.stops.values():
                    stop.set()


def test_a_job_that_waits_is_loaded_and_sent_by_the_settings_of_its_admission(
    tmp_path: Path,
) -> None:
    unloaded = {"/health": {"loaded": False}}
    with staged(
        tmp_path, unloaded, health="/health", load="/load/before", unload="/unload"
    ) as scene:
        eventually(lambda: not scene.voice()["loaded"])
        go_on = scene.stop_at("/stt")
        running = scene.job("stt")
        scene.await_asked("/stt")
        waiting = scene.job("tts")
        scene.broker.await_waiting(1)
        new = {"load": "/load/after", "paths": {"tts": "/tts/after"}}
        assert scene.reload(**new).json()["changed"] == ["voice"]
        go_on.set()
        assert running.result().status_code == 200
        assert waiting.result().json() == {"path": "/tts"}
        assert (scene.asked("/load/before"), scene.asked("/load/after")) == (1, 0)
        # The next one is by the new ones.
        scene.broker.post("/v1/consumers/voice/unload")
        assert scene.job("tts").result().json() == {"path": "/tts/after"}
        assert (scene.asked("/load/before"), scene.asked("/load/after")) == (1, 1)
        scene.nothing_is_held()


def test_a_job_that_loads_goes_on_with_the_load_of_its_admission(tmp_path: Path) -> None:
    """The reload comes while the consumer loads: what it loads with now is for the next job."""
    unloaded = {"/health": {"loaded": False}}
    with staged(
        tmp_path, unloaded, health="/health", load="/load/before", unload="/unload"
    ) as scene:
        eventually(lambda: not scene.voice()["loaded"])
        go_on = scene.stop_at("/load/before")
        job = scene.job("tts")
        scene.await_asked("/load/before")
        assert scene.reload(load="/load/after", paths={"tts": "/after"}).status_code == 200
        go_on.set()
        assert job.result().json() == {"path": "/tts"}
        assert scene.asked("/load/after") == 0
        scene.nothing_is_held()


def test_a_job_that_runs_is_stopped_as_was_configured_at_its_admission(tmp_path: Path) -> None:
    with staged(tmp_path, on_disconnect={"path": "/stop/before"}) as scene:
        go_on = scene.stop_at("/tts")
        with scene.broker.raw() as client:
            client.request("POST", "/v1/tts", b"{}")
            scene.await_asked("/tts")
            assert scene.reload(on_disconnect={"path": "/stop/after"}).status_code == 200
        scene.await_asked("/stop/before")
        go_on.set()
        assert scene.asked("/stop/after") == 0
        scene.nothing_is_held()


def test_a_job_that_is_followed_is_asked_after_as_was_configured_at_its_admission(
    tmp_path: Path,
) -> None:
    """With the model of then, too, which its calls name."""
    says = {"/tts": {"id": "7"}, "/before/7/old": {"over": False}}
    done = {**DONE, "poll": {"path": "/before/{id}/{model}", "every": 0.01}}
    with staged(tmp_path, says, done=done, model="old") as scene:
        assert scene.job("tts").result().json() == {"id": "7"}
        scene.await_asked("/before/7/old")
        new = {**DONE, "poll": {"path": "/after/{id}/{model}", "every": 0.01}}
        assert scene.reload(done=new, model="new").status_code == 200
        asked = scene.asked("/before/7/old")
        scene.await_asked("/before/7/old", asked + 2)
        assert scene.broker.stats.in_flight == 1
        says["/before/7/old"] = {"over": True}
        scene.broker.await_idle()
        paths = {request.line.split()[1].decode() for request in scene.server.requests}
        assert paths == {"/tts", "/before/7/old"}
        scene.nothing_is_held()


def test_what_a_probe_from_before_a_reload_hears_is_not_taken_for_the_new_ones(
    tmp_path: Path,
) -> None:
    """The consumer moves while the old one is being asked."""
    says = {"/health": {"loaded": True, "gpu_resident_mib": 9999}}
    with (
        ScriptedConsumer(
            lambda peer, _: peer.send(answer(b'{"loaded": false, "gpu_resident_mib": 7}'))
        ) as elsewhere,
        staged(tmp_path, says, health="/health") as scene,
    ):
        scene.await_asked("/health")
        eventually(lambda: scene.voice()["gpu_resident_mib"] == 9999)
        go_on = scene.stop_at("/health")
        asked = scene.asked("/health")
        scene.broker.broker.threads.wake_prober("voice")
        scene.await_asked("/health", asked + 1)
        moving = Outcome(lambda: scene.reload(url=elsewhere.url))
        go_on.set()
        assert moving.result().status_code == 200
        eventually(lambda: scene.voice()["gpu_resident_mib"] == 7)
        voice = scene.voice()
        assert (voice["loaded"], voice["url"]) == (False, elsewhere.url)
        scene.nothing_is_held()
