"""Validation of a request's members against the service's own model, in the words of AWS's framework.

The model is botocore's `service-2.json`: required members, lengths, ranges, patterns and enumerations of every
operation. All violations are found and said in one sentence, as the real services do::

    2 validation errors detected: Value null at 'keyId' failed to satisfy constraint: Member must not be null; Value …

What the model does not say (waiting periods of 7 to 30 days, aliases that begin with `alias/`) is the operations' own.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from customercloud.aws.errors import AwsError
from customercloud.aws.params import member_name

Shape = Mapping[str, Any]

_PYTHON_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "structure": (dict,),
    "map": (dict,),
    "list": (list,),
    "string": (str,),
    "blob": (str,),
    "integer": (int,),
    "long": (int,),
    "double": (int, float),
    "float": (int, float),
    "boolean": (bool,),
    "timestamp": (int, float),
}
_MAX_SHOWN_SIZE_CHARACTERS: Final = 2048


class ServiceModel:
    """`shapes` and `operations` of a service-2.json. `code`: what the service calls a violation."""

    def __init__(self, model: Mapping[str, Any], code: str = "ValidationException") -> None:
        self._code = code
        self._shapes: Mapping[str, Shape] = model["shapes"]
        self._operations: Mapping[str, Any] = model["operations"]

    @property
    def operations(self) -> frozenset[str]:
        return frozenset(self._operations)

    def members_of(self, operation: str) -> tuple[str, ...]:
        """Names of its input's members."""
        return tuple(self.input_shape(operation)["members"])

    def errors_of(self, operation: str) -> frozenset[str]:
        """Names of the errors that it declares."""
        return frozenset(error["shape"] for error in self._operations[operation].get("errors", ()))

    def input_shape(self, operation: str) -> Shape:
        return self._shapes[self._operations[operation]["input"]["shape"]]

    def shape(self, reference: Mapping[str, str]) -> Shape:
        return self._shapes[reference["shape"]]

    def validate(self, operation: str, members: Mapping[str, Any]) -> None:
        """Raises SerializationException for a wrong type, the service's validation error for everything else."""
        violations = list(self._violations(self.input_shape(operation), members, ""))
        if violations:
            errors = "error" if len(violations) == 1 else "errors"
            raise AwsError(self._code, f"{len(violations)} validation {errors} detected: {'; '.join(violations)}")

    def _violations(self, shape: Shape, value: Any, path: str) -> Iterator[str]:
        kind = shape["type"]
        _require_type(kind, value, path)
        match kind:
            case "structure":
                yield from self._structure(shape, value, path)
            case "list":
                yield from self._list(shape, value, path)
            case "map":  # of strings, in these services
                for item in value.values():
                    _require_type("string", item, path)
            case "string":
                shown = None if shape.get("sensitive") else value
                yield from (_sentence(shown, path, constraint) for constraint in _string(shape, value))
            case "blob":
                size_bytes = _blob_size_bytes(value)
                yield from (_sentence(None, path, constraint) for constraint in _length(shape, size_bytes))
            case "integer" | "long":
                yield from (_sentence(str(value), path, constraint) for constraint in _range(shape, value))

    def _structure(self, shape: Shape, value: Mapping[str, Any], path: str) -> Iterator[str]:
        for name, reference in shape["members"].items():
            member = value.get(name)
            where = f"{path}.{member_name(name)}" if path else member_name(name)
            if member is not None:
                yield from self._violations(self._shapes[reference["shape"]], member, where)
            elif name in shape.get("required", ()):
                yield f"Value null at '{where}' failed to satisfy constraint: Member must not be null"

    def _list(self, shape: Shape, value: list[Any], path: str) -> Iterator[str]:
        for constraint in _length(shape, len(value)):
            yield _sentence(_shown_list(value), path, constraint)
        member = self._shapes[shape["member"]["shape"]]
        for index, item in enumerate(value, start=1):
            if member["type"] != "string":
                yield from self._violations(member, item, f"{path}.{index}.member")
                continue
            _require_type("string", item, path)
            broken = list(_string(member, item))
            if broken:
                # Of simple items the framework shows the whole list, once.
                yield _sentence(_shown_list(value), path, f"Member must satisfy constraint: [{', '.join(broken)}]")
                return


def _require_type(kind: str, value: object, path: str) -> None:
    # A Python bool is an int; a JSON one is not.
    if not isinstance(value, _PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise AwsError("SerializationException", f"{path or 'the request'} has the wrong type")


def _string(shape: Shape, value: str) -> Iterator[str]:
    yield from _length(shape, len(value))
    if "pattern" in shape and _pattern(shape["pattern"]).fullmatch(value) is None:
        yield f"Member must satisfy regular expression pattern: {shape['pattern']}"
    if "enum" in shape and value not in shape["enum"]:
        yield f"Member must satisfy enum value set: [{', '.join(shape['enum'])}]"


def _length(shape: Shape, size: int) -> Iterator[str]:
    if size < shape.get("min", 0):
        yield f"Member must have length greater than or equal to {shape['min']}"
    if size > shape.get("max", size):
        yield f"Member must have length less than or equal to {shape['max']}"


def _range(shape: Shape, value: int) -> Iterator[str]:
    if value < shape.get("min", value):
        yield f"Member must have value greater than or equal to {shape['min']}"
    if value > shape.get("max", value):
        yield f"Member must have value less than or equal to {shape['max']}"


@lru_cache(maxsize=256)
def _pattern(pattern: str) -> re.Pattern[str]:
    if r"\p{" in pattern:
        # Classes of characters that Python's module has under other names.
        return re.compile(pattern.replace(r"\p{L}", r"\w").replace(r"\p{N}", r"\d").replace(r"\p{Z}", r"\s"))
    return re.compile(pattern, re.ASCII)


def _blob_size_bytes(text: str) -> int:
    try:
        return len(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise AwsError("SerializationException") from None


def _shown_list(value: list[Any]) -> str:
    return f"[{', '.join(str(item) for item in value)}]"


def _sentence(value: str | None, path: str, constraint: str) -> str:
    """`value` is None for what must not be shown: blobs are plaintexts and keys."""
    shown = "Value" if value is None else f"Value '{value[:_MAX_SHOWN_SIZE_CHARACTERS]}'"
    return f"{shown} at '{path}' failed to satisfy constraint: {constraint}"
