"""No command ends in a traceback for a bad address, or for a file that cannot be read or written:
each says in a sentence what is wrong. Held for every command there is. Tests run as root, too, so
that the files are such as fail for everybody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpumanager.cli import main
from tests.support.broker import LiveBroker, live_broker
from tests.support.ports import free_port
from tests.support.sockets import ScriptedConsumer, answer

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

pytestmark = pytest.mark.timeout(60)

SAMPLE = {"choice": "tts", "text": "it"}
"""An argument of each type."""


def asking() -> dict[str, list[str]]:
    """Commands that ask a broker, with what they need."""
    found = {}
    for name, command in main.commands.items():
        if any(param.name == "url" for param in command.params):
            needed = [param.type.name for param in command.params if param.required]
            found[name] = [SAMPLE[kind] for kind in needed]
    return found | {"top": ["--once"]}


ASKING = asking()

LISTENING = {"demo": [], "setup": ["--ports", "1", "--dry-run"]}
"""Commands that are told where to listen."""

READING = {
    "check": lambda file: [file],
    "doctor": lambda file: ["--config", file],
    "replay": lambda file: [file],
    "serve": lambda file: ["--config", file],
    "setup": lambda file: ["--config", file, "--ports", "1", "--dry-run"],
}
"""Commands that read a config."""

WRITING = {
    "events": lambda file: ["--trace", file],
    "simulate": lambda file: ["alternating", "--jobs", "4", "--plot", file],
    "setup": lambda file: ["--config", file, "--ports", "1", "--yes", "--no-service"],
}
"""Commands that write a file."""

PRINTING = {"completion": ["bash"], "schema": []}
"""Commands that only print."""

BAD_URLS = [
    "foo",
    "http://",
    "http://[::1",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:0",
    "http://a..b",
    "ftp://127.0.0.1",
    "http://127.0.0.1:1",
]

UNREADABLE = ["{tmp}", "{tmp}/none", "{tmp}/file/in/a/file", "/proc/self/mem", "/dev/zero"]
UNWRITABLE = ["/proc/nobody/x.yaml", "{tmp}/file/x.yaml", "{tmp}/" + "x" * 300, "/dev/full"]


Done = subprocess.CompletedProcess[str]


def run(*words: str, **environ: str) -> Done:
    """A command in this process, which is what many of them have time for: whatever would have
    been a traceback is raised."""
    result = CliRunner().invoke(main, list(words), env=environ, catch_exceptions=False)
    return Done(words, result.exit_code, result.stdout, result.stderr)


def started(*words: str, **environ: str) -> Done:
    """A program of its own."""
    return subprocess.run(
        words,
        env={**os.environ, "NO_PROXY": "127.0.0.1", **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def is_a_sentence(done: Done, *, said: str = "") -> None:
    """It failed, and told why without a traceback."""
    assert done.returncode in (1, 2), (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-2000:]
    assert said in done.stderr
    assert 0 < len(done.stderr.strip().splitlines()) < 8, done.stderr


@pytest.fixture
def broker() -> Iterator[LiveBroker]:
    with live_broker("{}") as live:
        yield live


def filled(path: str, tmp_path: Path) -> str:
    (tmp_path / "file").write_text("a file\n")
    return path.format(tmp=tmp_path)


def test_every_command_is_walked() -> None:
    walked = {*ASKING, *LISTENING, *READING, *WRITING, *PRINTING}
    assert set(main.commands) == walked
    assert {"status", "plan", "cancel", "load", "drain"} <= set(ASKING)


@pytest.mark.parametrize("command", sorted(ASKING))
def test_a_bad_address(command: str) -> None:
    for url in BAD_URLS:
        done = run(command, *ASKING[command], "--url", url)
        is_a_sentence(done, said=url)


@pytest.mark.parametrize("command", LISTENING)
@pytest.mark.parametrize("listen", ["foo", "127.0.0.1", "127.0.0.1:99999", ":", "127.0.0.1:0"])
def test_a_bad_address_to_listen_on(command: str, listen: str, tmp_path: Path) -> None:
    done = run(command, *LISTENING[command], "--listen", listen, HOME=str(tmp_path))
    is_a_sentence(done, said="--listen")


def test_another_programs_answers() -> None:
    for body in (b"<html>", b"{}", b"[]", b"7", b'{"queue": 7, "events": 7}'):
        with ScriptedConsumer(lambda peer, _, body=body: peer.send(answer(body))) as other:  # type: ignore[misc]
            for command in ("status", "queue", "events", "load"):
                is_a_sentence(run(command, *ASKING[command], "--url", other.url), said=other.url)


@pytest.mark.parametrize("key", ["€", "a b", "a\nb", ""])
def test_a_bad_key(key: str) -> None:
    done = run("status", "--url", "http://127.0.0.1:1", "--key", key)
    is_a_sentence(done, said="--key")


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("path", UNREADABLE)
def test_a_config_that_cannot_be_read(command: str, path: str, tmp_path: Path) -> None:
    file = filled(path, tmp_path)
    if command == "setup" and not Path(file).exists():
        pytest.skip("setup would write it")
    is_a_sentence(run(command, *READING[command](file)), said=file)


@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("path", UNWRITABLE)
def test_a_file_that_cannot_be_written(
    command: str, path: str, tmp_path: Path, broker: LiveBroker
) -> None:
    file = filled(path, tmp_path)
    words = WRITING[command](file)
    done = run(command, *words, GPUMANAGER_URL=broker.url, HOME=str(tmp_path))
    is_a_sentence(done, said=file)


@pytest.mark.parametrize("words", [["--help"], ["schema"], ["completion", "bash"], ["status"]])
def test_a_full_disk_behind_the_output(words: list[str], broker: LiveBroker) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gpumanager", *words],
            env={**os.environ, "GPUMANAGER_URL": broker.url},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "systemd").write_text("not a folder")
    environ = {"HOME": "/proc/nobody", "PATH": "/nowhere", "XDG_CONFIG_HOME": str(tmp_path)}
    environ |= {"XDG_STATE_HOME": "/proc/nobody"}
    listen = f"127.0.0.1:{free_port()}"
    command = (sys.executable, "-m", "gpumanager", "setup", "--yes", "--ports", "1")
    done = started(*command, "--listen", listen, **environ)
    is_a_sentence(done, said="gpumanager serve --config")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ask.py", ["Why?"]),
        ("openai_sdk.py", ["Why?"]),
        ("speak.sh", ["-o", os.devnull, "Hello"]),
        ("comfyui.sh", ["{workflow}"]),
        ("transcribe.sh", ["{workflow}"]),
    ],
)
def test_an_example_without_a_broker(name: str, words: list[str], tmp_path: Path) -> None:
    workflow = tmp_path / "workflow.json"
    workflow.write_text("{}")
    path = str(EXAMPLES / name)
    command = [sys.executable, path] if path.endswith(".py") else [path]
    command += [word.format(workflow=workflow) for word in words]
    for url in ("http://127.0.0.1:1", "foo"):
        is_a_sentence(started(*command, GPUMANAGER_URL=url), said=url)


def test_a_workflow_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no JSON")
    for path in ("/nowhere.json", str(tmp_path / "file")):
        is_a_sentence(started(str(EXAMPLES / "comfyui.sh"), path), said=f"{path} is no workflow")
