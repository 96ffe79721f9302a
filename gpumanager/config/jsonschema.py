"""The JSON Schema of the config, made from the models, for editors and other tools.

It knows what a key may hold; what hangs together across keys only `gpumanager check` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from gpumanager.config import presets
from gpumanager.config import schema as models

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_DURATION = {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})? ?(ms|[smhd])$"}
_TEXT = {"type": "string"}


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
    models._number: _or(_DURATION),
    models._bare_path: _or(_TEXT),
    models._bare_path_or_none: _or(_TEXT),
    models._bare_expression: _or(_TEXT),
    models._bare_rung: _or({"const": "http"}),
    models._listed: _one_or_list,
}


def config_schema() -> dict[str, Any]:
    """The schema of the whole file."""
    made = models.Config.model_json_schema(schema_generator=_WithShortForms)
    made["$schema"] = DIALECT
    made["title"] = "gpumanager's config"
    consumer = made["$defs"]["ConsumerConfig"]
    consumer["properties"]["preset"] = {
        "enum": list(presets.names()),
        "description": "Fills in what is known of a server of this kind; any key overrides it.",
    }
    return made
