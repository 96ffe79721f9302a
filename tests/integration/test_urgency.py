"""What a request says about its job: how urgent it is, whose, and of which conversation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import yaml

from gpumanager.keys import ApiKey
from gpumanager.model import Job
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually

KEYS = [
    ApiKey("alice", "alice-has-a-long-key", role="client"),
    ApiKey("nightly", "nightly-has-a-long-key", urgency=6, most_urgent=4),
    ApiKey("slow", "slow-also-has-a-long-key", most_urgent=5),
]
AS = {key.name: {"X-Api-Key": key.secret} for key in KEYS}

Jobs = Callable[..., tuple[Job, dict[str, Any]]]


@pytest.fixture
def jobs(held_consumer: ScriptedConsumer, release: threading.Event) -> Iterator[Callable[..., Any]]:
    """Runs one job at a time at a broker with these settings: gives it as the queue has it, and its
    entry in `/v1/queue`."""
    held = []

    def run(
        headers: Mapping[str, str],
        path: str = "/v1/tts",
        *,
        look_as: str | None = None,
        keys: list[ApiKey] | None = None,
        **settings: Any,
    ) -> tuple[Job, dict[str, Any]]:
        context = live_broker(config_for(held_consumer.url, **settings), keys=keys or [])
        broker = context.__enter__()
        held.append(context)
        outcome = Outcome(lambda: broker.post(path, headers=dict(headers)))
        broker.await_line(1)
        (entry,) = broker.broker.card.scheduler.queue()
        shown = broker.get("/v1/queue", headers=AS[look_as] if look_as else dict(headers)).json()
        release.set()
        assert outcome.result().status_code == 200
        return entry.job, shown["queue"][0]

    yield run
    release.set()
    for context in held:
        context.__exit__(None, None, None)


def test_a_job_of_which_nothing_says_another_has_urgency_3(jobs: Jobs) -> None:
    job, shown = jobs({})
    assert (job.urgency, job.requester, job.session) == (3, "127.0.0.1", None)
    assert (shown["urgency"], shown["requester"]) == (3, "127.0.0.1")
    assert "model" not in shown


@pytest.mark.parametrize(
    ("header", "urgency"), [("u=0", 0), ("i, u=7", 7), ("u=9", 3), ("u=1,", 3), ("", 3)]
)
def test_the_priority_header_says_it(jobs: Jobs, header: str, urgency: int) -> None:
    job, shown = jobs({"Priority": header})
    assert job.urgency == shown["urgency"] == urgency


def test_a_kind_and_a_consumer_have_defaults(jobs: Jobs) -> None:
    job, _ = jobs({}, scheduler={"urgency": {"tts": 2, "stt": 6}})
    assert job.urgency == 2


def test_a_consumers_default_goes_before_its_kinds(jobs: Jobs) -> None:
    job, _ = jobs({}, scheduler={"urgency": {"tts": 2}}, consumer={"urgency": 5})
    assert job.urgency == 5


def test_the_header_goes_before_all_defaults(jobs: Jobs) -> None:
    job, _ = jobs({"Priority": "u=0"}, scheduler={"urgency": {"tts": 2}}, consumer={"urgency": 5})
    assert job.urgency == 0


@pytest.mark.parametrize(
    ("name", "header", "urgency"),
    [
        ("nightly", None, 6),  # its own default
        ("nightly", "u=7", 7),
        ("nightly", "u=5", 5),
        ("nightly", "u=0", 4),  # no more than it may
        ("slow", None, 5),  # nor does a consumer's default lift it over that
        ("slow", "u=6", 6),
        ("alice", None, 1),
        ("alice", "u=0", 0),
    ],
)
def test_a_key_has_a_default_and_a_ceiling(
    jobs: Jobs, name: str, header: str | None, urgency: int
) -> None:
    said = {} if header is None else {"Priority": header}
    job, shown = jobs({**AS[name], **said}, keys=KEYS, consumer={"urgency": 1})
    assert (job.urgency, job.requester) == (urgency, name)
    assert (shown["urgency"], shown["requester"]) == (urgency, name)


def test_another_client_sees_how_urgent_a_job_is_but_not_whose(jobs: Jobs) -> None:
    _, shown = jobs({**AS["nightly"]}, keys=KEYS, look_as="alice")
    assert (shown["requester"], shown["client"], shown["urgency"]) == ("-", "-", 6)


@pytest.mark.parametrize(
    ("given", "session"),
    [
        ("a-conversation/7:b", "a-conversation/7:b"),
        ("x" * 128, "x" * 128),
        ("x" * 129, None),
        ("two words", None),
        ("gr\xfcn", None),
        ("", None),
    ],
)
def test_a_session_is_what_the_client_says_if_it_is_well_formed(
    jobs: Jobs, given: str, session: str | None
) -> None:
    job, _ = jobs({"X-Session-Id": given})
    assert job.session == session


@pytest.mark.parametrize(
    "path", ["/v1/tts", "/v1/audio/speech", "/consumers/mvoice/api/tts", "/consumers/mvoice/any"]
)
def test_every_way_in_says_it_and_passes_it_on(
    jobs: Jobs, held_consumer: ScriptedConsumer, path: str
) -> None:
    job, _ = jobs({"Priority": "u=1", "X-Session-Id": "s1"}, path)
    assert (job.urgency, job.requester, job.session) == (1, "127.0.0.1", "s1")
    (request,) = held_consumer.requests
    assert (request.header("priority"), request.header("x-session-id")) == ("u=1", "s1")


def test_a_call_that_no_kind_is_routed_to_has_a_default_of_its_own(jobs: Jobs) -> None:
    job, _ = jobs({}, "/consumers/mvoice/any", routing={}, scheduler={"urgency": {"mount": 6}})
    assert (job.kind, job.urgency) == ("mount", 6)


@pytest.mark.parametrize("move", ["load", "unload"])
def test_an_operators_calls_have_an_urgency_too(release: threading.Event, move: str) -> None:
    def script(connection: Connection, request: Received) -> None:
        release.wait(PATIENCE_S)
        connection.send(answer())

    settings = {"load": "/load", "unload": "/unload"}
    with (
        ScriptedConsumer(script) as consumer,
        live_broker(
            config_for(consumer.url, consumer=settings, scheduler={"urgency": {move: 2}})
        ) as broker,
    ):
        seen = []
        headers: list[dict[str, str]] = [{}, {"Priority": "u=0"}]
        for header in headers:
            held = Outcome(lambda: broker.post("/v1/tts"))
            broker.await_line(1)
            path = f"/v1/consumers/mvoice/{move}"
            moved = Outcome(partial(broker.post, path, headers=header))
            broker.await_line(2)
            (waiting,) = [
                each for each in broker.broker.card.scheduler.queue() if each.job.kind == move
            ]
            seen.append((waiting.job.urgency, waiting.job.requester))
            release.set()
            assert held.result().status_code == moved.result().status_code == 200
            release.clear()
    assert seen == [(2, "127.0.0.1"), (0, "127.0.0.1")]


def test_one_address_cannot_fill_the_queue(
    held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    """What is refused takes no place, and a job that has left gives its own back."""
    settings = config_for(held_consumer.url, scheduler={"max_queued": 2})
    with live_broker(settings) as broker:
        jobs = []
        for count in (1, 2):
            jobs.append(Outcome(lambda: broker.post("/v1/tts")))
            broker.await_line(count)
        for _ in range(2):
            refused = broker.post("/v1/tts")
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert refused.json() == {
                "error": "queue_full",
                "message": "2 jobs of the client at 127.0.0.1 are in the queue, and it may have "
                "no more",
                "retryable": True,
            }
        release.set()
        assert [job.result().status_code for job in jobs] == [200, 200]
        assert broker.post("/v1/tts").status_code == 200


def shares(broker: LiveBroker, name: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = broker.get("/v1/status", headers=AS[name]).json()["scheduler"][
        "shares"
    ]
    return told


def test_the_status_tells_who_had_how_much_of_the_gpu(
    held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    release.set()
    with live_broker(config_for(held_consumer.url), keys=KEYS) as broker:
        for name in ("alice", "nightly", "alice"):
            assert broker.post("/v1/tts", headers=AS[name]).status_code == 200
        eventually(lambda: sum(share["jobs"] for share in shares(broker, "nightly")) == 3)
        told = {name: shares(broker, name) for name in ("alice", "nightly")}
    assert {share["requester"]: share["jobs"] for share in told["nightly"]} == {
        "alice": 2,
        "nightly": 1,
    }
    assert {share["requester"]: share["jobs"] for share in told["alice"]} == {"alice": 2, "-": 1}
    assert all(share["gpu_ms"] >= 0 for share in told["alice"])


def test_the_status_tells_the_longest_overtake(release: threading.Event) -> None:
    """`b` and `a` do not fit together: the second job of `a` goes before the one of `b`."""

    def hold(connection: Connection, request: Received) -> None:
        if request.line.startswith(b"POST /job"):
            release.wait(PATIENCE_S)
        connection.send(answer())

    with ScriptedConsumer(hold) as consumer:
        one = {"url": consumer.url, "unload": "/unload", "vram_resident_mib": 600}
        config = {
            "gpu": {"total_mib": 1000, "reserved_mib": 0},
            "scheduler": {"policy": "affinity"},
            "routing": {"tts": "a", "stt": "b"},
            "consumers": {
                "a": {**one, "paths": {"tts": "/job"}},
                "b": {**one, "paths": {"stt": "/job"}},
            },
        }
        with live_broker(yaml.safe_dump(config)) as broker:
            jobs = []
            for count, kind in enumerate(("tts", "stt", "tts"), start=1):
                jobs.append(Outcome(partial(broker.post, f"/v1/{kind}")))
                broker.await_line(count)
            told = broker.get("/v1/status").json()["scheduler"]["longest_overtake"]
            assert told == {"jobs": 0, "ms": 0}
            release.set()
            assert [job.result().status_code for job in jobs] == [200] * 3
            told = broker.get("/v1/status").json()["scheduler"]["longest_overtake"]
            assert told == {"jobs": 1, "ms": 0}
            metrics = broker.get("/metrics").text.splitlines()
            assert "gpumanager_longest_overtake_jobs 1.0" in metrics
            assert "gpumanager_longest_overtake_seconds 0.0" in metrics
