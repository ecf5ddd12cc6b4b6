"""Log sequence number: a byte position in a WAL stream (Postgres `access/xlogdefs.h`, XLogRecPtr)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

WAL_BLOCK_SIZE_BYTES = 8192
"""XLOG_BLCKSZ of the Postgres that we run."""

WAL_SEGMENT_SIZE_BYTES = 16 * 1024 * 1024
"""Segment size that every project is initialised with (initdb's default)."""


@dataclass(frozen=True, slots=True, order=True)
class Lsn:
    """Unsigned 64-bit byte position, printed `%X/%X`. Ranges of Lsn are half-open.

    `Lsn + int` moves by bytes, `Lsn - Lsn` counts the bytes between; nothing else is defined. Hot loops use the plain
    integer (`.value`) and build an Lsn at their edge.
    """

    value: int

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1 << 64:
            raise ValueError(f"LSN out of range: {self.value:#x}")

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Parse Postgres's `XXXXXXXX/XXXXXXXX`. Raises ValueError for anything else."""
        high, slash, low = text.partition("/")
        if (
            not slash
            or not (1 <= len(high) <= 8 and 1 <= len(low) <= 8)
            or not all(c in "0123456789abcdefABCDEF" for c in high + low)
        ):
            raise ValueError(f"malformed LSN {text!r}: expected two hexadecimal numbers like 0/16B3748")
        return cls(int(high, 16) << 32 | int(low, 16))

    def __add__(self, length_bytes: int) -> Lsn:
        return Lsn(self.value + length_bytes)

    def __sub__(self, other: Lsn) -> int:
        return self.value - other.value

    def __str__(self) -> str:
        return f"{self.value >> 32:X}/{self.value & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn({self})"

    @property
    def segment_number(self) -> int:
        return self.value // WAL_SEGMENT_SIZE_BYTES

    @property
    def segment_offset_bytes(self) -> int:
        return self.value % WAL_SEGMENT_SIZE_BYTES

    @property
    def page_offset_bytes(self) -> int:
        return self.value % WAL_BLOCK_SIZE_BYTES

    def align_up(self, alignment_bytes: int = 8) -> Lsn:
        """Round up to a multiple of `alignment_bytes` (records start at MAXALIGN, 8 bytes)."""
        return Lsn((self.value + alignment_bytes - 1) // alignment_bytes * alignment_bytes)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        parse = core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema(max_length=17))
        return core_schema.json_or_python_schema(
            json_schema=parse,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), parse]),
            serialization=core_schema.to_string_ser_schema(),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": "^[0-9a-fA-F]{1,8}/[0-9a-fA-F]{1,8}$"}


ZERO_LSN = Lsn(0)
"""InvalidXLogRecPtr: no position."""
