"""Which consumer gets a job: by its kind, and, where several could, by the model that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Protocol

from gpumanager.config import ConsumerConfig, ModelEntry
from gpumanager.consumers.registry import Registry
from gpumanager.errors import ModelNotFound, NoConsumer
from gpumanager.model import ModelListing, model_key


@dataclass(frozen=True, slots=True)
class Offer:
    """What a consumer serves: the models that its config names, or else those that it lists. Where
    both are None, it is not known, and it may serve any; with `any_model` it is given what nobody
    has."""

    consumer: str
    declared: tuple[ModelEntry, ...] | None = None
    listed: tuple[str, ...] | None = None
    any_model: bool = False

    @property
    def may_serve_any(self) -> bool:
        return self.any_model or (self.declared is None and self.listed is None)


@dataclass(frozen=True, slots=True)
class Choice:
    """The consumer that gets a job of a kind, and the name that it is given for the model, None if
    that is the client's own. `makes_room` is False for one that only unloads. `model` is the model
    that it works with, where what the job needs depends on that, and `context` the context length
    that it asks for, in tokens. `called` is what the request calls its model, where its consumer
    tells which models are loaded."""

    kind: str
    consumer: str
    served_as: str | None = None
    makes_room: bool = True
    model: str | None = None
    context: int | None = None
    called: str | None = None


class Catalogue(Protocol):
    """The models that consumers say they offer, as far as is known."""

    def listed(self, name: str, *, wanted: str | None = None) -> ModelListing | None:
        """The models that the consumer lists, None if that is not known. `wanted`: the one that
        is asked for; where it is missing in a list that is not quite new, look again."""


def choose(kind: str, offers: Sequence[Offer], model: str | None) -> Choice:
    """The first offer that has the model by name, else by pattern, else in its list, else one that
    may serve any; without a model the first. Raises ModelNotFound with the nearest names."""
    if model is None:
        return Choice(kind, offers[0].consumer)
    known = by_config(kind, offers, model) or by_list(kind, offers, model)
    if known is not None:
        return known
    for offer in offers:
        if offer.may_serve_any:
            return Choice(kind, offer.consumer)
    raise not_found(model, [name for offer in offers for name in _names(offer)])


def by_config(kind: str, offers: Sequence[Offer], model: str) -> Choice | None:
    """What can be told without anybody's list."""
    for fits in (_named, _matched):
        for offer in offers:
            for entry in offer.declared or ():
                if fits(entry.name, model):
                    return Choice(kind, offer.consumer, entry.served_as)
    return None


def by_list(kind: str, offers: Sequence[Offer], model: str) -> Choice | None:
    """What the lists tell of those whose config names no models."""
    for offer in offers:
        if offer.declared is None and _is_listed(model, offer.listed or ()):
            return Choice(kind, offer.consumer)
    return None


def _named(name: str, model: str) -> bool:
    return name == model


def _matched(pattern: str, model: str) -> bool:
    return fnmatchcase(model, pattern)


def _is_listed(model: str, listed: Iterable[str]) -> bool:
    """Ollama lists `name:latest` where clients say `name`."""
    return any(each == model or each == f"{model}:latest" for each in listed)


def not_found(model: str, names: Iterable[str]) -> ModelNotFound:
    """The error for a model that none of `names` is; it tells the nearest, else the first few."""
    names = list(names)
    near = get_close_matches(model[:64], names, 3, 0.5) or sorted(names)[:3]
    shown = model if len(model) <= 64 else f"{model[:63]}…"
    hint = f"; there are {', '.join(near)}" if near else ""
    return ModelNotFound(f"no consumer has the model '{shown}'{hint}")


def _names(offer: Offer) -> Iterable[str]:
    return (entry.name for entry in offer.declared) if offer.declared else offer.listed or ()


class Router:
    """Chooses by the config of the moment. Safe from any thread."""

    def __init__(self, registry: Registry, catalogue: Catalogue) -> None:
        self._registry = registry
        self._catalogue = catalogue

    def choose(
        self,
        kinds: Sequence[str],
        model: Callable[[], str | None],
        serves: Callable[[str, ConsumerConfig], bool] = lambda kind, consumer: True,  # noqa: ARG005
    ) -> Choice:
        """The consumer for a job of the first of `kinds` that is routed, among those that `serves`
        says could take it, or the default if none could; of several that have the model, one that
        is not known to be down. `model` tells which one the job names;
        it is asked only if that matters. Raises NoConsumer, ModelNotFound, and what `model`
        raises."""
        config = self._registry.now.config
        for kind in kinds:
            names = config.candidates(kind)
            if names:
                break
        else:
            raise NoConsumer(f"no consumer routes {' or '.join(kinds)}")
        able = [each for each in names if serves(kind, config.consumers[each])]
        if not able or (len(able) == 1 and _takes_any(config.consumers[able[0]])):
            return Choice(kind, (able or names)[0])
        wanted = model()
        if wanted is None:
            return Choice(kind, able[0])
        up = [each for each in able if not self._is_down(each)]
        declared = {each: Offer(each, config.consumers[each].models) for each in able}
        known = by_config(kind, [declared[each] for each in up], wanted) or by_config(
            kind, list(declared.values()), wanted
        )
        if known is not None:
            return known
        offers = {each: self._offer(each, config.consumers[each], wanted) for each in able}
        return by_list(kind, [offers[each] for each in up], wanted) or choose(
            kind, list(offers.values()), wanted
        )

    def _is_down(self, name: str) -> bool:
        """Whether its last probe failed, and not because the broker has stopped it."""
        state = self._registry.now.states.get(name)
        return state is not None and state.healthy is False and state.stopped_by is None

    def consumer(self, name: str) -> ConsumerConfig:
        """The config of one that was chosen."""
        return self._registry.now.consumers[name]

    def counted_as(self, name: str, model: str) -> str | None:
        """The name by which that model of a consumer's is counted. None if it is not known which
        one the consumer means by that name: one that takes any may answer with another one."""
        now, key = self._registry.now, model_key(model)
        state, listing = now.states[name], now.listings.get(name)
        if listing is not None and key in listing.aliases:
            return listing.aliases[key]
        if listing is not None and _is_listed(model, listing.names):
            return key
        if key in state.aliases:
            return state.aliases[key]
        consumer = now.consumers[name]
        if not consumer.any_model or consumer.declared_for(key) or key in state.models:
            return key
        listed = self._catalogue.listed(name)
        return key if listed is not None and _is_listed(model, listed.names) else None

    def _offer(self, name: str, consumer: ConsumerConfig, wanted: str) -> Offer:
        asks = consumer.models is None
        listed = self._catalogue.listed(name, wanted=wanted) if asks else None
        names = None if listed is None else (*listed.names, *listed.aliases)
        return Offer(name, consumer.models, names, consumer.any_model)


def _takes_any(consumer: ConsumerConfig) -> bool:
    """Whether the model need not be known: the only consumer takes them all, or tells by itself
    which it has."""
    return consumer.any_model or (consumer.models is None and consumer.list_models is None)
