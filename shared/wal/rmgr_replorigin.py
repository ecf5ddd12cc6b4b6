"""Replication origins: how far what comes from elsewhere was taken over (Postgres `replication/origin.h`).

Commit records advance them, too: see rmgr_xact, `origin_lsn`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import google_crc32c

from shared.errors import CorruptedError
from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

CHECKPOINT_FILE_MAGIC: Final = 0x1257DADE

_SET: Final = struct.Struct("<QH?5x")
_DROP: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_ON_DISK: Final = struct.Struct("<H6xQ")


class ReplOriginOp(IntEnum):
    SET = 0x00
    DROP = 0x10


@dataclass(frozen=True, slots=True)
class ReplOriginSet:
    """`origin` stands at `remote_lsn`; without `force` it does not go back."""

    origin: int
    remote_lsn: int
    force: bool


@dataclass(frozen=True, slots=True)
class ReplOriginDrop:
    origin: int


def parse(info: int, data: bytes) -> ReplOriginSet | ReplOriginDrop:
    cursor = DataCursor(data, "ReplicationOrigin")
    match info & INFO_RMGR_MASK:
        case ReplOriginOp.SET:
            remote_lsn, origin, force = cursor.take(_SET)
            cursor.finish()
            return ReplOriginSet(origin, remote_lsn, force)
        case ReplOriginOp.DROP:
            (origin,) = cursor.take(_DROP)
            cursor.finish()
            return ReplOriginDrop(origin)
        case _:
            raise unknown_opcode("ReplicationOrigin", info)


def checkpoint_file(progress: Mapping[int, int]) -> bytes:
    """Content of pg_logical/replorigin_checkpoint: {origin: remote LSN} (origin.c, CheckPointReplicationOrigin)."""
    body = _U32.pack(CHECKPOINT_FILE_MAGIC) + b"".join(_ON_DISK.pack(*item) for item in sorted(progress.items()))
    return body + _U32.pack(google_crc32c.value(body))


def parse_checkpoint_file(content: bytes) -> dict[int, int]:
    """The inverse. Raises CorruptedError."""
    size = len(content) - 2 * _U32.size
    if size < 0 or size % _ON_DISK.size or _U32.unpack_from(content)[0] != CHECKPOINT_FILE_MAGIC:
        raise CorruptedError("not a file of replication origins")
    if google_crc32c.value(content[: -_U32.size]) != _U32.unpack_from(content, len(content) - _U32.size)[0]:
        raise CorruptedError("the file of replication origins has a wrong CRC")
    return dict(_ON_DISK.iter_unpack(content[_U32.size : -_U32.size]))
