"""What llama.cpp's grammars cannot enforce is refused: an answer that silently breaks its schema is worse than none."""

from typing import Any, Final

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ChatParams, JsonSchemaFormat

# Keywords that llama.cpp's conversion of schemas to grammars ignores (json-schema-to-grammar, version 2026.10).
_IGNORED: Final = frozenset(
    {
        *("not", "if", "then", "else", "patternProperties", "propertyNames", "minProperties", "maxProperties"),
        *("dependentRequired", "dependentSchemas", "dependencies", "contains", "minContains", "maxContains"),
        *("uniqueItems", "multipleOf", "unevaluatedProperties", "unevaluatedItems"),
    }
)
# Keywords whose value maps names to schemas, and those whose value is a schema or a list of them.
_MAPS: Final = ("properties", "$defs", "definitions")
_NESTED: Final = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")


def check_schema(params: ChatParams) -> None:
    """Raises `HelixError` UNSUPPORTED naming the keyword of `response_format` that cannot be enforced."""
    chosen = params.response_format
    if isinstance(chosen, JsonSchemaFormat) and isinstance(chosen.json_schema.schema, dict):
        _check(chosen.json_schema.schema, "response_format.json_schema.schema")


def _check(schema: dict[str, Any], path: str) -> None:
    for keyword, value in schema.items():
        if keyword in _IGNORED:
            raise _refusal(f"cannot enforce the keyword '{keyword}'", f"{path}.{keyword}")
        if keyword == "pattern" and not _is_plain_pattern(value):
            raise _refusal("can enforce a 'pattern' only from ^ to $ and without look-around", f"{path}.pattern")
        if keyword in _MAPS and isinstance(value, dict):
            for name, nested in value.items():
                _check_any(nested, f"{path}.{keyword}.{name}")
        elif keyword in _NESTED:
            _check_any(value, f"{path}.{keyword}")


def _check_any(value: object, path: str) -> None:
    if isinstance(value, dict):
        _check(value, path)
    elif isinstance(value, list):
        for index, nested in enumerate(value):
            _check_any(nested, f"{path}[{index}]")


def _is_plain_pattern(value: object) -> bool:
    if not isinstance(value, str) or not (value.startswith("^") and value.endswith("$")):
        return False
    return not any(group in value for group in ("(?=", "(?!", "(?<"))


def _refusal(what: str, path: str) -> HelixError:
    return HelixError(ErrorKind.UNSUPPORTED, f"This model {what}; leave it out of the schema.", param=path[:256])
