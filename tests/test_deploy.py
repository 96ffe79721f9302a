"""What stands in deploy/: files for other programs, checked by those where they are installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gpumanager.config import load_config, parse_config
from gpumanager.setup.userservice import UserService
from tests.support.broker import live_broker
from tests.support.ports import free_port

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PROMTOOL = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
ANALYZE = shutil.which("systemd-analyze")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def dashboard_expressions() -> list[str]:
    panels = json.loads((DEPLOY / "grafana" / "gpumanager.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alert_expressions() -> list[str]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Every series that a broker has, with its labels, before anything happened."""
    port = free_port()
    config = f"""
        gpu: {{total_mib: 1000}}
        routing: {{tts: it}}
        consumers: {{it: {{url: "http://127.0.0.1:{port}", paths: {{tts: /}}}}}}
    """
    with live_broker(config) as broker:
        assert broker.post("/v1/tts").status_code in (502, 503)
        broker.await_idle()
        text = broker.get("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        # What has not happened yet has a family, and no samples.
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        for suffix in suffixes.get(family.type, [""]):
            found.setdefault(family.name + suffix, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *alert_expressions()])
def test_every_query_asks_for_series_that_exist(
    expression: str, series: dict[str, set[str]]
) -> None:
    names = set(re.findall(r"\bgpumanager_\w+", expression))
    assert names or "up{" in expression
    assert names <= set(series), names - set(series)
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    asked = {label.strip() for group in grouped for label in group.split(",")}
    if known := set().union(*(series[name] for name in names)):
        assert asked - known <= {"instance", "le"} | (set() if known else asked)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_takes_the_alerts_and_the_metrics() -> None:
    def promtool(*words: str, text: str | None = None) -> None:
        done = subprocess.run(
            [PROMTOOL or "", *words],
            input=text,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    promtool("check", "rules", str(DEPLOY / "prometheus" / "alerts.yaml"))
    promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yaml"))
    with live_broker("{gpu: {total_mib: 1000}}") as broker:
        promtool("check", "metrics", text=broker.get("/metrics").text)


def test_the_composed_config_is_good_and_fits_the_composed_services() -> None:
    config = load_config(str(DEPLOY / "consumers.compose.yaml"))
    hosts = {
        consumer.url.partition("//")[2].rpartition(":")[0] for consumer in config.consumers.values()
    }
    assert hosts == set(COMPOSE["services"]) - {"gpumanager"}
    broker = COMPOSE["services"]["gpumanager"]
    assert broker["ports"] == [f"127.0.0.1:{config.port}:{config.port}"]
    assert (DEPLOY / "consumers.compose.yaml").name in broker["volumes"][0]
    grace = int(broker["stop_grace_period"].removesuffix("s"))
    assert grace > config.drain_timeout


def test_only_the_broker_is_published() -> None:
    for name, service in COMPOSE["services"].items():
        assert ("ports" in service) == (name == "gpumanager")


def test_the_image_runs_as_a_user_and_is_watched() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = text.split("FROM ")
    assert re.search(r"^USER gpumanager$", stages[-1], re.MULTILINE)
    assert "HEALTHCHECK" in stages[-1]
    # The build needs what setup.py reads.
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in ("gpumanager", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        assert f"!{name}" in ignored


def units(tmp_path: Path) -> list[Path]:
    """The system's unit and a user's, with a program that exists."""
    own = tmp_path / "gpumanager.service"
    text = (DEPLOY / "gpumanager.service").read_text()
    own.write_text(text.replace("/usr/local/bin/gpumanager", "/bin/true"))
    users = tmp_path / "user" / "gpumanager.service"
    users.parent.mkdir()
    config = parse_config("{}")
    users.write_text(UserService({"HOME": "/"}).text(Path("/x.yaml"), config.drain_timeout))
    return [own, users]


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in units(tmp_path):
        done = subprocess.run(
            [ANALYZE or "", "verify", "--man=no", str(unit)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if "gpumanager.service" in line]
        assert not said, said


def test_the_units_let_a_drain_end(tmp_path: Path) -> None:
    for unit in units(tmp_path):
        (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit.read_text(), re.MULTILINE)
        assert int(stop) > parse_config("{}").drain_timeout
        assert "Type=notify" in unit.read_text()
