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


def test_what_the_consumer_says_of_each_divides_what_they_hold_together() -> None:
    state = after_job(after_job(FRESH, "a", 1200, 1), "b", 4700, 2)  # `a` had gone for it
    state = after_job(state, "a", 5900, 3)
    assert held(state) == {"a": 2400, "b": 3500}
    state = says(state, 4, "a", "b", a=LoadedModel(1000), b=LoadedModel(4500))
    assert held(state) == {"a": 1072, "b": 4827}


# -- names ---------------------------------------------------------------------------------------


def unknown_job(state: ConsumerState, called: str, held_mib: int, at: float) -> ConsumerState:
    """A job whose model is not known by the name that it has there."""
    state = transitions.job_started(state, at, None, tells=True)
    state = shares.measured(state, held_mib, 0, at)
    return transitions.job_finished(
        state, at, worked=True, unloaded=None, process_gone=False, called=called
    )


def test_what_a_name_means_is_learned_from_what_was_loaded_for_it() -> None:
    state = says(unknown_job(says(FRESH, 1), "gpt-4o", 5000, 2), 3, "qwen3:8b")
    assert state.aliases == {"gpt-4o": "qwen3:8b"}
    state = says(unknown_job(state, "gpt-4o", 5000, 4), 5, "qwen3:8b")  # it was there already
    assert state.aliases == {"gpt-4o": "qwen3:8b"}
    state = says(unknown_job(state, "gpt-4o", 2000, 6), 7, "small")  # it means another one now
    assert state.aliases == {"gpt-4o": "small"}


def test_what_a_name_means_is_not_guessed() -> None:
    state = says(unknown_job(says(FRESH, 1, "a"), "x", 5000, 2), 3, "a")  # or it has unloaded it
    assert state.aliases == {}
    two = unknown_job(unknown_job(state, "x", 6000, 4), "y", 7000, 5)
    assert says(two, 6, "a", "b").aliases == {}
    assert says(unknown_job(state, "x", 9000, 4), 6, "a", "b", "c").aliases == {}
    failed = transitions.job_finished(
        transitions.job_started(state, 4, None, tells=True),
        5,
        worked=False,
        unloaded=None,
        process_gone=False,
        called="x",
    )
    assert says(failed, 6, "a", "b").aliases == {}


def test_a_name_that_is_listed_means_itself() -> None:
    state = says(unknown_job(says(FRESH, 1), "x", 5000, 2), 3, "a")
    assert says(state, 4, "a", "x").aliases == {}


def test_the_other_names_are_bounded() -> None:
    state = says(FRESH, 1)
    for number in range(2 * shares.MOST_MODELS):
        state = says(unknown_job(state, f"n{number}", 5000, number), number, f"m{number}")
    assert len(state.aliases) == shares.MOST_MODELS
    assert f"n{2 * shares.MOST_MODELS - 1}" in state.aliases


def test_a_model_that_was_counted_by_another_name_is_not_counted_twice() -> None:
    state = transitions.job_started(says(FRESH, 1), 2, "library/a", tells=True)
    state = shares.measured(state, 5000, 0, 2)
    state = transitions.job_finished(
        state,
        3,
        worked=True,
        unloaded=None,
        process_gone=False,
        model="library/a",
        called="library/a",
    )
    state = says(state, 4, "a:latest")
    assert held(state) == {"a": 5000}
    assert state.models.keys() == {"a"}
    assert state.aliases == {"library/a": "a"}


def test_what_comes_with_a_job_whose_model_is_not_known_is_not_anothers() -> None:
    state = says(after_job(FRESH, "a", 5000, 1), 1, "a")
    state = unknown_job(state, "x", 9000, 2)
    assert held(state) == {"a": 5000}
    state = shares.measured(state, 9000, 0, 3)  # at rest, and it has not said what is there
    assert held(state) == {"a": 5000}
    state = shares.measured(says(state, 4, "a", "b"), 9000, 0, 5)
    assert held(state) == {"a": 5000, "b": 4000}


def test_the_only_model_has_what_came_with_a_job_that_loaded_no_other() -> None:
    state = says(after_job(FRESH, "a", 5000, 1), 1, "a")
    state = unknown_job(state, "x", 5400, 2)
    assert held(state) == {"a": 5000}
    assert held(shares.measured(says(state, 3, "a"), 5400, 0, 4)) == {"a": 5400}


def test_models_that_were_there_before_the_broker_share_what_is_held() -> None:
    state = says(FRESH, 1, "a", "b")
    assert held(shares.measured(state, 8000, 0, 2)) == {"a": 4000, "b": 4000}


def test_a_list_from_before_all_was_back_says_nothing() -> None:
    """A router lists a model as loaded until its process has ended."""
    state = after_job(after_job(FRESH, "a", 5000, 1), "b", 6200, 2)
    state = transitions.set_loaded(state, False, 3, "a")
    seen = state.residency_version
    state = says(state, 4, "a", "b")
    assert set(held(state)) == {"a", "b"}
    state = transitions.came_back(state, "a")
    assert held(state) == {"b": 1200}
    assert state.loaded
    late = ProbeReport(loaded=True, items=("a", "b"))  # asked before, answered after
    state = transitions.probe_succeeded(state, late, 5, seen_version=seen, assumed_loaded=False)
    assert held(state) == {"b": 1200}
    state = transitions.came_back(transitions.set_loaded(state, False, 6, "b"), "b")
    assert (held(state), state.loaded) == ({}, False)


def test_one_that_works_again_when_its_memory_was_back_stays_loaded() -> None:
    state = transitions.set_loaded(after_job(FRESH, "a", 5000, 1), False, 2, "a")
    state = transitions.came_back(transitions.job_started(state, 3, "a", tells=True), "a")
    assert state.loaded_models == ("a",)
