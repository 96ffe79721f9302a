"""`kill -9` at each point where an asynchronous job is kept: none is lost unsaid, and none runs
twice, unless the config says that it may. The consumer counts the runs."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from gpumanager.asyncjobs.model import SMALL_BYTES
from tests.support.broker import config_for, live_broker
from tests.support.ports import free_port
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

ROOT = Path(__file__).parent.parent.parent
LATER = {"Prefer": "respond-async", "Idempotency-Key": "it"}

POINTS = {
    # where it dies: (had the client its 202, runs before that, the state that it comes to)
    ("Draft.finish", "after"): (False, 0, "done"),
    ("Store.submit", "before"): (False, 0, "done"),
    ("Store.submit", "after"): (False, 0, "done"),
    ("Store.sending", "before"): (True, 0, "done"),
    ("Store.sending", "after"): (True, 0, "lost"),
    ("Store.ended", "before"): (True, 1, "lost"),
    ("Store.ended", "after"): (True, 1, "done"),
}

pytestmark = pytest.mark.timeout(90)


class Counting:
    """A consumer that counts its runs, and answers with more than fits into a row."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, connection: Connection, _: Received) -> None:
        self.runs += 1
        connection.send(answer(bytes(SMALL_BYTES + 1)))


def submitted(url: str) -> str | None:
    """Submit the job; its id, None if the broker died before it answered."""
    body = bytes(SMALL_BYTES + 1)
    with suppress(requests.ConnectionError):
        said = requests.post(f"{url}/v1/tts", body, headers=LATER, timeout=PATIENCE_S)
        assert said.status_code == 202, said.text
        return str(said.json()["id"])
    return None


def is_up(url: str, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None
    with suppress(requests.ConnectionError):
        return requests.get(f"{url}/healthz", timeout=PATIENCE_S).ok
    return False


CASES = [
    (*point, idempotent)
    for point, (*_, state) in POINTS.items()
    for idempotent in ([False, True] if state == "lost" else [False])
]


@pytest.mark.parametrize(("point", "when", "idempotent"), CASES)
def test_a_broker_that_is_killed(tmp_path: Path, point: str, when: str, idempotent: bool) -> None:
    answered, ran, state = POINTS[point, when]
    counting, port = Counting(), free_port()
    url = f"http://127.0.0.1:{port}"
    with ScriptedConsumer(counting) as consumer:
        config = config_for(
            consumer.url,
            listen=f"127.0.0.1:{port}",
            state_file=str(tmp_path / "state.json"),
            jobs={"dir": str(tmp_path / "jobs")},
            consumer={"idempotent": idempotent},
        )
        file = tmp_path / "broker.yaml"
        file.write_text(config)
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.dying_broker", str(file), point, when],
                cwd=ROOT,
                env={**os.environ, "NO_PROXY": "127.0.0.1"},
                stdout=log,
                stderr=log,
            )
        try:
            eventually(lambda: is_up(url, process))
            job = submitted(url)
            assert process.wait(PATIENCE_S) == -9
        finally:
            process.kill()
            process.wait(PATIENCE_S)
        assert (job is not None, counting.runs) == (answered, ran)
        with live_broker(config) as broker:
            again = submitted(broker.url)
            assert again is not None
            assert job in (None, again)
            over = broker.get(f"/v1/jobs/{again}?wait=20").json()
            assert over["state"] == ("done" if idempotent else state)
            fetched = broker.get(f"/v1/jobs/{again}/result")
            if over["state"] == "done":
                assert fetched.content == bytes(SMALL_BYTES + 1)
            else:
                assert (fetched.status_code, fetched.json()["error"]) == (502, "job_lost")
            runs = ran + 1 if idempotent else max(ran, state == "done")
            assert counting.runs == runs
            assert len(broker.get("/v1/jobs").json()["jobs"]) == 1
            broker.await_idle()
        kept = [each.name for each in (tmp_path / "jobs" / "files").iterdir()]
        assert kept == ([f"{again}.result"] if over["state"] == "done" else [])
