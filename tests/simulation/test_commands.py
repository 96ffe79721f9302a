"""`gpumanager simulate` and `gpumanager replay`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gpumanager.cli import main, simulating
from gpumanager.simulation.policies import POLICIES
from gpumanager.simulation.workloads import WORKLOADS


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), env={"COLUMNS": "120"}, catch_exceptions=False)


def test_the_options_know_all_there_is() -> None:
    assert list(simulating.WORKLOADS) == list(WORKLOADS)
    assert list(simulating.POLICIES) == list(POLICIES)


def test_simulate_shows_every_policy_of_a_workload() -> None:
    done = run("simulate", "alternating", "--jobs", "24")
    assert done.exit_code == 0
    for policy in POLICIES:
        assert f"\n{policy} " in done.stdout
    assert "left-1" in done.stdout
    assert "optimum" not in done.stdout


def test_a_small_workload_has_its_optimum() -> None:
    done = run("simulate", "alternating", "--jobs", "8", "--json", "--policy", "fifo")
    (found,) = json.loads(done.stdout)
    assert (found["trace"], found["seed"], found["jobs"]) == ("alternating", 1, 8)
    (fifo,) = found["policies"]
    assert fifo["policy"] == "fifo"
    assert fifo["swaps"] == 7
    assert fifo["makespan_s"] > 2 * found["optimum"]["makespan_s"]
    assert fifo["waits"]["p50"] <= fifo["waits"]["p95"] <= fifo["waits"]["p99"]


def test_without_a_name_all_workloads_are_played() -> None:
    done = run("simulate", "--jobs", "10", "--policy", "fifo", "--json")
    assert [each["trace"] for each in json.loads(done.stdout)] == list(WORKLOADS)


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "it.svg"
    done = run("simulate", "mixed", "--jobs", "20", "--plot", str(path))
    assert done.exit_code == 0
    assert path.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulate", "nope"], "'nope' is not one of 'chat-bursts'"),
        (["simulate", "--policy", "lifo"], "'lifo' is not one of 'fifo'"),
        (["simulate", "--jobs", "0"], "0 is not in the range"),
        (["simulate", "--plot", "x.svg"], "--plot draws one workload"),
        (["simulate", "mixed", "--plot", "/nowhere/x.svg"], "/nowhere/x.svg cannot be written"),
    ],
)
def test_bad_input_is_told(words: list[str], said: str) -> None:
    done = run(*words)
    assert done.exit_code in (1, 2)
    assert said in done.stderr
