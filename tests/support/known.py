"""A registry whose consumers are named, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping

from gpumanager.clock import Clock
from gpumanager.config import Config, ConsumerConfig
from gpumanager.consumers.registry import Registry


def config_of(consumers: Mapping[str, bool]) -> Config:
    """A config with these consumers; each says whether it is taken for loaded at first."""
    settings: dict[bool, ConsumerConfig] = {
        loaded: ConsumerConfig.model_validate(
            {"url": "http://127.0.0.1:1", **({} if loaded else {"unload": "/unload"})}
        )
        for loaded in (True, False)
    }
    return Config(consumers={name: settings[loaded] for name, loaded in consumers.items()})


def registry_of(consumers: Mapping[str, bool], clock: Clock) -> Registry:
    """The registry of such a config."""
    return Registry(config_of(consumers), clock)
