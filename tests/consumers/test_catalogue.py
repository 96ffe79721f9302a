"""The lists of models: asked for when somebody wants them, and believed for a while."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from gpumanager.consumers.catalogue import FAILED_S, FRESH_S, LOOK_AGAIN_S, ModelCatalogue
from gpumanager.errors import ConsumerUnreachable
from gpumanager.model import ModelListing
from tests.support.clock import FakeClock
from tests.support.threads import PATIENCE_S


class Consumer:
    def __init__(self) -> None:
        self.models: tuple[str, ...] | None = ("a",)
        self.asked = 0

    def __call__(self, name: str) -> ModelListing | None:
        self.asked += 1
        if self.models is None:
            raise ConsumerUnreachable("down", consumer=name)
        return ModelListing(self.models)


def names(catalogue: ModelCatalogue, wanted: str | None = None) -> tuple[str, ...] | None:
    listed = catalogue.listed("it", wanted=wanted)
    return None if listed is None else listed.names


def test_a_list_is_believed_for_a_while() -> None:
    clock, consumer = FakeClock(), Consumer()
    catalogue = ModelCatalogue(consumer, clock)
    assert names(catalogue) == ("a",)
    consumer.models = ("a", "b")
    clock.advance(FRESH_S - 1)
    assert (names(catalogue), consumer.asked) == (("a",), 1)
    clock.advance(2)
    assert (names(catalogue), consumer.asked) == (("a", "b"), 2)


def test_a_model_that_was_just_pulled_is_found() -> None:
    clock, consumer = FakeClock(), Consumer()
    catalogue = ModelCatalogue(consumer, clock)
    assert names(catalogue, "b") == ("a",)
    consumer.models = ("a", "b")
    assert (names(catalogue, "b"), consumer.asked) == (("a",), 1)  # it was asked just now
    clock.advance(LOOK_AGAIN_S)
    assert (names(catalogue, "a"), consumer.asked) == (("a",), 1)
    assert (names(catalogue, "b"), consumer.asked) == (("a", "b"), 2)


def test_one_that_cannot_be_asked_keeps_its_list_and_is_left_alone_for_a_while() -> None:
    clock, consumer = FakeClock(), Consumer()
    catalogue = ModelCatalogue(consumer, clock)
    names(catalogue)
    clock.advance(FRESH_S)
    consumer.models = None
    assert (names(catalogue, "b"), consumer.asked) == (("a",), 2)
    clock.advance(FAILED_S - 1)
    assert (names(catalogue, "b"), consumer.asked) == (("a",), 2)
    clock.advance(1)
    consumer.models = ("b",)
    assert names(catalogue, "b") == ("b",)


def test_one_that_never_answered_is_unknown() -> None:
    consumer = Consumer()
    consumer.models = None
    assert names(ModelCatalogue(consumer, FakeClock())) is None


def test_a_new_config_forgets_what_was_known() -> None:
    consumer = Consumer()
    catalogue = ModelCatalogue(consumer, FakeClock())
    names(catalogue)
    catalogue.forget()
    assert (names(catalogue), consumer.asked) == (("a",), 2)


def test_what_was_asked_by_the_old_config_is_forgotten_with_it() -> None:
    consumer = Consumer()

    def ask(name: str) -> ModelListing | None:
        if not consumer.asked:
            catalogue.forget()  # a reload, while the consumer at the old address thinks
        return consumer(name)

    catalogue = ModelCatalogue(ask, FakeClock())
    assert names(catalogue) == ("a",)
    assert (names(catalogue), consumer.asked) == (("a",), 2)


def test_a_name_without_its_tag_is_in_the_list() -> None:
    clock, consumer = FakeClock(), Consumer()
    consumer.models = ("gemma3:latest",)
    catalogue = ModelCatalogue(consumer, clock)
    names(catalogue, "gemma3")
    clock.advance(LOOK_AGAIN_S)
    assert (names(catalogue, "gemma3"), consumer.asked) == (("gemma3:latest",), 1)


def test_many_at_once_ask_once() -> None:
    asked, go = [], threading.Event()

    def ask(name: str) -> ModelListing:
        asked.append(name)
        go.wait(PATIENCE_S)
        return ModelListing(("a",))

    catalogue = ModelCatalogue(ask, FakeClock())
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(names, catalogue) for _ in range(8)]
        go.set()
        assert {answer.result(PATIENCE_S) for answer in answers} == {("a",)}
    assert asked == ["it"]
