"""The model of an asynchronous job: as it was asked for, from its submission to its end."""

from __future__ import annotations

import pytest

from tests.support.scene import models
from tests.support.threads import eventually

pytestmark = pytest.mark.timeout(60)


def test_a_job_tells_its_model_where_that_is_known() -> None:
    with models({"titles:1b": 1000, "code:20b": 5000}) as it:
        it.used("titles:1b")
        it.pace(ollama=1)
        later = {"Prefer": "respond-async"}
        body = {"model": "code:20b", "messages": [{"role": "user", "content": "hello"}]}
        job = it.broker.post("/api/chat", json=body, headers=later).json()
        assert (job["consumer"], job["model"]) == ("ollama", "code:20b")
        address = f"/v1/jobs/{job['id']}"
        eventually(lambda: it.broker.get(address).json()["state"] == "running")
        assert it.broker.get(address).json()["model"] == "code:20b"
        over = it.broker.get(f"{address}?wait=8").json()
        assert (over["state"], over["model"]) == ("done", "code:20b")
        speech = it.broker.post("/v1/tts", json={"text": "hello"}, headers=later).json()
        assert speech["model"] is None
        assert it.broker.get(f"/v1/jobs/{speech['id']}?wait=8").json()["state"] == "done"
