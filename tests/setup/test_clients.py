"""What clients are told, and how it comes into their config files."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumanager.client import KEY_ENV
from gpumanager.setup.clients import CLIENTS, Settings
from gpumanager.setup.connections import Offered
from gpumanager.setup.merging import CannotMerge, json_with, read, toml_with, write, yaml_with
from gpumanager.web.ways import DROP_IN

SECRET = "0123456789abcdef"
OPEN = Offered(
    "http://127.0.0.1:8770",
    routes=frozenset(way.path for way in DROP_IN),
    models=(
        ("qwen3:8b", ("llm",)),
        ("gemma3", ("llm", "embed")),
        ("bge-m3", ("embed",)),
        ("kokoro", ("tts",)),
        ("flux", ("image",)),
    ),
)
KEYED = replace(OPEN, needs_key=True)
KNOWN = {client.name: client for client in CLIENTS}
WITH_FILES = ["continue", "aider", "codex", "claude-code", "shell"]


def told(
    name: str,
    offer: Offered = OPEN,
    model: str | None = None,
    environ: Mapping[str, str] = {"HOME": "/home/me"},
) -> Settings:
    return KNOWN[name].settings(offer, model, environ)


def loaded(name: str, text: str) -> Any:
    if name == "codex":
        return tomllib.loads(text)
    return json.loads(text) if name == "claude-code" else yaml.safe_load(text)


def merged(name: str, before: str, offer: Offered = OPEN, model: str | None = None) -> str:
    merge = told(name, offer, model).merged
    assert merge is not None
    return merge(before)


# -- what they are told --------------------------------------------------------------------------


def test_continue_gets_all_models_for_what_they_do() -> None:
    models = loaded("continue", told("continue").text)["models"]
    assert [(each["model"], each["roles"]) for each in models] == [
        ("qwen3:8b", ["chat", "edit", "apply"]),
        ("gemma3", ["chat", "edit", "apply"]),
        ("gemma3", ["embed"]),
    ]
    assert {each["apiBase"] for each in models} == {"http://127.0.0.1:8770/v1"}


def test_the_wanted_model_is_the_one() -> None:
    assert "openai/gemma3" in told("aider", model="gemma3").text
    assert tomllib.loads(told("codex", model="gemma3").text)["model"] == "gemma3"
    env = json.loads(told("claude-code", model="gemma3").text)["env"]
    models = {value for key, value in env.items() if key.endswith("MODEL")}
    assert models == {"gemma3"}


@pytest.mark.parametrize("name", KNOWN)
def test_no_key_is_shown_or_written_unless_asked_for(name: str) -> None:
    settings = told(name, KEYED)
    assert SECRET not in settings.text
    assert KEY_ENV in settings.text + " ".join(settings.notes)
    shown = told(name, replace(KEYED, shown_key=SECRET))
    assert SECRET in shown.text or name == "codex"  # which takes it from the environment only


@pytest.mark.parametrize("name", KNOWN)
def test_without_keys_nobody_is_told_of_one(name: str) -> None:
    settings = told(name)
    assert KEY_ENV not in settings.text
    assert "unused" in settings.text or name == "codex"


@pytest.mark.parametrize("name", sorted(set(KNOWN) - {"shell"}))
def test_where_no_model_is_listed_it_is_said(name: str) -> None:
    settings = told(name, replace(OPEN, models=()))
    assert "MODEL" in settings.text or name == "open-webui"
    assert any("lists no model" in note for note in settings.notes) or name == "open-webui"


def test_open_webui_gets_what_there_is() -> None:
    everything = told("open-webui").text
    for name, value in {
        "OPENAI_API_BASE_URL": "http://127.0.0.1:8770/v1",
        "AUDIO_TTS_MODEL": "kokoro",
        "AUDIO_STT_MODEL": "whisper-1",
        "IMAGE_GENERATION_MODEL": "flux",
        "RAG_EMBEDDING_MODEL": "gemma3",
    }.items():
        assert f"{name}={value}\n" in everything
    chat = told("open-webui", replace(OPEN, routes=frozenset({"/v1/chat/completions"}))).text
    assert "AUDIO" not in chat
    assert "IMAGE" not in chat


def test_a_program_in_a_container_does_not_reach_loopback() -> None:
    assert any("allowed_hosts" in note for note in told("open-webui").notes)
    elsewhere = replace(OPEN, url="http://192.168.1.5:8770")
    assert not any("allowed_hosts" in note for note in told("open-webui", elsewhere).notes)


def test_who_works_with_what_is_served() -> None:
    chat = replace(OPEN, routes=frozenset({"/v1/chat/completions"}))
    assert [each.name for each in CLIENTS if each.works_with(chat)] == [
        *("open-webui", "continue", "aider", "sillytavern", "n8n", "shell")
    ]


@pytest.mark.parametrize("offer", [OPEN, replace(KEYED, shown_key="$(touch x)'\"")])
def test_a_shell_reads_it_as_it_is(offer: Offered, tmp_path: Path) -> None:
    script = tmp_path / "clients.sh"
    script.write_text(told("shell", offer, "a b'c").text)
    out = subprocess.run(
        ["/bin/sh", "-c", f'. {script}; printf "%s|" "$OPENAI_API_KEY" "$ANTHROPIC_MODEL"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out == f"{offer.key()}|a b'c|"
    assert list(tmp_path.iterdir()) == [script]


def test_a_shell_takes_the_key_from_its_environment(tmp_path: Path) -> None:
    script = tmp_path / "clients.sh"
    script.write_text(told("shell", KEYED).text)
    command = ["/bin/sh", "-c", f'. {script}; printf %s "$ANTHROPIC_AUTH_TOKEN"']
    environ = {**os.environ, KEY_ENV: SECRET}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout
    assert out == SECRET


# -- their files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_FILES)
def test_a_second_time_changes_nothing(name: str) -> None:
    once = merged(name, "")
    assert merged(name, once) == once
    assert once == told(name).text


OWN = {
    "continue": """# mine
