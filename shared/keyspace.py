"""The pageserver's key space: every piece of database state that has a history, as an 18-byte key.

Layout as in Neon (`libs/pageserver_api/src/key.rs`): field1 u8, field2..4 u32, field5 u8, field6 u32, big-endian, so
byte order is
key order. Our assignment of fields::

    f1 | f2   | f3   | f4  | f5   | f6      | what
    ---+------+------+-----+------+---------+-----------------------------------------------------------------
    00 | spc  | db   | rel | fork | block   | one 8 KiB block of a relation fork
    01 | spc  | db   | rel | fork | 0       | size of that fork in blocks, u32 big-endian; tombstone = dropped
    02 | spc  | db   | 0   | 0    | 0       | pg_filenode.map of a database (db 0: the shared one); its presence means
    that the database exists
    03 | kind | 0    | 0   | 0    | page    | one SLRU page; kind 0 pg_xact, 1 pg_multixact/offsets, 2
    pg_multixact/members, 3 pg_commit_ts
    05 | xid  | 0    | 0   | 0    | 0       | two-phase state file
    06 | 0    | 0    | 0   | 0    | 0       | pg_control as initdb wrote it, with the newest logged parameters
    07 | 0    | 0    | 0   | 0    | 0       | CheckPoint struct, kept current record by record
    08 | 0    | 0    | 0   | 0    | 0       | the latest time that a commit or abort up to here says: u64 big-endian,
    microseconds since 2000-01-01 UTC (TimestampTz); it never goes back
    09 | id   | 0    | 0   | 0    | 0       | progress of a replication origin: its remote LSN, u64 big-endian

Sizes stand apart from blocks (Neon's first layout keeps a directory value per database), so that a listing is one
scan of a short key range.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

_KEY: Final = struct.Struct(">BIIIBI")
KEY_SIZE_BYTES: Final = _KEY.size
_AFTER_DATABASE_BYTES: Final = struct.calcsize(">IBI")
pack_key: Final = _KEY.pack
"""(field1 … field6) → 18 bytes. Hot loops call it directly."""
unpack_key: Final = _KEY.unpack

REL_BLOCK: Final = 0x00
REL_SIZE: Final = 0x01
REL_MAP: Final = 0x02
SLRU_PAGE: Final = 0x03
TWO_PHASE: Final = 0x05
CONTROL_FILE: Final = 0x06
CHECKPOINT: Final = 0x07
COMMIT_TIME: Final = 0x08
REPL_ORIGIN: Final = 0x09

GLOBAL_TABLESPACE_OID: Final = 1664
DEFAULT_TABLESPACE_OID: Final = 1663
MAX_U32: Final = 0xFFFFFFFF


class Fork(enum.IntEnum):
    """common/relpath.h, ForkNumber."""

    MAIN = 0
    FSM = 1
    VISIBILITY_MAP = 2
    INIT = 3


class Slru(enum.IntEnum):
    """SLRUs that outlive a restart. pg_subtrans, pg_notify and pg_serial are not kept."""

    CLOG = 0
    MULTIXACT_OFFSETS = 1
    MULTIXACT_MEMBERS = 2
    COMMIT_TS = 3


@dataclass(frozen=True, slots=True, order=True)
class RelTag:
    """One relation fork: tablespace OID, database OID, relfilenumber, fork (storage/buf_internals.h, BufferTag)."""

    spc: int
    db: int
    rel: int
    fork: Fork

    def block_key(self, block: int) -> bytes:
        return pack_key(REL_BLOCK, self.spc, self.db, self.rel, self.fork, block)

    def size_key(self) -> bytes:
        return pack_key(REL_SIZE, self.spc, self.db, self.rel, self.fork, 0)


def rel_map_key(spc: int, db: int) -> bytes:
    return pack_key(REL_MAP, spc, db, 0, 0, 0)


def slru_key(kind: Slru, page: int) -> bytes:
    return pack_key(SLRU_PAGE, kind, 0, 0, 0, page)


def two_phase_key(xid: int) -> bytes:
    return pack_key(TWO_PHASE, xid, 0, 0, 0, 0)


def repl_origin_key(origin: int) -> bytes:
    return pack_key(REPL_ORIGIN, origin, 0, 0, 0, 0)


CONTROL_FILE_KEY: Final = pack_key(CONTROL_FILE, 0, 0, 0, 0, 0)
CHECKPOINT_KEY: Final = pack_key(CHECKPOINT, 0, 0, 0, 0, 0)
COMMIT_TIME_KEY: Final = pack_key(COMMIT_TIME, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Half-open range of keys."""

    start: bytes
    end: bytes

    def __contains__(self, key: bytes) -> bool:
        return self.start <= key < self.end


WHOLE_KEYSPACE: Final = KeyRange(bytes(KEY_SIZE_BYTES), b"\xff" * KEY_SIZE_BYTES)


def field1_range(field1: int) -> KeyRange:
    """All keys of one kind."""
    return KeyRange(pack_key(field1, 0, 0, 0, 0, 0), pack_key(field1 + 1, 0, 0, 0, 0, 0))


def database_range(field1: int, spc: int, db: int) -> KeyRange:
    """All keys of one kind (REL_BLOCK or REL_SIZE) in one database."""
    start = pack_key(field1, spc, db, 0, 0, 0)
    last = int.from_bytes(start, "big") | (1 << 8 * _AFTER_DATABASE_BYTES) - 1
    return KeyRange(start, (last + 1).to_bytes(KEY_SIZE_BYTES, "big"))
