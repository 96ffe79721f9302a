"""Presets: what is known of a server, as data, so that the operator need not write it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from gpumanager.config.values import same_paths

_MERGED = ("paths", "routes", "timeouts")
"""Keys whose entries are filled in one by one; any other key is taken whole or not at all."""


@cache
def names() -> tuple[str, ...]:
    """The names that `preset` may have, sorted."""
    folder = files("gpumanager.config").joinpath("presets")
    found = (entry.name.removesuffix(".yaml") for entry in folder.iterdir())
    return tuple(sorted(name for name in found if not name.startswith("_")))


def filled_in(consumer: dict[str, Any]) -> dict[str, Any]:
    """`consumer` with the keys of its preset that it does not set itself."""
    name = consumer.get("preset")
    if not isinstance(name, str) or name not in names():
        return consumer
    preset = _load(name)
    if consumer.get("model") is None:
        # What is about a model cannot be said without one.
        preset = {key: value for key, value in preset.items() if not names_model(value)}
    merged = {**preset, **consumer}
    for key in _MERGED:
        filled = same_paths(preset.get(key))
        if isinstance(filled, dict) and isinstance(consumer.get(key), dict):
            merged[key] = {**filled, **consumer[key]}
    return merged


def names_model(value: Any) -> bool:
    """Whether `{model}` stands anywhere in `value`."""
    if isinstance(value, dict):
        return any(map(names_model, value.values()))
    if isinstance(value, list):
        return any(map(names_model, value))
    return isinstance(value, str) and "{model}" in value


@cache
def _load(name: str) -> dict[str, Any]:
    text = files("gpumanager.config").joinpath("presets", f"{name}.yaml").read_text("utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data
