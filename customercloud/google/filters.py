"""The filters of list methods, as "Sorting and filtering list results" of the Cloud KMS documentation has them.

    filter      = and { space | AND } …, where OR binds closer than AND
    term        = [ - | NOT ] ( restriction | "(" filter ")" )
    restriction = field operator value;  operators = != < <= => >= > and `:` (contains, in any case)

Fields are those of the listed message, in either spelling, with dots into messages and maps (`labels.team`,
`primary.state`). Times are RFC 3339. Pure: a filter becomes a predicate of messages.
"""

from __future__ import annotations

import datetime as dt
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from customercloud.google.errors import GoogleError, invalid_argument

MAX_FILTER_SIZE_CHARACTERS: Final = 2048
_MAX_DEPTH: Final = 16

Predicate = Callable[[Mapping[str, Any]], bool]
"""Of a message as JSON has it."""

_TOKEN: Final = re.compile(
    r"""\s*(?:
        (?P<paren>[()])
      | (?P<operator>!=|<=|=>|>=|=|<|>|:)
      | "(?P<quoted>(?:[^"\\]|\\.)*)"
      | (?P<minus>-)(?=[A-Za-z("])
      | (?P<word>[A-Za-z0-9_./+@*-]+)
    )""",
    re.VERBOSE,
)
_TIME: Final = re.compile(r"\s*([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+(?:Z|[+-][0-9:]+))")
_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    "=>": operator.ge,
    ">=": operator.ge,
    ">": operator.gt,
}


def _invalid(why: str) -> GoogleError:
    return invalid_argument(f"Invalid filter: {why}.")


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str


def _tokens(text: str) -> list[_Token]:
    if len(text) > MAX_FILTER_SIZE_CHARACTERS:
        raise _invalid("it is too long")
    tokens: list[_Token] = []
    position = 0
    while text[position:].strip():
        follows_operator = bool(tokens) and tokens[-1].kind == "operator"
        if follows_operator and (time := _TIME.match(text, position)):
            tokens.append(_Token("word", time[1]))
            position = time.end()
            continue
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise _invalid("a character stands where none can")
        value = match[match.lastgroup]
        tokens.append(_Token(match.lastgroup, re.sub(r"\\(.)", r"\1", value) if match.lastgroup == "quoted" else value))
        position = match.end()
    return tokens


class _Parser:
    def __init__(self, tokens: list[_Token], descriptor: Descriptor) -> None:
        self._tokens = tokens
        self._descriptor = descriptor
        self._next = 0

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, *kinds: str) -> _Token:
        token = self._peek()
        if token is None or token.kind not in kinds:
            raise _invalid("it ends too early" if token is None else f"'{token.text[:64]}' is not expected")
        self._next += 1
        return token

    def _skip(self, kind: str, text: str) -> bool:
        if self._peek() == _Token(kind, text):
            self._next += 1
            return True
        return False

    def whole(self) -> Predicate:
        predicate = self._all(0)
        if (token := self._peek()) is not None:
            raise _invalid(f"'{token.text[:64]}' is not expected")
        return predicate

    def _all(self, depth: int) -> Predicate:
        if depth > _MAX_DEPTH:
            raise _invalid("it is nested too deeply")
        parts = [self._any(depth)]
        while (token := self._peek()) is not None and token != _Token("paren", ")"):
            self._skip("word", "AND")
            parts.append(self._any(depth))
        return lambda members: all(part(members) for part in parts)

    def _any(self, depth: int) -> Predicate:
        parts = [self._term(depth)]
        while self._skip("word", "OR"):
            parts.append(self._term(depth))
        return lambda members: any(part(members) for part in parts)

    def _term(self, depth: int) -> Predicate:
        if self._skip("minus", "-") or self._skip("word", "NOT"):
            negated = self._term(depth + 1) if depth < _MAX_DEPTH else self._all(depth + 1)
            return lambda members: not negated(members)
        if self._skip("paren", "("):
            inner = self._all(depth + 1)
            if not self._skip("paren", ")"):
                raise _invalid("a parenthesis is not closed")
            return inner
        field = self._take("word").text
        comparison = self._take("operator").text
        return _restriction(self._descriptor, field, comparison, self._take("word", "quoted").text)


def _restriction(descriptor: Descriptor, path: str, comparison: str, text: str) -> Predicate:
    names, field = _resolve(descriptor, path)
    read = _reader(field)
    if comparison == ":":
        return lambda members: text.lower() in str(_value(members, names) or "").lower()
    wanted = read(text)
    if wanted is None:
        raise _invalid(f"the value of {path[:64]} cannot be compared")
    compare = _COMPARISONS[comparison]

    def matches(members: Mapping[str, Any]) -> bool:
        value = _value(members, names)
        actual = None if value is None else read(str(value))
        # What is not set differs from everything, and is neither before nor after anything.
        return comparison == "!=" if actual is None else compare(actual, wanted)

    return matches


def _resolve(descriptor: Descriptor, path: str) -> tuple[tuple[str, ...], FieldDescriptor | None]:
    """Names as JSON has them, and the last field; None for a value of a map of strings."""
    names: list[str] = []
    parts = path.split(".")
    current: Descriptor | None = descriptor
    field: FieldDescriptor | None = None
    for index, part in enumerate(parts):
        if current is not None:
            field = current.fields_by_name.get(part) or current.fields_by_camelcase_name.get(part)
        if field is None or current is None:
            raise _invalid(f"there is no field {path[:64]}")
        names.append(field.camelcase_name)
        current = field.message_type
        if current is not None and current.GetOptions().map_entry:
            rest = ".".join(parts[index + 1 :])
            if not rest:
                raise _invalid(f"{path[:64]} needs a key")
            return (*names, rest), None
    if (
        field is not None
        and field.message_type is not None
        and field.message_type.name not in ("Timestamp", "Duration")
    ):
        raise _invalid(f"{path[:64]} is no single value")
    return tuple(names), field


def _value(members: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    value: Any = members
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _reader(field: FieldDescriptor | None) -> Callable[[str], Any]:
    """From text to what compares; None for a text that is none of it."""
    if field is None:
        return lambda text: text
    if field.message_type is not None:
        return _time if field.message_type.name == "Timestamp" else _seconds
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64):
        return lambda text: int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return lambda text: {"true": True, "false": False}.get(text.lower())
    return lambda text: text


def _time(text: str) -> dt.datetime | None:
    try:
        time = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else None


def _seconds(text: str) -> float | None:
    return float(text[:-1]) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?s", text) else None


def parsed(text: str, descriptor: Descriptor) -> Callable[[Message], bool]:
    """Raises INVALID_ARGUMENT for what is no filter of messages of this type. The empty one matches all."""
    if not text.strip():
        return lambda _: True
    predicate = _Parser(_tokens(text), descriptor).whole()
    return lambda message: predicate(json_format.MessageToDict(message, always_print_fields_with_no_presence=True))
