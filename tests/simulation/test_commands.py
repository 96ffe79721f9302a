"""`gpumanager simulate` and `gpumanager replay`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpumanager.cli import main, simulating
from gpumanager.simulation.policies import POLICIES
from gpumanager.simulation.workloads import WORKLOADS
from tests.simulation.test_recorded import SWAP, job


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


def affinity(*words: str) -> dict[str, Any]:
    done = run(*words, "--policy", "affinity", "--json")
    found = json.loads(done.stdout)
    figures: dict[str, Any] = (found if isinstance(found, dict) else found[0])["policies"][-1]
    return figures


def test_the_promise_can_be_another(tmp_path: Path) -> None:
    usual = affinity("simulate", "alternating")
    strict = affinity("simulate", "alternating", "--max-overtaken-by", "2")
    short = affinity("simulate", "alternating", "--max-overtake", "5")
    assert usual["out_of_turn_by"] > strict["out_of_turn_by"] == 2
    assert usual["out_of_turn_s"] > 5 >= short["out_of_turn_s"]
    talk = (
        affinity("simulate", "voice-assistant"),
        affinity("simulate", "voice-assistant", "--hold", "5"),
    )
    assert talk[0]["by_kind"]["tts"]["p95"] > talk[1]["by_kind"]["tts"]["p95"]


def test_replay_takes_the_promise_of_the_config(tmp_path: Path) -> None:
    config = tmp_path / "consumers.yaml"
    config.write_text(
        "scheduler: {policy: affinity, max_overtaken_by: 0}\n"
        "consumers: {a: {url: 'http://127.0.0.1:1', unload: /u}, "
        "b: {url: 'http://127.0.0.1:1', unload: /u}}"
    )
    jobs = [
        job(n, n * 0.1, 0.0, 0.0, 1.0, consumer="ab"[n % 2], requester=f"r{n}") for n in range(1, 9)
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in jobs))
    assert affinity("replay", str(path))["out_of_turn_by"] > 0
    assert affinity("replay", str(path), "--config", str(config))["out_of_turn_by"] == 0


def test_without_a_name_all_workloads_are_played() -> None:
    done = run("simulate", "--jobs", "10", "--policy", "fifo", "--json")
    assert [each["trace"] for each in json.loads(done.stdout)] == list(WORKLOADS)


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "it.svg"
    done = run("simulate", "mixed", "--jobs", "20", "--plot", str(path))
    assert done.exit_code == 0
    assert path.read_text().startswith("<svg")


def events_in(tmp_path: Path) -> str:
    """A file of a broker that served two consumers in turn."""
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in SWAP))
    return str(path)


def test_replay_shows_what_really_happened_beside_the_policies(tmp_path: Path) -> None:
    path = events_in(tmp_path)
    done = run("replay", path)
    assert done.exit_code == 0
    for name in ("really", *POLICIES, "optimum"):
        assert f"\n{name} " in done.stdout
    found = json.loads(run("replay", path, "--policy", "fifo", "--json").stdout)
    really, fifo = found["policies"]
    assert (really["policy"], fifo["policy"]) == ("really", "fifo")
    assert (really["swaps"], fifo["swaps"]) == (1, 1)
    assert really["waits"] == fifo["waits"]
    assert found["guesses"] == []


def test_replay_reads_what_events_prints(tmp_path: Path) -> None:
    text = Path(events_in(tmp_path)).read_text()
    done = CliRunner().invoke(main, ["replay", "-", "--policy", "fifo", "--json"], input=text)
    assert json.loads(done.stdout)["jobs"] == 3


def test_replay_draws_and_takes_other_sizes(tmp_path: Path) -> None:
    config, plot = tmp_path / "consumers.yaml", tmp_path / "it.svg"
    config.write_text("consumers: {a: {url: 'http://127.0.0.1:1', vram_resident_mib: 2000}}")
    more = ["--config", str(config), "--card-mib", "16000", "--plot", str(plot), "--clients-wait"]
    done = run("replay", events_in(tmp_path), "--policy", "fifo", "--json", *more)
    assert json.loads(done.stdout)["policies"][1]["swaps"] == 0  # both fit
    assert "really" in plot.read_text()


def test_a_job_that_could_not_be_placed_is_told(tmp_path: Path) -> None:
    config = tmp_path / "consumers.yaml"
    config.write_text(
        "consumers: {a: {url: 'http://127.0.0.1:1', unload: /u, pinned: true}, "
        "b: {url: 'http://127.0.0.1:1', unload: /u}}"
    )
    done = run("replay", events_in(tmp_path), "--policy", "fifo", "--config", str(config))
    assert done.exit_code == 1
    assert "job 2: there is no room for b" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["replay"], "Missing argument 'EVENTS...'"),
        (["replay", "/nowhere"], "/nowhere cannot be read: No such file or directory"),
        (["replay", "/etc/passwd"], "/etc/passwd, line 1: is no JSON object"),
        (["replay", "x", "--config", "/nowhere"], "/nowhere: 1 fault"),
        (["replay", "x", "--card-mib", "0"], "0 is not in the range"),
        (["replay", "x", "--max-overtake", "-1"], "-1.0 is not in the range"),
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
