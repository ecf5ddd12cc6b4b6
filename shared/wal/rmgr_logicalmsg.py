"""Logical decoding messages (Postgres `replication/message.h`): for those who decode the log, nothing for storage."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from shared.errors import CorruptedError
from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

MESSAGE: Final = 0x00
_HEAD: Final = struct.Struct("<I?3xQQ")


@dataclass(frozen=True, slots=True)
class LogicalMessage:
    database: int
    transactional: bool
    prefix: bytes = field(repr=False)
    content: bytes = field(repr=False)


def parse(info: int, data: bytes) -> LogicalMessage:
    if info & INFO_RMGR_MASK != MESSAGE:
        raise unknown_opcode("LogicalMessage", info)
    cursor = DataCursor(data, "LogicalMessage")
    database, transactional, prefix_size, content_size = cursor.take(_HEAD)
    prefix = cursor.take_bytes(prefix_size)
    content = cursor.take_bytes(content_size)
    cursor.finish()
    if not prefix.endswith(b"\0"):
        raise CorruptedError("LogicalMessage record has a prefix without end")
    return LogicalMessage(database, transactional, prefix[:-1], content)
