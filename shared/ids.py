"""Identifiers. One type each, so that a project id can never stand where a timeline id belongs.

Printed as `prefix-` and 16 lower-case hexadecimal digits (64 random bits); made by `new()`, parsed by `parse()`. They
appear in object names, AAD, logs and HTTP paths, so they are never derived from user text.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True, slots=True, order=True)
class _Id:
    text: str
    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"{self.prefix}-[0-9a-f]{{16}}", self.text):
            raise ValueError(
                f"malformed {type(self).__name__} {self.text[:64]!r}: expected {self.prefix}-<16 hex digits>"
            )

    @classmethod
    def new(cls) -> Self:
        return cls(f"{cls.prefix}-{secrets.token_hex(8)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError when `text` is not an id of this type."""
        return cls(text)

    def __hash__(self) -> int:
        return hash(self.text)  # a tuple of it, as dataclasses do it, is made anew each time

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        parse = core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema(max_length=64))
        return core_schema.json_or_python_schema(
            json_schema=parse,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), parse]),
            serialization=core_schema.to_string_ser_schema(),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": f"^{cls.prefix}-[0-9a-f]{{16}}$"}


class AccountId(_Id):
    """The customer organisation that owns key configurations."""

    prefix = "acc"


class KeyConfigurationId(_Id):
    """{provider, key identifier, principal}: which CMK, and as whom it is used."""

    prefix = "kc"


class WorkspaceId(_Id):
    """Unit of key binding; its projects inherit the key configuration."""

    prefix = "ws"


class ProjectId(_Id):
    """A database cluster with its own KEKs (Neon's *tenant*)."""

    prefix = "prj"


class TimelineId(_Id):
    """One history of a project, a branch (Neon's *timeline*; not Postgres's WAL timeline, which is always 1)."""

    prefix = "tl"


class EndpointId(_Id):
    """A connection target: at most one running compute of one timeline."""

    prefix = "ep"


class InstanceId(_Id):
    """One process of one service from start to end; the holder of leases. A restart is another instance."""

    prefix = "in"


class TokenId(_Id):
    """A token for a person: its `jti`. Not a secret."""

    prefix = "tok"


class KekId(_Id):
    """A key encryption key of a project, over all its versions."""

    prefix = "kek"
