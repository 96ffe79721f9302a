"""Examples of the broker's JSON answers, from a data file, for its OpenAPI description."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from gpumanager import errors

_JSON = "application/json"


@cache
def answers() -> dict[str, Any]:
    """The broker's answers where all went well, by `METHOD /path/{template} STATUS`."""
    found: dict[str, Any] = _file()["answers"]
    return found


@cache
def refusals() -> dict[tuple[int, str], dict[str, Any]]:
    """The body of each error by its status and code."""
    retryable = {
        (each.status, each.code): each.retryable
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.BrokerError)
    }
    found = {}
    for key, body in _file()["errors"].items():
        status, _, code = key.partition(" ")
        which = int(status), code
        found[which] = {"error": code, **body, "retryable": retryable[which]}
    return found


def add_to(paths: dict[str, Any]) -> None:
    """Put an example beside the schema of each JSON answer of an OpenAPI description's `paths`."""
    for path, methods in paths.items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                content = answer.get("content", {}).get(_JSON)
                if content is None or status == "default":
                    continue
                if found := _of(f"{method.upper()} {path} {status}", answer["description"], status):
                    content["examples"] = found


def _of(key: str, description: str, status: str) -> dict[str, Any]:
    if key in answers():
        return {"answer": {"value": answers()[key]}}
    return {
        code: {"value": body}
        for (of, code), body in refusals().items()
        if str(of) == status and f"`{code}`" in description
    }


@cache
def _file() -> Any:
    return yaml.safe_load(files("gpumanager.web").joinpath("examples.yaml").read_text("utf-8"))
