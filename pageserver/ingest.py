"""WAL records → values of the key space: what Postgres's redo would change, written down instead of done.

Theory of operation. Every block reference of a record becomes one value of that block at the record's *end* LSN, and
the redo worker applies it when the page is read. What redo changes without naming a block is handled here, row by row
as Neon does it (`walingest.rs`): visibility-map clears, relation sizes and existence, relation maps, databases copied
or dropped; what is kept outside of relations is in `pageserver/ingest_state.py`. FSM forks are not kept: stock Postgres
does not log them reliably and rebuilds them. What is not understood stops ingest (UnsupportedWalError, CorruptedError):
no record is ever skipped in the hope that it does not matter.

`Tip` is the newest state that the decisions depend on (sizes above all), in memory; the storage engine has the same,
with history.

A relation that grows over a block again, after a truncate or under a reused relfilenumber, must not see that block's
old life: a block that comes to exist without being initialised by its record gets a TOMBSTONE, "starts from zeros",
just below the record's end LSN.

A core: no I/O. The one record that needs to read pages (CREATE DATABASE … STRATEGY = file_copy) is handed to the
shell as an effect.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Final

from pageserver import native
from pageserver.ingest_state import KeyedValue, StateIngest, Tip, UnsupportedWalError, require_known_tablespace
from pageserver.value import ValueKind
from shared.keyspace import REL_BLOCK, REL_SIZE, Fork, pack_key, rel_map_key
from shared.wal import (
    rmgr_clog,
    rmgr_commit_ts,
    rmgr_dbase,
    rmgr_logicalmsg,
    rmgr_multixact,
    rmgr_relmap,
    rmgr_replorigin,
    rmgr_smgr,
    rmgr_standby,
    rmgr_tblspc,
    rmgr_xact,
    rmgr_xlog,
)
from shared.wal.image import restore_image, with_page_lsn
from shared.wal.readable import is_readable, readable_for
from shared.wal.reader import RECORD_HEADER_SIZE_BYTES, RawRecord
from shared.wal.record import SINGLE_END, BlockFlag, Rel, parse_blocks
from shared.wal.rmgr import RmgrId
from shared.wal.rmgr_heap import (
    CLEAR_FLAGS,
    HEAP_BLOCKS_PER_MAP_PAGE,
    OPCODE_MASK,
    VisibilityClear,
    visibility_clears,
)
from shared.wal.rmgr_smgr import TruncateFlag

MAX_GAP_BLOCKS: Final = 1 << 18
"""That one record may leave before the block it extends a fork to: 2 GiB. A heap is extended by some dozens at once
(RelationAddBlocks), a hash index by a quarter of itself (_hash_expandtable), so that of 8 GiB is the largest."""
_MANY_VALUES: Final = 1 << 16
"""When a fork has grown and there are so many, they are handed over before the next record is looked at: what a log
may come to in memory is not a multiple of its own size."""
_SIZE: Final = struct.Struct(">I")
pack_size: Final = _SIZE.pack
unpack_time: Final = struct.Struct("<q").unpack_from
"""xl_xact_commit, xact_time (xact.h)."""

_WAL, _WAL_INIT, _IMAGE, _NATIVE, _TOMBSTONE = (
    int(k) for k in (ValueKind.WAL, ValueKind.WAL_INIT, ValueKind.IMAGE, ValueKind.NATIVE, ValueKind.TOMBSTONE)
)
_FSM, _VM = int(Fork.FSM), int(Fork.VISIBILITY_MAP)
_HEADER: Final = struct.Struct("<4xI8xH")
"""Of a record: its xid, and its operation: xl_info, and above it the resource manager's id."""
_SINGLE: Final = struct.Struct("<4xI8xH6xBBH16xBB")
"""Of a record of SINGLE_END bytes or more: the same; then block id, fork and flags, data length, id of the main data's
header, its length, if it names one block without an image (record.py). What is left out is the block's place:"""
_PLACE: Final = struct.Struct("<IIII")
"""Tablespace, database, relfilenumber, block number; from _PLACE_START."""
_PLACE_START: Final = RECORD_HEADER_SIZE_BYTES + 4
_PLACE_END: Final = _PLACE_START + _PLACE.size
_MAX_KNOWN_BLOCKS: Final = 1 << 15
"""Some 7 MB."""
_BARE_COMMIT: Final = bytes((255, 8))
"""The header of the main data of a commit record, of 34 bytes, that says when and nothing else."""
# Resource managers whose records concern more than their blocks.
_SPECIAL: Final = frozenset(
    {
        RmgrId.XLOG,
        RmgrId.XACT,
        RmgrId.SMGR,
        RmgrId.CLOG,
        RmgrId.DBASE,
        RmgrId.TBLSPC,
        RmgrId.MULTIXACT,
        RmgrId.RELMAP,
        RmgrId.STANDBY,
        RmgrId.COMMIT_TS,
        RmgrId.REPLORIGIN,
        RmgrId.LOGICALMSG,
    }
)
_PLAIN: Final = frozenset(RmgrId) - _SPECIAL
_PLAIN_OPERATIONS: Final[dict[int, tuple[int, int] | tuple[()]]] = {
    rmid << 8 | info: CLEAR_FLAGS.get(rmid << 8 | info & OPCODE_MASK, ()) for rmid in _PLAIN for info in range(256)
}
"""Operations that concern their blocks only; with where the flags are that may clear bits of a visibility map, too."""
_COMMIT: Final = RmgrId.XACT << 8
_WILL_INIT: Final = int(BlockFlag.WILL_INIT)
_SINGLE_KINDS: Final = tuple({data: _WAL, data | _WILL_INIT: _WAL_INIT} for data in (int(BlockFlag.HAS_DATA), 0))
"""Fork and flags → kind of value, of a block of a main fork with its own relation and without an image: of one with
data, and of one without."""
_HEAP: Final = frozenset({RmgrId.HEAP, RmgrId.HEAP2})


