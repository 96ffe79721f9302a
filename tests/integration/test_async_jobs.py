"""Asynchronous jobs, over HTTP: submitted, waited for, fetched, cancelled."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from gpumanager.asyncjobs.model import SMALL_BYTES
from gpumanager.keys import ApiKey
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

LATER = {"Prefer": "respond-async"}


class Server:
    """A consumer that counts its jobs by their body; one called `slow` waits for `release`."""

    def __init__(self) -> None:
        self.jobs: list[Received] = []
        self.release = threading.Event()
        self.says = answer(b'{"done": true}', headers=("Content-Type: application/json",))
        self.left = threading.Event()

    def __call__(self, connection: Connection, received: Received) -> None:
        self.jobs.append(received)
        if received.body == b"slow" and not self.release.is_set():
            while not self.release.wait(0.02):
                if connection.wait_closed(0.02):
                    self.left.set()
                    return
        connection.send(self.says)

    @property
    def bodies(self) -> list[bytes]:
        return [each.body for each in self.jobs]


@pytest.fixture
def server() -> Server:
    return Server()


@contextmanager
def serving(
    server: Server, tmp_path: Path, keys: tuple[ApiKey, ...] = (), **changes: Any
) -> Iterator[LiveBroker]:
    jobs = {"dir": str(tmp_path / "jobs"), **changes.pop("jobs", {})}
    with (
        ScriptedConsumer(server) as consumer,
        live_broker(config_for(consumer.url, jobs=jobs, **changes), keys=keys) as broker,
    ):
        try:
            yield broker
        finally:
            server.release.set()


@pytest.fixture
def broker(server: Server, tmp_path: Path) -> Iterator[LiveBroker]:
    with serving(server, tmp_path) as running:
        yield running


def submit(broker: LiveBroker, body: bytes = b"it", path: str = "/v1/tts", **headers: str) -> Any:
    answered = broker.post(path, data=body, headers=LATER | headers)
    assert answered.status_code == 202, answered.text
    assert answered.headers["Location"] == f"/v1/jobs/{answered.json()['id']}"
    assert answered.headers["Preference-Applied"] == "respond-async"
    return answered.json()


def show(broker: LiveBroker, job: Any, query: str = "", **headers: str) -> Any:
    return broker.get(f"/v1/jobs/{job['id']}{query}", headers=headers).json()


def result(broker: LiveBroker, job: Any, query: str = "?wait=20", **headers: str) -> Any:
    return broker.get(f"/v1/jobs/{job['id']}/result{query}", headers=headers)


def test_a_job_is_taken_at_once_and_its_result_is_the_answer(
    broker: LiveBroker, server: Server
) -> None:
    job = submit(broker, b"hello", "/v1/tts?voice=it", **{"X-Own": "mine"})
    assert (job["kind"], job["consumer"], job["urgency"]) == ("tts", "mvoice", 5)
    fetched = result(broker, job)
    assert (fetched.status_code, fetched.content) == (200, b'{"done": true}')
    assert fetched.headers["Content-Type"] == "application/json"
    over = show(broker, job)
    assert (over["state"], over["status"], over["position"]) == ("done", 200, None)
    assert over["created"] <= over["started"] <= over["ended"]
    (sent,) = server.jobs
    assert (sent.line, sent.body) == (b"POST /api/tts?voice=it HTTP/1.1", b"hello")
    assert sent.header("x-own") == "mine"
    assert sent.header("prefer") is None
    assert sent.header("x-request-id") == job["id"]


def test_other_preferences_go_on_to_the_consumer(broker: LiveBroker, server: Server) -> None:
    job = submit(broker, Prefer="wait=1, Respond-Async; x, handling=lenient")
    assert result(broker, job).status_code == 200
    assert server.jobs[0].header("prefer") == "handling=lenient"


def test_drop_in_routes_and_mounts_take_them_too(broker: LiveBroker, server: Server) -> None:
    for path in ("/v1/audio/speech", "/consumers/mvoice/api/tts", "/v1/chat/completions"):
        job = submit(broker, b"{}", path)
        assert result(broker, job).content == b'{"done": true}', path
    lines = [each.line.split()[1] for each in server.jobs]
    assert lines == [b"/v1/audio/speech", b"/api/tts", b"/v1/chat/completions"]


def test_what_is_no_gpu_work_is_answered_at_once(broker: LiveBroker) -> None:
    answered = broker.get("/consumers/mvoice/anything", headers=LATER)
    assert (answered.status_code, answered.json()) == (200, {"done": True})


def test_what_nobody_serves_is_refused_at_once(broker: LiveBroker) -> None:
    answered = broker.post("/v1/rerank", json={"model": "x"}, headers=LATER)
    assert (answered.status_code, answered.json()["error"]["code"]) == (501, "no_consumer")


def test_a_job_that_waits_runs_and_waits_again(broker: LiveBroker, server: Server) -> None:
    first = submit(broker, b"slow")
    eventually(lambda: show(broker, first)["state"] == "running")
    others = [submit(broker, b"%d" % number) for number in range(5)]
    eventually(lambda: broker.stats.queue_depth == 1)  # one more than runs, in order of arrival
    assert [show(broker, each)["position"] for each in others] == [1, 2, 3, 4, 5]
    assert {show(broker, each)["state"] for each in others} == {"waiting"}
    pending = result(broker, first, "")
    assert (pending.status_code, pending.json()["state"]) == (202, "running")
    assert int(pending.headers["Retry-After"]) >= 1
    assert show(broker, first, "?wait=1")["state"] == "running"
    server.release.set()
    for each in others:
        assert result(broker, each).status_code == 200
    assert server.bodies == [b"slow", b"0", b"1", b"2", b"3", b"4"]


def test_the_urgent_come_first_and_a_priority_is_kept(broker: LiveBroker, server: Server) -> None:
    first = submit(broker, b"slow")
    eventually(lambda: show(broker, first)["state"] == "running")
    submit(broker, b"taken")
    eventually(lambda: broker.stats.queue_depth == 1)
    late, soon = submit(broker, b"late"), submit(broker, b"soon", Priority="u=1")
    assert (late["urgency"], soon["urgency"]) == (5, 1)
    (waiting,) = [e for e in broker.get("/v1/queue").json()["queue"] if e["state"] == "waiting"]
    assert waiting["urgency"] == 5
    server.release.set()
    result(broker, late)
    assert server.bodies == [b"slow", b"taken", b"soon", b"late"]


def test_large_requests_and_results_and_ranges_of_them(broker: LiveBroker, server: Server) -> None:
    body = bytes(range(256)) * 1024
    server.says = answer(body, headers=("Content-Type: image/png", 'ETag: "it"'))
    job = submit(broker, body)
    whole = result(broker, job)
    assert whole.content == body
    assert server.bodies == [body]
    assert whole.headers["Content-Length"] == str(len(body))
    part = result(broker, job, Range=f"bytes={SMALL_BYTES}-{SMALL_BYTES + 9}")
    assert (part.status_code, part.content) == (206, body[SMALL_BYTES : SMALL_BYTES + 10])
    assert part.headers["Content-Range"] == f"bytes {SMALL_BYTES}-{SMALL_BYTES + 9}/{len(body)}"
    last = result(broker, job, Range="bytes=-10")
    assert (last.status_code, last.content) == (206, body[-10:])
    beyond = result(broker, job, Range=f"bytes={len(body)}-")
    assert (beyond.status_code, beyond.json()["error"]) == (416, "range_not_satisfiable")
    assert result(broker, job, **{"If-None-Match": '"it"'}).status_code == 304
    small = result(broker, submit(broker, b"x"), Range="bytes=3-4")
    assert small.content == body[3:5]


def test_a_range_of_a_small_result(broker: LiveBroker) -> None:
    part = result(broker, submit(broker), Range="bytes=2-5")
    assert (part.status_code, part.content) == (206, b"done")


def test_what_the_consumer_refuses_is_failed_and_the_result_its_answer(
    broker: LiveBroker, server: Server
) -> None:
    server.says = answer(b"no such voice", "422 Unprocessable Entity")
    job = submit(broker)
    fetched = result(broker, job)
    assert (fetched.status_code, fetched.reason) == (422, "Unprocessable Entity")
    assert fetched.content == b"no such voice"
    assert (show(broker, job)["state"], show(broker, job)["status"]) == ("failed", 422)


def test_an_answer_that_breaks_off_is_failed(broker: LiveBroker, server: Server) -> None:
    server.says = answer(b"half")[:-2]
    job = submit(broker)
    fetched = result(broker, job)
    assert (fetched.status_code, fetched.json()["error"]) == (502, "consumer_unreachable")
    assert show(broker, job)["failure"] == "consumer_unreachable"


def test_one_that_waits_is_cancelled_and_never_sent(broker: LiveBroker, server: Server) -> None:
    first = submit(broker, b"slow")
    eventually(lambda: show(broker, first)["state"] == "running")
    queued = submit(broker, b"queued")
    eventually(lambda: broker.stats.queue_depth == 1)
    on_disk = submit(broker, b"on disk")
    for job in (queued, on_disk):
        answered = broker.delete(f"/v1/jobs/{job['id']}")
        assert (answered.status_code, answered.json()["state"]) == (200, "cancelled")
    broker.await_waiting(0)
    gone = result(broker, queued)
    assert (gone.status_code, gone.json()["error"]) == (503, "cancelled")
    server.release.set()
    assert result(broker, submit(broker, b"last")).status_code == 200
    assert server.bodies == [b"slow", b"last"]
    assert broker.delete(f"/v1/jobs/{queued['id']}").json()["state"] == "cancelled"


def test_one_that_runs_is_cancelled_at_its_consumer(broker: LiveBroker, server: Server) -> None:
    job = submit(broker, b"slow")
    eventually(lambda: show(broker, job)["state"] == "running")
    broker.delete(f"/v1/jobs/{job['id']}")
    assert server.left.wait(PATIENCE_S)
    assert show(broker, job, "?wait=20")["state"] == "cancelled"
    broker.await_idle()


def test_the_same_key_and_body_is_the_same_job(broker: LiveBroker, server: Server) -> None:
    first = submit(broker, b"once", **{"Idempotency-Key": "k"})
    again = submit(broker, b"once", **{"Idempotency-Key": "k"})
    assert again["id"] == first["id"]
    assert result(broker, first).status_code == 200
    assert submit(broker, b"once", **{"Idempotency-Key": "k"})["state"] == "done"
    for path, body in (("/v1/tts", b"twice"), ("/v1/stt", b"once"), ("/v1/tts?x", b"once")):
        other = broker.post(path, data=body, headers=LATER | {"Idempotency-Key": "k"})
        assert (other.status_code, other.json()["error"]) == (422, "idempotency_mismatch")
    malformed = broker.post("/v1/tts", data=b"x", headers=LATER | {"Idempotency-Key": "k\x7f"})
    assert malformed.status_code == 400
    assert server.bodies == [b"once"]


def test_many_clients_with_one_key_make_one_job(broker: LiveBroker, server: Server) -> None:
    seen: list[str] = []

    def one() -> None:
        headers = LATER | {"Idempotency-Key": "k"}
        said = requests.post(f"{broker.url}/v1/tts", data=b"once", headers=headers, timeout=20)
        seen.append(said.json()["id"])

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(seen) == 8
    assert len(set(seen)) == 1
    eventually(lambda: server.bodies == [b"once"])


def test_the_list_has_pages_and_of_a_clients_key_its_own_only(
    server: Server, tmp_path: Path
) -> None:
    secrets = {name: name * 20 for name in ("ann", "bob", "root")}
    keys = tuple(
        ApiKey(name, secret, role="admin" if name == "root" else "client")
        for name, secret in secrets.items()
    )
    auth = {name: {"X-Api-Key": secret} for name, secret in secrets.items()}
    with serving(server, tmp_path, keys) as broker:
        mine = [submit(broker, b"%d" % n, **auth["ann"])["id"] for n in range(3)]
        theirs = submit(broker, b"bob", **auth["bob"])
        page = broker.get("/v1/jobs?limit=2", headers=auth["ann"]).json()
        assert [each["id"] for each in page["jobs"]] == [mine[2], mine[1]]
        rest = broker.get(f"/v1/jobs?limit=2&before={page['before']}", headers=auth["ann"]).json()
        assert [each["id"] for each in rest["jobs"]] == [mine[0]]
        assert "before" not in rest
        assert len(broker.get("/v1/jobs", headers=auth["root"]).json()["jobs"]) == 4
        for path in (f"/v1/jobs/{theirs['id']}", f"/v1/jobs/{theirs['id']}/result"):
            assert broker.get(path, headers=auth["ann"]).status_code == 404
        denied = broker.delete(f"/v1/jobs/{theirs['id']}", headers=auth["ann"])
        assert denied.status_code == 404
        assert broker.get(f"/v1/jobs/{theirs['id']}").status_code == 401
        assert result(broker, theirs, **auth["bob"]).status_code == 200
        assert all(each.header("x-api-key") is None for each in server.jobs)


def test_its_states_come_as_events_until_it_is_over(broker: LiveBroker, server: Server) -> None:
    job = submit(broker, b"slow")
    states = []
    with requests.get(
        f"{broker.url}/v1/jobs/{job['id']}",
        headers={"Accept": "text/event-stream"},
        stream=True,
        timeout=PATIENCE_S,
    ) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith(b"data: "):
                states.append(json.loads(line[6:])["state"])
                if states[-1] == "running":
                    server.release.set()
    assert states[-2:] == ["running", "done"]


def test_only_so_many_may_wait_for_jobs(broker: LiveBroker) -> None:
    job = submit(broker, b"slow")
    taken = 0
    while broker.broker.jobs.begin_waiting():
        taken += 1
    assert taken == 32
    assert show(broker, job, "?wait=60")["id"] == job["id"]  # at once
    stream = broker.get(f"/v1/jobs/{job['id']}", headers={"Accept": "text/event-stream"})
    assert (stream.status_code, stream.json()["error"]) == (503, "queue_full")
    for _ in range(taken):
        broker.broker.jobs.end_waiting()
    assert broker.get(f"/v1/jobs/{job['id']}?wait=61").status_code == 400


def test_too_many_that_wait_or_too_much_of_the_disk(server: Server, tmp_path: Path) -> None:
    limits = {"max_waiting": 3, "max_mib": 1}
    with serving(server, tmp_path, jobs=limits) as broker:
        large = broker.post("/v1/tts", data=bytes(2**20 + 1), headers=LATER)
        assert (large.status_code, large.json()["error"]) == (507, "jobs_full")
        first = submit(broker, b"slow")
        eventually(lambda: show(broker, first)["state"] == "running")
        jobs = [submit(broker, b"%d" % n) for n in range(3)]
        full = broker.post("/v1/tts", data=b"", headers=LATER)
        assert (full.status_code, full.json()["error"]) == (503, "queue_full")
        assert int(full.headers["Retry-After"]) >= 1
        server.release.set()
        for job in jobs:
            assert result(broker, job).status_code == 200


def test_a_job_for_a_consumer_that_is_down_waits_until_it_is_back(
    server: Server, tmp_path: Path
) -> None:
    config = {"health": {"path": "/health"}}
    with serving(server, tmp_path, consumer=config, health_interval=0.1) as broker:
        eventually(lambda: broker.get("/v1/status").json()["consumers"][0]["healthy"])
        up, server.says = server.says, answer(b"", "500 Down")
        eventually(lambda: not broker.get("/v1/status").json()["consumers"][0]["healthy"])
        job = submit(broker)
        eventually(lambda: any(e["event"] == "refused" for e in events(broker)))
        assert show(broker, job)["state"] == "waiting"
        server.says = up
        assert result(broker, job).json() == {"done": True}


def events(broker: LiveBroker) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = broker.get("/v1/events").json()["events"]
    return told


def test_one_that_goes_on_after_its_answer_is_done_when_its_consumer_says_so(
    tmp_path: Path,
) -> None:
    """As ComfyUI's: the GPU is held, and the job runs, until its `done` rule says that it is
    over."""
    over, stopped, failing = threading.Event(), threading.Event(), threading.Event()

    def script(peer: Connection, request: Received) -> None:
        if request.line.startswith(b"GET /jobs/"):
            ended = over.is_set() or stopped.is_set()
            said = {"over": ended, "error": "no such node" if failing.is_set() else None}
            peer.send(answer(json.dumps(said).encode()))
        elif request.line.startswith(b"POST /stop/"):
            stopped.set()
            peer.send(answer(b"{}"))
        else:
            peer.send(answer(b'{"id": "j1"}'))

    done = {
        "match": {"path": "/api/image"},
        "id": "id",
        "poll": {"path": "/jobs/{id}", "every": 0.02},
        "until": "over",
        "failure": "error",
        "cancel": [{"method": "POST", "path": "/stop/{id}"}],
    }
    jobs = {"dir": str(tmp_path / "jobs")}
    with (
        ScriptedConsumer(script) as consumer,
        live_broker(config_for(consumer.url, jobs=jobs, consumer={"done": done})) as broker,
    ):
        job = submit(broker, b"{}", "/v1/image")
        eventually(lambda: show(broker, job)["state"] == "running")
        assert result(broker, job, "?wait=1").status_code == 202
        assert broker.stats.in_flight == 1
        over.set()
        assert result(broker, job).json() == {"id": "j1"}
        failing.set()
        failed = show(broker, submit(broker, b"{}", "/v1/image"), "?wait=20")
        assert (failed["state"], failed["failure"]) == ("failed", "job_failed")
        over.clear()
        unwanted = submit(broker, b"{}", "/v1/image")
        eventually(lambda: show(broker, unwanted)["state"] == "running")
        broker.delete(f"/v1/jobs/{unwanted['id']}")
        assert stopped.wait(PATIENCE_S)
        assert show(broker, unwanted, "?wait=20")["state"] == "cancelled"
        broker.await_idle()


def test_what_was_kept_long_enough_is_swept_and_told(server: Server, tmp_path: Path) -> None:
    with serving(server, tmp_path, jobs={"keep": "300ms"}) as broker:
        server.says = answer(bytes(SMALL_BYTES + 1))
        job = submit(broker, bytes(SMALL_BYTES + 1))
        eventually(lambda: broker.get(f"/v1/jobs/{job['id']}").status_code == 404)
        assert list((tmp_path / "jobs" / "files").iterdir()) == []
        eventually(lambda: any(e["event"] == "async_jobs_swept" for e in events(broker)))


def test_a_drain_keeps_those_that_wait_for_the_next_broker(server: Server, tmp_path: Path) -> None:
    with serving(server, tmp_path) as broker:
        first = submit(broker, b"slow")
        eventually(lambda: show(broker, first)["state"] == "running")
        rest = [submit(broker, b"%d" % n) for n in range(4)]
        drained = threading.Thread(target=broker.broker.lifecycle.drain)
        drained.start()
        eventually(lambda: broker.get("/healthz").status_code == 503)
        refused = broker.post("/v1/tts", data=b"", headers=LATER)
        assert (refused.status_code, refused.json()["error"]) == (503, "shutting_down")
        server.release.set()
        drained.join(PATIENCE_S)
        eventually(lambda: show(broker, first)["state"] == "done")
        assert {show(broker, each)["state"] for each in rest} == {"waiting"}
    assert server.bodies == [b"slow"]
    with serving(server, tmp_path) as broker:
        for each in rest:
            assert result(broker, each).json() == {"done": True}
        assert result(broker, first).json() == {"done": True}
        (resumed,) = [e for e in events(broker) if e["event"] == "async_jobs_resumed"]
        assert resumed["jobs"] == 4
    assert server.bodies == [b"slow", b"0", b"1", b"2", b"3"]


def test_two_brokers_do_not_share_a_folder(broker: LiveBroker, tmp_path: Path) -> None:
    submit(broker)
    with serving(Server(), tmp_path) as other:
        answered = other.post("/v1/tts", data=b"", headers=LATER)
        assert (answered.status_code, answered.json()["error"]) == (507, "jobs_full")
        assert "another broker" in answered.json()["message"]


def test_without_a_folder_clients_wait_as_ever(server: Server) -> None:
    with ScriptedConsumer(server) as consumer, live_broker(config_for(consumer.url)) as broker:
        answered = broker.post("/v1/tts", data=b"", headers=LATER)
        assert (answered.status_code, answered.json()) == (200, {"done": True})
        assert broker.get("/v1/jobs").json() == {"jobs": []}
        assert broker.get("/v1/jobs/none").status_code == 404


def test_the_status_and_the_metrics_count_them(broker: LiveBroker, server: Server) -> None:
    states = ("waiting", "running", "done", "failed", "cancelled", "lost")
    assert broker.get("/v1/status").json()["jobs"] == dict.fromkeys(states, 0)
    assert result(broker, submit(broker)).status_code == 200
    first = submit(broker, b"slow")
    eventually(lambda: show(broker, first)["state"] == "running")
    for _ in range(3):
        submit(broker)
    told = broker.get("/v1/status").json()["jobs"]
    assert told == dict.fromkeys(states, 0) | {"waiting": 3, "running": 1, "done": 1}
    metrics = broker.get("/metrics").text
    assert 'gpumanager_async_jobs{state="waiting"} 3.0' in metrics
    assert 'gpumanager_async_jobs{state="lost"} 0.0' in metrics
    server.release.set()


def test_a_job_tells_whose_it_is_and_what_its_answer_is_like(
    broker: LiveBroker, server: Server
) -> None:
    server.says = answer(bytes(1234), headers=("Content-Type: audio/wav",))
    job = submit(broker)
    assert (job["requester"], job["content_type"], job["bytes"]) == ("127.0.0.1", None, None)
    over = show(broker, job, "?wait=20")
    assert (over["content_type"], over["bytes"]) == ("audio/wav", 1234)


def test_a_result_runs_nothing_in_a_browser(broker: LiveBroker, server: Server) -> None:
    own = "Content-Security-Policy: img-src *"
    for status in ("200 OK", "422 Unprocessable Entity"):
        server.says = answer(b"<script>", status, headers=("Content-Type: text/html", own))
        job = submit(broker, b"it")
        for fetched in (result(broker, job), result(broker, job, Range="bytes=1-3")):
            assert fetched.headers["Content-Type"] == "text/html"
            assert fetched.headers["X-Content-Type-Options"] == "nosniff"
            policies = fetched.headers["Content-Security-Policy"].split(", ")
            assert policies[0] == "img-src *"
            assert policies[1].startswith("sandbox; default-src 'none'")
