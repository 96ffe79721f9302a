"""Examples of the broker's JSON answers, from a data file, for its OpenAPI description."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from gpumanager import errors
from gpumanager.web.protocols import protocol_of

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
                key = f"{method.upper()} {path} {status}"
                if key in answers():
                    content["examples"] = {"answer": {"value": answers()[key]}}
                elif found := _refused(path, answer["description"], int(status)):
                    content["examples"] = found


def _refused(path: str, description: str, status: int) -> dict[str, Any]:
    shape = protocol_of(path).shape
    return {
        code: {"value": shape(body, status)}
        for (of, code), body in refusals().items()
        if of == status and f"`{code}`" in description
    }


@cache
def _file() -> Any:
    return yaml.safe_load(files("gpumanager.web").joinpath("examples.yaml").read_text("utf-8"))
