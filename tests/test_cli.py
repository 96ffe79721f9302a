"""The command line: exit codes, and faults without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from gpumanager import __version__
from gpumanager.cli import main
from gpumanager.config import Config

EXAMPLE = Path(__file__).parent.parent / "config" / "consumers.yaml"


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"gpumanager, version {__version__}\n"


def test_check_of_a_good_file() -> None:
    result = CliRunner().invoke(main, ["check", str(EXAMPLE)])
    assert result.exit_code == 0
    assert "ok, 4 consumers, listens on 127.0.0.1:8770" in result.output


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


def test_serve_of_an_empty_name_does_not_mean_the_default() -> None:
    result = CliRunner().invoke(main, ["serve", "--config", ""])
    assert result.exit_code == 2
    assert "cannot be read: No such file or directory" in result.stderr


@pytest.mark.parametrize("arguments", [["check"], ["serve", "--port", "1"], ["fly"]])
def test_wrong_usage_is_told(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("command", [[], ["serve"], ["check"], ["demo"]])
def test_every_command_explains_itself(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "-h"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
