"""From a file to a Config, or to every fault in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, TypeGuard

from pydantic import ValidationError

from gpumanager.addresses import host_and_port, is_loopback
from gpumanager.config import presets
from gpumanager.config.faults import ConfigError, Fault, Path, dotted, in_words, nearest, shown
from gpumanager.config.schema import Config, GpuConfig
from gpumanager.config.source import Lines, SourceError, read
from gpumanager.folders import config_folder

CONFIG_ENV = "GPUMANAGER_CONFIG"
DEFAULT_CONFIG_PATH = "config/consumers.yaml"
LARGEST_BYTES = 1024 * 1024
"""Of a config file; a real one has a few thousand."""


def config_path_from_env(environ: Mapping[str, str]) -> str:
    """The file that GPUMANAGER_CONFIG names, else `config/consumers.yaml`, else the one that setup
    writes; the middle one where none of them is there."""
    if named := environ.get(CONFIG_ENV):
        return named
    made = os.fspath(users_config_path(environ))
    return (
        made
        if os.path.exists(made) and not os.path.exists(DEFAULT_CONFIG_PATH)
        else DEFAULT_CONFIG_PATH
    )


def users_config_path(environ: Mapping[str, str]) -> FilePath:
    """Where the user's own config lies, which `gpumanager setup` writes."""
    return config_folder(environ) / "gpumanager" / "consumers.yaml"


def load_config(path: str | os.PathLike[str]) -> Config:
    """The config in a file. Raises ConfigError, also if the file cannot be read."""
    return parse_config(read_config_file(path), os.fspath(path))


def read_config_file(path: str | os.PathLike[str]) -> bytes:
    """What stands in a config file. Raises ConfigError if it cannot be read."""
    source = os.fspath(path)
    try:
        return _read(source)
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(source, [Fault("", None, reason)]) from None


def _read(source: str) -> bytes:
    # A FIFO or a device could block for ever, or never end.
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("it is not a regular file")
    with open(source, "rb") as file:
        text = file.read(LARGEST_BYTES + 1)
    if len(text) > LARGEST_BYTES:
        raise ValueError(f"it is larger than {LARGEST_BYTES // 1024} KiB")
    return text


def parse_config(text: str | bytes, source: str = "<config>") -> Config:
    """The config in `text` (YAML). Raises ConfigError with every fault at once."""
    try:
        document = read(text)
    except SourceError as error:
        raise ConfigError(source, [error.fault]) from None
    data, found = document.data, list(_cross_faults(document.data))
    config = None
    try:
        config = Config.model_validate(_with_presets(data))
    except ValidationError as invalid:
        details = invalid.errors(include_url=False)
        found += [in_words(detail, Config) for detail in details]
    faults = document.faults + [
        Fault(dotted(path), _line_of(path, data, document.lines), message, value)
        for path, message, value in found
        if path not in document.unread
    ]
    if config is None or faults:
        raise ConfigError(source, dict.fromkeys(faults))
    return config


def _with_presets(data: dict[str, Any]) -> dict[str, Any]:
    consumers = data.get("consumers")
    if not isinstance(consumers, dict):
        return data
    filled = {
        name: presets.filled_in(consumer) if isinstance(consumer, dict) else consumer
        for name, consumer in consumers.items()
    }
    return {**data, "consumers": filled}


def _line_of(path: Path, data: dict[str, Any], lines: Lines) -> int:
    """The line of `path`; what a preset filled in is found at the `preset` key."""
    if len(path) > 2 and path[0] == "consumers":
        consumer = _mapping(_mapping(data.get("consumers")).get(str(path[1])))
        if (
            "preset" in consumer
            and path[2] not in consumer
            and path[2] in presets.filled_in(consumer)
        ):
            return lines[(*path[:2], "preset")]
    return lines[path]


_Found = tuple[Path, str, str]


def _cross_faults(data: dict[str, Any]) -> Iterator[_Found]:
    """What no key shows by itself. Looks at the raw data, so that it is told of together with
    the faults in single keys, which are passed over here."""
    consumers = _mapping(data.get("consumers"))
    yield from _memory_faults(_mapping(data.get("gpu")), consumers)
    scheduler = _mapping(data.get("scheduler"))
    if scheduler.get("hold") not in (None, 0) and scheduler.get("policy", "fifo") == "fifo":
        yield ("scheduler", "hold"), "is of use only with 'policy: affinity'", ""
    if scheduler.get("policy") == "affinity" and scheduler.get("kind") == "passthrough":
        yield ("scheduler", "policy"), "is of use only with 'kind: locked'", ""
    if not isinstance(data.get("consumers", {}), dict):
        return  # that is the fault; that no reference then leads anywhere tells nothing more
    for kind, name in _mapping(data.get("routing")).items():
        yield from _routed(("routing", kind), name, consumers)
    yield from _port_faults(data, consumers)
    if (name := data.get("audio_proxy")) is not None:
        yield from _reference(("audio_proxy",), name, consumers)
    resident = data.get("default_resident")
    for index, name in enumerate(resident if isinstance(resident, list) else []):
        yield from _reference(("default_resident", index), name, consumers)
        if isinstance(name, str) and name in consumers:
            filled = presets.filled_in(_mapping(consumers[name]))
            if filled.get("load") is None and filled.get("warm") is None:
                message = f"consumer '{name}' has neither a load nor a warm call to load it with"
                hint = "; its preset has one if 'model' is set" if "preset" in filled else ""
                yield ("default_resident", index), message + hint, ""
    for name, raw in consumers.items():
        here, consumer = ("consumers", name), _mapping(raw)
        preset = consumer.get("preset")
        if isinstance(preset, str) and preset not in presets.names():
            message = f"unknown preset '{preset}'{nearest(preset, presets.names())}"
            yield (*here, "preset"), message, ""
        if consumer.get("ca_file") is not None and str(consumer.get("url")).startswith("http:"):
            yield (*here, "ca_file"), "is of use only where 'url' is https", ""
        for key, itself in (
            ("can_coexist_with", "a consumer need not be said to coexist with itself"),
            ("can_run_with", "how many of its own jobs run at once is 'max_parallel'"),
        ):
            friends = consumer.get(key)
            for index, friend in enumerate(friends if isinstance(friends, list) else []):
                place: Path = (*here, key, index)
                if friend == name:
                    yield place, itself, ""
                else:
                    yield from _reference(place, friend, consumers)
        filled = presets.filled_in(consumer)
        yield from _parallel_faults(here, filled)
        unload, probe = _mapping(filled.get("unload")), _mapping(filled.get("probe"))
        if unload.get("for_each") is not None and probe.get("items") is None:
            message = "needs a probe with 'items' to tell what to unload"
            yield (*here, "unload", "for_each"), message, ""
        yield from _eviction_faults(here, filled)
        most, needed = filled.get("max_mib"), filled.get("vram_resident_mib")
        if _is_mib(most) and _is_mib(needed) and most < needed:
            yield (*here, "max_mib"), f"is less than 'vram_resident_mib', {needed}", shown(most)
        if filled.get("model") is None:
            for key in filter(lambda key: presets.names_model(filled[key]), filled):
                yield (*here, key), "holds {model}, but the consumer has no 'model'", ""


