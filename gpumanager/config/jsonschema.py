"""The JSON Schema of the config, made from the models, for editors and other tools.

It knows what a key may hold; what hangs together across keys only `gpumanager check` knows.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from gpumanager.config import calls, presets, values
from gpumanager.config import schema as models

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_DURATION = {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})? ?(ms|[smhd])$"}
_PATH = {"type": "string", "format": "path"}
_EXPRESSION = {"type": "string", "format": "jmespath"}


class _WithShortForms(GenerateJsonSchema):
    """Knows what else may stand where a validator rewrites its input first."""

    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        found = super().function_before_schema(schema)
        widen = _SHORT_FORMS.get(schema["function"]["function"])
        return found if widen is None else widen(found)


def _or(*more: dict[str, Any]) -> Callable[[JsonSchemaValue], JsonSchemaValue]:
    return lambda found: {"anyOf": [found, *more]}


def _one_or_list(found: JsonSchemaValue) -> JsonSchemaValue:
    arrays = [found, *found.get("anyOf", [])]
    items: dict[str, Any] = next((each["items"] for each in arrays if "items" in each), {})
    return {"anyOf": [found, items]}


_SHORT_FORMS: dict[Any, Callable[[JsonSchemaValue], JsonSchemaValue]] = {
    values.number: _or(_DURATION),
    values.bare_path: _or(_PATH),
    values.bare_path_or_none: _or(_PATH),
    values.bare_expression: _or(_EXPRESSION),
    values.bare_method: _or({"const": "http"}),
    values.listed: _one_or_list,
    values.bare_model: _or({"type": "string"}),
    values.same_paths: _or({"type": "array", "items": {"type": "string", "format": "route"}}),
}


def config_schema() -> dict[str, Any]:
    """The schema of the whole file."""
    made = models.Config.model_json_schema(schema_generator=_WithShortForms)
    made["$schema"] = DIALECT
    made["title"] = "gpumanager's config"
    preset: dict[str, Any] = {"enum": list(presets.names())}
    made["$defs"]["ConsumerConfig"]["properties"]["preset"] = preset
    _describe(models.Config, made)
    for name, shape in made["$defs"].items():
        _describe(getattr(models, name, None) or getattr(calls, name), shape)
    return made


def _describe(model: type[BaseModel], shape: dict[str, Any]) -> None:
    """Put the text below each key into its shape."""
    texts = key_texts(model)
    for name, field in model.model_fields.items():
        shape["properties"][field.alias or name]["description"] = texts[name]


def key_texts(model: type[BaseModel]) -> Mapping[str, str]:
    """What stands below each key of a model, in the source of the model or of its bases.

    Read from the source only when somebody asks: pydantic could do it, at each start."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        found |= _texts_of(each.__module__).get(each.__name__, {})
    return found


@cache
def _texts_of(module: str) -> Mapping[str, Mapping[str, str]]:
    if not module.startswith("gpumanager."):
        return {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        cls.name: {
            key.target.id: " ".join(text.value.value.split())
            for key, text in zip(cls.body, cls.body[1:], strict=False)
            if isinstance(key, ast.AnnAssign)
            and isinstance(key.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for cls in tree.body
        if isinstance(cls, ast.ClassDef)
    }
