"""What a client may send on the drop-in routes and gets a clear answer to, or nobody minds."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumanager.web.ways import DROP_IN
from tests.integration.test_serving import serving
from tests.support.broker import LiveBroker, live_broker
from tests.support.ports import free_port
from tests.support.sockets import ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S

KINDS = ("llm", "embed", "rerank", "tts", "stt", "image")
FORM = "multipart/form-data; boundary=line"
MIB = 1024 * 1024


def config(first: ScriptedConsumer, second: ScriptedConsumer, **top: Any) -> str:
    """Two consumers for each kind, so that the model counts."""
    routes = [way.path for way in DROP_IN]
    return yaml.safe_dump(
        {
            "routing": {kind: ["first", "second"] for kind in KINDS},
            "consumers": {
                "first": {"url": first.url, "models": ["one"], "routes": routes},
                "second": {
                    "url": second.url,
                    "models": [{"name": "two", "served_as": "deux"}],
                    "routes": routes,
                },
            },
            **top,
        }
    )


@pytest.fixture
def first() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b'{"by": "first"}'))) as running:
        yield running


@pytest.fixture
def second() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b'{"by": "second"}'))) as running:
        yield running


@pytest.fixture
def broker(first: ScriptedConsumer, second: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config(first, second)) as running:
        yield running


def worded(path: str, said: Any) -> tuple[str, str]:
    """The code and the message of an error, where the protocol of the path has them."""
    if path.startswith("/api/"):
        assert set(said) == {"error", "code", "retryable"}
        return said["code"], said["error"]
    error = said["error"]
    if path.startswith("/v1/messages"):
        assert (said["type"], error["type"]) == ("error", "invalid_request_error")
    else:
        assert {"message", "type", "param", "code"} <= set(error)
    return error["code"], error["message"]


def form(*parts: tuple[str, bytes]) -> bytes:
    pieces = [
        b'--line\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % (name.encode(), value)
        for name, value in parts
    ]
    return b"".join(pieces) + b"--line--\r\n"


BAD = {
    "nothing": (b"", "application/json", "no body"),
    "no JSON": (b'{"model": "one",', "application/json", "no JSON"),
    "a list": (b'["one"]', "application/json", "must be a JSON object"),
    "a number": (b'{"model": 1}', "application/json", "'model' must be a text"),
    "10 kB": (
        json.dumps({"model": "m" * 10_000}).encode(),
        "application/json",
        "at most 512 characters",
    ),
    "10 kB, escaped": (
        b'{"model": "' + rb"\u006d" * 10_000 + b'"}',
        "application/json",
        "at most 512 characters",
    ),
    "10 kB in a form": (form(("model", b"m" * 10_000)), FORM, "at most 512 characters"),
    "a form that is cut off": (form(("file", b"RIFF"))[:-20], FORM, "cut off"),
    "a form without a boundary": (form(("file", b"x")), "multipart/form-data", "no boundary"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
def test_what_names_no_model_in_a_way_that_can_be_read_reaches_nobody(
    broker: LiveBroker,
    first: ScriptedConsumer,
    second: ScriptedConsumer,
    path: str,
    what: str,
) -> None:
    body, content_type, why = BAD[what]
    found = broker.post(path, data=body, headers={"Content-Type": content_type})
    assert found.status_code == 400, found.text
    code, message = worded(path, found.json())
    assert code == "bad_request"
    assert why in message
    assert len(message) < 200
    assert first.requests == second.requests == []
    assert broker.stats.total_jobs == 0


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/images/edits"])
def test_a_form_without_a_model_is_the_first_consumers_as_it_is(
    broker: LiveBroker, first: ScriptedConsumer, path: str
) -> None:
    body = form(("file", b"RIFF\x00\xff"), ("language", b"en"))
    found = broker.post(path, data=body, headers={"Content-Type": FORM})
    assert found.json() == {"by": "first"}
    assert first.requests[-1].body == body


def peak_mib(pid: int) -> float:
    """The most memory that a process ever had."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kib) / 1024


@pytest.mark.timeout(90)
def test_a_model_behind_a_large_file_costs_no_memory(
    tmp_path: Path, first: ScriptedConsumer, second: ScriptedConsumer
) -> None:
    port, size = free_port(), 64 * MIB
    head = b'--line\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    tail = b'\r\n--line\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n--line--\r\n'
    length = len(head) + size + len(tail % b"two")

    def pieces() -> Iterator[bytes]:
        yield head
        for _ in range(size // MIB):
            yield bytes(MIB)
        yield tail % b"two"

    text = config(first, second, listen=f"127.0.0.1:{port}", max_body_mib=100)
    with serving(tmp_path, "gpumanager serve", text, port) as process:
        small = form(("model", b"one"))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        headers = {"Content-Type": FORM}
        connection.request("POST", "/v1/audio/transcriptions", small, headers)
        assert connection.getresponse().read() == b'{"by": "first"}'
        before = peak_mib(process.popen.pid)
        headers["Content-Length"] = str(length)
        connection.request("POST", "/v1/audio/transcriptions", pieces(), headers)
        assert connection.getresponse().read() == b'{"by": "second"}'
        connection.close()
        grown = peak_mib(process.popen.pid) - before
    sent = second.requests[-1]
    assert sent.header("content-length") == str(length + 1)
    assert len(sent.body) == length + 1
    assert sent.body.endswith(tail % b"deux")
    assert sent.body.startswith(head)
    assert grown < 16, f"{grown:.0f} MiB more"