def _parallel_faults(here: Path, consumer: Mapping[str, Any]) -> Iterator[_Found]:
    parallel, place = consumer.get("max_parallel", 1), (*here, "max_parallel")
    several = parallel == "auto" or (isinstance(parallel, int) and parallel > 1)
    if several and _mapping(consumer.get("on_disconnect")):
        message = "must be 1: the call of 'on_disconnect' would stop all jobs that run at once"
        yield place, message, ""
    elif parallel == "auto" and consumer.get("slots") is None:
        yield place, "'auto' needs 'slots', the call that asks the server for it", ""
    elif parallel == "auto" and consumer.get("health") is None and consumer.get("probe") is None:
        yield place, "'auto' needs a 'health' or 'probe' call: the server is asked with it", ""


def _eviction_faults(here: Path, consumer: Mapping[str, Any]) -> Iterator[_Found]:
    eviction_methods = consumer.get("evict")
    listed = (
        eviction_methods
        if isinstance(eviction_methods, list)
        else []
        if eviction_methods is None
        else [eviction_methods]
    )
    if consumer.get("unload") is None and ("http" in listed or {"http": True} in listed):
        yield (*here, "evict"), "holds http, but the consumer has no 'unload' call", ""
    if consumer.get("start_ahead") is True and not any(
        isinstance(each, dict) and ("unit" in each or "container" in each) for each in listed
    ):
        yield (*here, "start_ahead"), "needs a unit or a container in 'evict' to start", ""
    if consumer.get("idle_unload") is not None:
        if not listed and consumer.get("unload") is None:
            yield (*here, "idle_unload"), "needs an 'unload' call, or another way to 'evict'", ""
        if consumer.get("pinned") is True:
            yield (*here, "idle_unload"), "contradicts 'pinned'", ""


def _port_faults(data: Mapping[str, Any], consumers: Mapping[str, Any]) -> Iterator[_Found]:
    listen = str(data.get("listen", Config().listen)).rpartition(":")[2]
    for port, name in _mapping(data.get("ports")).items():
        yield from _reference(("ports", port), name, consumers)
        if str(port) == listen:
            yield ("ports", port), "is the port of 'listen' already", ""
        url = _mapping(consumers.get(str(name))).get("url")
        if isinstance(url, str) and _is_there(url, port):
            message = f"'{name}' listens there itself: move it, and its 'url', to another port"
            yield ("ports", port), message, ""


def _is_there(url: str, port: object) -> bool:
    try:
        host, own = host_and_port(url)
    except ValueError:
        return False
    return str(own) == str(port) and is_loopback(host)


def _routed(path: Path, names: object, consumers: Mapping[str, Any]) -> Iterator[_Found]:
    if not isinstance(names, list):
        yield from _reference(path, names, consumers)
        return
    for index, name in enumerate(names):
        yield from _reference((*path, index), name, consumers)
        if name in names[:index]:
            yield (*path, index), f"names '{name}' twice", ""


def _reference(path: Path, name: object, consumers: Mapping[str, Any]) -> Iterator[_Found]:
    if isinstance(name, str) and name not in consumers:
        yield path, f"unknown consumer '{name}'{nearest(name, consumers)}", ""


def _memory_faults(gpu: Mapping[str, Any], consumers: Mapping[str, Any]) -> Iterator[_Found]:
    total = gpu.get("total_mib")
    reserved = gpu.get("reserved_mib", GpuConfig().reserved_mib)
    if not _is_mib(total) or not _is_mib(reserved) or not total:
        return
    if reserved >= total:
        message = f"must be less than gpu.total_mib, which is {total}"
        yield ("gpu", "reserved_mib"), message, shown(reserved)
        return
    for name, consumer in consumers.items():
        needed = _mapping(consumer).get("vram_resident_mib")
        if _is_mib(needed) and needed > total - reserved:
            message = f"can never fit: {total - reserved} MiB are left of gpu.total_mib after "
            yield (
                ("consumers", name, "vram_resident_mib"),
                message + "gpu.reserved_mib",
                shown(needed),
            )


def _is_mib(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
