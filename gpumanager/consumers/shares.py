"""What each model of a consumer holds, where only the sum is measured; and what happens to the
models as their consumer works. Pure; times are monotonic seconds.

A process tells how much it holds, not for which model. What it grows by while a job works belongs
to the model of that job; what is left, when all others have gone, to the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from types import MappingProxyType

from gpumanager.model import (
    RELEASE_S,
    UNUSED,
    ConsumerState,
    LoadedModel,
    ModelState,
    model_key,
)

MOST_MODELS = 64
"""Of one consumer: names come from clients. Beyond that, those that were used longest ago, and are
not loaded, are forgotten."""

Models = Mapping[str, ModelState]


def shared(state: ConsumerState, held_mib: int, base_mib: int) -> dict[str, int]:
    """What each loaded model holds, if the consumer holds `held_mib`, of which `base_mib` is there
    with no model loaded. Never more than that in sum; less, while what others were unloaded of may
    not be back yet.

    What has come since the last look is the model's that works; at rest, that of those of which
    nobody knows yet what they hold, or else the one's that was used last. While there may be a
    model that the consumer has not listed yet, it is nobody's.
    """
    held = {name: each.held_mib for name, each in state.models.items() if each.loaded}
    left, known = max(0, held_mib - base_mib), sum(held.values())
    releasing = any(each.unloaded_at is not None for each in state.models.values())
    if len(held) == 1 and not releasing and not state.unplaced:
        return dict.fromkeys(held, left)
    owner = state.at_work if state.at_work in held else None
    if known > left:
        if owner is not None:  # it gave something back
            held[owner] = max(0, held[owner] - (known - left))
            known = sum(held.values())
        return {name: mib * left // known for name, mib in held.items()} if known > left else held
    if owner is not None:
        owners = [owner]
    elif releasing or not held or state.unplaced:
        return held
    else:
        owners = [name for name, mib in held.items() if not mib]
        owners = owners or [max(held, key=lambda name: state.models[name].last_used or 0.0)]
    for name in owners:
        held[name] += (left - known) // len(owners)
    return held


def measured(state: ConsumerState, held_mib: int, base_mib: int, now: float) -> ConsumerState:
    """The shares of a consumer that was seen to hold `held_mib`. At rest none gets less: its
    consumer may have unloaded another one by itself, and will say so with the next probe."""
    held = shared(state, held_mib, base_mib)
    at_rest = not state.active and len(held) > 1
    changed = {
        name: replace(state.models[name], held_mib=mib)
        for name, mib in held.items()
        if mib > state.models[name].held_mib or (mib < state.models[name].held_mib and not at_rest)
    }
    back = held_mib - base_mib <= sum(each.held_mib for each in state.models.values())
    for name, each in state.models.items():
        if each.unloaded_at is not None and (back or now - each.unloaded_at >= RELEASE_S):
            changed[name] = replace(changed.get(name, each), unloaded_at=None)
    return with_models(state, changed) if changed else state


def with_models(state: ConsumerState, changed: Models) -> ConsumerState:
    """The consumer, with these models' states changed."""
    models = {**state.models, **changed}
    if len(models) > MOST_MODELS:
        idle = [
            name
            for name, each in models.items()
            if not each.loaded and not each.active and each.pinned is None
        ]
        idle.sort(key=lambda name: models[name].last_used or 0.0)
        for name in idle[: len(models) - MOST_MODELS]:
            del models[name]
    return replace(state, models=MappingProxyType(models))


# -- what happens to them ------------------------------------------------------------------------


def job_started(
    state: ConsumerState, name: str | None, now: float, *, tells: bool
) -> ConsumerState:
    """A job begins. `tells`: the consumer says which models are loaded."""
    if name is None:
        return state
    model = state.model(name)
    loads = tells and not model.loaded
    model = replace(
        model,
        active=model.active + 1,
        total_requests=model.total_requests + 1,
        last_used=now,
        loaded=tells,
        sure=model.sure and not loads,
        held_mib=0 if loads else model.held_mib,
        unloaded_at=None,
    )
    return with_models(state, {name: model})


