"""Pieces of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def schema_type(schema: dict[str, Any], link: str = "") -> str:
    """A JSON schema in a few words: type, choices, limits. A model's name is a link when `link` says where models are
    (`#{}`)."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}]({link.format(name.lower())})" if link else name
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            kinds = [schema_type(each, link) for each in schema[key]]
            return " or ".join(dict.fromkeys(kind for kind in kinds if kind))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    match schema.get("type"):
        case "array":
            items = schema.get("items", {})
            kind = f"list of {schema_type(items, link) or 'anything'}"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            kind = f"map to {schema_type(schema['additionalProperties'], link)}"
        case "null":
            return "null"
        case None:
            return ""
        case str(name):
            kind = {"date-time": "time", "path": "path", "file-path": "path", "password": "secret"}.get(
                schema.get("format", ""), name
            )
    return kind + _limits(schema)


def _limits(schema: dict[str, Any]) -> str:
    signs = {
        "minimum": "≥ {}",
        "exclusiveMinimum": "> {}",
        "maximum": "≤ {}",
        "exclusiveMaximum": "< {}",
        "minLength": "≥ {} letters",
        "maxLength": "≤ {} letters",
        "minItems": "≥ {}",
        "maxItems": "≤ {}",
        "pattern": "`{}`",
    }
    told = [
        sign.format(f"{value:g}" if isinstance(value, float) else value)
        for key, sign in signs.items()
        if (value := schema.get(key)) is not None
    ]
    return f" ({', '.join(told)})" if told else ""
