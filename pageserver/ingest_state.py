"""The state that Postgres keeps outside of relations: SLRUs, two-phase files, pg_control, replication origins.

It is changed by records that name no block for it (xact_redo, clog_redo, multixact_redo, commit_ts_redo, xlog_redo,
replorigin_redo). Half of ingest: the other half, relations and blocks, is `pageserver/ingest.py`.

`CheckPoint` is kept current record by record, as a start from any LSN mints a shutdown checkpoint from it. Its counters
run ahead of the primary's, never behind: an xid or multixact id is not given out twice.

A core: no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from pageserver import native
from pageserver.slru import follows_or_equals, member_pages_between, pages_before
from pageserver.value import ValueKind
from shared.errors import CorruptedError, InvalidInputError
from shared.keyspace import (
    CHECKPOINT_KEY,
    COMMIT_TIME_KEY,
    CONTROL_FILE_KEY,
    DEFAULT_TABLESPACE_OID,
    GLOBAL_TABLESPACE_OID,
    Slru,
    repl_origin_key,
    slru_key,
    two_phase_key,
)
from shared.wal import (
    rmgr_clog,
    rmgr_commit_ts,
    rmgr_multixact,
    rmgr_replorigin,
    rmgr_standby,
    rmgr_xact,
    rmgr_xlog,
)
from shared.wal.control import CheckPoint, ControlFile
from shared.wal.record import Rel, parse_record

KeyedValue = tuple[bytes, int, int, bytes]
"""(key, lsn, ValueKind, payload)."""

XID_ALIGNMENT: Final = 1024
"""nextXid is stored rounded up to this, so that not every transaction writes a checkpoint (Neon:
XID_CHECKPOINT_INTERVAL)."""

FIRST_NORMAL_XID: Final = 3
FIRST_MULTIXACT: Final = 1
_MASK32: Final = 0xFFFFFFFF
_UNKNOWN_LSN: Final = 1 << 64
_LSN: Final = struct.Struct(">Q")
pack_lsn: Final = _LSN.pack
pack_time: Final = _LSN.pack

_IMAGE, _NATIVE, _TOMBSTONE = (int(k) for k in (ValueKind.IMAGE, ValueKind.NATIVE, ValueKind.TOMBSTONE))


class UnsupportedWalError(InvalidInputError):
    """The log holds what this storage cannot keep. Ingest stops there: nothing behind it could be right."""


@dataclass(slots=True)
class Tip:
    """The newest state, as far as ingest depends on it."""

    rel_sizes: dict[tuple[Rel, int], int]
    """(rel, fork) → blocks."""
    rel_maps: set[tuple[int, int]]
    """(tablespace, database) that have a pg_filenode.map."""
    slru_pages: dict[Slru, set[int]]
    two_phase: set[int]
    checkpoint: CheckPoint
    control: ControlFile
    origins: dict[int, int] = field(default_factory=dict)
    """Replication origin → remote LSN."""
    commit_time_us: int = 0
    """The latest time of a commit or abort, as a TimestampTz; 0 when there was none."""


class StateIngest:
    """Collects values in `_values`; what one record may change more than once in `_pending`, stored once when the
    record is done, as (key, lsn) is unique."""

    def __init__(self, tip: Tip) -> None:
        self.tip = tip
        self._values: list[KeyedValue] = []
        self._pending: dict[bytes, tuple[int, bytes]] = {}
        self._clog_page = -1
        self._clog_key = b""
        """Of the last commit; -1 when that page may be gone."""
        self._running_are_listed = False
        """Completely, by the last record that does."""
        self._copied_lsn = _UNKNOWN_LSN
        """No database was copied file by file from here on. Before its first record an ingest knows of none."""

    def _store_pending(self, end: int) -> None:
        self._values += ((key, end, kind, payload) for key, (kind, payload) in self._pending.items())
        self._pending.clear()

    # --- the checkpoint ---

    def _advance_next_xid(self, xid: int) -> int:
        """Store a nextXid above `xid`, which is not below the one we have; returns its low 32 bits."""
        full = self.tip.checkpoint.next_xid
        ahead = (xid - full) & _MASK32
        following = full + ahead + 1
        stored = -(-following // XID_ALIGNMENT) * XID_ALIGNMENT
        if stored & _MASK32 == 0:
            # Not rounded across the wrap: a start reads the page of the commit log that nextXid is on (TrimCLOG), and
            # the first one of a new epoch is zeroed only when xid 3 is given out.
            stored = following if following & _MASK32 else following + FIRST_NORMAL_XID
        self._set_checkpoint(replace(self.tip.checkpoint, next_xid=stored))
        return stored & _MASK32

    def _advance_past(self, xids: Iterable[int]) -> None:
        """AdvanceNextTransactionIdPastXid, for xids that records name without having them in their headers."""
        for xid in xids:
            if xid and follows_or_equals(xid, self.tip.checkpoint.next_xid):
                self._advance_next_xid(xid)

    def _set_checkpoint(self, changed: CheckPoint) -> None:
        if changed != self.tip.checkpoint:
            self.tip.checkpoint = changed
            self._pending[CHECKPOINT_KEY] = _IMAGE, changed.serialize()

    def _xlog(self, record: rmgr_xlog.XlogRecord | None, start: int, end: int) -> None:
        if isinstance(record, rmgr_xlog.XlogCheckpoint):
            self._keep_checkpoint(record, start)
        match record:
            case rmgr_xlog.NextOid(next_oid=oid):
                self._set_checkpoint(replace(self.tip.checkpoint, next_oid=oid))
            case rmgr_xlog.XlogCheckpoint(is_shutdown=True, checkpoint=logged):
                # Nothing runs, so all of it is exact; what belongs to its own place in the log is minted anew.
                mine = self.tip.checkpoint
                self._set_checkpoint(
                    replace(
                        logged,
                        redo=mine.redo,
                        this_timeline=mine.this_timeline,
                        prev_timeline=mine.prev_timeline,
                        oldest_active_xid=mine.oldest_active_xid,
                    )
                )
            case rmgr_xlog.XlogCheckpoint(checkpoint=logged):
                self._set_checkpoint(_after_online_checkpoint(self.tip.checkpoint, logged))
            case rmgr_xlog.FullPageWritesChange(full_page_writes=on):
                self._set_checkpoint(replace(self.tip.checkpoint, full_page_writes=on))
            case rmgr_xlog.ParameterChange():
                self._parameters(record, end)
            case _:
                pass

    def _keep_checkpoint(self, record: rmgr_xlog.XlogCheckpoint, start: int) -> None:
        """In the control file, as it was logged, and where: a standby starts from it.

        Not one behind which a standby would not know who runs: between redo and record there is a list that leaves
        subtransactions out. It starts from an older one then; unless a database was copied file by file since, which
        redo does again, from what the files are now.
        """
        if record.is_shutdown or self._running_are_listed or self.tip.control.checkpoint.redo < self._copied_lsn:
            self._set_control(replace(self.tip.control, checkpoint_lsn=start, checkpoint=record.checkpoint))

    def _set_control(self, changed: ControlFile) -> None:
        if changed != self.tip.control:
            self.tip.control = changed
            self._pending[CONTROL_FILE_KEY] = _IMAGE, changed.serialize()

    def _parameters(self, record: rmgr_xlog.ParameterChange, end: int) -> None:
        """pg_control keeps them for the next start: whether commit timestamps are kept, above all."""
        before = self.tip.control
        changed = replace(
            before,
            max_connections=record.max_connections,
            max_worker_processes=record.max_worker_processes,
            max_wal_senders=record.max_wal_senders,
            max_prepared_transactions=record.max_prepared_transactions,
            max_locks_per_transaction=record.max_locks_per_transaction,
            wal_level=record.wal_level,
            wal_log_hints=record.wal_log_hints,
            track_commit_timestamp=record.track_commit_timestamp,
        )
        self._set_control(changed)
        checkpoint, pages = self.tip.checkpoint, self.tip.slru_pages[Slru.COMMIT_TS]
        if not record.track_commit_timestamp:  # DeactivateCommitTs
            self._slru_drop(Slru.COMMIT_TS, list(pages), end)
            self._set_checkpoint(replace(checkpoint, oldest_commit_ts_xid=0, newest_commit_ts_xid=0))
        elif not before.track_commit_timestamp:  # ActivateCommitTs
            next_xid = checkpoint.next_xid & _MASK32
            if checkpoint.oldest_commit_ts_xid == 0:
                self._set_checkpoint(replace(checkpoint, oldest_commit_ts_xid=next_xid, newest_commit_ts_xid=next_xid))
            page = next_xid // native.COMMIT_TS_XACTS_PER_PAGE
            if page not in pages:
                self._slru_zero(Slru.COMMIT_TS, page, end)

    def _standby(self, record: rmgr_standby.RunningXacts | rmgr_standby.StandbyLocks | None) -> None:
        if isinstance(record, rmgr_standby.RunningXacts):
            self._running_are_listed = not record.subxids_overflowed
            self._set_checkpoint(replace(self.tip.checkpoint, oldest_active_xid=record.oldest_running_xid))

    # --- ends of transactions ---

    def _xact(
        self,
        record: rmgr_xact.XactEnd | rmgr_xact.XactPrepare | rmgr_xact.XactAssignment | None,
        raw: bytes,
        data: bytes,
        end: int,
    ) -> None:
        """`raw` is the whole record. The relations that it drops are not looked at here."""
        if isinstance(record, rmgr_xact.XactPrepare):
            self.tip.two_phase.add(record.xid)
            self._pending[two_phase_key(record.xid)] = _IMAGE, rmgr_xact.twophase_file(data)
            if record.subxids:
                self._advance_past(record.subxids)
            if record.origin_lsn:
                self._advance_origin(raw, record.origin_lsn)
        elif isinstance(record, rmgr_xact.XactEnd):
            self._note_end_time(record.time_us, end)
            xids = (record.xid, *record.subxids) if record.xid else record.subxids
            if xids:
                self._set_clog(xids, committed=record.committed, end=end)
            if record.subxids or record.was_prepared:
                self._advance_past(xids)  # a subtransaction may have an xid and no record of its own
            if xids and record.committed and self.tip.control.track_commit_timestamp:
                self._set_commit_ts(record, xids, raw, end)
            if record.was_prepared and record.xid in self.tip.two_phase:
                self.tip.two_phase.discard(record.xid)
                self._pending[two_phase_key(record.xid)] = _TOMBSTONE, b""
            if record.info & rmgr_xact.HAS_ORIGIN:
                self._advance_origin(raw, record.origin_lsn)

    def _commit_one(self, xid: int, time_us: int, end: int) -> None:
        """A commit without anything else to it, as most are: what `_xact` would do with it."""
        tip, append = self.tip, self._values.append
        if time_us > tip.commit_time_us:
            tip.commit_time_us = time_us
            append((COMMIT_TIME_KEY, end, _IMAGE, pack_time(time_us)))
        page, index = divmod(xid, native.CLOG_XACTS_PER_PAGE)
        if page == self._clog_page:
            append((self._clog_key, end, _NATIVE, native.pack_clog_commit(index)))
        else:
            self._slru_change(Slru.CLOG, page, native.pack_clog_commit(index), end)
            self._clog_page, self._clog_key = page, slru_key(Slru.CLOG, page)

    def _note_end_time(self, time_us: int, end: int) -> None:
        """Times of transactions that end together may cross in the log; what is stored only rises, to be searched."""
        if time_us > self.tip.commit_time_us:
            self.tip.commit_time_us = time_us
            self._values.append((COMMIT_TIME_KEY, end, _IMAGE, pack_time(time_us)))

    def _set_clog(self, xids: tuple[int, ...], *, committed: bool, end: int) -> None:
        status = rmgr_clog.XidStatus.COMMITTED if committed else rmgr_clog.XidStatus.ABORTED
        for page, on_page in _by_page(xids, native.CLOG_XACTS_PER_PAGE):
            self._slru_change(Slru.CLOG, page, native.pack_clog_set(on_page, status), end)

    def _set_commit_ts(self, record: rmgr_xact.XactEnd, xids: tuple[int, ...], raw: bytes, end: int) -> None:
        """TransactionTreeSetCommitTsData, as xact_redo_commit calls it."""
        origin, time_us = 0, record.time_us
        if record.info & rmgr_xact.HAS_ORIGIN:
            origin, time_us = _origin_of(raw), record.origin_time_us
        for page, on_page in _by_page(xids, native.COMMIT_TS_XACTS_PER_PAGE):
            self._slru_change(Slru.COMMIT_TS, page, native.pack_commit_ts(on_page, time_us, origin), end)
        newest = xids[-1]
        if not follows_or_equals(self.tip.checkpoint.newest_commit_ts_xid, newest):
            self._set_checkpoint(replace(self.tip.checkpoint, newest_commit_ts_xid=newest))

    # --- replication origins ---

    def _advance_origin(self, raw: bytes, remote_lsn: int) -> None:
        origin = _origin_of(raw)
        if origin:
            self._set_origin(rmgr_replorigin.ReplOriginSet(origin, remote_lsn, force=False))

    def _set_origin(self, record: rmgr_replorigin.ReplOriginSet | rmgr_replorigin.ReplOriginDrop) -> None:
        """replorigin_advance, replorigin_redo."""
        origins = self.tip.origins
        if isinstance(record, rmgr_replorigin.ReplOriginDrop):
            if origins.pop(record.origin, None) is not None:
                self._pending[repl_origin_key(record.origin)] = _TOMBSTONE, b""
        elif record.force or record.remote_lsn > origins.get(record.origin, 0):
            origins[record.origin] = record.remote_lsn
            self._pending[repl_origin_key(record.origin)] = _IMAGE, pack_lsn(record.remote_lsn)

    # --- SLRUs ---

    def _slru_change(self, kind: Slru, page: int, change: bytes, end: int) -> None:
        """A change of a page that nothing has zeroed yet starts it from zeros, as redo with a missing segment would."""
        if page not in self.tip.slru_pages[kind]:
            self.tip.slru_pages[kind].add(page)
            self._values.append((slru_key(kind, page), end - 1, _IMAGE, native.ZERO_PAGE))
        self._values.append((slru_key(kind, page), end, _NATIVE, change))

    def _slru_zero(self, kind: Slru, page: int, end: int) -> None:
        if page < 0:
            raise CorruptedError("a record zeroes a page with a negative number")
        self.tip.slru_pages[kind].add(page)
        self._values.append((slru_key(kind, page), end, _IMAGE, native.ZERO_PAGE))

    def _slru_drop(self, kind: Slru, gone: Iterable[int], end: int) -> None:
        self._clog_page = -1
        for page in gone:
            self.tip.slru_pages[kind].discard(page)
            self._values.append((slru_key(kind, page), end, _TOMBSTONE, b""))

    def _slru_truncate(self, kind: Slru, cutoff_page: int, end: int) -> None:
        self._slru_drop(kind, pages_before(kind, self.tip.slru_pages[kind], cutoff_page), end)

    def _clog(self, record: rmgr_clog.ClogZeroPage | rmgr_clog.ClogTruncate, end: int) -> None:
        if isinstance(record, rmgr_clog.ClogZeroPage):
            self._slru_zero(Slru.CLOG, record.page_number, end)
            return
        # A start from any LSN needs what only this record says (Neon: "not just on a checkpoint").
        self._set_checkpoint(
            replace(self.tip.checkpoint, oldest_xid=record.oldest_xid, oldest_xid_database=record.oldest_xid_database)
        )
        self._slru_truncate(Slru.CLOG, record.page_number, end)

    def _commit_ts(self, record: rmgr_commit_ts.CommitTsZeroPage | rmgr_commit_ts.CommitTsTruncate, end: int) -> None:
        if isinstance(record, rmgr_commit_ts.CommitTsZeroPage):
            self._slru_zero(Slru.COMMIT_TS, record.page_number, end)
            return
        oldest = self.tip.checkpoint.oldest_commit_ts_xid
        if oldest and not follows_or_equals(oldest, record.oldest_xid):  # AdvanceOldestCommitTsXid
            self._set_checkpoint(replace(self.tip.checkpoint, oldest_commit_ts_xid=record.oldest_xid))
        self._slru_truncate(Slru.COMMIT_TS, record.page_number, end)

    def _multixact(
        self,
        record: rmgr_multixact.MultixactZeroPage | rmgr_multixact.MultixactCreate | rmgr_multixact.MultixactTruncate,
        end: int,
    ) -> None:
        match record:
            case rmgr_multixact.MultixactZeroPage():
                kind = Slru.MULTIXACT_MEMBERS if record.of_members else Slru.MULTIXACT_OFFSETS
                self._slru_zero(kind, record.page_number, end)
            case rmgr_multixact.MultixactCreate():
                count = len(record.members)
                for page, change in native.pack_multixact_offsets(record.multixact_id, record.members_offset, count):
                    self._slru_change(Slru.MULTIXACT_OFFSETS, page, change, end)
                for page, change in native.pack_multixact_members(record.members_offset, record.members):
                    self._slru_change(Slru.MULTIXACT_MEMBERS, page, change, end)
                self._advance_multixact(record)
                self._advance_past(xid for xid, _ in record.members)
            case rmgr_multixact.MultixactTruncate():
                self._set_checkpoint(
                    replace(
                        self.tip.checkpoint,
                        oldest_multi=record.end_offset,
                        oldest_multi_database=record.oldest_database,
                    )
                )
                members = self.tip.slru_pages[Slru.MULTIXACT_MEMBERS]
                gone = member_pages_between(members, record.start_member, record.end_member)
                self._slru_drop(Slru.MULTIXACT_MEMBERS, gone, end)
                # One step back: the page of the oldest one need not exist yet (PerformOffsetsTruncation).
                before = _MASK32 if record.end_offset == FIRST_MULTIXACT else record.end_offset - 1
                self._slru_truncate(Slru.MULTIXACT_OFFSETS, before // native.MULTIXACT_OFFSETS_PER_PAGE, end)

    def _advance_multixact(self, record: rmgr_multixact.MultixactCreate) -> None:
        """nextMulti and nextMultiOffset (multixact_redo, MultiXactAdvanceNextMXact)."""
        following = (record.multixact_id + 1) & _MASK32 or FIRST_MULTIXACT
        offset = (record.members_offset + len(record.members)) & _MASK32
        self._set_checkpoint(_with_multixacts(self.tip.checkpoint, following, offset))


def _with_multixacts(mine: CheckPoint, next_multi: int, next_offset: int) -> CheckPoint:
    """Each of both, where it is ahead of ours."""
    return replace(
        mine,
        next_multi=next_multi if follows_or_equals(next_multi, mine.next_multi) else mine.next_multi,
        next_multi_offset=(
            next_offset if follows_or_equals(next_offset, mine.next_multi_offset) else mine.next_multi_offset
        ),
    )


def _after_online_checkpoint(mine: CheckPoint, logged: CheckPoint) -> CheckPoint:
    """What xlog_redo takes over from a checkpoint that was taken while others went on.

    It was filled in before the record was written, so it may be older than records that came before it: its counters
    and horizons are minima. Its nextOid is left to XLOG_NEXTOID.
    """
    changed = _with_multixacts(mine, logged.next_multi, logged.next_multi_offset)
    changed = replace(changed, next_xid=max(mine.next_xid, logged.next_xid), time_s=logged.time_s)
    if follows_or_equals(logged.oldest_xid, mine.oldest_xid):
        changed = replace(changed, oldest_xid=logged.oldest_xid, oldest_xid_database=logged.oldest_xid_database)
    if follows_or_equals(logged.oldest_multi, mine.oldest_multi):
        changed = replace(changed, oldest_multi=logged.oldest_multi, oldest_multi_database=logged.oldest_multi_database)
    return changed


def _by_page(xids: Iterable[int], per_page: int) -> Iterable[tuple[int, list[int]]]:
    pages: dict[int, list[int]] = {}
    for xid in xids:
        pages.setdefault(xid // per_page, []).append(xid)
    return pages.items()


def _origin_of(raw: bytes) -> int:
    """The replication origin that a record carries; 0 for none."""
    return parse_record(raw).origin_id or 0


def require_known_tablespace(spc: int) -> None:
    """Raises UnsupportedWalError for any but the two of initdb."""
    if spc not in (DEFAULT_TABLESPACE_OID, GLOBAL_TABLESPACE_OID):
        raise UnsupportedWalError("tablespaces are not supported: data has one home, sealed storage")
