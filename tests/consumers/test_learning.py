"""What is learned, what follows from it, and what is left of it after a restart."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gpumanager.consumers.footprint import Figure
from gpumanager.consumers.learning import Learned, Times
from gpumanager.consumers.shares import MOST_MODELS
from gpumanager.consumers.statefile import StateFile, state_path
from gpumanager.model import Declared, StoppedBy


def needed(learned: Learned, declared: int = 2800) -> int:
    return learned.needed("tts", Declared(declared)).mib


def test_nothing_is_known_at_first() -> None:
    learned = Learned(["tts"])
    figures = learned.figures("tts")
    assert (figures.peak, figures.raised, figures.residue_mib, figures.run_s) == (None,) * 4
    assert needed(learned) == 2800


def test_what_jobs_that_went_well_held_is_learned() -> None:
    learned = Learned(["tts"], lambda: 17.0)
    learned.held("tts", 3000)
    learned.ran("tts", 1)
    learned.held("tts", 9000)
    learned.failed("tts")
    learned.held("tts", 8000)
    learned.unloaded("tts", 1, None)
    assert learned.needed("tts", Declared(2800)) == Figure(3000, "measured", 17.0)
    learned.ran_out("tts", 5000)
    assert learned.needed("tts", Declared(2800)) == Figure(5000, "out-of-memory", 17.0)
    assert learned.needed("tts", Declared(2800, 4000)) == Figure(4000, "declared")


def test_all_of_it_can_be_forgotten() -> None:
    learned = filled()
    learned.ran_out("tts", 9000)
    changes = learned.changes
    learned.forget("tts")
    assert learned.changes > changes  # so that it is saved
    assert learned.figures("tts") == Learned(["tts"]).figures("tts")
    assert learned.figures("llm").residue_mib == 400


def test_times_by_the_nearest_rank() -> None:
    learned = Learned(["tts"])
    for seconds in range(1, 21):
        learned.loaded("tts", seconds)
    learned.unloaded("tts", 0.5, 300)
    learned.unloaded("tts", 0.7, None)
    learned.ran("tts", 2)
    figures = learned.figures("tts")
    assert figures.load_s == Times(10, 19, 20, 10.5)
    assert figures.unload_s == Times(0.5, 0.7, 2, 0.6)
    assert figures.run_s == Times(2, 2, 1, 2)
    assert figures.residue_mib == 300


def test_what_the_first_job_takes_longer_than_a_usual_one_is_the_load() -> None:
    learned = Learned(["llm"])
    learned.ran("llm", 14, cold=True)
    figures = learned.figures("llm")
    assert (figures.load_s, figures.run_s) == (None, None)  # nobody can tell the two apart yet
    assert figures.cold_s == Times(14, 14, 1, 14)
    for seconds in (3, 4, 5):
        learned.ran("llm", seconds)
    figures = learned.figures("llm")
    assert figures.run_s == Times(4, 5, 3, 4)
    assert figures.load_s == Times(10, 10, 1, 10)
    learned.ran("llm", 3, cold=True)  # it was loaded after all: a load takes no less than no time
    assert learned.figures("llm").load_s == Times(0, 10, 2, 5)


# -- over a restart ------------------------------------------------------------------------------


def filled() -> Learned:
    learned = Learned(["tts", "llm"])
    learned.held("tts", 3000)
    learned.ran("tts", 1.5)
    learned.ran("tts", 9.5, cold=True)
    learned.loaded("llm", 7.25)
    learned.unloaded("llm", 0.5, 400)
    return learned


def test_all_of_it_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    stopped_by = {
        "llm": StoppedBy("checkpoint", ((17, 1763.25),)),
        "tts": StoppedBy("http", ((18, 1764.5),)),  # not stopped, but unloaded
    }
    before = filled()
    StateFile(path, before, lambda: stopped_by).save()
    after = Learned(["tts", "llm", "new"])
    assert StateFile(path, after, dict).load() == stopped_by
    for name in ("tts", "llm"):
        assert after.figures(name) == before.figures(name)
    assert after.figures("new").peak is None
    assert [each.name for each in path.parent.iterdir()] == ["state.json"]


def test_a_file_that_does_not_speak_of_the_unloaded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    stopped = {"llm": StoppedBy("unit")}
    StateFile(path, filled(), lambda: stopped).save()
    data = json.loads(path.read_text())
    assert data.pop("unloaded") == {}
    path.write_text(json.dumps(data))
    assert StateFile(path, Learned(["tts", "llm"]), dict).load() == stopped


def test_a_peak_that_no_job_has_ended_with_yet_is_kept_too(tmp_path: Path) -> None:
    learned = Learned(["tts"], lambda: 17.0)
    learned.held("tts", 3000)
    StateFile(tmp_path / "state.json", learned, dict).save()
    after = Learned(["tts"], lambda: 18.0)
    StateFile(tmp_path / "state.json", after, dict).load()
    assert after.figures("tts").peak == Figure(3000, "measured", 17.0)


def test_it_is_written_only_if_there_is_something_new(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    learned, stopped_by = filled(), dict[str, StoppedBy]()
    state = StateFile(path, learned, lambda: stopped_by)
    state.save()
    path.unlink()
    state.save()
    assert not path.exists()
    stopped_by["llm"] = StoppedBy("unit")
    state.save()
    assert path.exists()
    path.unlink()
    learned.ran("tts", 1)
    state.save()
    assert path.exists()


def test_a_consumer_that_is_gone_from_the_config_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    StateFile(path, filled(), dict).save()
    only = Learned(["llm"])
    StateFile(path, only, dict).load()
    assert only.figures("llm").residue_mib == 400


def test_a_file_from_before_first_jobs_were_told_apart_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    StateFile(path, filled(), dict).save()
    data = json.loads(path.read_text())
    for entry in data["consumers"].values():
        del entry["cold_s"]
    path.write_text(json.dumps(data))
    learned = Learned(["tts"])
    StateFile(path, learned, dict).load()
    assert learned.figures("tts").run_s == Times(1.5, 1.5, 1, 1.5)
    assert learned.figures("tts").cold_s is None


def test_guesses_of_an_older_version_are_not_taken_over(tmp_path: Path) -> None:
    """They were never forgotten, and had consumers refused for ever."""
    path = tmp_path / "state.json"
    StateFile(path, filled(), dict).save()
    data = json.loads(path.read_text())
    data["version"] = 1
    for entry in data["consumers"].values():
        del entry["footprint"]
        entry["peaks_mib"] = [7500, 9375, 11_719]
    path.write_text(json.dumps(data))
    learned = Learned(["tts", "llm"])
    StateFile(path, learned, dict).load()
    assert needed(learned) == 2800
    assert learned.figures("tts").run_s == Times(1.5, 1.5, 1, 1.5)
    assert learned.figures("llm").residue_mib == 400


def test_without_a_file_nothing_is_known(tmp_path: Path) -> None:
    assert StateFile(tmp_path / "none", Learned([]), dict).load() == {}


def broken() -> list[Any]:
    footprint = {"measured": [[1, 2.0]], "reported": [], "raised": None, "patience": 20}
    tts = {"footprint": footprint, "residue_mib": None, "load_s": [], "unload_s": [], "run_s": [1]}
    good = {"version": 2, "consumers": {"tts": tts}, "parked": {}}
    raised = {"mib": 1, "at": 1, "good": 1, "patience": 20}

    def with_footprint(**changed: Any) -> Any:
        return {**good, "consumers": {"tts": {**tts, "footprint": {**footprint, **changed}}}}

    return [
        [],
        {},
        {**good, "version": 3},
        with_footprint(measured=[[-1, 2.0]]),
        with_footprint(measured=[[True, 2.0]]),
        with_footprint(measured=[1]),
        with_footprint(reported=[[1, "2"]]),
        with_footprint(raised=5),
        with_footprint(raised={**raised, "good": -1}),
        with_footprint(patience=None),
        {**good, "consumers": {"tts": {**tts, "footprint": None}}},
        {**good, "consumers": {"tts": {**tts, "run_s": ["1"]}}},
        {**good, "consumers": {"tts": {**tts, "run_s": None}}},
        {**good, "consumers": {"tts": 5}},
        {**good, "parked": {"tts": {"rung": "unit"}}},
        {**good, "parked": {"tts": {"rung": "unit", "processes": [[1]]}}},
    ]


@pytest.mark.parametrize("text", ["", "{", "\xff", *map(json.dumps, broken())])
def test_a_file_that_cannot_be_understood_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "state.json"
    path.write_text(text, encoding="latin-1")
    learned = Learned(["tts"])
    with caplog.at_level(logging.WARNING):
        assert StateFile(path, learned, dict).load() == {}
    assert "state not read" in caplog.text
    assert not path.exists()
    assert (tmp_path / "state.json.bad").exists()


def test_a_place_that_cannot_be_read_or_written_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    state = StateFile(tmp_path / "file" / "state.json", filled(), dict)
    with caplog.at_level(logging.WARNING):
        assert state.load() == {}
        state.save()
        state.save()
    assert "state not read" in caplog.text
    assert caplog.text.count("state not saved") == 1
    (tmp_path / "file").unlink()
    state.save()  # nothing was lost meanwhile
    assert json.loads((tmp_path / "file" / "state.json").read_text())["consumers"]["tts"]


@pytest.mark.parametrize(
    ("configured", "environ", "path"),
    [
        ("/var/x.json", {"HOME": "/home/a"}, "/var/x.json"),
        (None, {"HOME": "/home/a"}, "/home/a/.local/state/gpumanager/state-127-0-0-1-8770.json"),
        (None, {"XDG_STATE_HOME": "/s"}, "/s/gpumanager/state-127-0-0-1-8770.json"),
        (
            None,
            {"STATE_DIRECTORY": "/var/lib/g:/x", "HOME": "/home/a"},
            "/var/lib/g/state-127-0-0-1-8770.json",
        ),
    ],
)
def test_where_it_is_kept(configured: str | None, environ: dict[str, str], path: str) -> None:
    assert str(state_path(configured, "127.0.0.1:8770", environ)) == path


def test_what_it_keeps_is_learned_when_a_release_is_over_and_falls_with_less() -> None:
    learned = Learned(["tts"])
    learned.unloaded("tts", 1.0, 2400, until=10.0)  # it was cut short: more may come

    def residue() -> int | None:
        return learned.figures("tts").residue_mib

    assert residue() is None
    learned.kept("tts", 2000, 9.0)
    assert residue() is None
    learned.kept("tts", 900, 10.0)
    assert residue() == 900
    learned.kept("tts", 1500, 20.0)  # somebody uses it beside the broker
    assert residue() == 900
    changes = learned.changes
    learned.kept("tts", 300, 21.0)
    assert residue() == 300
    assert learned.changes == changes + 1
    learned.unloaded("tts", 1.0, 500)
    assert residue() == 500
    learned.unloaded("tts", 1.0, 100, until=30.0)
    assert residue() == 100


@pytest.mark.parametrize("what", ["a job", "somebody beside the broker"])
def test_a_release_that_was_cut_short_and_loaded_again_says_nothing(what: str) -> None:
    learned = Learned(["tts"])
    learned.unloaded("tts", 1.0, 900, until=10.0)
    if what == "a job":
        learned.held("tts", 3000)
    else:
        learned.kept("tts", 3000, 5.0)
    learned.kept("tts", 800, 11.0)
    assert learned.figures("tts").residue_mib is None


def test_whether_it_leaks_is_known_after_a_restart_and_can_be_forgotten() -> None:
    learned, again = Learned(["tts"]), Learned(["tts"])
    for job in range(60):
        learned.growths.at_rest("tts", 3000 + 5 * job, job, 0.0)
    again.restore(json.loads(json.dumps(learned.as_data())))
    _, growth = again.growths.at_rest("tts", 3000, 0, 1.0)
    assert (growth.verdict, growth.mib_per_job) == ("leaks", 5.0)
    again.forget("tts")
    _, growth = again.growths.at_rest("tts", 3000, 0, 1.0)
    assert growth.verdict == "unknown"


# -- of models -----------------------------------------------------------------------------------


def of_models(*names: str) -> Learned:
    learned = Learned(["llm"])
    for name in names:
        learned.held(f"llm/{name}", 3000)
        learned.ran(f"llm/{name}", 1.0, context=4096)
    return learned


def test_of_a_model_nothing_is_known_before_something_is_learned_of_it() -> None:
    learned = of_models("a/b:7b")
    assert learned.figures("llm/new") == Learned(["llm"]).figures("llm")
    assert learned.figures("llm/a/b:7b").needs.contexts == ((4096, 3000),)
    assert learned.figures("llm").peak is None
    learned.failed("llm/new")
    assert "llm/new" not in learned.as_data()


def test_the_models_that_are_learned_of_are_bounded() -> None:
    learned = Learned(["llm", "tts"])
    learned.held("tts/voice", 100)
    learned.held("llm/kept", 3000)
    for number in range(2 * MOST_MODELS):
        learned.held(f"llm/m{number}", 3000)
        learned.ran("llm/kept", 1.0)
    known = learned.as_data().keys()
    assert len([name for name in known if name.startswith("llm/")]) == MOST_MODELS
    assert {"llm", "tts", "tts/voice", "llm/kept", f"llm/m{2 * MOST_MODELS - 1}"} <= known
    assert learned.figures("llm/m0").peak is None


def test_what_is_known_of_one_model_or_of_all_can_be_forgotten() -> None:
    learned = of_models("a", "b", "c")
    learned.held("llm", 9000)
    told: list[Any] = []
    learned.publish(told.append)
    learned.forget("llm/a")
    assert learned.figures("llm/a").peak is None
    assert told[-1].keys() == {"llm", "llm/b", "llm/c"}
    learned.forget("llm")
    assert told[-1].keys() == {"llm"}
    assert learned.figures("llm").peak is None


def test_what_is_known_of_models_outlives_a_restart(tmp_path: Path) -> None:
    before = of_models("a/b:7b", "c")
    before.ran_out("llm/c", 8000)
    StateFile(tmp_path / "state.json", before, dict).save()
    after = Learned(["llm"])
    StateFile(tmp_path / "state.json", after, dict).load()
    for name in ("llm/a/b:7b", "llm/c"):
        assert after.figures(name) == before.figures(name)
    without = Learned(["tts"])
    StateFile(tmp_path / "state.json", without, dict).load()
    assert without.as_data().keys() == {"tts"}  # its consumer is not configured any more


def test_a_file_with_more_models_than_are_kept_is_read(tmp_path: Path) -> None:
    before = of_models("a")
    data = before.as_data()
    many = {f"llm/m{number}": data["llm/a"] for number in range(2 * MOST_MODELS)}
    after = Learned(["llm"])
    after.restore(many)
    assert len(after.as_data()) == MOST_MODELS + 1
