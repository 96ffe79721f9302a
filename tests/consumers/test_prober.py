"""What a probe's outcome says of a consumer, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import ANY

import pytest
import yaml

from gpumanager.config import parse_config
from gpumanager.consumers.footprint import Figure
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.prober import ASKED_AGAIN, Prober
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerTimeout, ConsumerUnreachable
from gpumanager.gpu.accounting import held
from gpumanager.model import ConsumerState, LoadedModel, ProbeReport, StoppedBy
from gpumanager.telemetry.events import CameBack, Event
from tests.support.clock import FakeClock
from tests.support.events import ignore
from tests.support.known import registry_of

TIMEOUT = ConsumerTimeout("mvoice: no answer within 3 s")
REFUSED = ConsumerUnreachable("mvoice refused the connection", nothing_listens=True)
BROKEN = ConsumerUnreachable("mvoice answered 500 to GET /health")


def held_mib(state: ConsumerState, declared: int) -> int:
    return held("mvoice", state, declared, None).mib


class ScriptedProbes:
    def __init__(self) -> None:
        self.answer: ProbeReport | BrokerError = ProbeReport()
        self.meanwhile: Callable[[], object] = lambda: None
        self.told: int | BrokerError | None = None
        self.asked = 0

    def probe(self, name: str, consumer: object) -> ProbeReport:
        assert name == "mvoice"
        self.meanwhile()
        if isinstance(self.answer, BrokerError):
            raise self.answer
        return self.answer

    def slots(self, name: str, consumer: object) -> int | None:
        self.asked += 1
        if isinstance(self.told, BrokerError):
            raise self.told
        return self.told


@pytest.fixture
def probes() -> ScriptedProbes:
    return ScriptedProbes()


@pytest.fixture
def registry() -> Registry:
    return registry_of({"mvoice": True}, FakeClock())


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def prober(probes: ScriptedProbes, registry: Registry, told: list[Event]) -> Prober:
    return Prober(
        "mvoice",
        probes,
        registry,
        Learned(["mvoice"]),
        lambda name, stopped_by: None,
        told.append,
        interval=5.0,
    )


def test_a_good_answer_makes_it_healthy(
    prober: Prober, probes: ScriptedProbes, registry: Registry
) -> None:
    probes.answer = ProbeReport(loaded=True, resident_mib=2800)
    assert prober.probe() == 5.0
    assert registry.get("mvoice").healthy is True
    assert registry.get("mvoice").resident_mib == 2800


@pytest.mark.parametrize("error", [TIMEOUT, REFUSED, BROKEN])
def test_a_failure_makes_it_unhealthy(
    prober: Prober, probes: ScriptedProbes, registry: Registry, error: BrokerError
) -> None:
    probes.answer = error
    prober.probe()
    assert registry.get("mvoice").healthy is False
    assert registry.get("mvoice").last_error == error.message


def test_a_time_out_while_its_job_runs_says_nothing(
    prober: Prober, probes: ScriptedProbes, registry: Registry
) -> None:
    prober.probe()
    registry.job_started("mvoice")
    probes.answer = TIMEOUT
    prober.probe()
    assert registry.get("mvoice").healthy is True


def test_a_time_out_of_a_probe_that_a_job_overtook_says_nothing(
    prober: Prober, probes: ScriptedProbes, registry: Registry
) -> None:
    prober.probe()
    probes.answer = TIMEOUT
    probes.meanwhile = lambda: registry.job_started("mvoice")
    prober.probe()
    assert registry.get("mvoice").healthy is True


def test_a_time_out_of_a_probe_that_began_during_a_job_says_nothing(
    prober: Prober, probes: ScriptedProbes, registry: Registry
) -> None:
    prober.probe()
    registry.job_started("mvoice")
    probes.answer = TIMEOUT
    probes.meanwhile = lambda: registry.job_finished("mvoice")
    prober.probe()
    assert registry.get("mvoice").healthy is True


@pytest.mark.parametrize("error", [REFUSED, BROKEN])
def test_any_other_failure_counts_while_a_job_runs(
    prober: Prober, probes: ScriptedProbes, registry: Registry, error: BrokerError
) -> None:
    registry.job_started("mvoice")
    probes.answer = error
    prober.probe()
    assert registry.get("mvoice").healthy is False


def test_one_that_went_and_came_back_is_a_fresh_process(
    prober: Prober, probes: ScriptedProbes, registry: Registry
) -> None:
    probes.answer = ProbeReport(loaded=True, resident_mib=2800)
    prober.probe()
    probes.answer = REFUSED
    prober.probe()
    assert held_mib(registry.get("mvoice"), 2800) == 0
    probes.answer = ProbeReport()
    prober.probe()
    assert registry.get("mvoice").healthy is True
    assert held_mib(registry.get("mvoice"), 3000) == 3000


def test_transitions_are_events_and_nothing_else_is(
    prober: Prober, probes: ScriptedProbes, told: list[Event]
) -> None:
    prober.probe()
    prober.probe()
    probes.answer = BROKEN
    prober.probe()
    prober.probe()
    probes.answer = ProbeReport()
    prober.probe()
    assert [event.name for event in told] == ["healthy", "unhealthy", "healthy"]


def test_a_time_out_while_the_broker_has_it_load_says_nothing(
    prober: Prober, probes: ScriptedProbes, registry: Registry
) -> None:
    prober.probe()
    probes.answer = TIMEOUT
    with registry.busy("mvoice"):
        prober.probe()
    assert registry.get("mvoice").healthy is True
    prober.probe()
    assert registry.get("mvoice").healthy is False


# -- stopped by a checkpoint ---------------------------------------------------------------------

SUSPENDED = StoppedBy("checkpoint", ((11, 1.0),))


@pytest.mark.parametrize(("how", "loaded"), [(None, False), ("resumed", True), ("replaced", False)])
def test_a_checkpoint_ends_with_a_restore_not_with_an_answer(
    probes: ScriptedProbes, how: Any, loaded: bool, told: list[Event]
) -> None:
    """Only its CUDA calls are stopped: /health goes on answering."""
    registry = registry_of({"mvoice": False}, FakeClock())
    registry.mark_stopped("mvoice", SUSPENDED)
    prober = Prober(
        "mvoice",
        probes,
        registry,
        Learned(["mvoice"]),
        lambda name, stopped_by: how,
        told.append,
        interval=5.0,
    )
    prober.probe()
    state = registry.get("mvoice")
    assert (state.stopped_by, state.loaded) == (SUSPENDED if how is None else None, loaded)
    assert told == ([] if how is None else [CameBack(consumer="mvoice", how=how)])


def test_a_stopped_process_that_ends_is_one_that_is_gone(
    prober: Prober, probes: ScriptedProbes, registry: Registry
) -> None:
    registry.mark_stopped("mvoice", SUSPENDED)
    probes.answer = TIMEOUT
    prober.probe()
    assert registry.get("mvoice").stopped_by == SUSPENDED
    probes.answer = REFUSED
    prober.probe()
    state = registry.get("mvoice")
    assert (state.stopped_by, state.healthy, state.loaded) == (None, False, False)


def test_one_that_was_stopped_anew_meanwhile_stays_so(probes: ScriptedProbes) -> None:
    registry = registry_of({"mvoice": False}, FakeClock())
    registry.mark_stopped("mvoice", SUSPENDED)

    def returned(name: str, stopped_by: StoppedBy) -> Any:
        registry.mark_started(name, resumed=True)
        registry.mark_stopped(name, SUSPENDED)
        return "resumed"

    Prober("mvoice", probes, registry, Learned(["mvoice"]), returned, ignore, interval=5.0).probe()
    assert registry.get("mvoice").stopped_by == SUSPENDED


def test_a_model_that_went_to_the_cpu_needs_more_than_it_holds() -> None:
    text = yaml.safe_dump(
        {
            "consumers": {
                "mvoice": {
                    "url": "http://127.0.0.1:1",
                    "probe": {"path": "/ps", "items": "models"},
                    "unload": {"path": "/unload", "for_each": "items"},
                }
            }
        }
    )
    registry, learned = Registry(parse_config(text), FakeClock()), Learned(["mvoice"])
    learned.publish(registry.learn)
    for _ in range(2):  # two of its jobs held what was left on the card
        learned.held("mvoice/big", 3500)
        learned.ran("mvoice/big", 1.0)
    probes = ScriptedProbes()
    said = {"big": LoadedModel(3500, 9000, 4096)}
    probes.answer = ProbeReport(loaded=True, on_cpu=("big",), items=("big",), details=said)
    Prober("mvoice", probes, registry, learned, lambda *_: None, ignore, interval=5.0).probe()
    assert registry.now.needed("mvoice/big") == Figure(9000, "out-of-memory", ANY)


# -- how many jobs it works on at once -----------------------------------------------------------

AUTO = """
consumers:
  mvoice:
    url: http://127.0.0.1:1
    health: /health
    max_parallel: auto
    slots: {path: /props, count: total_slots}
