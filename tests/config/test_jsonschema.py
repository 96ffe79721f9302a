"""The JSON Schema agrees with what `gpumanager check` accepts."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gpumanager.config import ConfigError, parse_config, presets
from gpumanager.config.jsonschema import config_schema

ROOT = Path(__file__).parent.parent.parent
SCHEMA = config_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def one(**consumer: Any) -> dict[str, Any]:
    return {"consumers": {"it": {"url": "http://127.0.0.1:1", **consumer}}}


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_one_in_the_repository_is_this_one() -> None:
    stored = json.loads((ROOT / "config" / "schema.json").read_text("utf-8"))
    assert stored == json.loads(json.dumps(SCHEMA)), "gpumanager schema > config/schema.json"


def test_the_example_config_names_it_and_is_valid_by_it() -> None:
    text = (ROOT / "config" / "consumers.yaml").read_text("utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    VALIDATOR.validate(yaml.safe_load(text))


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_valid_by_it(name: str) -> None:
    text = files("gpumanager.config").joinpath("presets", f"{name}.yaml").read_text("utf-8")
    VALIDATOR.validate(one(preset=name, **yaml.safe_load(text)))


@pytest.mark.parametrize(
    "config",
    [
        one(health="/health", unload="/free", paths={"tts": "/say"}),
        one(timeouts={"total": "15m", "idle": 90}, idle_unload="1h", unload="/free"),
        one(evict="http", unload="/free"),
        one(probe={"path": "/ps", "busy": "running"}),
        one(routes=["/v1/audio/speech"], models=["a", {"name": "b", "served_as": "c"}]),
        one(routes={"/v1/audio/speech": "/say"}),
    ],
    ids=["paths", "durations", "an eviction method", "an expression", "lists", "routes"],
)
def test_short_forms_are_valid_in_both(config: dict[str, Any]) -> None:
    VALIDATOR.validate(config)
    parse_config(yaml.safe_dump(config))


@pytest.mark.parametrize(
    "config",
    [
        {"lisen": "127.0.0.1:1"},
        {"scheduler": {"max_queue": 0}},
        {"log": {"level": "loud"}},
        {"health_interval": "soon"},
        {"events": {"max_mib": 0}},
        one(helth="/health"),
        one(unload=3),
        {"consumers": {"it": {"health": "/health"}}},
    ],
)
def test_faults_in_single_keys_are_faults_in_both(config: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(config)
    with pytest.raises(ConfigError):
        parse_config(yaml.safe_dump(config))
