"""What a consumer's list tells of a model that was never seen: its size, and its other names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from gpumanager.config import parse_config
from gpumanager.consumers.catalogue import FRESH_S, ModelCatalogue
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.prober import Prober
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.snapshot import LISTED_MIB
from gpumanager.jobs.routing import Router
from gpumanager.model import ModelListing, ProbeReport
from tests.support.clock import FakeClock
from tests.support.events import ignore

LISTING = ModelListing(
    ("small", "big:latest", "untold", "cloud"),
    sizes={"small": 1000, "big": 20_000, "cloud": 0},
    aliases={"gpt-4o": "big"},
)
LISTED = round(1.15 * 1000) + LISTED_MIB


def registry_of(**keys: Any) -> Registry:
    consumer = {
        "url": "http://127.0.0.1:1",
        "vram_resident_mib": 24_000,
        "probe": {"path": "/ps", "items": "models[].name"},
        "unload": {"path": "/unload", "json": {"model": "{item}"}, "for_each": "items"},
        "list_models": {"path": "/tags", "items": "names", "details": "models"},
        **keys,
    }
    config = parse_config(yaml.safe_dump({"consumers": {"it": consumer}}))
    return Registry(config, FakeClock())


def needed(registry: Registry, model: str, context: int | None = None) -> tuple[int, str]:
    figure = registry.now.needed(f"it/{model}", context)
    return figure.mib, figure.source


def test_a_model_that_was_never_seen_needs_its_size_and_some_room() -> None:
    registry = registry_of()
    assert needed(registry, "small") == (24_000, "declared")
    registry.listed("it", LISTING)
    assert needed(registry, "small") == (LISTED, "listed")
    assert needed(registry, "untold") == (24_000, "declared")
    assert needed(registry, "cloud") == (LISTED_MIB, "listed")  # it runs somewhere else
    longer = needed(registry, "small", 32_768)
    assert longer[1] == "listed"
    assert longer[0] > 2 * LISTED


def test_what_is_declared_or_was_seen_goes_before_what_is_listed() -> None:
    registry = registry_of(models=[{"name": "big", "vram_mib": 18_000}, "*"])
    registry.listed("it", LISTING)
    assert needed(registry, "big") == (18_000, "declared")
    learned = Learned(["it"])
    learned.publish(registry.learn)
    learned.held("it/small", 3000)
    assert needed(registry, "small") == (3000, "measured")
    learned.forget("it/small")
    assert needed(registry, "small") == (LISTED, "listed")


def test_it_is_never_more_than_the_most_that_room_is_made_for() -> None:
    registry = registry_of(vram_resident_mib=1100, max_mib=1200)
    registry.listed("it", LISTING)
    assert needed(registry, "small") == (1200, "declared")


@pytest.mark.parametrize("keys", [{"vram_resident_mib": 0}, {"elastic": True}])
def test_a_size_says_nothing_of_who_is_not_on_the_card_or_fills_it(keys: dict[str, Any]) -> None:
    registry = registry_of(**keys)
    registry.listed("it", LISTING)
    assert needed(registry, "small")[1] == "declared"


def test_a_size_says_nothing_of_one_whose_jobs_hold_nothing() -> None:
    registry = registry_of()
    registry.listed("it", LISTING)
    learned = Learned(["it"])
    learned.publish(registry.learn)
    for _ in range(3):  # on the CPU
        learned.held("it", 0)
        learned.ran("it", 1.0)
    assert needed(registry, "small") == (0, "measured")


def test_what_another_consumer_of_that_name_listed_is_forgotten() -> None:
    registry = registry_of()
    registry.listed("it", LISTING)
    registry.reshape(registry.now.config)
    assert needed(registry, "small") == (LISTED, "listed")
    registry.reshape(registry.now.config, ["it"])
    assert needed(registry, "small") == (24_000, "declared")
    registry.listed("gone", LISTING)
    assert not registry.now.listings


# -- who asks -------------------------------------------------------------------------------------


class Asked:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self, name: str) -> ModelListing:
        assert name == "it"
        self.times += 1
        return LISTING

    def probe(self, name: str, consumer: object) -> ProbeReport:
        return ProbeReport(loaded=False, items=())

    def slots(self, name: str, consumer: object) -> int | None:
        raise AssertionError("its settings do not go by that")


def test_the_prober_asks_so_that_no_job_has_to() -> None:
    registry, asked, clock = registry_of(), Asked(), FakeClock()
    catalogue = ModelCatalogue(asked, clock, registry.listed)
    prober = Prober(
        "it",
        asked,
        registry,
        Learned(["it"]),
        lambda *_: None,
        ignore,
        interval=5.0,
        look=catalogue.listed,
    )
    for _ in range(3):
        prober.probe()
    assert asked.times == 1
    assert needed(registry, "small") == (LISTED, "listed")
    clock.advance(FRESH_S + 1)
    prober.probe()
    assert asked.times == 2


NO_SIZES = {"path": "/tags", "items": "names"}


@pytest.mark.parametrize(
    ("keys", "times"),
    [
        ({"list_models": None}, 0),
        ({"list_models": NO_SIZES}, 0),
        ({"list_models": NO_SIZES, "any_model": True}, 1),  # for their names
        ({"list_models": NO_SIZES, "any_model": True, "unload": "/unload"}, 0),
    ],
)
def test_only_who_tells_something_that_counts_is_asked(keys: dict[str, Any], times: int) -> None:
    registry, asked = registry_of(**keys), Asked()
    look: Callable[[str], object] = asked
    prober = Prober(
        "it", asked, registry, Learned(["it"]), lambda *_: None, ignore, interval=5.0, look=look
    )
    prober.probe()
    assert asked.times == times


# -- names ---------------------------------------------------------------------------------------


def router(registry: Registry) -> tuple[Router, Asked]:
    asked = Asked()
    return Router(registry, ModelCatalogue(asked, FakeClock(), registry.listed)), asked


def test_a_model_is_counted_by_its_own_name() -> None:
    registry = registry_of()
    it, asked = router(registry)
    assert it.counted_as("it", "big:latest") == "big"
    assert it.counted_as("it", "gpt-4o") == "gpt-4o"  # it has not said yet
    assert asked.times == 0
    registry.listed("it", LISTING)
    assert it.counted_as("it", "gpt-4o") == "big"


def test_of_one_that_takes_any_name_it_has_to_be_known_what_it_means() -> None:
    registry = registry_of(any_model=True)
    it, asked = router(registry)
    assert it.counted_as("it", "small") == "small"
    assert it.counted_as("it", "whatever") is None
    assert asked.times == 1
    registry.job_started("it")
    registry.job_finished("it", called="whatever")
    version = registry.get("it").residency_version
    registry.probe_succeeded("it", ProbeReport(loaded=True, items=("small",)), seen_version=version)
    assert it.counted_as("it", "whatever") == "small"


def test_a_name_that_something_is_declared_for_is_known() -> None:
    registry = registry_of(any_model=True, models=[{"name": "flux*", "vram_mib": 14_000}, "*"])
    it, _ = router(registry)
    assert it.counted_as("it", "flux1-dev") == "flux1-dev"
    assert it.counted_as("it", "whatever") is None
    assert needed(registry, "flux1-dev") == (14_000, "declared")


def test_a_job_that_uses_another_name_is_routed_by_it() -> None:
    registry = registry_of(paths={"llm": "/v1/chat/completions"})
    registry.reshape(registry.now.config.model_copy(update={"routing": {"llm": ("it",)}}))
    it, _ = router(registry)
    assert it.choose(("llm",), lambda: "gpt-4o").consumer == "it"
