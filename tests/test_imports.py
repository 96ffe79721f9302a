"""What import-linter cannot hold: which file may know which library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gpumanager"


def files_that_mention(library: str) -> set[str]:
    """Files that import `library`, statically or by name."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Constant) and node.value == library:
                names = [library]
            if any(name.split(".")[0] == library for name in names):
                found.add(path.relative_to(PACKAGE).as_posix())
    return found


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("pynvml", {"gpu/device.py"}),
        (
            "waitress",
            {
                "telemetry/logs.py",
                "web/server.py",
                "web/parsing.py",
                "web/answering.py",
                "web/connection.py",
                "demo/speech.py",
            },
        ),
        ("urllib3", {"upstream/exchange.py", "upstream/reasons.py"}),
        (
            "requests",
            {
                "client.py",
                "setup/asking.py",
                "upstream/reasons.py",
                "upstream/transport.py",
            },
        ),
        ("prometheus_client", {"telemetry/metrics.py", "telemetry/modelmetrics.py"}),
        ("opentelemetry", {"telemetry/tracing.py"}),
        (
            "rich",
            {
                "cli/jobs.py",
                "cli/jobviews.py",
                "cli/policyviews.py",
                "cli/submitting.py",
                "cli/top.py",
                "cli/views.py",
                "cli/watching.py",
            },
        ),
        (
            "psutil",
            {"host/pagecache.py", "host/processes.py", "host/signals.py", "residency/stopping.py"},
        ),
        ("cuda.bindings.driver", {"host/checkpoint.py"}),
    ],
)
def test_a_library_is_known_in_few_places(library: str, files: set[str]) -> None:
    assert files_that_mention(library) <= files


def test_importing_the_package_starts_nothing() -> None:
    code = (
        "import sys, threading, gpumanager.serving, gpumanager.cli;"
        "assert threading.active_count() == 1, threading.enumerate();"
        "assert 'pynvml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
