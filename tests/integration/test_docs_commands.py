"""Every command in the documents is run, here or in a test that is named; none is only believed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from gpumanager.demo import studio
from tests.support.ports import free_port
from tests.support.threads import eventually

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

ELSEWHERE = {
    r"make test": "is what runs this",
    r"make run": "the fixture below runs what it runs: gpumanager demo",
    r"pipx install (--force )?\.": "tests/integration/test_packaging.py",
    r"pipx uninstall m?gpumanager": "would need pipx",
    r"git pull": "would change what is tested",
    r"(systemctl|rm) .*": "is about the user's own home",
    r"gpumanager check ~/\.config/.*": "tests/test_cli.py",
    r"docker compose .*": "tests/test_deploy.py checks the file; there may be no engine",
    r"gpumanager setup.*": "tests/integration/test_setup.py",
    r"GPUMANAGER_API_KEYS=.* gpumanager serve": "tests/integration/test_serving.py",
    r"gpumanager serve --config config/consumers\.yaml": "tests/integration/test_serving.py",
    r"gpumanager reload": "tests/integration/test_reload.py",
    r"gpumanager (events --json \| gpumanager )?replay .*": "tests/simulation/test_commands.py",
    r"gpumanager plan llm": "tests/integration/test_operations.py",
    r"(\S*/)?python -m benchmarks\..*": "takes minutes",
}
"""Why a command is not run here."""

LAST = "gpumanager drain"


def commands() -> list[str]:
    found: dict[str, None] = {}
    for document in DOCUMENTS:
        blocks = re.findall(r"^```(sh|console)\n(.*?)^```", document.read_text(), re.M | re.S)
        for language, body in blocks:
            for line in body.splitlines():
                if language == "console" and not line.startswith("$ "):
                    continue
                command = re.sub(r"\s+# .*|^# .*", "", line.removeprefix("$ ")).strip()
                if command:
                    found[command] = None
    return list(found)


def is_elsewhere(command: str) -> bool:
    return any(re.fullmatch(pattern, command) for pattern in ELSEWHERE)


HERE = [command for command in commands() if not is_elsewhere(command)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a demo as a user starts it."""
    if missing := studio.missing_packages():
        pytest.skip(f"not installed: {', '.join(missing)}")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    state = str(tmp_path_factory.mktemp("state"))
    with subprocess.Popen(
        [sys.executable, "-m", "gpumanager", "demo", "--listen", f"127.0.0.1:{port}"],
        env={**os.environ, "XDG_STATE_HOME": state},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            eventually(lambda: is_up(url), 60)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def is_up(url: str) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(f"{url}/healthz", timeout=5).status_code == 200
    return False


@pytest.mark.timeout(90)
@pytest.mark.parametrize("command", sorted(HERE, key=lambda command: command == LAST))
def test_the_documents_commands_work(command: str, demo: str, tmp_path: Path) -> None:
    script = command.replace("localhost:8770", demo.removeprefix("http://"))
    script = script.replace("hello.wav", str(tmp_path / "hello.wav"))
    script = script.replace(".venv/bin/gpumanager", "gpumanager")
    if "&& file " in script:  # Debian's `file` need not be there
        script = script.partition(" && file ")[0]
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", script],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GPUMANAGER_URL": demo,
            "NO_PROXY": "127.0.0.1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout
    if "-o " in script:
        assert (tmp_path / "hello.wav").read_bytes().startswith(b"RIFF")


def test_what_is_said_to_be_run_elsewhere_is_still_documented() -> None:
    known = commands()
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, command) for command in known), pattern
    assert LAST in HERE
