"""Which consumer gets a job."""

from __future__ import annotations

import pytest

from gpumanager.config import ModelEntry, parse_config
from gpumanager.consumers.registry import Registry
from gpumanager.errors import ModelNotFound, NoConsumer
from gpumanager.jobs.routing import Choice, Offer, Router, choose
from gpumanager.model import ModelListing, StoppedBy
from tests.support.clock import FakeClock


def named(consumer: str, *names: str, **served_as: str) -> Offer:
    entries = [ModelEntry(name=name) for name in names]
    entries += [ModelEntry(name=name, served_as=other) for name, other in served_as.items()]
    return Offer(consumer, declared=tuple(entries))


OFFERS = [
    named("a", "qwen3:8b", gpt="qwen3:8b"),
    named("b", "llama*", "qwen3:*"),
    Offer("c", listed=("gemma3:latest", "qwen3:8b")),
]


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        (None, Choice("llm", "a")),
        ("qwen3:8b", Choice("llm", "a")),
        ("gpt", Choice("llm", "a", "qwen3:8b")),
        ("llama3.2", Choice("llm", "b")),
        ("qwen3:14b", Choice("llm", "b")),
        ("gemma3", Choice("llm", "c")),
        ("gemma3:latest", Choice("llm", "c")),
    ],
)
def test_a_name_counts_before_a_pattern_and_that_before_a_list(
    model: str | None, choice: Choice
) -> None:
    assert choose("llm", OFFERS, model) == choice


def test_an_unknown_model_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ModelNotFound, match="'gema3'; there are gemma3:latest"):
        choose("llm", OFFERS, "gema3")
    with pytest.raises(ModelNotFound, match=r"'x{63}…'"):
        choose("llm", OFFERS, "x" * 10_000)


def test_who_may_serve_any_model_gets_what_nobody_names() -> None:
    assert choose("llm", [*OFFERS, Offer("d")], "new").consumer == "d"
    assert choose("llm", [Offer("e", any_model=True), *OFFERS], "gemma3").consumer == "c"


def test_of_two_that_take_any_name_the_one_that_lists_it_gets_it() -> None:
    two = """
routing: {llm: [small, big]}
consumers:
  small: {url: "http://127.0.0.1:1", any_model: true}
  big: {url: "http://127.0.0.1:2", any_model: true}
"""
    it = Router(Registry(parse_config(two), FakeClock()), ListsOf(small=("s",), big=("b",)))
    assert it.choose(("llm",), lambda: "b").consumer == "big"
    assert it.choose(("llm",), lambda: "s").consumer == "small"
    assert it.choose(("llm",), lambda: "gpt-4o").consumer == "small"


TWINS = """
routing: {llm: [first, second, third]}
consumers:
  first: {url: "http://127.0.0.1:1", models: [big, first's]}
  second: {url: "http://127.0.0.1:2", models: ["b*"]}
  third: {url: "http://127.0.0.1:3"}
"""


def test_of_two_that_have_a_model_one_that_is_down_comes_last() -> None:
    registry = Registry(parse_config(TWINS), FakeClock())
    it = Router(registry, ListsOf(third=("listed",)))
    assert it.choose(("llm",), lambda: "big").consumer == "first"
    registry.probe_failed("first", "refused")
    assert it.choose(("llm",), lambda: "big").consumer == "second"
    # Nobody else has it: its client is told who is down.
    assert it.choose(("llm",), lambda: "first's").consumer == "first"
    assert it.choose(("llm",), lambda: None).consumer == "first"
    registry.probe_failed("second", "refused")
    assert it.choose(("llm",), lambda: "big").consumer == "first"


def test_one_that_the_broker_has_stopped_is_not_down() -> None:
    registry = Registry(parse_config(TWINS), FakeClock())
    registry.probe_failed("first", "refused")
    registry.mark_stopped("first", StoppedBy("unit"))
    it = Router(registry, ListsOf(third=()))
    assert it.choose(("llm",), lambda: "big").consumer == "first"


class ListsOf:
    def __init__(self, **names: tuple[str, ...]) -> None:
        self._names = names

    def listed(self, name: str, *, wanted: str | None = None) -> ModelListing | None:
        return ModelListing(self._names[name])


CONFIG = """
routing: {llm: [ollama, vllm], tts: voice, rerank: tei}
consumers:
  ollama:
    url: http://127.0.0.1:1
    list_models: {path: /api/tags, items: "models[].name"}
    routes: [/api/chat, /v1/chat/completions]
  vllm: {url: "http://127.0.0.1:2", models: [big, {name: gpt-4o, served_as: big}]}
  voice: {url: "http://127.0.0.1:3"}
  tei: {url: "http://127.0.0.1:4"}
"""


class Lists:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def listed(self, name: str, *, wanted: str | None = None) -> ModelListing | None:
        self.asked.append(name)
        return ModelListing(("qwen3:8b",)) if name == "ollama" else None


def router() -> tuple[Router, Lists]:
    lists = Lists()
    return Router(Registry(parse_config(CONFIG), FakeClock()), lists), lists


def unread() -> str | None:
    raise AssertionError("nobody needs the model")


def test_a_model_is_only_read_where_it_matters() -> None:
    it, lists = router()
    assert it.choose(("tts",), unread) == Choice("tts", "voice")
    assert lists.asked == []
    assert it.choose(("llm",), lambda: "qwen3:8b").consumer == "ollama"
    lists.asked.clear()
    assert it.choose(("llm",), lambda: "gpt-4o") == Choice("llm", "vllm", "big")
    assert lists.asked == []  # the config names it
    with pytest.raises(ModelNotFound):
        it.choose(("llm",), lambda: "nobody's")


def test_only_those_that_serve_the_route_are_asked() -> None:
    it, _ = router()

    def serves(_: str, consumer: object) -> bool:
        return getattr(consumer, "routes", None) is None

    assert it.choose(("llm",), lambda: "big", serves).consumer == "vllm"
    with pytest.raises(ModelNotFound):
        it.choose(("llm",), lambda: "qwen3:8b", serves)


def test_the_first_kind_that_is_routed_counts() -> None:
    it, _ = router()
    assert it.choose(("embed", "llm"), lambda: None) == Choice("llm", "ollama")
    assert it.choose(("rerank", "llm"), unread) == Choice("rerank", "tei")
    with pytest.raises(NoConsumer, match="no consumer routes embed"):
        it.choose(("embed",), unread)
