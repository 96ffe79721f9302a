"""A config that can be replaced while it is in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from gpumanager.config.schema import Config

FIXED = (
    "listen",
    "ports",
    "audio_proxy",
    "audio_path_prefix",
    "scheduler",
    "health_interval",
    "max_body_mib",
    "max_header_kib",
    "max_websockets",
    "jobs",
    "auth",
    "allowed_hosts",
    "state_file",
    "log",
    "events",
)
"""Keys that are read once, at the start: a change needs a restart."""

FIXED_OF_GPU = ("device", "sample_interval")


class LiveConfig:
    """Reads like the Config that `current` gives at the moment: for who looks at one setting, at
    the moment when it matters. Who has to see one and the same config in several looks takes it
    from a snapshot."""

    def __init__(self, current: Callable[[], Config]) -> None:
        self._current = current

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current(), name)

    @property
    def seen(self) -> Config:
        """Itself, as the type that its readers know."""
        return cast(Config, self)


@dataclass(frozen=True, slots=True)
class Changes:
    """What a new config changes: consumers by name, other keys as they are written. `fixed` are
    those that cannot be changed while the broker runs."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def as_json(self) -> Mapping[str, Any]:
        """As the answer of `/v1/reload` has it: lists of names."""
        return {
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": list(self.changed),
            "keys": list(self.keys),
        }


def changes(old: Config, new: Config) -> Changes:
    """What a reload from `old` to `new` would change."""
    differing = [
        name
        for name in Config.model_fields
        if name not in ("consumers", "gpu") and getattr(old, name) != getattr(new, name)
    ]
    of_gpu = [
        name
        for name in type(new.gpu).model_fields
        if getattr(old.gpu, name) != getattr(new.gpu, name)
    ]
    fixed = [name for name in differing if name in FIXED]
    fixed += [f"gpu.{name}" for name in of_gpu if name in FIXED_OF_GPU]
    keys = [name for name in differing if name not in FIXED]
    keys += [f"gpu.{name}" for name in of_gpu if name not in FIXED_OF_GPU]
    before, after = old.consumers, new.consumers
    return Changes(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        changed=tuple(name for name in after if name in before and after[name] != before[name]),
        keys=tuple(keys),
        fixed=tuple(fixed),
    )
