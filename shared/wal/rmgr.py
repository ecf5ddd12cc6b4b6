"""Resource managers (Postgres `access/rmgrlist.h`) and the bounds-checked cursor that their parsers share.

Each `rmgr_<name>.py` has `parse(info, …, data)`: `info` is xl_info, `data` the record's main data. It answers a frozen
value, or None for a record that changes nothing outside its own blocks, and raises CorruptedError for an opcode that
PostgreSQL 16 does not have and for data that ends too early or goes on too long.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, Final

from shared.errors import CorruptedError
from shared.wal.record import Rel


class RmgrId(IntEnum):
    XLOG = 0
    XACT = 1
    SMGR = 2
    CLOG = 3
    DBASE = 4
    TBLSPC = 5
    MULTIXACT = 6
    RELMAP = 7
    STANDBY = 8
    HEAP2 = 9
    HEAP = 10
    BTREE = 11
    HASH = 12
    GIN = 13
    GIST = 14
    SEQ = 15
    SPGIST = 16
    BRIN = 17
    COMMIT_TS = 18
    REPLORIGIN = 19
    GENERIC = 20
    LOGICALMSG = 21


RMGR_NAMES: Final = {
    RmgrId.XLOG: "XLOG",
    RmgrId.XACT: "Transaction",
    RmgrId.SMGR: "Storage",
    RmgrId.CLOG: "CLOG",
    RmgrId.DBASE: "Database",
    RmgrId.TBLSPC: "Tablespace",
    RmgrId.MULTIXACT: "MultiXact",
    RmgrId.RELMAP: "RelMap",
    RmgrId.STANDBY: "Standby",
    RmgrId.HEAP2: "Heap2",
    RmgrId.HEAP: "Heap",
    RmgrId.BTREE: "Btree",
    RmgrId.HASH: "Hash",
    RmgrId.GIN: "Gin",
    RmgrId.GIST: "Gist",
    RmgrId.SEQ: "Sequence",
    RmgrId.SPGIST: "SPGist",
    RmgrId.BRIN: "BRIN",
    RmgrId.COMMIT_TS: "CommitTs",
    RmgrId.REPLORIGIN: "ReplicationOrigin",
    RmgrId.GENERIC: "Generic",
    RmgrId.LOGICALMSG: "LogicalMessage",
}
"""As pg_waldump prints them."""

_U32 = struct.Struct("<I")
_REL = struct.Struct("<III")


class DataCursor:
    """Reads the data of one record from front to back; raises CorruptedError rather than read past its end."""

    __slots__ = ("_data", "_pos", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        """`what` names the record in messages."""
        self._data = data
        self._pos = 0
        self._what = what

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take_bytes(layout.size))

    def take_bytes(self, length: int) -> bytes:
        if not 0 <= length <= len(self._data) - self._pos:
            raise CorruptedError(
                f"{self._what} record wants {length} bytes where {len(self._data) - self._pos} are left"
            )
        start = self._pos
        self._pos += length
        return self._data[start : self._pos]

    def take_u32s(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{max(count, 0)}I", self.take_bytes(count * _U32.size))

    def take_rels(self, count: int) -> tuple[Rel, ...]:
        return tuple(_REL.iter_unpack(self.take_bytes(count * _REL.size)))

    def take_rows(self, layout: struct.Struct, count: int) -> tuple[tuple[int, ...], ...]:
        return tuple(layout.iter_unpack(self.take_bytes(count * layout.size)))

    def take_cstring(self) -> bytes:
        """Bytes up to a NUL, which is consumed and not returned."""
        end = self._data.find(b"\0", self._pos)
        if end < 0:
            raise CorruptedError(f"{self._what} record has a string without end")
        text = self._data[self._pos : end]
        self._pos = end + 1
        return text

    def align8(self) -> None:
        """Skip to the next multiple of 8 from the start of the data (MAXALIGN)."""
        self.take_bytes(-self._pos % 8)

    def rest(self) -> bytes:
        return self.take_bytes(len(self._data) - self._pos)

    def finish(self) -> None:
        """Raises CorruptedError when something is left."""
        if self._pos != len(self._data):
            raise CorruptedError(f"{self._what} record goes on for {len(self._data) - self._pos} bytes too many")


def unknown_opcode(what: str, info: int) -> CorruptedError:
    return CorruptedError(f"{what} record has the unknown opcode {info & 0xF0:#04x}")
