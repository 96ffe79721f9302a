"""What a request holds of the broker on its way to the GPU, and by which config."""

from __future__ import annotations

import pytest

from gpumanager.config import Config
from gpumanager.errors import NoConsumer
from gpumanager.jobs.deadlines import Deadlines
from gpumanager.jobs.place import Places
from gpumanager.jobs.routing import Choice
from gpumanager.jobs.shares import Shares
from gpumanager.scheduling.factory import locked
from tests.support.clock import FakeClock
from tests.support.known import config_of, registry_of

FIRST = {"a": True, "b": True}


class Setting:
    """Places of a broker that can be reloaded, and a choice between `a` and `b`."""

    def __init__(self) -> None:
        clock = FakeClock()
        self.registry = registry_of(FIRST, clock)
        scheduler = locked(max_queue=9, max_wait=60, clock=clock)
        self.places = Places(self.registry, scheduler, Shares(), Deadlines(scheduler, clock, 60))
        self.reloads: list[Config] = []
        self.chosen_by: list[Config] = []

    def choose(self) -> Choice:
        """`a`, as long as there is one; a reload comes just after that."""
        config = self.registry.now.config
        self.chosen_by.append(config)
        if self.reloads:
            self.registry.reshape(self.reloads.pop())
        return Choice("tts", "a" if "a" in config.consumers else "b")


def test_choice_and_place_are_by_one_config() -> None:
    """The second config has the same consumers with other settings."""
    setting = Setting()
    other = config_of(FIRST)
    setting.reloads = [other]
    choice, place = setting.places.chosen(setting.choose)
    assert setting.chosen_by[1:] == [other]
    assert setting.chosen_by[1] is other
    assert place.config is other.consumers["a"]
    assert choice.consumer == place.name == "a"
    place.give_up()
    setting.registry.reshape(Config())  # nothing of the first try is held


def test_a_choice_that_a_reload_has_removed_is_made_again() -> None:
    setting = Setting()
    setting.reloads = [config_of({"b": True})]
    choice, place = setting.places.chosen(setting.choose)
    assert (choice.consumer, place.name) == ("b", "b")


def test_a_choice_that_is_not_in_the_config_is_refused() -> None:
    setting = Setting()
    with pytest.raises(NoConsumer):
        setting.places.chosen(lambda: Choice("tts", "nobody"))


def test_the_settings_of_its_admission_stay_the_requests_own() -> None:
    setting = Setting()
    place = setting.places.open("a")
    before = place.config
    setting.registry.reshape(config_of({"a": False}))
    assert place.config is before
    assert setting.registry.now.consumers["a"] is not before
