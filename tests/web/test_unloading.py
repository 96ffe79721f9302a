"""Which of Ollama's calls only unload."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import pytest

from gpumanager.upstream.proxy import Inbound
from gpumanager.web.unloading import only_unloads


def inbound(body: bytes | None) -> Inbound:
    stream = None if body is None else BytesIO(body)
    return Inbound("POST", "", [], stream, None if body is None else len(body), "1")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"model": "m", "keep_alive": 0}, True),
        ({"model": "m", "keep_alive": "0"}, True),
        ({"model": "m", "keep_alive": "0s", "messages": []}, True),
        ({"model": "m", "keep_alive": 0, "prompt": ""}, True),
        ({"model": "m", "keep_alive": 0, "prompt": "Hello."}, False),
        ({"model": "m", "keep_alive": 0, "messages": [{"role": "user"}]}, False),
        ({"model": "m", "keep_alive": False}, False),
        ({"model": "m", "keep_alive": [0]}, False),
        ({"model": "m", "keep_alive": -1}, False),
        ({"model": "m", "keep_alive": "5m"}, False),
        ({"model": "m"}, False),
        ({"model": "m" * 2000, "keep_alive": 0}, False),
        ([0], False),
    ],
)
def test_a_keep_alive_of_nothing_with_nothing_to_answer_does(said: Any, expected: bool) -> None:
    body = json.dumps(said).encode()
    request = inbound(body)
    for path in ("/api/generate", "/api/chat"):
        assert only_unloads(path, request) is expected
        assert request.body is not None
        assert request.body.read() == body
        request.body.seek(0)
    assert not only_unloads("/v1/chat/completions", request)


@pytest.mark.parametrize("body", [None, b"", b"{", b"[" * 1000])
def test_what_is_no_such_call_is_a_job_like_any_other(body: bytes | None) -> None:
    assert not only_unloads("/api/generate", inbound(body))
