"""The name of the distribution: `gpumanager` on PyPI is somebody else's program, so that nothing of
ours may have it installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = (ROOT / "setup.py").read_text()
NAME = "mgpumanager"

_INSTALLS = re.compile(
    r"\b(?:pip3?|pipx|uvx?)\b[^\n`]*?\b(?:install|upgrade|add|run|inject|wheel|download)\b"
    r"[^\n`]*?(?<![\w./:@-])gpumanager(?![\w./-])"
)
_EXTRA = re.compile(r"(\w+)\[([a-z,]+)\]")


def texts() -> Iterator[tuple[str, str]]:
    """All that a user may read, or that runs for one: every text file of the project by its path
    in it."""
    folders = ("gpumanager", "docs", "deploy", "examples", "config", "benchmarks")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*ROOT.iterdir(), *found]:
        if path.parent.name == "__pycache__" or path.name.startswith(".coverage"):
            continue  # other processes of this run write them, and put them away
        if path.is_file() and path.suffix != ".png":
            yield str(path.relative_to(ROOT)), path.read_text("utf-8", errors="replace")


@pytest.mark.parametrize(
    "bad",
    [
        "pipx install --global gpumanager   (or",
        "RUN pip install --no-index --find-links /wheels gpumanager \\",
        "pip install 'gpumanager[otel]'",
        "uv tool install gpumanager",
        "uvx run gpumanager",
    ],
)
def test_what_would_install_the_other_program_is_seen(bad: str) -> None:
    assert _INSTALLS.search(bad)
    assert not _INSTALLS.search(bad.replace("gpumanager", NAME))


def test_nothing_installs_the_other_program() -> None:
    bad = [f"{path}: {hit[0]}" for path, text in texts() for hit in _INSTALLS.finditer(text)]
    assert not bad


def test_extras_are_ours_and_exist() -> None:
    known = set(re.findall(r'^        "(\w+)": \[', SETUP, re.MULTILINE))
    assert known >= {"demo", "otel", "checkpoint"}
    seen = 0
    for path, text in texts():
        for owner, extras in _EXTRA.findall(text):
            if owner.endswith("gpumanager"):
                seen += 1
                assert owner == NAME, path
                assert set(extras.split(",")) <= known, path
    assert seen >= 4


def test_the_package_and_the_image_carry_the_name() -> None:
    assert f'name="{NAME}"' in SETUP
    assert f"--find-links /wheels {NAME}" in (ROOT / "Dockerfile").read_text()


def test_upgrading_and_uninstalling_are_described() -> None:
    text = (ROOT / "docs" / "setup.md").read_text()
    assert "## Upgrade" in text
    assert f"pipx uninstall {NAME}" in text.partition("## Uninstall")[2]
