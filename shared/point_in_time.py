"""A state of a timeline, named by an LSN or by a time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from shared.lsn import Lsn

MAX_LENGTH: Final = 64


@dataclass(frozen=True, slots=True)
class PointInTime:
    """One of the two. Everything that was committed by then is in it. In JSON it is text, as `parse` takes it."""

    lsn: Lsn | None = None
    timestamp: datetime | None = None
    """With a time zone."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if (self.lsn is None) == (self.timestamp is None):
            raise ValueError("give either an LSN or a time")
        if self.timestamp is not None and self.timestamp.tzinfo is None:
            raise ValueError("the time has no zone: put a Z behind it for UTC, or an offset like +02:00")

    @classmethod
    def parse(cls, text: str) -> PointInTime:
        """`0/18915F8`, or a time as ISO 8601 writes it, with its zone. Raises ValueError."""
        try:
            return cls(lsn=Lsn.parse(text))
        except ValueError:
            pass
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError("neither an LSN like 0/18915F8 nor a time like 2026-11-26T10:00:00Z") from None
        return cls(timestamp=time)

    def __str__(self) -> str:
        return str(self.lsn) if self.timestamp is None else self.timestamp.isoformat()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        parse = core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema(max_length=MAX_LENGTH))
        return core_schema.json_or_python_schema(
            json_schema=parse,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), parse]),
            serialization=core_schema.to_string_ser_schema(),
        )
