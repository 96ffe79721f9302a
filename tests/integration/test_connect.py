"""`gpumanager connect`, against a broker that runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from gpumanager.cli import main
from gpumanager.keys import ApiKey
from tests.support.broker import LiveBroker, live_broker
from tests.support.ports import free_port
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer

SECRET = "0123456789abcdef"
CONFIG = """
routing: {{llm: ollama, tts: piper}}
consumers:
  ollama: {{preset: ollama, url: "{url}"}}
  piper: {{preset: piper, url: "{url}"}}
"""


def says(connection: Connection, received: Received) -> None:
    tags = b"/api/tags" in received.line
    found = {"models": [{"name": "qwen3:8b"}]} if tags else {"version": "0.33.0", "models": []}
    connection.send(answer(json.dumps(found).encode()))


@pytest.fixture
def ollama() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(says) as consumer:
        yield consumer


@pytest.fixture
def broker(ollama: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(CONFIG.format(url=ollama.url)) as running:
        yield running


def run(url: str, *arguments: str, home: Path | None = None, key: str | None = None) -> Result:
    environ = {"HOME": str(home or "/nowhere"), "GPUMANAGER_API_KEY": key, "XDG_CONFIG_HOME": None}
    return CliRunner().invoke(main, ["connect", *arguments, "--url", url], env=environ)


def test_the_clients_are_listed_with_what_they_miss(broker: LiveBroker) -> None:
    result = run(broker.url)
    assert result.exit_code == 0, result.output
    assert f"{broker.url} (no keys)" in result.output
    assert "llm: qwen3:8b" in result.output
    assert "gpumanager connect continue [--write]" in result.output
    missing = [line for line in result.output.splitlines() if "no consumer serves" in line]
    assert missing == []


def test_what_is_printed_is_what_the_client_needs(broker: LiveBroker) -> None:
    result = run(broker.url, "continue")
    assert result.exit_code == 0
    (model,) = yaml.safe_load(result.stdout)["models"]
    assert (model["model"], model["apiBase"]) == ("qwen3:8b", f"{broker.url}/v1")


def test_it_is_written_once_with_a_backup(broker: LiveBroker, tmp_path: Path) -> None:
    path = tmp_path / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text('{"env": {"FOO": "a-secret"}}')
    first = run(broker.url, "claude-code", "--write", home=tmp_path)
    assert first.exit_code == 0, first.output
    env = json.loads(path.read_text())["env"]
    assert (env["FOO"], env["ANTHROPIC_BASE_URL"]) == ("a-secret", broker.url)
    assert "a-secret" not in first.output
    (backup,) = set(path.parent.iterdir()) - {path}
    assert str(backup) in first.output
    again = run(broker.url, "claude-code", "--write", home=tmp_path)
    assert "nothing to change" in again.output
    assert len(list(path.parent.iterdir())) == 2


def test_a_broken_file_is_named_and_left(broker: LiveBroker, tmp_path: Path) -> None:
    path = tmp_path / ".aider.conf.yml"
    path.write_text("a: [1\n")
    result = run(broker.url, "aider", "--write", home=tmp_path)
    assert result.exit_code == 1
    assert f"{path} is not valid YAML" in result.output
    assert "openai/qwen3:8b" in result.output
    assert path.read_text() == "a: [1\n"


def test_a_client_that_nobody_serves_is_told(ollama: ScriptedConsumer) -> None:
    text = f"""
routing: {{llm: tabby}}
consumers:
  tabby: {{preset: tabby, url: "{ollama.url}"}}
"""
    with live_broker(text) as broker:
        result = run(broker.url, "claude-code", "--write")
        assert result.exit_code == 1
        assert "serves /v1/messages" in result.output
        assert "no consumer serves /v1/messages" in run(broker.url).output


def test_a_key_is_wanted_used_and_not_shown(ollama: ScriptedConsumer) -> None:
    keys = (ApiKey("alice", SECRET, role="client"),)
    with live_broker(CONFIG.format(url=ollama.url), keys=keys) as broker:
        without = run(broker.url, "codex")
        assert without.exit_code == 1
        assert "GPUMANAGER_API_KEY" in without.output
        result = run(broker.url, "codex", key=SECRET)
        assert result.exit_code == 0, result.output
        assert 'env_key = "GPUMANAGER_API_KEY"' in result.stdout
        assert SECRET not in result.output
        assert (
            f"OPENAI_API_KEY={SECRET}" in run(broker.url, "shell", "--show-key", key=SECRET).stdout
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vim"], "is none of open-webui, continue"),
        (["--write"], "--write needs a CLIENT"),
        (["aider", "--write", "--show-key"], "puts no key into a file"),
    ],
)
def test_bad_usage_is_told(arguments: list[str], message: str) -> None:
    result = run(f"http://127.0.0.1:{free_port()}", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_client_without_a_file_says_where_to_type(broker: LiveBroker) -> None:
    result = run(broker.url, "n8n", "--write")
    assert result.exit_code == 1
    assert "has no file to write" in result.output
    assert f"{broker.url}/v1" in result.stdout
