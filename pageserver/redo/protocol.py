"""The pipe protocol of walredo.c, pure: requests to bytes, bytes to replies. Its table is in walredo.c's head."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shared.errors import CorruptedError, IntegrityError, InvalidInputError, KeylakeError, UnavailableError

PAGE_SIZE_BYTES: Final = 8192
PROTOCOL_VERSION: Final = 1
FRAME_HEADER_SIZE_BYTES: Final = 5
MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
MAX_RECORD_BYTES: Final = 4 * 1024 * 1024
MAX_BLOCK: Final = 0xFFFFFFFE - 1  # below MaxBlockNumber
MAX_FORK: Final = 3
MAX_RMGR_ID: Final = 21  # RM_MAX_BUILTIN_ID of PostgreSQL 16: RM_LOGICALMSG_ID
MIN_RECORD_BYTES: Final = 24  # SizeOfXLogRecord

_FRAME: Final = struct.Struct("<IB")
_APPLY: Final = struct.Struct("<IBBBxxIIIII")  # with its frame header
_RECORD: Final = struct.Struct("<QI")
_MASK: Final = struct.Struct("<IBBxxxI")
_GREETING: Final = struct.Struct("<4sIII")
_MAGIC: Final = b"KLWR"
_HAS_BASE: Final = 1
_VERIFY_CRC: Final = 2

APPLY_OVERHEAD_BYTES: Final = _APPLY.size - FRAME_HEADER_SIZE_BYTES + PAGE_SIZE_BYTES
RECORD_OVERHEAD_BYTES: Final = _RECORD.size

Rel = tuple[int, int, int]
"""(tablespace OID, database OID, relfilenumber)."""


class Status(enum.IntEnum):
    OK = 0
    INVALID = 1
    """The request is malformed."""
    CORRUPTED = 2
    """A record does not parse, or does not belong to this page in its state."""
    FAILED = 3
    """Postgres raised an error in redo or masking."""
    PANIC = 4
    """As FAILED, and the worker has ended."""


@dataclass(frozen=True, slots=True)
class Greeting:
    protocol_version: int
    pg_version_num: int
    system_calls_filtered: bool


def ping_request() -> bytes:
    return _FRAME.pack(0, ord("P"))


def mask_request(rmid: int, block: int, page: bytes) -> bytes:
    """Raises InvalidInputError."""
    if not 0 <= rmid <= MAX_RMGR_ID or not 0 <= block <= MAX_BLOCK or len(page) != PAGE_SIZE_BYTES:
        raise InvalidInputError("no such resource manager or block, or not a page")
    payload_size = _MASK.size - FRAME_HEADER_SIZE_BYTES + PAGE_SIZE_BYTES
    return _MASK.pack(payload_size, ord("M"), rmid, block) + page


def apply_request(
    rel: Rel,
    fork: int,
    block: int,
    base: bytes | None,
    records: Sequence[tuple[int, bytes]],
    *,
    verify_crc: bool = False,
) -> bytes:
    """One request for the whole chain. Raises InvalidInputError: malformed, or longer than MAX_REQUEST_BYTES."""
    if base is not None and len(base) != PAGE_SIZE_BYTES:
        raise InvalidInputError("the base is not a page")
    if not 0 <= fork <= MAX_FORK or not 0 <= block <= MAX_BLOCK or not records:
        raise InvalidInputError("no such fork or block, or no records")
    pack = _RECORD.pack
    parts = [b"", base or b""]
    append = parts.append
    try:
        for end_lsn, record in records:
            append(pack(end_lsn, len(record)))
            append(record)
        flags = (0 if base is None else _HAS_BASE) | (_VERIFY_CRC if verify_crc else 0)
        size = sum(map(len, parts)) + _APPLY.size - FRAME_HEADER_SIZE_BYTES
        if size > MAX_REQUEST_BYTES:
            raise InvalidInputError("the request is too long")
        parts[0] = _APPLY.pack(size, ord("A"), flags, fork, *rel, block, len(records))
    except struct.error:
        raise InvalidInputError("a number is out of range") from None
    return b"".join(parts)


def split_chain(records: Sequence[tuple[int, bytes]]) -> list[Sequence[tuple[int, bytes]]]:
    """Cut a chain into runs that fit one request each; nearly always there is one. Raises InvalidInputError."""
    lengths = [len(record) for _, record in records]
    if lengths and not (min(lengths) >= MIN_RECORD_BYTES and max(lengths) <= MAX_RECORD_BYTES):
        raise InvalidInputError("a record of impossible length")
    if APPLY_OVERHEAD_BYTES + len(lengths) * RECORD_OVERHEAD_BYTES + sum(lengths) <= MAX_REQUEST_BYTES:
        return [records]
    runs: list[Sequence[tuple[int, bytes]]] = []
    start = 0
    size = APPLY_OVERHEAD_BYTES
    for index, length in enumerate(lengths):
        size += RECORD_OVERHEAD_BYTES + length
        if size > MAX_REQUEST_BYTES:
            runs.append(records[start:index])
            start = index
            size = APPLY_OVERHEAD_BYTES + RECORD_OVERHEAD_BYTES + length
    runs.append(records if start == 0 else records[start:])
    return runs


@dataclass(frozen=True, slots=True)
class Reply:
    status: Status
    payload: bytes


class ReplyParser:
    """Cuts the reply stream into replies. After an error it must not be fed again."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Reply]:
        """Raises CorruptedError for bytes that no worker sends."""
        buffer = self._buffer
        buffer += data
        replies: list[Reply] = []
        pos = 0
        available = len(buffer)
        while available - pos >= FRAME_HEADER_SIZE_BYTES:
            length, status = _FRAME.unpack_from(buffer, pos)
            if length > PAGE_SIZE_BYTES or status > Status.PANIC:
                raise CorruptedError("the redo worker does not speak its protocol")
            end = pos + FRAME_HEADER_SIZE_BYTES + length
            if end > available:
                break
            replies.append(Reply(Status(status), bytes(memoryview(buffer)[pos + FRAME_HEADER_SIZE_BYTES : end])))
            pos = end
        if pos:
            del buffer[:pos]
        return replies


def parse_greeting(reply: Reply) -> Greeting:
    """Raises UnavailableError: whatever this is, it is not our worker."""
    if reply.status is not Status.OK or len(reply.payload) != _GREETING.size:
        raise UnavailableError("the redo worker does not greet")
    magic, version, pg_version_num, flags = _GREETING.unpack(reply.payload)
    if magic != _MAGIC or version != PROTOCOL_VERSION:
        raise UnavailableError("the redo worker speaks another protocol")
    return Greeting(version, pg_version_num, bool(flags & 1))


def error_of(reply: Reply) -> KeylakeError:
    """The exception for a reply that is not OK. Its text says which record and why: no user data (walredo.c)."""
    text = reply.payload.decode("ascii", errors="replace")
    match reply.status:
        case Status.INVALID:
            return InvalidInputError(text)
        case Status.CORRUPTED:
            return CorruptedError(text)
        case Status.FAILED | Status.PANIC | Status.OK:
            return IntegrityError(text)
