"""Callbacks of asynchronous jobs, through a whole broker."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpumanager.asyncjobs.model import Submission
from gpumanager.asyncjobs.store import Store
from gpumanager.keys import ApiKey
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

SECRET = b"0123456789abcdef0123456789abcdef"


def works(connection: Connection, received: Received) -> None:
    connection.send(
        answer(status="500 Internal Server Error" if received.body == b"bad" else "200 OK")
    )


class Receiver:
    """Takes what it is told; while `silent`, it does not answer."""

    def __init__(self) -> None:
        self.came: list[Received] = []
        self.told = threading.Event()
        self.silent = False

    def __call__(self, connection: Connection, received: Received) -> None:
        self.came.append(received)
        self.told.set()
        if self.silent:
            connection.wait_closed()
        else:
            connection.send(answer())


@contextmanager
def serving(tmp_path: Path, *hosts: str, keys: tuple[ApiKey, ...] = ()) -> Iterator[LiveBroker]:
    jobs = {"dir": str(tmp_path / "jobs"), "callbacks": list(hosts)}
    with (
        ScriptedConsumer(works) as consumer,
        live_broker(
            config_for(consumer.url, jobs=jobs), keys=keys, callback_secret=SECRET
        ) as broker,
    ):
        broker.consumer = consumer  # type: ignore[attr-defined]
        yield broker


def submit(
    broker: LiveBroker, url: str, body: bytes = b"it", headers: Mapping[str, str] | None = None
) -> Any:
    said = {"Prefer": "respond-async", "X-Callback-Url": url, **(headers or {})}
    return broker.post("/v1/tts", data=body, headers=said)


def delivered(broker: LiveBroker, job: Any, **headers: str) -> Any:
    def state() -> bool:
        shown = broker.get(f"/v1/jobs/{job['id']}", headers=headers).json()
        return bool(shown["callback"]["state"] == "delivered")

    eventually(state)
    return broker.get(f"/v1/jobs/{job['id']}", headers=headers).json()


@pytest.mark.parametrize(("body", "state"), [(b"it", "done"), (b"bad", "failed")])
def test_a_job_tells_that_it_is_over(tmp_path: Path, body: bytes, state: str) -> None:
    receiver = Receiver()
    with ScriptedConsumer(receiver) as server:
        url = f"{server.url}/hook?of=me"
        with serving(tmp_path, f"127.0.0.1:{server.port}") as broker:
            answered = submit(broker, url, body)
            assert answered.status_code == 202
            job = answered.json()
            assert job["callback"]["state"] == "pending"
            over = delivered(broker, job)
            assert over["callback"] == {
                "url": url, "state": "delivered", "attempts": 1, "next": None,
            }  # fmt: skip
            (came,) = receiver.came
            assert came.line == b"POST /hook?of=me HTTP/1.1"
            signed = b"msg_%s.%s.%s" % (
                job["id"].encode(),
                (came.header("webhook-timestamp") or "").encode(),
                came.body,
            )
            mac = base64.b64encode(hmac.new(SECRET, signed, hashlib.sha256).digest()).decode()
            assert came.header("webhook-signature") == f"v1,{mac}"
            said = json.loads(came.body)
            assert said["type"] == f"job.{state}"
            assert said["timestamp"] == over["ended"]
            assert said["data"] == {name: over[name] for name in over if name != "callback"}
            (sent,) = broker.consumer.requests  # type: ignore[attr-defined]
            assert sent.header("x-callback-url") is None
            metrics = broker.get("/metrics").text
            assert 'gpumanager_callbacks_total{outcome="delivered"} 1.0' in metrics
            events = broker.get("/v1/events?type=callback_sent").text
            assert "/hook" not in events


def test_one_that_is_cancelled_while_it_waits_tells_so(tmp_path: Path) -> None:
    receiver = Receiver()
    with (
        ScriptedConsumer(receiver) as server,
        serving(tmp_path, f"127.0.0.1:{server.port}") as broker,
    ):
        broker.consumer.script = lambda connection, _: connection.wait_closed()  # type: ignore[attr-defined]
        first = submit(broker, server.url).json()
        second = submit(broker, server.url).json()
        for job in (second, first):
            broker.delete(f"/v1/jobs/{job['id']}")
            delivered(broker, job)
        assert {json.loads(each.body)["type"] for each in receiver.came} == {"job.cancelled"}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.org/", "X-Callback-Url: its host example.org:80 is not listed"),
        ("http://169.254.169.254/", "is not listed"),
        ("http://localhost:8770/", "is not listed"),
        ("nonsense", "must be an http or https URL"),
    ],
)
def test_what_may_not_be_called_is_refused_at_once(tmp_path: Path, url: str, why: str) -> None:
    with serving(tmp_path, "hooks.example.org") as broker:
        answered = submit(broker, url)
        assert (answered.status_code, answered.json()["error"]) == (400, "bad_request")
        assert why in answered.json()["message"]
        assert broker.get("/v1/jobs").json()["jobs"] == []


def test_nobody_is_called_unless_the_config_says_so(tmp_path: Path) -> None:
    with serving(tmp_path) as broker:
        answered = submit(broker, "http://127.0.0.1:1/")
        assert answered.status_code == 400
        assert "jobs.callbacks is empty" in answered.json()["message"]
        assert broker.post("/v1/tts", data=b"x", headers={"X-Callback-Url": "any"}).ok


def test_another_callback_under_the_same_idempotency_key_is_another_request(
    tmp_path: Path,
) -> None:
    receiver = Receiver()
    with (
        ScriptedConsumer(receiver) as server,
        serving(tmp_path, f"127.0.0.1:{server.port}") as broker,
    ):
        key = {"Idempotency-Key": "one"}
        job = submit(broker, server.url, headers=key).json()
        assert submit(broker, server.url, headers=key).json()["id"] == job["id"]
        assert submit(broker, f"{server.url}/other", headers=key).status_code == 422
        delivered(broker, job)
        assert len(receiver.came) == 1


def test_whom_a_job_tells_is_shown_to_its_owner_alone(tmp_path: Path) -> None:
    keys = (
        ApiKey("alice", "a" * 16, role="client"),
        ApiKey("bob", "b" * 16, role="client"),
        ApiKey("root", "r" * 16, role="admin"),
    )
    with (
        ScriptedConsumer(Receiver()) as server,
        serving(tmp_path, f"127.0.0.1:{server.port}", keys=keys) as broker,
    ):
        hers = {"X-Api-Key": "a" * 16}
        job = submit(broker, server.url, headers=hers).json()
        assert delivered(broker, job, **hers)["callback"]["url"] == server.url
        others = broker.get(f"/v1/jobs/{job['id']}", headers={"X-Api-Key": "b" * 16})
        assert others.status_code == 404


def test_a_restart_tells_what_was_not_told(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.silent = True
    with ScriptedConsumer(receiver) as server:
        host = f"127.0.0.1:{server.port}"
        with serving(tmp_path, host) as broker:
            job = submit(broker, server.url).json()
            assert receiver.told.wait(PATIENCE_S)
            # A receiver that hangs delays no job.
            other = submit(broker, server.url).json()
            fetched = broker.get(f"/v1/jobs/{other['id']}/result?wait=20")
            assert fetched.status_code == 200
        receiver.silent = False
        with serving(tmp_path, host) as broker:
            delivered(broker, job)
            delivered(broker, other)
        ids = [each.header("webhook-id") or "" for each in receiver.came]
        assert sorted(ids) == sorted([f"msg_{job['id']}"] * 2 + [f"msg_{other['id']}"])


def test_one_that_was_lost_tells_so_after_the_restart(tmp_path: Path) -> None:
    receiver = Receiver()
    with ScriptedConsumer(receiver) as server:
        store = Store(tmp_path / "jobs", most_bytes=2**20, most_waiting=10)
        store.open()
        said = Submission(
            "tts", "mvoice", 5, "127.0.0.1", None, "admin", {}, callback=f"{server.url}/"
        )
        job, _ = store.submit(said, store.draft(), 1.0)
        assert store.sending(job, "mvoice", 2.0)
        store.close()  # as if it had been killed now
        with serving(tmp_path, f"127.0.0.1:{server.port}") as broker:
            assert delivered(broker, {"id": job.id})["state"] == "lost"
        (came,) = receiver.came
        assert json.loads(came.body)["type"] == "job.lost"