def job_finished(
    state: ConsumerState,
    name: str | None,
    now: float,
    *,
    worked: bool,
    context: int | None,
    unloaded: ConsumerState | None,
    called: str | None = None,
) -> ConsumerState:
    """It ends; `unloaded` is its consumer before it, if it has loaded nothing; `called` is what it
    calls its model."""
    if called is not None and worked and len(state.called) < MOST_MODELS:
        state = replace(state, called=state.called | {called})
    if name is None:
        return state
    before, model = UNUSED if unloaded is None else unloaded.model(name), state.model(name)
    model = replace(model, active=max(0, model.active - 1), last_used=now)
    if worked:
        known = model.context if context is None else context
        model = replace(model, sure=model.loaded, context=known)
    if unloaded is not None:
        model = replace(
            model,
            loaded=before.loaded,
            sure=before.sure,
            held_mib=before.held_mib,
            unloaded_at=before.unloaded_at,
        )
    return with_models(state, {name: model})


def loaded(state: ConsumerState, name: str, now: float) -> ConsumerState:
    """The broker has loaded one."""
    model = replace(state.model(name), loaded=True, sure=True, unloaded_at=None)
    return with_models(state, {name: replace(model, last_used=model.last_used or now)})


def unloaded(state: ConsumerState, name: str, now: float) -> ConsumerState:
    """One was unloaded."""
    return with_models(state, {name: _without_memory(state.model(name), now)})


def all_unloaded(state: ConsumerState, now: float | None) -> ConsumerState:
    """All of them were; with None for the time, their process has ended."""
    changed = {
        name: _without_memory(each, now) for name, each in state.models.items() if each.loaded
    }
    return with_models(state, changed) if changed else state


def listed(
    state: ConsumerState,
    items: tuple[str, ...],
    details: Mapping[str, LoadedModel],
    now: float,
) -> ConsumerState:
    """The consumer has said which are loaded. Where it has said of each how much it holds, they
    share what they hold together in these proportions: when a server unloads a model by itself to
    load another one, what it grew by does not tell what the other one took."""
    state = _with_aliases(state, {model_key(item) for item in items[:MOST_MODELS]})
    there = {model_key(item): details.get(item, LoadedModel()) for item in items[:MOST_MODELS]}
    changed: dict[str, ModelState] = {}
    held = {name: state.model(name).held_mib for name in there}
    said_mib = sum(said.mib or 0 for said in there.values())
    by_word = said_mib if all(said.mib is not None for said in there.values()) else 0
    for name, said in there.items():
        model = state.model(name)
        if all(held.values()) and by_word:
            held_mib = sum(held.values()) * (said.mib or 0) // by_word
        else:
            held_mib = model.held_mib if model.loaded else said.mib or 0
        after = replace(
            model,
            loaded=True,
            sure=True,
            held_mib=held_mib,
            reported_mib=said.mib,
            needs_mib=said.needs_mib,
            context=model.context if said.context is None else said.context,
            unloaded_at=None,
        )
        if after != model:
            changed[name] = after
    for name, model in state.models.items():
        if model.loaded and name not in there:
            changed[name] = _without_memory(model, now)
    return with_models(state, changed) if changed else state


def _with_aliases(state: ConsumerState, there: Set[str]) -> ConsumerState:
    """What its jobs have called a model by another name than it is listed by, if that is certain: a
    name that all jobs since the last list had, where one model was loaded meanwhile."""
    aliases = {name: model for name, model in state.aliases.items() if name not in there}
    new = there - {model_key(item) for item in state.items}
    if len(state.called) == len(new) == 1:
        (name,), (model,) = state.called, new
        if name not in there:
            aliases.pop(name, None)
            aliases[name] = model
    if len(aliases) > MOST_MODELS:
        del aliases[next(iter(aliases))]
    if not state.called and not state.unplaced and aliases == state.aliases:
        return state
    models = dict(state.models)
    for name, model in aliases.items():
        known = models.get(name)
        if known is not None and not known.active and known.pinned is None:
            del models[name]  # it was another name of that one
            if known.loaded:
                models.setdefault(model, known)
    return replace(
        state,
        called=frozenset(),
        unplaced=False,
        aliases=MappingProxyType(aliases),
        models=MappingProxyType(models),
    )


def _without_memory(model: ModelState, now: float | None) -> ModelState:
    return replace(
        model,
        loaded=False,
        sure=False,
        held_mib=0,
        reported_mib=None,
        needs_mib=None,
        context=None,
        unloaded_at=now,
    )
