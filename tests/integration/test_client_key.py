"""One name for a client's key, GPUMANAGER_API_KEY: the command line, setup, the examples, the
documents."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumanager.client import KEY_ENV
from gpumanager.keys import ApiKey
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import ScriptedConsumer, answer

ROOT = Path(__file__).parent.parent.parent
SECRET = "a-key-of-enough-characters"

ASKING = [
    ["status"],
    ["queue"],
    ["top", "--once"],
    ["events"],
    ["plan", "tts"],
    ["cancel", "99"],
    ["load", "nobody"],
    ["unload", "nobody"],
    ["forget", "nobody"],
    ["reload"],
    ["submit", "tts", "{}"],
    ["jobs"],
    ["result", "none"],
]


@pytest.fixture
def broker() -> Iterator[LiveBroker]:
    audio = answer(b"RIFF", headers=("Content-Type: audio/wav",))
    with (
        ScriptedConsumer(lambda peer, _: peer.send(audio)) as consumer,
        live_broker(
            config_for(consumer.url, gpu={"total_mib": 1000}), keys=[ApiKey("alice", SECRET)]
        ) as live,
    ):
        yield live


def run(*command: str, **environ: str) -> str:
    """What is said by a command with this environment, on either stream."""
    kept = {name: value for name, value in os.environ.items() if name != KEY_ENV}
    done = subprocess.run(
        command,
        env={**kept, "NO_PROXY": "127.0.0.1", **environ},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("words", ASKING, ids=lambda words: words[0])
def test_every_command_shows_the_key_of_the_environment(
    broker: LiveBroker, words: list[str]
) -> None:
    command = [sys.executable, "-m", "gpumanager", *words, "--url", broker.url]
    said = run(*command)
    assert "a key is required" in said
    assert f"--key, or {KEY_ENV}" in said
    said = run(*command, **{KEY_ENV: SECRET})
    assert "key is" not in said
    assert "Traceback" not in said


def test_the_examples_show_it(broker: LiveBroker) -> None:
    for name in ("speak.sh", "ask.py", "openai_sdk.py"):
        path = str(ROOT / "examples" / name)
        words = [path] if name.endswith(".sh") else [sys.executable, path]
        words += ["-o", os.devnull] if name == "speak.sh" else []
        environ = {"GPUMANAGER_URL": broker.url}
        assert re.search("401|key is", run(*words, "Hello", **environ)), name
        said = run(*words, "Hello", **environ, **{KEY_ENV: SECRET})
        assert not re.search("401|key is", said), (name, said)


def test_no_other_name_is_left() -> None:
    folders = ("gpumanager", "docs", "deploy", "examples", "config")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    names: set[str] = set()
    for path in {*ROOT.glob("*.*"), *found} - {ROOT / "CHANGELOG.md"}:
        if path.suffix in {".py", ".md", ".sh", ".yaml", ".service", ".json"}:
            names |= set(re.findall(r"GPUMANAGER_\w*KEY\w*", path.read_text("utf-8")))
    assert names == {KEY_ENV, "GPUMANAGER_API_KEYS"}
