"""The command line: exit codes, and faults without a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpumanager import __version__
from gpumanager.cli import main
from gpumanager.config import Config, load_config
from gpumanager.serving import prepare

EXAMPLE = Path(__file__).parent.parent / "config" / "consumers.yaml"


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"gpumanager, version {__version__}\n"


def test_check_of_a_good_file() -> None:
    result = CliRunner().invoke(main, ["check", str(EXAMPLE)])
    assert result.exit_code == 0
    assert "ok, 4 consumers, listens on 127.0.0.1:8770" in result.output


@pytest.mark.parametrize(
    ("listen", "keys", "warned"),
    [
        ("0.0.0.0:8770", "", True),
        ("'[::]:8770'", "", True),
        ("192.168.1.5:8770", "", True),
        ("gpu.lan:8770", "", True),
        ("0.0.0.0:8770", "alice 0123456789abcdef", False),
        ("127.0.0.1:8770", "", False),
        ("127.1.2.3:8770", "", False),
        ("'[::1]:8770'", "", False),
        ("localhost:8770", "", False),
    ],
)
def test_check_and_the_start_warn_of_a_broker_that_everybody_may_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    listen: str,
    keys: str,
    warned: bool,
) -> None:
    monkeypatch.setenv("GPUMANAGER_API_KEYS", keys)
    file = tmp_path / "open.yaml"
    file.write_text(f"listen: {listen}\n")
    result = CliRunner().invoke(main, ["check", str(file)])
    assert result.exit_code == 0
    assert "ok, 0 consumers" in result.stdout
    assert ("there are no keys" in result.stderr) is warned
    assert ("auth.keys_file, or listen on 127.0.0.1" in result.stderr) is warned

    monkeypatch.setattr("gpumanager.web.server.set_defaults", lambda config: None)
    monkeypatch.setattr("gpumanager.telemetry.logs.configure", lambda settings: None)
    monkeypatch.setattr("gpumanager.lifecycle.Lifecycle.install_signal_handlers", lambda *_: None)
    prepare(load_config(file)).stop()
    said = [record for record in caplog.records if "there are no keys" in record.message]
    assert bool(said) is warned


def test_check_says_that_the_keys_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text("auth: {keys_file: /nowhere/keys}\n")
    result = CliRunner().invoke(main, ["check", str(file)])
    assert result.exit_code == 2
    assert "the keys cannot be read: /nowhere/keys: No such file or directory" in result.stderr


def test_check_of_a_bad_file_names_every_fault(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("listen: nowhere\nrooting: {}\n")
    result = CliRunner().invoke(main, ["check", str(file)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"{file}: 2 faults",
        "  line 1: listen: must be HOST:PORT or [IPV6]:PORT, with a port of 0 to 65535 "
        "(found 'nowhere')",
        "  line 2: rooting: unknown key 'rooting'; did you mean 'routing'? known: "
        + ", ".join(sorted(Config.model_fields)),
    ]


def test_check_of_no_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["check", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "cannot be read: No such file or directory" in result.stderr


def test_serve_of_a_bad_file_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUMANAGER_CONFIG", "/nowhere/at/all.yaml")
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 2
    assert "/nowhere/at/all.yaml: 1 fault" in result.stderr


class Found:
    """Where a config may lie, and what `check` finds, which is what `serve` takes."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        (home / "here" / "config").mkdir(parents=True)
        (home / "made" / "gpumanager").mkdir(parents=True)
        patch.chdir(home / "here")
        patch.setenv("XDG_CONFIG_HOME", str(home / "made"))
        patch.delenv("GPUMANAGER_CONFIG", raising=False)
        self.here = home / "here" / "config" / "consumers.yaml"
        self.made = home / "made" / "gpumanager" / "consumers.yaml"

    def checked(self, command: str = "check") -> Any:
        return CliRunner().invoke(main, [command])


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    return Found(tmp_path, monkeypatch)


def test_the_config_that_setup_wrote_is_found_last(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found.made.write_text("listen: 127.0.0.1:1003\n")
    assert found.checked().output.startswith(f"{found.made}: ok")
    found.here.write_text("listen: 127.0.0.1:1002\n")
    assert found.checked().output.startswith("config/consumers.yaml: ok")
    named = tmp_path / "named.yaml"
    named.write_text("listen: 127.0.0.1:1001\n")
    monkeypatch.setenv("GPUMANAGER_CONFIG", str(named))
    assert found.checked().output.startswith(f"{named}: ok")


@pytest.mark.parametrize("command", ["serve", "check", "doctor"])
def test_without_any_config_the_way_to_one_is_told(found: Found, command: str) -> None:
    result = found.checked(command)
    assert result.exit_code == 2
    assert str(found.made) in result.stderr
    assert "gpumanager setup" in result.stderr


def test_serve_of_an_empty_name_does_not_mean_the_default() -> None:
    result = CliRunner().invoke(main, ["serve", "--config", ""])
    assert result.exit_code == 2
    assert "cannot be read: No such file or directory" in result.stderr


@pytest.mark.parametrize("arguments", [["check", "a", "b"], ["serve", "--port", "1"], ["fly"]])
def test_wrong_usage_is_told(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("command", [[], ["serve"], ["check"], ["demo"]])
def test_every_command_explains_itself(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "-h"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_check_says_that_callbacks_lack_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUMANAGER_CALLBACK_SECRET", raising=False)
    file = tmp_path / "broker.yaml"
    file.write_text("jobs: {callbacks: [nas]}\n")
    result = CliRunner().invoke(main, ["check", str(file)])
    assert result.exit_code == 2
    assert "there is no secret to sign with" in result.stderr
    monkeypatch.setenv("GPUMANAGER_CALLBACK_SECRET", "whsec_" + "A" * 32)
    assert CliRunner().invoke(main, ["check", str(file)]).exit_code == 0
