"""Bodies for a JSON schema: a good one, and every way of spoiling it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tests.cluster_bad_input.place import CANARY

Schema = dict[str, Any]
EXAMPLES: Final[Mapping[str, Any]] = {
    "key_arn": "arn:aws:kms:us-east-1:111122223333:key/00000000-0000-4000-8000-000000000000",
    "role_arn": "arn:aws:iam::111122223333:role/keylake-kms",
    "external_id": CANARY,
    "password": CANARY,
    "at": "0/1000028",
    "read_only_at": "2026-11-26T10:00:00+00:00",
    "timestamp": "2026-11-26T10:00:00Z",
    "shred_id": "shr-0123456789abcdef",
    "instance_id": "in-0123456789abcdef",
    "subject": "backups",
    "object_name": "index/0000000000000001",
    "sha256": "0" * 64,
    "size": "1",
    "user_hex": "616e6e61",
}
"""Where the schema has a pattern, or a secret goes."""
MALFORMED_LSNS: Final = (
    *("", "0", "0/", "/0", "0/0/0", "0x0/0", "-1/0", "G/0", "100000000/0", "0/100000000", "0/0 ", "0/0\0"),
    "\N{FULLWIDTH DIGIT ZERO}/0",
)
MALFORMED_IDS: Final = (
    *("", "x", "prj", "prj-", "PRJ-0123456789ABCDEF", "prj-0123456789abcde", "prj-0123456789abcdef0"),
    *("xyz-0123456789abcdef", "0123456789abcdef"),
)
_NOT_JSON: Final = {
    "nothing": b"",
    "no JSON": b"no JSON " + CANARY.encode(),
    "half of JSON": b'{"name": "' + CANARY.encode(),
    "two values": b"{} {}",
    "no UTF-8": b'{"name": "\xff\xfe"}',
    "UTF-16": '{"name": "x"}'.encode("utf-16"),
    "a list": b"[]",
    "a string": json.dumps(CANARY).encode(),
    "a number": b"1",
    "null": b"null",
    "nested too deep": b"[" * 100_000,
    "a number that is too long": b'{"term": ' + b"9" * 100_000 + b"}",
}


class Bodies:
    """Of one route. `ids` are those that the good body names."""

    def __init__(self, schema: Schema, schemas: Mapping[str, Schema], ids: Mapping[str, str]) -> None:
        self._schema = schema
        self._schemas = schemas
        self._ids = ids

    def good(self) -> Any:
        """One that the schema allows."""
        return self._example(self._schema, "")

    def bad(self) -> Iterator[tuple[str, bytes]]:
        """(what is wrong, body). Never one that could be meant."""
        empty_is_good = not self._resolve(self._schema).get("required")
        yield from _NOT_JSON.items()
        good = self.good()
        for where, schema in self._walk(self._schema, good, ()):
            for what, value in self._spoiled(schema, str(where[-1]) if where else ""):
                yield f"{'.'.join(map(str, where))}: {what}", json.dumps(_replaced(good, where, value)).encode()
            if schema.get("type") == "object":
                yield f"{where}: unknown field", json.dumps(_replaced(good, (*where, "unknown"), CANARY)).encode()
                for required in schema.get("required", ()):
                    yield f"{where}: without {required}", json.dumps(_without(good, (*where, required))).encode()
        if not empty_is_good:
            yield "empty", b"{}"

    def _resolve(self, schema: Schema) -> Schema:
        while True:
            if "$ref" in schema:
                schema = self._schemas[schema["$ref"].rpartition("/")[2]]
            elif options := schema.get("anyOf") or schema.get("oneOf"):
                schema = next((o for o in options if o.get("$ref", "").endswith("/AwsKey")), options[0])
            else:
                return schema

    def _example(self, schema: Schema, name: str) -> Any:
        schema = self._resolve(schema)
        if name in EXAMPLES:
            return EXAMPLES[name]
        if name in self._ids:
            return self._ids[name]
        if name.endswith("lsn"):
            return "0/1000028"
        if "const" in schema:
            return schema["const"]
        match schema.get("type"):
            case "object":
                return {key: self._example(value, key) for key, value in schema.get("properties", {}).items()}
            case "array":
                return [self._example(schema["items"], name)]
            case "integer" | "number":
                return schema.get("default", max(1, schema.get("minimum", 1)))
            case "string":
                return "x"
            case "boolean":
                return False
            case other:
                raise AssertionError(f"{name}: no example for the type {other}")

    def _walk(self, schema: Schema, value: Any, where: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Schema]]:
        schema = self._resolve(schema)
        yield where, schema
        for key, each in schema.get("properties", {}).items():
            yield from self._walk(each, value[key], (*where, key))
        if schema.get("type") == "array":
            yield from self._walk(schema["items"], value[0], (*where, 0))

    def _spoiled(self, schema: Schema, name: str) -> Iterator[tuple[str, Any]]:
        kind = schema.get("type")
        if kind != "array":
            yield "a list", [CANARY]
        if kind != "object":
            yield "an object", {CANARY: CANARY}
        if kind in ("integer", "number", "object", "array", "boolean"):
            yield "a string", CANARY
        if kind in ("integer", "number", "boolean"):
            yield "a string with one in it", "1"
        if kind in ("integer", "number"):
            yield "true", True
            yield "far too large", 10**400
            yield "far too small", -(10**400)
            yield "not a number", float("nan")
            yield "infinite", float("inf")
        if kind == "integer":
            yield "a fraction", 1.5
            yield "more than 64 bits", 1 << 64
            yield "negative", -1
        if kind == "boolean":
            yield "one", 1
        if kind == "string":
            yield "a number", 5
            yield "half a surrogate", "\ud800"
            if "maxLength" in schema:
                yield "too long", "x" * (schema["maxLength"] + 1)
            if schema.get("minLength"):
                yield "empty", ""
        if name.endswith("lsn"):
            yield from ((f"LSN {text!r}", text) for text in MALFORMED_LSNS)
        elif name in self._ids:
            yield from ((f"id {text!r}", text) for text in MALFORMED_IDS)
        elif name == "name":
            yield "a NUL", "a\0b"
            yield "a line break", "a\nb"


def _replaced(good: Any, where: tuple[Any, ...], value: Any) -> Any:
    if not where:
        return value
    changed = copy.deepcopy(good)
    inner = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    return changed


def _without(good: Any, where: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(good)
    inner = changed
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    return changed
