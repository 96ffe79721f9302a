"""What is known of the consumers, through everything that changes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpumanager.consumers.registry import InUse, Registry
from gpumanager.errors import NoConsumer
from gpumanager.gpu.accounting import Held, held
from gpumanager.model import (
    RELEASE_S,
    ConsumerState,
    GpuState,
    Growth,
    Holdings,
    MemoryReading,
    ProbeReport,
    StoppedBy,
)
from tests.support.clock import FakeClock
from tests.support.known import config_of, registry_of
from tests.support.threads import Outcome


def held_mib(state: ConsumerState, declared: int) -> int:
    return held("mvoice", state, declared, None).mib


def make(*, loaded: bool = True) -> tuple[Registry, FakeClock]:
    clock = FakeClock()
    return registry_of({"mvoice": loaded, "comfyui": False}, clock), clock


def probe(registry: Registry, loaded: bool | None = None, mib: int | None = None) -> bool:
    version = registry.get("mvoice").residency_version
    return registry.probe_succeeded("mvoice", ProbeReport(loaded, mib), seen_version=version)


def test_what_is_assumed_at_the_start() -> None:
    registry, _ = make()
    assert registry.get("mvoice").loaded
    assert not registry.get("comfyui").loaded
    assert registry.get("mvoice").healthy is None


def test_a_probe_is_believed() -> None:
    registry, clock = make()
    assert probe(registry, loaded=False, mib=120)
    state = registry.get("mvoice")
    assert (state.healthy, state.loaded, state.resident_mib) == (True, False, 120)
    assert state.last_probe == clock.monotonic()
    assert not probe(registry)  # nothing changed
    assert registry.get("mvoice").resident_mib == 120


def test_one_that_has_unloaded_by_itself_is_releasing() -> None:
    registry, clock = make()
    assert not registry.get("mvoice").is_releasing(clock.monotonic())
    probe(registry, loaded=True)
    clock.advance(5)
    probe(registry, loaded=False)
    state = registry.get("mvoice")
    assert state.is_releasing(clock.monotonic())
    clock.advance(RELEASE_S)
    probe(registry, loaded=False)
    assert not registry.get("mvoice").is_releasing(clock.monotonic())


def test_one_that_was_only_assumed_to_be_loaded_has_nothing_to_release() -> None:
    registry, clock = make()
    probe(registry, loaded=False)
    assert not registry.get("mvoice").is_releasing(clock.monotonic())


def test_a_failed_probe_says_nothing_of_the_residency() -> None:
    registry, _ = make()
    probe(registry, loaded=True, mib=2800)
    assert registry.probe_failed("mvoice", "answered 500")
    state = registry.get("mvoice")
    assert (state.healthy, state.last_error) == (False, "answered 500")
    assert (state.loaded, state.resident_mib) == (True, 2800)
    assert not registry.probe_failed("mvoice", "answered 500")
    assert probe(registry)
    assert registry.get("mvoice").last_error == ""


def test_a_process_that_is_gone_holds_nothing() -> None:
    registry, _ = make()
    probe(registry, loaded=True, mib=2800)
    registry.probe_failed("mvoice", "refused", process_gone=True)
    assert not registry.get("mvoice").loaded
    assert held_mib(registry.get("mvoice"), 2800) == 0
    registry.process_returned("mvoice", seen_version=registry.get("mvoice").residency_version)
    assert held_mib(registry.get("mvoice"), 2800) == 2800


def test_a_job_counts_as_use_and_loads_the_model() -> None:
    registry, clock = make(loaded=False)
    probe(registry, loaded=False, mib=0)
    registry.job_started("mvoice")
    state = registry.get("mvoice")
    assert (state.active, state.total_requests, state.loaded) == (1, 1, True)
    assert held_mib(state, 2800) == 2800
    clock.advance(5)
    registry.job_finished("mvoice")
    state = registry.get("mvoice")
    assert (state.active, state.total_requests) == (0, 1)
    assert state.last_used == clock.monotonic()


def test_a_probe_is_no_use() -> None:
    registry, _ = make()
    probe(registry, loaded=True, mib=1)
    assert registry.get("mvoice").last_used is None


def test_a_probe_that_began_before_an_unload_does_not_undo_it() -> None:
    registry, _ = make()
    seen = registry.get("mvoice").residency_version
    registry.set_loaded("mvoice", False)
    registry.probe_succeeded("mvoice", ProbeReport(True, 2800), seen_version=seen)
    state = registry.get("mvoice")
    assert (state.healthy, state.loaded, held_mib(state, 2800)) == (True, False, 0)
    assert probe(registry, loaded=True, mib=2800) is False
    assert registry.get("mvoice").loaded


@pytest.mark.parametrize("ends", ["before the probe does", "after the probe does"])
def test_a_probe_that_began_before_a_job_loaded_the_model_does_not_undo_it(ends: str) -> None:
    registry, _ = make(loaded=False)
    registry.job_started("mvoice")
    seen = registry.get("mvoice").residency_version  # the model is not in memory yet
    if ends == "before the probe does":
        registry.job_finished("mvoice")
    registry.probe_succeeded("mvoice", ProbeReport(False, 0), seen_version=seen)
    assert held_mib(registry.get("mvoice"), 2800) == 2800


def test_a_load_forgets_what_was_reported_before() -> None:
    registry, _ = make()
    registry.set_loaded("mvoice", False)
    registry.set_loaded("mvoice", True)
    assert held_mib(registry.get("mvoice"), 2800) == 2800


def test_a_snapshot_never_changes() -> None:
    registry, _ = make()
    before = registry.now.states
    registry.job_started("mvoice")
    assert before["mvoice"].active == 0
    assert registry.now.states["mvoice"].active == 1


def test_counts_survive_many_threads() -> None:
    registry, _ = make()

    def use() -> None:
        for _ in range(300):
            registry.job_started("mvoice")
            registry.job_finished("mvoice")

    for outcome in [Outcome(use) for _ in range(4)]:
        outcome.result()
    state = registry.get("mvoice")
    assert (state.active, state.total_requests) == (0, 1200)


def test_the_gpu_sample_is_published_whole() -> None:
    registry, _ = make()
    registry.set_gpu(GpuState(err="no driver"))
    assert registry.now.gpu.err == "no driver"


def test_a_job_that_was_never_sent_leaves_the_residency_as_it_was() -> None:
    registry, _ = make(loaded=False)
    before = registry.job_started("mvoice")
    registry.job_finished("mvoice", unloaded=before)
    assert held_mib(registry.get("mvoice"), 2800) == 0


def test_a_refused_job_proves_that_the_process_is_gone() -> None:
    registry, _ = make()
    registry.job_started("mvoice")
    registry.job_finished("mvoice", process_gone=True)
    assert held_mib(registry.get("mvoice"), 2800) == 0


def test_a_figure_from_before_a_job_is_a_lower_bound_until_the_next_probe() -> None:
    registry, _ = make()
    probe(registry, loaded=True, mib=2000)
    registry.job_started("mvoice")
    registry.job_finished("mvoice")
    state = registry.get("mvoice")
    assert (held_mib(state, 10000), held("mvoice", state, 10000, None).surely_mib) == (10000, 2000)
    probe(registry, loaded=True, mib=2000)
    assert held_mib(registry.get("mvoice"), 10000) == 2000


def test_memory_that_is_reported_shows_that_a_model_is_loaded() -> None:
    registry, _ = make(loaded=False)
    probe(registry, mib=500)  # a context, no model
    assert not registry.get("mvoice").loaded
    probe(registry, mib=10000)
    assert registry.get("mvoice").loaded


def test_a_return_that_was_seen_too_late_undoes_no_job() -> None:
    registry, _ = make(loaded=False)
    seen = registry.get("mvoice").residency_version
    registry.job_started("mvoice")
    registry.process_returned("mvoice", seen_version=seen)
    assert registry.get("mvoice").loaded


# -- stopped by the broker, and in quarantine ----------------------------------------------------

STOPPED = StoppedBy("unit")


def test_who_was_stopped_is_not_unhealthy_for_not_answering() -> None:
    registry, _ = make()
    probe(registry)
    registry.mark_stopped("mvoice", STOPPED)
    assert not registry.probe_failed("mvoice", "refused", process_gone=True)
    state = registry.get("mvoice")
    assert (state.healthy, state.stopped_by, state.loaded, state.last_error) == (
        None,
        STOPPED,
        False,
        "",
    )
    registry.mark_started("mvoice", resumed=False)
    state = registry.get("mvoice")
    assert (state.healthy, state.stopped_by, state.loaded) == (True, None, True)  # as assumed


def test_who_goes_on_where_it_was_has_its_model() -> None:
    registry, _ = make(loaded=False)
    registry.mark_stopped("mvoice", StoppedBy("checkpoint"))
    registry.mark_started("mvoice", resumed=True)
    assert registry.get("mvoice").loaded


def test_who_was_started_by_somebody_else_is_back() -> None:
    registry, _ = make()
    registry.mark_stopped("mvoice", STOPPED)
    assert probe(registry, True, 100)
    assert registry.get("mvoice").stopped_by is None


def test_an_answer_from_just_before_it_was_stopped_brings_nobody_back() -> None:
    registry, _ = make()
    seen = registry.get("mvoice").residency_version
    registry.mark_stopped("mvoice", STOPPED)
    registry.probe_succeeded("mvoice", ProbeReport(True, 2800), seen_version=seen)
    state = registry.get("mvoice")
    assert (state.stopped_by, state.loaded, state.healthy) == (STOPPED, False, None)


@pytest.mark.parametrize("how", ["probe", "job", "stop"])
def test_a_quarantine_ends_with_the_process(how: str) -> None:
    registry, _ = make()
    registry.quarantine("mvoice", "gave nothing back")
    probe(registry, True, 2800)
    assert registry.get("mvoice").quarantine == "gave nothing back"
    if how == "probe":
        registry.probe_failed("mvoice", "refused", process_gone=True)
    elif how == "job":
        registry.job_started("mvoice")
        registry.job_finished("mvoice", process_gone=True)
    else:
        registry.mark_stopped("mvoice", STOPPED)
    assert registry.get("mvoice").quarantine == ""


def test_a_quarantine_ends_by_itself_and_lasts_longer_each_time() -> None:
    registry, clock = make()
    lasted = []
    for _ in range(8):
        lasted.append(registry.quarantine("mvoice", "gave nothing back"))
        clock.advance(lasted[-1] - 1)
        registry.end_quarantines()
        assert registry.get("mvoice").quarantine
        clock.advance(1)
        registry.end_quarantines()
        assert registry.get("mvoice").quarantine == ""
    assert lasted == [60, 120, 240, 480, 600, 600, 600, 600]
    registry.release("mvoice")
    assert registry.quarantine("mvoice", "again") == 60


def test_what_is_on_the_cpu_is_forgotten_with_the_model() -> None:
    registry, _ = make()
    registry.probe_succeeded("mvoice", ProbeReport(True, 1, ("big",)), seen_version=0)
    assert registry.get("mvoice").on_cpu == ("big",)
    registry.set_loaded("mvoice", False)
    assert registry.get("mvoice").on_cpu == ()


def test_figures_of_its_processes_outweigh_its_own() -> None:
    registry, _ = make()
    probe(registry, True, 2800)
    reading = MemoryReading(8000, 500, 7500, holdings=Holdings({"mvoice": 500}))
    state = registry.get("mvoice")
    assert held("mvoice", state, 3000, reading) == Held(500, 500, "measured")
    assert held("other", state, 3000, reading) == Held(2800, 2800, "reported")
    assert held("mvoice", state, 3000, None) == Held(2800, 2800, "reported")


def test_it_is_known_since_when_a_consumer_is_down_stopped_or_back() -> None:
    registry, clock = make()
    assert registry.get("mvoice").health_since is None
    probe(registry)
    came = clock.monotonic()
    clock.advance(5)
    probe(registry)
    assert registry.get("mvoice").health_since == came
    registry.probe_failed("mvoice", "connection refused")
    fell = clock.monotonic()
    clock.advance(5)
    registry.probe_failed("mvoice", "timed out")
    assert registry.get("mvoice").health_since == fell
    registry.mark_stopped("mvoice", StoppedBy("unit"))
    assert registry.get("mvoice").health_since == clock.monotonic()
    clock.advance(5)
    registry.mark_started("mvoice", resumed=False)
    assert registry.get("mvoice").health_since == clock.monotonic()


# -- what is only assumed ------------------------------------------------------------------------


def test_what_is_assumed_at_the_start_is_known_to_be_assumed() -> None:
    registry, clock = make()
    assert registry.get("mvoice").assumed == clock.monotonic()
    assert registry.get("comfyui").assumed is None


@pytest.mark.parametrize(
    "confirm",
    [
        lambda registry: probe(registry, loaded=True),
        lambda registry: probe(registry, mib=2800),
        lambda registry: registry.set_loaded("mvoice", True),
        lambda registry: registry.confirm("mvoice"),
        lambda registry: (registry.job_started("mvoice"), registry.job_finished("mvoice")),
    ],
)
def test_an_assumption_is_confirmed(confirm: Callable[[Registry], object]) -> None:
    registry, _ = make()
    confirm(registry)
    state = registry.get("mvoice")
    assert (state.loaded, state.assumed) == (True, None)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_job_that_failed_confirms_nothing(loaded: bool) -> None:
    registry, _ = make(loaded=loaded)
    probe(registry)
    before = registry.job_started("mvoice")
    assert registry.get("mvoice").assumed is not None
    registry.job_finished("mvoice", worked=False)
    state = registry.get("mvoice")
    assert state.loaded
    assert state.assumed is not None
    registry.job_started("mvoice")
    registry.job_finished("mvoice", worked=False, unloaded=before)
    state = registry.get("mvoice")
    assert (state.loaded, state.assumed is not None) == (loaded, loaded)


def test_a_fresh_process_is_known_as_little_as_at_the_start() -> None:
    registry, _ = make()
    probe(registry, loaded=True)
    registry.probe_failed("mvoice", "refused", process_gone=True)
    assert registry.get("mvoice").assumed is None
    registry.process_returned("mvoice", seen_version=registry.get("mvoice").residency_version)
    assert registry.get("mvoice").assumed is not None
    registry.mark_stopped("mvoice", STOPPED)
    assert registry.get("mvoice").assumed is None
    registry.mark_started("mvoice", resumed=False)
    assert registry.get("mvoice").assumed is not None


def test_one_that_somebody_else_started_may_have_its_model() -> None:
    registry, _ = make()
    registry.mark_stopped("mvoice", STOPPED)
    probe(registry)
    state = registry.get("mvoice")
    assert (state.loaded, state.assumed is not None) == (True, True)


def test_only_an_assumption_can_be_dropped() -> None:
    registry, _ = make()
    registry.job_started("mvoice")
    registry.drop_assumption("mvoice")
    assert registry.get("mvoice").loaded
    registry.job_finished("mvoice", worked=False)
    registry.drop_assumption("mvoice")
    assert not registry.get("mvoice").loaded
    registry.set_loaded("mvoice", True)
    registry.drop_assumption("mvoice")
    assert registry.get("mvoice").loaded


def test_who_is_in_use_is_neither_removed_nor_moved() -> None:
    registry, _ = make()
    first = registry.now.config
    with registry.using("mvoice"):
        registry.job_started("mvoice")
        with pytest.raises(InUse, match="consumer mvoice is in use"):
            registry.reshape(config_of({"comfyui": False}))
        with pytest.raises(InUse):
            registry.reshape(config_of({"mvoice": False, "comfyui": False}), ["mvoice"])
        assert registry.now.config is first
        others = config_of({"mvoice": True, "new": True})
        registry.reshape(others)
        registry.job_finished("mvoice")
    assert registry.now.config is others
    assert registry.get("new").loaded
    assert registry.get("mvoice").active == 0
    registry.reshape(config_of({"mvoice": False, "new": True}), ["mvoice"])
    assert registry.get("mvoice") == ConsumerState(loaded=False, residency_version=3)


def test_one_that_the_broker_has_stopped_is_not_removed() -> None:
    registry, _ = make()
    registry.mark_stopped("comfyui", StoppedBy("unit"))
    with pytest.raises(InUse):
        registry.reshape(config_of({"mvoice": True}))


def test_nobody_begins_to_work_with_one_that_was_removed() -> None:
    registry, _ = make()
    registry.reshape(config_of({"comfyui": False}))
    with pytest.raises(NoConsumer, match="mvoice is not in the config"):
        registry.enter("mvoice")
    assert not registry.get("mvoice").active  # for who still reads by the config before
    registry.reshape(config_of({"mvoice": False, "comfyui": False}), ["mvoice"])
    with registry.using("mvoice"):
        pass


def test_what_was_asked_of_the_one_before_is_no_answer_of_the_one_that_took_its_name() -> None:
    registry, _ = make()
    seen = registry.get("mvoice").residency_version
    registry.reshape(config_of({"mvoice": False, "comfyui": False}), ["mvoice"])
    registry.probe_succeeded("mvoice", ProbeReport(True, 2000), seen_version=seen)
    assert not registry.get("mvoice").loaded


def test_since_when_its_memory_may_be_on_its_way_back() -> None:
    registry, clock = make()
    assert registry.get("mvoice").unloaded_at is None
    registry.set_loaded("mvoice", False)
    at = clock.monotonic()
    assert registry.get("mvoice").unloaded_at == at
    clock.advance(1)
    probe(registry, mib=2800)  # which is still there, but on its way
    assert not registry.get("mvoice").loaded
    before = registry.job_started("mvoice")
    assert registry.get("mvoice").unloaded_at is None
    registry.job_finished("mvoice", worked=False, unloaded=before)  # it loaded nothing
    assert registry.get("mvoice").unloaded_at == at
    registry.set_loaded("mvoice", True)
    assert registry.get("mvoice").unloaded_at is None
    registry.mark_stopped("mvoice", STOPPED)
    assert registry.get("mvoice").unloaded_at == clock.monotonic()
    registry.mark_started("mvoice", resumed=True)
    assert registry.get("mvoice").unloaded_at is None
    registry.set_loaded("mvoice", False)
    registry.probe_failed("mvoice", "refused", process_gone=True)
    assert registry.get("mvoice").unloaded_at is None


def test_what_it_still_reports_long_after_an_unload_is_loaded() -> None:
    registry, clock = make()
    registry.set_loaded("mvoice", False)
    clock.advance(RELEASE_S)
    probe(registry, mib=2800)
    assert registry.get("mvoice").loaded


# -- growth --------------------------------------------------------------------------------------


def test_what_has_leaked_is_over_with_an_unload_and_the_leak_is_known_all_the_same() -> None:
    registry = registry_of({"tts": True}, FakeClock())
    leaks = Growth("leaks", "jobs", 3000, grown_mib=900, mib_per_job=10.0, jobs=90)
    registry.note_growth("tts", leaks)
    registry.job_started("tts")
    assert registry.get("tts").growth == leaks
    registry.job_finished("tts")
    registry.set_loaded("tts", False)
    assert registry.get("tts").growth == Growth("leaks", "jobs", 3000, mib_per_job=10.0)
    registry.note_growth("tts", leaks)  # a look from before
    registry.job_started("tts")
    assert registry.get("tts").growth.leaked_mib == 0
