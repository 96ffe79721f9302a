"""What each model of a consumer holds, where only the sum is measured."""

from __future__ import annotations

from dataclasses import replace

from gpumanager.consumers import shares, transitions
from gpumanager.model import ConsumerState, LoadedModel, ProbeReport


def after_job(state: ConsumerState, model: str, held_mib: int, at: float) -> ConsumerState:
    """A job with that model has run, and its consumer holds so much meanwhile."""
    state = transitions.job_started(state, at, model, tells=True)
    state = shares.measured(state, held_mib, 0, at)
    return transitions.job_finished(
        state, at, worked=True, unloaded=None, process_gone=False, model=model
    )


def says(state: ConsumerState, at: float, *items: str, **details: LoadedModel) -> ConsumerState:
    report = ProbeReport(loaded=bool(items), items=items, details=details)
    return transitions.probe_succeeded(
        state, report, at, seen_version=state.residency_version, assumed_loaded=False
    )


def held(state: ConsumerState) -> dict[str, int]:
    return {name: each.held_mib for name, each in state.models.items() if each.loaded}


FRESH = transitions.fresh(False, 0.0)


def test_the_only_model_holds_all_that_is_not_the_bare_process() -> None:
    state = after_job(FRESH, "a", 5000, 1)
    assert shares.shared(state, 5200, 300) == {"a": 4900}


def test_what_a_job_grows_by_is_its_models() -> None:
    state = after_job(after_job(FRESH, "a", 5000, 1), "b", 6200, 2)
    assert held(state) == {"a": 5000, "b": 1200}
    state = after_job(state, "a", 6500, 3)  # a longer context
    assert held(state) == {"a": 5300, "b": 1200}


def test_what_a_job_gives_back_is_its_models() -> None:
    state = after_job(after_job(FRESH, "a", 5000, 1), "b", 6200, 2)
    state = after_job(state, "a", 5700, 3)
    assert held(state) == {"a": 4500, "b": 1200}


def test_at_rest_nothing_is_taken_from_one_that_another_may_have_given_back() -> None:
    state = after_job(after_job(FRESH, "a", 5000, 1), "b", 6200, 2)
    state = shares.measured(state, 1200, 0, 3)  # `a` has gone by itself, and nobody has said so
    assert held(state) == {"a": 5000, "b": 1200}
    assert sum(shares.shared(state, 1200, 0).values()) <= 1200
    assert held(says(state, 4, "b")) == {"b": 1200}


def test_what_one_was_unloaded_of_is_not_given_to_another() -> None:
    state = after_job(after_job(FRESH, "a", 5000, 1), "b", 6200, 2)
    state = transitions.set_loaded(state, False, 3, "a")
    state = shares.measured(state, 6200, 0, 3)  # it is still there
    assert held(state) == {"b": 1200}
    state = shares.measured(state, 1200, 0, 4)
    assert state.model("a").unloaded_at is None
    assert held(shares.measured(state, 1500, 0, 5)) == {"b": 1500}


def test_memory_that_never_comes_back_is_in_the_end_somebodys() -> None:
    state = after_job(after_job(FRESH, "a", 5000, 1), "b", 6200, 2)
    state = transitions.set_loaded(state, False, 3, "a")
    state = shares.measured(state, 6200, 0, 90)
    assert held(shares.measured(state, 6200, 0, 91)) == {"b": 6200}


def test_a_model_that_somebody_else_has_loaded_holds_what_the_consumer_says() -> None:
    state = after_job(FRESH, "a", 5000, 1)
    state = says(state, 2, "a", "b", b=LoadedModel(1200, 1200, 8192))
    assert held(state) == {"a": 5000, "b": 1200}
    assert state.model("b").context == 8192


def test_names_with_the_usual_tag_are_the_same() -> None:
    state = says(after_job(FRESH, "a", 5000, 1), 2, "a:latest")
    assert held(state) == {"a": 5000}


def test_a_consumer_is_loaded_as_long_as_one_of_its_models_is() -> None:
    state = after_job(after_job(FRESH, "a", 5000, 1), "b", 6200, 2)
    state = transitions.set_loaded(state, False, 3, "a")
    assert state.loaded
    assert state.unloaded_at is None
    state = transitions.set_loaded(state, False, 4, "b")
    assert not state.loaded
    assert state.unloaded_at == 4


def test_a_process_that_has_ended_has_no_models() -> None:
    state = after_job(FRESH, "a", 5000, 1)
    assert not transitions.probe_failed(state, "gone", 2, process_gone=True).loaded_models


def test_a_job_that_loaded_nothing_leaves_its_model_as_it_was() -> None:
    before = after_job(FRESH, "a", 5000, 1)
    state = transitions.job_started(before, 2, "b", tells=True)
    state = transitions.job_finished(
        state, 3, worked=False, unloaded=before, process_gone=False, model="b"
    )
    assert state.loaded_models == ("a",)
    assert state.loaded


def test_the_models_are_bounded_and_those_that_are_loaded_or_pinned_stay() -> None:
    state = after_job(FRESH, "kept", 100, 1)
    state = shares.with_models(state, {"pinned": replace(state.model("pinned"), pinned=True)})
    for number in range(2 * shares.MOST_MODELS):
        state = transitions.job_started(state, number, f"m{number}", tells=False)
        state = transitions.job_finished(
            state, number, worked=True, unloaded=None, process_gone=False, model=f"m{number}"
        )
    assert len(state.models) == shares.MOST_MODELS
    assert {"kept", "pinned", f"m{2 * shares.MOST_MODELS - 1}"} <= state.models.keys()


def test_models_that_were_there_before_the_broker_are_told_apart_as_far_as_can_be() -> None:
    state = shares.measured(says(FRESH, 1, "a", "b"), 6001, 0, 2)
    assert held(state) == {"a": 3000, "b": 3000}
    state = says(after_job(FRESH, "a", 5000, 1), 2, "a", "b")
    assert held(shares.measured(state, 6200, 0, 3)) == {"a": 5000, "b": 1200}


def test_what_it_said_of_one_that_was_unloaded_is_taken_off_its_own_sum() -> None:
    state = replace(
        says(FRESH, 1, "a", "b", a=LoadedModel(5000), b=LoadedModel(1200)), resident_mib=6200
    )
    assert transitions.set_loaded(state, False, 2, "a").resident_mib == 1200