"""


def asking(probes: ScriptedProbes, config: str = AUTO) -> tuple[Prober, Registry]:
    registry = Registry(parse_config(config), FakeClock())
    learned = Learned(["mvoice"])
    prober = Prober("mvoice", probes, registry, learned, lambda *_: None, ignore, interval=5.0)
    return prober, registry


def test_a_server_is_asked_once_how_many_jobs_it_works_on_and_again_after_a_while(
    probes: ScriptedProbes,
) -> None:
    prober, registry = asking(probes)
    probes.told = 4
    prober.probe()
    assert registry.now.slots == {"mvoice": 4}
    probes.told = 2
    for _ in range(ASKED_AGAIN):
        prober.probe()
    assert (probes.asked, registry.now.slots) == (1, {"mvoice": 4})
    prober.probe()
    assert (probes.asked, registry.now.slots) == (2, {"mvoice": 2})


def test_it_is_asked_again_as_soon_as_it_was_started_anew(probes: ScriptedProbes) -> None:
    prober, registry = asking(probes)
    probes.told = 4
    prober.probe()
    probes.answer = REFUSED
    prober.probe()
    assert registry.now.slots == {"mvoice": 4}  # most likely it will be what it was
    probes.answer, probes.told = ProbeReport(), 8
    prober.probe()
    assert registry.now.slots == {"mvoice": 8}
    registry.mark_stopped("mvoice", StoppedBy("unit"))
    probes.told = 16
    prober.probe()
    assert registry.now.slots == {"mvoice": 16}


def test_what_it_said_stands_while_it_does_not_answer_and_not_once_it_says_nothing(
    probes: ScriptedProbes,
) -> None:
    prober, registry = asking(probes)
    probes.told = BROKEN
    prober.probe()
    assert registry.now.slots == {}
    probes.told = 4
    prober.probe()
    probes.told = BROKEN
    for _ in range(ASKED_AGAIN + 1):
        prober.probe()
    assert (probes.asked, registry.now.slots) == (3, {"mvoice": 4})
    probes.told = None
    prober.probe()
    assert (probes.asked, registry.now.slots) == (4, {})


@pytest.mark.parametrize("number", [1, 4])
def test_nobody_is_asked_whose_number_is_given(probes: ScriptedProbes, number: int) -> None:
    prober, _ = asking(probes, AUTO.replace("auto", str(number)))
    prober.probe()
    assert probes.asked == 0


def test_one_that_has_nothing_loaded_is_not_asked(probes: ScriptedProbes) -> None:
    prober, _ = asking(probes)
    probes.answer = ProbeReport(loaded=False)
    prober.probe()
    assert probes.asked == 0


def test_a_reload_keeps_what_was_said_unless_it_is_another_server(probes: ScriptedProbes) -> None:
    prober, registry = asking(probes)
    probes.told = 4
    prober.probe()
    registry.reshape(parse_config(AUTO + "health_interval: 9"))
    assert registry.now.slots == {"mvoice": 4}
    registry.reshape(parse_config(AUTO.replace(":1", ":2")), ["mvoice"])
    assert registry.now.slots == {}
