"""Changes that Python applies to a page, because Postgres makes them without naming the page in the record.

They are the payloads of `ValueKind.NATIVE` (Neon keeps the same ones: `libs/wal_decoder` ClearVisibilityMapFlags,
ClogSetCommitted, …, applied in `walredo/apply_neon.rs`). Layouts of the pages are those of PostgreSQL 16:

    commit log           access/transam/clog.c       2 bits per xid, xid 0 of a page lowest, no page header
    multixact offsets    access/transam/multixact.c  u32 per multixact id
    multixact members    access/transam/multixact.c  groups of 4 flag bytes and 4 xids; 409 groups, 12 spare bytes
    commit timestamps    access/transam/commit_ts.c  time i64 and origin u16 per xid, 10 bytes; 819, 2 spare bytes
    visibility map       access/heap/visibilitymap.c 2 bits per heap block behind a page header of 24 bytes

None of them sets the page's LSN: SLRU pages have none, and visibilitymap_clear and visibilitymap_prepare_truncate
leave pd_lsn alone (they only mark the buffer dirty).

Encoding of a payload, little-endian: format version (u8, 1), operation (u8), then rows of one size::

    op | rows
    ---+----------------------------------------------------------------
    1  | status u8 once; index u16 of each xid in its page
    2  | index u16, first member u32
    3  | index u16, status u8, xid u32
    4  | index u16 of the heap block in its map page, bits u8
    5  | count u16 of heap blocks whose bits stay, once
    6  | time i64 and origin u16 once; index u16 of each xid in its page

A core: pages and payloads in, pages out.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from shared.errors import CorruptedError
from shared.keyspace import REL_BLOCK, SLRU_PAGE, Fork, Slru, unpack_key
from shared.wal.rmgr_clog import XidStatus
from shared.wal.rmgr_heap import HEAP_BLOCKS_PER_MAP_PAGE, VALID_BITS

PAGE_SIZE_BYTES: Final = 8192
ZERO_PAGE: Final = bytes(PAGE_SIZE_BYTES)

CLOG_XACTS_PER_PAGE: Final = PAGE_SIZE_BYTES * 4
MULTIXACT_OFFSETS_PER_PAGE: Final = PAGE_SIZE_BYTES // 4
MEMBERS_PER_GROUP: Final = 4
MEMBER_GROUP_SIZE_BYTES: Final = MEMBERS_PER_GROUP + 4 * MEMBERS_PER_GROUP
MULTIXACT_MEMBERS_PER_PAGE: Final = PAGE_SIZE_BYTES // MEMBER_GROUP_SIZE_BYTES * MEMBERS_PER_GROUP
MAX_MULTIXACT_STATUS: Final = 5
COMMIT_TS_SIZE_BYTES: Final = 10
COMMIT_TS_XACTS_PER_PAGE: Final = PAGE_SIZE_BYTES // COMMIT_TS_SIZE_BYTES
PAGE_HEADER_SIZE_BYTES: Final = 24

FORMAT_VERSION: Final = 1
_HEADER: Final = struct.Struct("<BB")
_INDEX: Final = struct.Struct("<H")
_OFFSET: Final = struct.Struct("<HI")
_MEMBER: Final = struct.Struct("<HBI")
_VM_BITS: Final = struct.Struct("<HB")
_COMMIT_TS: Final = struct.Struct("<qH")
_U32: Final = struct.Struct("<I")
_ONE_COMMIT: Final = struct.Struct("<3xH")
_MASK32: Final = 0xFFFFFFFF


class NativeOp(enum.IntEnum):
    CLOG_SET = 1
    MULTIXACT_OFFSETS = 2
    MULTIXACT_MEMBERS = 3
    VM_CLEAR = 4
    VM_TRUNCATE = 5
    COMMIT_TS_SET = 6


_CLOG_SET: Final = int(NativeOp.CLOG_SET)
_COMMITTED: Final = int(XidStatus.COMMITTED)
_SUB_COMMITTED: Final = int(XidStatus.SUB_COMMITTED)
_COMMIT_HEADER: Final = bytes((FORMAT_VERSION, _CLOG_SET, _COMMITTED))
_pack_index: Final = _INDEX.pack


# --- ingest's side: what a record does → payloads ---


def pack_clog_set(xids: Iterable[int], status: XidStatus) -> bytes:
    """The outcome of transactions, all on one page of the commit log."""
    indexes = [xid % CLOG_XACTS_PER_PAGE for xid in xids]
    return struct.pack(f"<BBB{len(indexes)}H", FORMAT_VERSION, NativeOp.CLOG_SET, status, *indexes)


def pack_clog_commit(index: int) -> bytes:
    """`pack_clog_set` of one xid that committed, by its index in its page: once per transaction, so it is fast."""
    return _COMMIT_HEADER + _pack_index(index)


def pack_commit_ts(xids: Iterable[int], time_us: int, origin: int) -> bytes:
    """When transactions committed (TimestampTz) and whose replication brought them; all on one page."""
    indexes = [xid % COMMIT_TS_XACTS_PER_PAGE for xid in xids]
    return struct.pack(f"<BBqH{len(indexes)}H", FORMAT_VERSION, NativeOp.COMMIT_TS_SET, time_us, origin, *indexes)


def pack_multixact_offset(multixact_id: int, members_offset: int) -> tuple[int, bytes]:
    """(page, payload): where the members of one multixact start."""
    page, index = divmod(multixact_id, MULTIXACT_OFFSETS_PER_PAGE)
    return page, _HEADER.pack(FORMAT_VERSION, NativeOp.MULTIXACT_OFFSETS) + _OFFSET.pack(index, members_offset)


def pack_multixact_offsets(multixact_id: int, members_offset: int, members: int) -> list[tuple[int, bytes]]:
    """[(page, payload)], one per page: all that the creation of a multixact writes to pg_multixact/offsets.

    Since 16.12 that is the start of the *next* multixact too, and reading the newest one fails without it
    (multixact.c, RecordNewMultiXact). Ids skip 0 when they wrap; so do offsets, as 0 means "not set".
    """
    following = (multixact_id + 1) & _MASK32 or 1
    next_offset = (members_offset + members) & _MASK32 or 1
    page, first = pack_multixact_offset(multixact_id, members_offset)
    next_page, second = pack_multixact_offset(following, next_offset)
    if page == next_page:
        return [(page, first + second[_HEADER.size :])]
    return [(page, first), (next_page, second)]


def pack_multixact_members(members_offset: int, members: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """[(page, payload)] of members [(xid, MultiXactStatus)] stored from `members_offset` on, which wraps at 2^32."""
    rows: dict[int, list[bytes]] = {}
    for number, (xid, status) in enumerate(members):
        page, index = divmod((members_offset + number) & _MASK32, MULTIXACT_MEMBERS_PER_PAGE)
        rows.setdefault(page, []).append(_MEMBER.pack(index, status, xid))
    header = _HEADER.pack(FORMAT_VERSION, NativeOp.MULTIXACT_MEMBERS)
    return [(page, header + b"".join(of_page)) for page, of_page in rows.items()]


def pack_vm_clear(cleared: Iterable[tuple[int, int]]) -> bytes:
    """Clear bits: [(heap block within its map page, VISIBILITYMAP_* bits)], all on one map page."""
    header = _HEADER.pack(FORMAT_VERSION, NativeOp.VM_CLEAR)
    return header + b"".join(_VM_BITS.pack(index, bits) for index, bits in cleared)


def pack_vm_truncate(blocks_kept: int) -> bytes:
    """The relation was cut: bits of heap blocks from the `blocks_kept`-th of this map page on are cleared."""
    return _HEADER.pack(FORMAT_VERSION, NativeOp.VM_TRUNCATE) + _INDEX.pack(blocks_kept)


# --- the read path's side: payloads → page ---


def apply_native(key: bytes, base: bytes | None, payloads: Sequence[bytes]) -> bytes:
    """The page of `key` after `payloads`, oldest first. `base` None is a page of zeros, for a visibility map only.

    Raises CorruptedError for a payload that is malformed or does not fit this kind of page.
    """
    if base is None:
        if key[0] != REL_BLOCK or key[13] != Fork.VISIBILITY_MAP:
            raise CorruptedError("a change needs a page and there is none")
        base = ZERO_PAGE
    if len(base) != PAGE_SIZE_BYTES:
        raise CorruptedError("a change needs a page and the base is not one")
    page = bytearray(base)
    allowed = _allowed_ops(key)
    for header in {payload[: _HEADER.size] for payload in payloads}:  # one mostly, of hundreds of changes
        if len(header) < _HEADER.size:
            raise CorruptedError("native change is shorter than its header")
        version, operation = header
        if version != FORMAT_VERSION:
            raise CorruptedError(f"native change of format version {version} is not supported")
        if operation not in allowed:
            raise CorruptedError(f"native change {operation} does not belong on this page")
    if _CLOG_SET in allowed and _clog_commits(page, payloads):
        return bytes(page)
    for payload in payloads:
        _APPLY[payload[1]](page, payload)
    return bytes(page)


def _allowed_ops(key: bytes) -> frozenset[int]:
    field1, field2, _, _, fork, _ = unpack_key(key)
    if field1 == SLRU_PAGE:
        return _SLRU_OPS.get(field2, frozenset())
    if field1 == REL_BLOCK and fork == Fork.VISIBILITY_MAP:
        return _VM_OPS
    return frozenset()


_VM_OPS: Final = frozenset({int(NativeOp.VM_CLEAR), int(NativeOp.VM_TRUNCATE)})
_SLRU_OPS: Final[dict[int, frozenset[int]]] = {
    Slru.CLOG: frozenset({int(NativeOp.CLOG_SET)}),
    Slru.MULTIXACT_OFFSETS: frozenset({int(NativeOp.MULTIXACT_OFFSETS)}),
    Slru.MULTIXACT_MEMBERS: frozenset({int(NativeOp.MULTIXACT_MEMBERS)}),
    Slru.COMMIT_TS: frozenset({int(NativeOp.COMMIT_TS_SET)}),
}


def _clog_commits(page: bytearray, payloads: Sequence[bytes]) -> bool:
    """As `_clog_set` with each, if each is the commit of one xid: mostly they are, and there are hundreds of them.
    Their first two bytes were looked at. False, and nothing is done, for others."""
    if set(map(len, payloads)) != {_ONE_COMMIT.size}:
        return False
    rows = b"".join(payloads)
    if rows[2 :: _ONE_COMMIT.size].count(_COMMITTED) != len(payloads):
        return False
    for (index,) in _ONE_COMMIT.iter_unpack(rows):
        if index >= CLOG_XACTS_PER_PAGE:
            raise CorruptedError("native change of the commit log is beyond its page")
        byte, shift = index >> 2, (index & 3) * 2
        page[byte] = page[byte] & ~(3 << shift) | _COMMITTED << shift
    return True


def _clog_set(page: bytearray, payload: bytes) -> None:
    size = len(payload) - 3
    if size < 0 or size % _INDEX.size:
        raise CorruptedError("native change of the commit log has a wrong length")
    status = payload[2]
    if not _COMMITTED <= status <= _SUB_COMMITTED:
        raise CorruptedError("native change of the commit log has an impossible status")
    for index in struct.unpack_from(f"<{size // _INDEX.size}H", payload, 3):
        if index >= CLOG_XACTS_PER_PAGE:
            raise CorruptedError("native change of the commit log is beyond its page")
        byte, shift = index >> 2, (index & 3) * 2
        old = page[byte]
        # TransactionIdSetStatusBit: in recovery, a committed xid does not go back to sub-committed.
        if status == _SUB_COMMITTED and (old >> shift) & 3 == _COMMITTED:
            continue
        page[byte] = old & ~(3 << shift) | status << shift


def _commit_ts_set(page: bytearray, payload: bytes) -> None:
    start = _HEADER.size + _COMMIT_TS.size
    size = len(payload) - start
    if size < 0 or size % _INDEX.size:
        raise CorruptedError("native change of commit timestamps has a wrong length")
    entry = payload[_HEADER.size : start]
    for index in struct.unpack_from(f"<{size // _INDEX.size}H", payload, start):
        if index >= COMMIT_TS_XACTS_PER_PAGE:
            raise CorruptedError("native change of commit timestamps is beyond its page")
        page[index * COMMIT_TS_SIZE_BYTES : (index + 1) * COMMIT_TS_SIZE_BYTES] = entry


def _multixact_offsets(page: bytearray, payload: bytes) -> None:
    for index, offset in _rows(_OFFSET, payload):
        if index >= MULTIXACT_OFFSETS_PER_PAGE:
            raise CorruptedError("native change of multixact offsets is beyond its page")
        _U32.pack_into(page, index * 4, offset)


def _multixact_members(page: bytearray, payload: bytes) -> None:
    for index, status, xid in _rows(_MEMBER, payload):
        if index >= MULTIXACT_MEMBERS_PER_PAGE or status > MAX_MULTIXACT_STATUS:
            raise CorruptedError("native change of multixact members is impossible")
        group, member = divmod(index, MEMBERS_PER_GROUP)
        start = group * MEMBER_GROUP_SIZE_BYTES
        page[start + member] = status
        _U32.pack_into(page, start + MEMBERS_PER_GROUP + member * 4, xid)


def _vm_clear(page: bytearray, payload: bytes) -> None:
    for index, bits in _rows(_VM_BITS, payload):
        if index >= HEAP_BLOCKS_PER_MAP_PAGE or bits & ~VALID_BITS:
            raise CorruptedError("native change of a visibility map is impossible")
        page[PAGE_HEADER_SIZE_BYTES + (index >> 2)] &= ~(bits << (index & 3) * 2) & 0xFF


def _vm_truncate(page: bytearray, payload: bytes) -> None:
    if len(payload) != _HEADER.size + _INDEX.size:
        raise CorruptedError("native truncation of a visibility map has a wrong length")
    (kept,) = _INDEX.unpack_from(payload, _HEADER.size)
    if kept >= HEAP_BLOCKS_PER_MAP_PAGE:
        raise CorruptedError("native truncation of a visibility map is beyond its page")
    byte = PAGE_HEADER_SIZE_BYTES + (kept >> 2)
    page[byte] &= (1 << (kept & 3) * 2) - 1
    page[byte + 1 :] = bytes(PAGE_SIZE_BYTES - byte - 1)


def _rows(layout: struct.Struct, payload: bytes) -> Iterable[tuple[int, ...]]:
    body = memoryview(payload)[_HEADER.size :]
    if len(body) % layout.size:
        raise CorruptedError("native change has a wrong length")
    return layout.iter_unpack(body)


_APPLY: Final = {
    int(NativeOp.CLOG_SET): _clog_set,
    int(NativeOp.MULTIXACT_OFFSETS): _multixact_offsets,
    int(NativeOp.MULTIXACT_MEMBERS): _multixact_members,
    int(NativeOp.VM_CLEAR): _vm_clear,
    int(NativeOp.VM_TRUNCATE): _vm_truncate,
    int(NativeOp.COMMIT_TS_SET): _commit_ts_set,
}