name: Mine  # keep
version: 0.0.1
schema: v1
models:
- name: "GPT"
  provider: openai
  model: gpt-4o   # the big one
  roles: [chat]
context:
- provider: code
""",
    "aider": "# mine\ndark-mode: true   # at night\nmodel: gpt-4o\n",
    "codex": """# mine
approval_policy = "on-request"  # careful
model = "gpt-5"

[mcp_servers.x]
command = "x"
""",
    "claude-code": '{"permissions": {"allow": ["Bash(ls:*)"]}, "env": {"FOO": "1"}}\n',
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_there_stays(name: str) -> None:
    before = OWN[name]
    after = merged(name, before)
    kept = [line for line in before.splitlines() if not line.startswith(("model:", "model ="))]
    if name != "claude-code":
        lines = iter(after.splitlines())
        assert all(line in lines for line in kept)  # all of them, in their order
    data, old = loaded(name, after), loaded(name, before)
    if name == "continue":
        assert data["models"][0] == old["models"][0]
        assert data["name"] == "Mine"
        assert len(data["models"]) == 4
    elif name == "claude-code":
        assert data["permissions"] == old["permissions"]
        assert data["env"]["FOO"] == "1"
    else:
        assert {**data, "model": None} == {**data, **old, "model": None}
        assert data["model"].endswith("qwen3:8b")
    assert merged(name, after) == after


@pytest.mark.parametrize("name", ["aider", "codex", "claude-code"])
def test_what_counts_instead_of_a_key_goes_with_it(name: str) -> None:
    """A token of another time would be sent in place of the key."""
    there_and_back = merged(name, merged(name, merged(name, ""), KEYED), OPEN)
    assert loaded(name, there_and_back) == loaded(name, merged(name, ""))
    keyed = loaded(name, merged(name, merged(name, ""), KEYED))
    assert keyed == loaded(name, merged(name, "", KEYED))


def test_another_servers_keys_are_not_sent_to_the_broker() -> None:
    before = json.dumps({"env": {"ANTHROPIC_API_KEY": "sk-ant-x", "ANTHROPIC_AUTH_TOKEN": "y"}})
    for offer in (OPEN, KEYED):
        after = merged("claude-code", before, offer)
        assert "sk-ant-x" not in after
        assert '"y"' not in after


@pytest.mark.parametrize(
    ("merge", "text", "why"),
    [
        (yaml_with, "a: [1\n", "is not valid YAML: line 2"),
        (yaml_with, "- a\n", "is no mapping"),
        (yaml_with, "a: 1\na: 2\n", "is not valid YAML"),
        (toml_with, "a = \n", "is not valid TOML"),
        (json_with, "{a: 1}", "is not valid JSON"),
        (json_with, "[1]", "is no mapping"),
        (json_with, '{"a": 1} // mine', "is not valid JSON"),
    ],
)
def test_a_broken_file_is_left_alone(merge: Any, text: str, why: str) -> None:
    with pytest.raises(CannotMerge, match=why):
        merge(text, lambda root: root.update(b=1))


def test_a_file_of_comments_keeps_them() -> None:
    after = yaml_with("# mine\n#a: 1", lambda root: root.update(b=1))
    assert after == "# mine\n#a: 1\nb: 1\n"


def test_an_alias_does_not_lead_elsewhere() -> None:
    text = "one: &it\n  - {name: x}\nmodels: *it\n"
    with pytest.raises(CannotMerge, match="laid out"):
        yaml_with(text, lambda root: root["models"].append({"name": "y"}))


def test_a_backup_is_kept_and_the_file_stays_whose_it_was(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "settings.json"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    link = tmp_path / "settings.json"
    link.symlink_to(real)
    now = datetime(2026, 11, 24, 12, 0)
    first = write(link, "new", now)
    second = write(link, "newer", now)
    assert link.is_symlink()
    assert read(link) == "newer"
    assert first is not None
    assert second is not None
    assert (first.read_text(), second.read_text()) == ("old", "new")
    assert first.name == "settings.json.20261124-120000.bak"
    assert {stat.S_IMODE(each.stat().st_mode) for each in (real, first, second)} == {0o640}
    assert sorted(real.parent.iterdir()) == sorted([real, first, second])


def test_a_new_file_is_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.yaml"
    assert write(path, "x", datetime(2026, 1, 1)) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(CannotMerge, match="UTF-8"):
        read(tmp_path / "bytes")


def test_a_program_that_has_its_folder_elsewhere_is_asked_there() -> None:
    assert told("codex", environ={"CODEX_HOME": "/c"}).file == Path("/c/config.toml")
    assert told("claude-code", environ={"CLAUDE_CONFIG_DIR": "/d"}).file == Path("/d/settings.json")
