"""The JSON Schema of a configuration file, for editors and checkers."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from kvmsnapd.config.models import Settings


class _Generator(GenerateJsonSchema):
    def sort(self, value: Any, parent_key: str | None = None) -> Any:  # noqa: ANN401, ARG002
        """Leave everything in the order of the models, examples as well."""
        return value


def settings_schema() -> dict[str, Any]:
    """Return the schema of one file; what only several keys together can tell is left to ``check-config``."""
    schema = Settings.model_json_schema(schema_generator=_Generator)
    _tidy(schema)
    policy = schema["$defs"]["PolicySettings"]
    policy["properties"] = {"extends": policy["properties"].pop("extends"), **policy["properties"]}  # comes first
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kvmsnapd configuration",
        **schema,
    }


def render_schema() -> str:
    """Return the schema as text."""
    return json.dumps(settings_schema(), indent=2) + "\n"


def _tidy(node: Any) -> None:  # noqa: ANN401  # JSON data
    """Remove pydantic's titles, which repeat the names; refuse names that fit no pattern."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        if "patternProperties" in node:
            node["additionalProperties"] = False
        for value in node.values():
            _tidy(value)
    elif isinstance(node, list):
        for item in node:
            _tidy(item)