@dataclass(frozen=True, slots=True)
class CopyDatabase:
    """Copy everything of one database to another, as of `lsn`, before the next record is looked at."""

    source: tuple[int, int]
    target: tuple[int, int]
    lsn: int


@dataclass(slots=True)
class Ingested:
    """What a run of records comes to. `consumed` of them were taken; with a `copy` that is done before the rest."""

    values: list[KeyedValue] = field(default_factory=list)
    consumed: int = 0
    copy: CopyDatabase | None = None


class WalIngest(StateIngest):
    """Feeds on complete records in LSN order. After an error the timeline must not go on."""

    def __init__(self, tip: Tip) -> None:
        super().__init__(tip)
        self._copy: CopyDatabase | None = None
        self._known: dict[bytes, bytes] = {}
        """Place, as a record has it → key, of blocks of main forks that exist. One key object for all values of a block
        is what makes finding its run fast: its hash is known, and it is compared by identity."""

    def ingest(self, records: Sequence[RawRecord]) -> Ingested:
        """Values of `records`, or of the first of them, in LSN order per key. Raises CorruptedError,
        UnsupportedWalError."""
        values: list[KeyedValue] = []
        self._values = values
        append = values.append
        sizes = self.tip.rel_sizes
        next_xid = self.tip.checkpoint.next_xid & 0xFFFFFFFF
        full = False
        unpack_header, unpack_single, find_plain = _HEADER.unpack_from, _SINGLE.unpack_from, _PLAIN_OPERATIONS.get
        kind_with_data, kind_without = (kinds.get for kinds in _SINGLE_KINDS)
        find_known, pending = self._known.get, self._pending
        tracking = self.tip.control.track_commit_timestamp
        if records:
            self._copied_lsn = min(self._copied_lsn, records[0][0])
        rest = iter(records)
        for start, end, record in rest:
            size = len(record)
            if size >= SINGLE_END:
                xid, operation, block_id, flags, data_length, main_id, main_length = unpack_single(record)
            else:
                xid, operation = unpack_header(record)
                main_id = 0
            # Wraparound-safe "xid >= next_xid" (transam.h, TransactionIdFollowsOrEquals), after a guess that is right
            # for nearly all. 0 is no xid.
            if not next_xid - 0x80000000 <= xid < next_xid and xid and (xid - next_xid) & 0xFFFFFFFF < 0x80000000:
                next_xid = self._advance_next_xid(xid)
            clear = find_plain(operation)
            if clear is not None:
                # Nine records of ten: one block of a main fork without an image, and the short header of main data. The
                # same tests as parse_blocks makes, without a tuple for what is used once.
                if main_id == 255 and block_id == 0 and SINGLE_END + data_length + main_length == size:
                    kind = (kind_with_data if data_length else kind_without)(flags)
                    if kind is not None:
                        key = find_known(record[_PLACE_START:_PLACE_END])
                        if key is None:
                            key = self._make_known(record, kind, end)
                            full = len(values) > _MANY_VALUES
                        append((key, end, kind, record))
                        if clear and (main_length < clear[1] or record[SINGLE_END + data_length + clear[0]] & 3):
                            blocks, main_start = parse_blocks(record)
                            clears = visibility_clears(operation >> 8, operation & 0xFF, blocks, record, main_start)
                            if clears:
                                self._clear_visibility(clears, end)
                        if pending:
                            self._store_pending(end)
                        if full:
                            break
                        continue
            elif operation == _COMMIT and xid and record[24:26] == _BARE_COMMIT and size == 34 and not tracking:
                self._commit_one(xid, unpack_time(record, 26)[0], end)
                if pending:
                    self._store_pending(end)
                continue
            rmid, info = divmod(operation, 256)
            blocks, main_start = parse_blocks(record)
            readable = is_readable(blocks)
            for block_id, rel, fork, block, flags, image, _, _ in blocks:
                if fork == _FSM:
                    continue
                if image is not None and image.is_applied and rmid == 0:
                    kind, payload = _IMAGE, with_page_lsn(restore_image(record, image), end)
                else:
                    is_whole = flags & 0x40 or (image is not None and image.is_applied)
                    kind = _WAL_INIT if is_whole else _WAL
                    payload = record if readable else readable_for(record, block_id)
                if block >= sizes.get((rel, fork), 0):
                    self._extend(rel, fork, block, end, initialised=kind != _WAL)
                    full = len(values) > _MANY_VALUES
                append((pack_key(REL_BLOCK, *rel, fork, block), end, kind, payload))
            if rmid in _HEAP:
                clears = visibility_clears(rmid, info, blocks, record, main_start)
                if clears:
                    self._clear_visibility(clears, end)
            elif rmid in _SPECIAL:
                self._special(rmid, info, xid, record, record[main_start:], start, end)
                next_xid = self.tip.checkpoint.next_xid & 0xFFFFFFFF
                tracking = self.tip.control.track_commit_timestamp
            elif rmid not in _PLAIN:
                raise UnsupportedWalError(f"WAL record of the unknown resource manager {rmid}")
            if pending:
                self._store_pending(end)
            if full or self._copy is not None:
                break
        copy, self._copy = self._copy, None
        return Ingested(values, len(records) - length_hint(rest), copy)

    def _make_known(self, record: bytes, kind: int, end: int) -> bytes:
        """The key of the one block of a record, in a main fork, which comes to exist if it does not."""
        spc, db, number, block = _PLACE.unpack_from(record, _PLACE_START)
        rel = spc, db, number
        if block >= self.tip.rel_sizes.get((rel, 0), 0):
            self._extend(rel, 0, block, end, initialised=kind != _WAL)
        key = pack_key(REL_BLOCK, spc, db, number, 0, block)
        if len(self._known) >= _MAX_KNOWN_BLOCKS:
            self._known.clear()
        self._known[record[_PLACE_START:_PLACE_END]] = key
        return key

    # --- sizes ---

    def _extend(self, rel: Rel, fork: int, block: int, end: int, *, initialised: bool) -> None:
        """The fork grows to hold `block`; blocks that no record initialises start from zeros.

        Raises UnsupportedWalError for a gap that no Postgres leaves. Whoever has the compute may write any log.
        """
        old = self.tip.rel_sizes.get((rel, fork), 0)
        if block - old > MAX_GAP_BLOCKS:
            raise UnsupportedWalError(f"a record extends a relation by more than {MAX_GAP_BLOCKS} blocks")
        for gap in range(old, block if initialised else block + 1):
            self._values.append((pack_key(REL_BLOCK, *rel, fork, gap), end - 1, _TOMBSTONE, b""))
        self._set_size(rel, fork, block + 1)

    def _set_size(self, rel: Rel, fork: int, blocks: int) -> None:
        require_known_tablespace(rel[0])
        if blocks < self.tip.rel_sizes.get((rel, fork), 0):
            self._known.clear()
        self.tip.rel_sizes[rel, fork] = blocks
        self._pending[pack_key(REL_SIZE, *rel, fork, 0)] = _IMAGE, pack_size(blocks)

    def _drop_rel(self, rel: Rel) -> None:
        self._known.clear()
        for fork in Fork:
            if self.tip.rel_sizes.pop((rel, int(fork)), None) is not None:
                self._pending[pack_key(REL_SIZE, *rel, fork, 0)] = _TOMBSTONE, b""

    def _clear_visibility(self, clears: Iterable[VisibilityClear], end: int) -> None:
        """Both clears of one update may fall on one map page: then they are one value, as (key, lsn) is unique."""
        by_page: dict[tuple[Rel, int], list[tuple[int, int]]] = {}
        for rel, heap_block, bits in clears:
            map_block, in_page = divmod(heap_block, HEAP_BLOCKS_PER_MAP_PAGE)
            if map_block < self.tip.rel_sizes.get((rel, _VM), 0):
                by_page.setdefault((rel, map_block), []).append((in_page, bits))
        for (rel, map_block), cleared in by_page.items():
            key = pack_key(REL_BLOCK, *rel, _VM, map_block)
            self._values.append((key, end, _NATIVE, native.pack_vm_clear(cleared)))

    # --- records that concern more than their blocks ---

    def _special(self, rmid: int, info: int, xid: int, record: bytes, data: bytes, start: int, end: int) -> None:
        match rmid:
            case RmgrId.XACT:
                parsed = rmgr_xact.parse(info, xid, data)
                self._xact(parsed, record, data, end)
                if isinstance(parsed, rmgr_xact.XactEnd):
                    for rel in parsed.dropped_rels:
                        self._drop_rel(rel)
            case RmgrId.XLOG:
                self._xlog(rmgr_xlog.parse(info, data), start, end)
            case RmgrId.SMGR:
                self._smgr(rmgr_smgr.parse(info, data), end)
            case RmgrId.CLOG:
                self._clog(rmgr_clog.parse(info, data), end)
            case RmgrId.MULTIXACT:
                self._multixact(rmgr_multixact.parse(info, data), end)
            case RmgrId.RELMAP:
                update = rmgr_relmap.parse(info, data)
                self._set_rel_map(update.tablespace, update.database, update.content)
            case RmgrId.DBASE:
                self._dbase(rmgr_dbase.parse(info, data), end)
            case RmgrId.STANDBY:
                self._standby(rmgr_standby.parse(info, data))
            case RmgrId.TBLSPC:
                if isinstance(rmgr_tblspc.parse(info, data), rmgr_tblspc.TablespaceCreate):
                    raise UnsupportedWalError("tablespaces are not supported: data has one home, sealed storage")
            case RmgrId.COMMIT_TS:
                self._commit_ts(rmgr_commit_ts.parse(info, data), end)
            case RmgrId.REPLORIGIN:
                self._set_origin(rmgr_replorigin.parse(info, data))
            case RmgrId.LOGICALMSG:
                rmgr_logicalmsg.parse(info, data)  # for subscribers; storage has nothing to keep of it

    def _smgr(self, record: rmgr_smgr.SmgrCreate | rmgr_smgr.SmgrTruncate, end: int) -> None:
        sizes = self.tip.rel_sizes
        rel = record.rel
        if isinstance(record, rmgr_smgr.SmgrCreate):
            if record.fork != _FSM and (rel, int(record.fork)) not in sizes:
                self._set_size(rel, record.fork, 0)
            return
        if record.flags & TruncateFlag.HEAP and sizes.get((rel, 0), 0) > record.block_count:
            self._set_size(rel, Fork.MAIN, record.block_count)
        if record.flags & TruncateFlag.VISIBILITY_MAP and (rel, _VM) in sizes:
            map_block, in_page = divmod(record.block_count, HEAP_BLOCKS_PER_MAP_PAGE)
            if in_page and map_block < sizes[rel, _VM]:
                key = pack_key(REL_BLOCK, *rel, _VM, map_block)
                self._values.append((key, end, _NATIVE, native.pack_vm_truncate(in_page)))
            blocks = map_block + 1 if in_page else map_block
            if blocks < sizes[rel, _VM]:
                self._set_size(rel, _VM, blocks)

    def _set_rel_map(self, spc: int, db: int, content: bytes) -> None:
        require_known_tablespace(spc)
        self.tip.rel_maps.add((spc, db))
        self._pending[rel_map_key(spc, db)] = _IMAGE, content

    def _dbase(
        self,
        record: rmgr_dbase.DatabaseFileCopy | rmgr_dbase.DatabaseCreate | rmgr_dbase.DatabaseDrop,
        end: int,
    ) -> None:
        match record:
            case rmgr_dbase.DatabaseFileCopy():
                require_known_tablespace(record.tablespace)
                require_known_tablespace(record.source_tablespace)
                self._copied_lsn = end
                self._copy = CopyDatabase(
                    (record.source_tablespace, record.source_database), (record.tablespace, record.database), end
                )
            case rmgr_dbase.DatabaseCreate():
                require_known_tablespace(
                    record.tablespace
                )  # its relation map and blocks follow as records of their own
            case rmgr_dbase.DatabaseDrop():
                for spc in record.tablespaces:
                    for rel in {r for r, _ in self.tip.rel_sizes if r[0] == spc and r[1] == record.database}:
                        self._drop_rel(rel)
                    if (spc, record.database) in self.tip.rel_maps:
                        self.tip.rel_maps.discard((spc, record.database))
                        self._pending[rel_map_key(spc, record.database)] = _TOMBSTONE, b""

    def copied_database(
        self, copy: CopyDatabase, rel_map: bytes, sizes: dict[tuple[Rel, int], int]
    ) -> list[KeyedValue]:
        """Size and map values of a database that the shell has copied block by block. `sizes` names the source's
        forks."""
        self._values = []
        for (rel, fork), blocks in sizes.items():
            self._set_size((copy.target[0], copy.target[1], rel[2]), fork, blocks)
        self._set_rel_map(*copy.target, rel_map)
        self._store_pending(copy.lsn)
        return self._values
