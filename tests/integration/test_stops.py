"""A key of the role client stops its own jobs at ComfyUI, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from gpumanager.keys import ApiKey
from tests.support.scene import Scene, scene
from tests.support.threads import PATIENCE_S, eventually

KEYS = (
    ApiKey("alice", "alice-key", role="client"),
    ApiKey("bob", "bob-key", role="client"),
    ApiKey("boss", "boss-key", role="admin"),
)
MOUNT = "/consumers/comfyui"


@pytest.fixture
def it() -> Iterator[Scene]:
    with scene(keys=KEYS) as made:
        yield made


def call(it: Scene, who: str, path: str, body: Any = None, data: bytes | None = None) -> Any:
    """POST; the path is sent to the letter."""
    request = requests.Request(
        "POST", it.broker.url, json=body, data=data, headers={"X-Api-Key": f"{who}-key"}
    ).prepare()
    request.url = f"{it.broker.url}{MOUNT}{path}"  # or `requests` would mend what is odd in it
    with requests.Session() as session:
        session.trust_env = False
        return session.send(request, timeout=PATIENCE_S)


def render(it: Scene, who: str) -> str:
    """Have a prompt of somebody's run for long; returns its id."""
    prompt = {"1": {"class_type": "KSampler", "seconds": 30}}
    answer = call(it, who, "/api/prompt", {"prompt": prompt})
    assert answer.status_code == 200
    job = str(answer.json()["prompt_id"])
    eventually(lambda: [each[1] for each in queue(it)] == [job])
    return job


def queue(it: Scene) -> list[Any]:
    """What ComfyUI works on."""
    running: list[Any] = it.fakes["comfyui"].ask("GET", "/queue")["queue_running"]
    return running


def statuses(it: Scene, who: str, job: str) -> dict[str, int]:
    """What is answered to all that stops a job, or might."""
    calls: dict[str, tuple[str, Any]] = {
        "interrupt it": ("/interrupt", {"prompt_id": job}),
        "interrupt whatever runs": ("/api/interrupt", {}),
        "interrupt it, written otherwise": ("/%69nterrupt", {"prompt_id": job}),
        "delete it": ("/api/queue", {"delete": [job]}),
        "delete it and another": ("/queue", {"delete": [job, "another"]}),
        "clear": ("/queue", {"clear": True}),
        "clear, and name one": ("/queue", {"clear": True, "delete": [job]}),
        "delete what is no id": ("/queue", {"delete": [job, 7]}),
    }
    return {name: call(it, who, path, body).status_code for name, (path, body) in calls.items()}


def test_what_would_stop_anothers_job_is_refused(it: Scene) -> None:
    job = render(it, "alice")
    assert set(statuses(it, "bob", job).values()) == {403}
    assert call(it, "bob", "/interrupt", data=b"no json").status_code == 403
    assert call(it, "bob", "/interrupt").status_code == 403
    told = call(it, "bob", "/interrupt", {"prompt_id": job}).json()
    assert told["error"] == "forbidden"
    assert told["message"].startswith(f"job {job} is not a job of key 'bob'")
    assert [each[1] for each in queue(it)] == [job]
    assert call(it, "boss", "/interrupt", {"prompt_id": job}).status_code == 200
    it.broker.await_idle()


def test_its_own_job_a_client_may_stop(it: Scene) -> None:
    job = render(it, "alice")
    assert call(it, "alice", "/queue", {"delete": ["another"]}).status_code == 403
    assert call(it, "alice", "/queue", {"delete": [job]}).status_code == 200
    assert call(it, "alice", "/api/interrupt", {}).status_code == 200
    it.broker.await_idle()
    eventually(lambda: not queue(it))
    # It is over: there is nothing of hers any more.
    assert call(it, "alice", "/interrupt", {"prompt_id": job}).status_code == 403
    told = call(it, "alice", "/interrupt", {}).json()
    assert told["message"] == "comfyui works on no job of key 'alice'"


def test_a_body_too_large_to_look_into_is_refused(it: Scene) -> None:
    many = {"delete": ["x" * 36] * 10_000}
    assert call(it, "alice", "/queue", many).status_code == 413
    assert call(it, "boss", "/queue", many).status_code == 200


def test_without_keys_everybody_stops_everything() -> None:
    with scene() as it:
        job = render(it, "nobody")
        assert set(statuses(it, "nobody", job).values()) == {200}
        it.broker.await_idle()


def test_a_prompt_whose_path_is_written_otherwise_is_followed_all_the_same(it: Scene) -> None:
    """Else the GPU would be given back while it renders."""
    body = {"prompt": {"1": {"class_type": "KSampler", "seconds": 30}}}
    job = call(it, "alice", "/%70rompt", body).json()["prompt_id"]
    eventually(lambda: [each[1] for each in queue(it)] == [job])
    assert it.broker.stats.in_flight == 1
    assert call(it, "alice", "/interrupt", {"prompt_id": job}).status_code == 200
    it.broker.await_idle()
