"""The examples of the API's description: there is one of each answer, and each is as described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError

from gpumanager.config import Config
from gpumanager.web import examples
from gpumanager.web.openapi import describe

DESCRIPTION = describe(Config(), "0", keys=False)
JSON = "application/json"


def answers() -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON answers of the broker's own, each by its method, path and status."""
    for path, methods in DESCRIPTION["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                if status != "default" and JSON in answer.get("content", {}):
                    yield f"{method.upper()} {path} {status}", answer


ANSWERS = dict(answers())


def validator(schema: dict[str, Any]) -> Any:
    whole = {"components": DESCRIPTION["components"], **schema}
    return Draft202012Validator(whole, format_checker=FormatChecker())


@pytest.mark.parametrize("key", [key for key in ANSWERS if key != "GET /openapi.json 200"])
def test_each_answer_has_examples_that_are_as_described(key: str) -> None:
    content = ANSWERS[key]["content"][JSON]
    assert content["examples"]
    for example in content["examples"].values():
        validator(content["schema"]).validate(example["value"])


def test_an_example_that_is_not_as_described_would_be_noticed() -> None:
    content = ANSWERS["GET /v1/status 200"]["content"][JSON]
    good = content["examples"]["answer"]["value"]
    less = {key: value for key, value in good.items() if key != "gpu"}
    for bad in (less, {**good, "listen": 1}, {**good, "role": "boss"}):
        with pytest.raises(ValidationError):
            validator(content["schema"]).validate(bad)


def test_examples_have_no_field_that_is_not_described() -> None:
    schemas = DESCRIPTION["components"]["schemas"]

    def undescribed(shape: dict[str, Any], value: Any, at: str) -> Iterator[str]:
        shape = schemas[shape["$ref"].rpartition("/")[2]] if "$ref" in shape else shape
        if isinstance(value, list):
            for each in value:
                yield from undescribed(shape.get("items", {}), each, at)
        elif isinstance(value, dict) and "oneOf" not in shape:
            known = shape.get("properties", {})
            for name, each in value.items():
                inner = known.get(name, shape.get("additionalProperties"))
                if inner is None and known:
                    yield f"{at}.{name}"
                elif inner:
                    yield from undescribed(inner, each, f"{at}.{name}")

    for key, value in examples.answers().items():
        assert list(undescribed(ANSWERS[key]["content"][JSON]["schema"], value, key)) == []


def test_every_example_belongs_to_an_answer() -> None:
    assert set(examples.answers()) <= set(ANSWERS)
    told = {
        (int(key.rpartition(" ")[2]), code)
        for key, answer in ANSWERS.items()
        for code in answer["content"][JSON].get("examples", {})
    }
    assert set(examples.refusals()) <= told
