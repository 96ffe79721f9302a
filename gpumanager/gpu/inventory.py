"""Who holds what of the card, by one snapshot: the one place where that is worked out. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from gpumanager.consumers.shares import shared
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.gpu.accounting import Balance, Held, balance, disproved, held, plausible
from gpumanager.model import ModelState, resident_name


def holder(snapshot: Snapshot, name: str, now: float | None = None) -> Held:
    """What one consumer holds. With `now`, monotonic seconds, one that the broker has unloaded just
    before is credited with no more than it keeps."""
    state = snapshot.states[name]
    at_rest = state.loaded and state.unloaded_at is None  # what it would keep does not matter
    return held(
        name,
        state,
        _declared_mib(snapshot, name),
        snapshot.gpu.reading,
        last=snapshot.gpu.last,
        keeps_mib=0 if at_rest else keeps_mib(snapshot, name),
        now=now,
    )


def model_shares(snapshot: Snapshot, name: str) -> dict[str, int]:
    """What each loaded model of a consumer holds, by its name: a share of what is measured; else
    what the consumer says of it, else what it is known to need. Empty where the consumer cannot
    tell them apart."""
    if not snapshot.config.consumers[name].tells_models_apart:
        return {}
    state, reading = snapshot.states[name], snapshot.gpu.reading
    mib = None if reading is None else reading.measured_mib(name)
    if mib is not None:
        return shared(state, mib, keeps_mib(snapshot, name))
    return {
        model: _said_or_needed(snapshot, name, model, state.models[model])
        for model in state.loaded_models
    }


def _said_or_needed(snapshot: Snapshot, name: str, model: str, state: ModelState) -> int:
    if state.reported_mib is not None:
        return state.reported_mib
    return max(state.held_mib, snapshot.needed(resident_name(name, model), state.context).mib)


def _declared_mib(snapshot: Snapshot, name: str) -> int:
    """What a consumer is taken to hold, if nobody measures it, and it does not say."""
    consumer, state = snapshot.config.consumers[name], snapshot.states[name]
    if not consumer.tells_models_apart or not state.loaded_models:
        return consumer.vram_resident_mib
    return sum(
        snapshot.needed(resident_name(name, each), state.models[each].context).mib
        for each in state.loaded_models
    )


def holders(snapshot: Snapshot, now: float | None = None) -> dict[str, Held]:
    """What each consumer holds, by name."""
    return {name: holder(snapshot, name, now) for name in snapshot.config.consumers}


def left(snapshot: Snapshot, holds: Mapping[str, Held], target: str | None = None) -> Balance:
    """How much of the card is free, if the consumers hold that; for the next job of `target`, if
    one is given: what it may hold, but not surely, is not in its own way."""
    mib = [each.surely_mib if name == target else each.mib for name, each in holds.items()]
    gpu = snapshot.gpu
    return balance(gpu.reading, snapshot.config.gpu.total_mib, mib, gpu.last)


def keeps_mib(snapshot: Snapshot, name: str) -> int:
    """What a consumer keeps after an unload: as declared, else as was seen."""
    declared = snapshot.config.consumers[name].floor_mib
    return (snapshot.figures(name).residue_mib or 0) if declared is None else declared


def believable(snapshot: Snapshot) -> Snapshot:
    """The snapshot without the assumptions that cannot all be true."""
    if not _assumes(snapshot):
        return snapshot
    states = plausible(
        snapshot.states, _declared(snapshot), snapshot.gpu.reading, _total_mib(snapshot)
    )
    return snapshot if states is snapshot.states else snapshot.supposing(states)


def impossible(snapshot: Snapshot) -> list[str]:
    """While the card cannot be read: the consumers that are assumed to be loaded and cannot be,
    since those that surely are leave no room for them."""
    if not _assumes(snapshot):
        return []
    return disproved(snapshot.states, _declared(snapshot), _total_mib(snapshot))


def _assumes(snapshot: Snapshot) -> bool:
    return any(state.assumed is not None for state in snapshot.states.values())


def _declared(snapshot: Snapshot) -> dict[str, int]:
    return {name: _declared_mib(snapshot, name) for name in snapshot.config.consumers}


def _total_mib(snapshot: Snapshot) -> int:
    last = snapshot.gpu.last
    return snapshot.config.gpu.total_mib or (last.total_mib if last else 0)
