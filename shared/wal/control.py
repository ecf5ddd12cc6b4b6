"""pg_control and the CheckPoint in it (Postgres `catalog/pg_control.h`, PG_CONTROL_VERSION 1300).

| offset | size | field                              | offset | size | field                              |
|--------|------|------------------------------------|--------|------|------------------------------------|
| 0      | 8    | system_identifier                  | 180    | 4*5  | MaxConnections, worker processes,  |
| 8      | 4    | pg_control_version                 |        |      | wal senders, prepared xacts, locks |
| 12     | 4    | catalog_version_no                 | 200    | 1+3  | track_commit_timestamp             |
| 16     | 4+4  | state (DBState)                    | 204    | 4    | maxAlign                           |
| 24     | 8    | time                               | 208    | 8    | floatFormat                        |
| 32     | 8    | checkPoint                         | 216    | 4*4  | blcksz, relseg_size, xlog_blcksz,  |
| 40     | 88   | checkPointCopy (below)             |        |      | xlog_seg_size                      |
| 128    | 8    | unloggedLSN                        | 232    | 4*4  | nameDataLen, indexMaxKeys, toast   |
| 136    | 8    | minRecoveryPoint                   |        |      | chunk, loblksize                   |
| 144    | 4+4  | minRecoveryPointTLI                | 248    | 1+3  | float8ByVal                        |
| 152    | 8    | backupStartPoint                   | 252    | 4    | data_checksum_version              |
| 160    | 8    | backupEndPoint                     | 256    | 32   | mock_authentication_nonce          |
| 168    | 1+3  | backupEndRequired                  | 288    | 4    | crc, CRC-32C of [0, 288)           |
| 172    | 4    | wal_level                          | 292    |      | zeros up to 8192                   |
| 176    | 1+3  | wal_log_hints                      |        |      |                                    |

CheckPoint: redo u64 · ThisTimeLineID u32 · PrevTimeLineID u32 · fullPageWrites bool+7 · nextXid u64 · nextOid ·
nextMulti · nextMultiOffset · oldestXid · oldestXidDB · oldestMulti · oldestMultiDB (u32 each)+4 · time i64 ·
oldestCommitTsXid · newestCommitTsXid · oldestActiveXid (u32 each)+4.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import google_crc32c

from shared.errors import CorruptedError
from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES

CONTROL_FILE_SIZE_BYTES: Final = 8192
CONTROL_VERSION: Final = 1300
CATALOG_VERSION: Final = 202307071
CHECKPOINT_SIZE_BYTES: Final = 88

_CHECKPOINT: Final = struct.Struct("<QII?7xQIIIIIII4xqIII4x")
_CONTROL: Final = struct.Struct("<QIIi4xqQ88sQQI4xQQ?3xi?3xiiiii?3xIdIIIIIIII?3xI32s")
_CRC: Final = struct.Struct("<I")
_FLOAT_FORMAT: Final = 1234567.0


class DbState(IntEnum):
    STARTUP = 0
    SHUTDOWNED = 1
    SHUTDOWNED_IN_RECOVERY = 2
    SHUTDOWNING = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


@dataclass(frozen=True, slots=True)
class CheckPoint:
    """Body of the checkpoint records. LSNs and xids are plain integers, `time_s` seconds since 1970."""

    redo: int
    this_timeline: int
    prev_timeline: int
    full_page_writes: bool
    next_xid: int
    """FullTransactionId: epoch in the upper 32 bits."""
    next_oid: int
    next_multi: int
    next_multi_offset: int
    oldest_xid: int
    oldest_xid_database: int
    oldest_multi: int
    oldest_multi_database: int
    time_s: int
    oldest_commit_ts_xid: int
    newest_commit_ts_xid: int
    oldest_active_xid: int
    """0 in shutdown checkpoints."""

    @classmethod
    def parse(cls, data: bytes) -> CheckPoint:
        """Raises CorruptedError unless `data` is exactly CHECKPOINT_SIZE_BYTES long."""
        if len(data) != CHECKPOINT_SIZE_BYTES:
            raise CorruptedError(f"CheckPoint of {len(data)} bytes, expected {CHECKPOINT_SIZE_BYTES}")
        return cls(*_CHECKPOINT.unpack(data))

    def serialize(self) -> bytes:
        return _CHECKPOINT.pack(*(getattr(self, name) for name in _CHECKPOINT_FIELDS))


_CHECKPOINT_FIELDS: Final = tuple(f.name for f in dataclasses.fields(CheckPoint))


@dataclass(frozen=True, slots=True)
class ControlFile:
    """ControlFileData without its CRC, which `parse` checks and `serialize` makes."""

    system_identifier: int
    control_version: int
    catalog_version: int
    state: DbState
    time_s: int
    checkpoint_lsn: int
    checkpoint: CheckPoint
    unlogged_lsn: int
    min_recovery_lsn: int
    min_recovery_timeline: int
    backup_start_lsn: int
    backup_end_lsn: int
    backup_end_required: bool
    wal_level: int
    """0 minimal, 1 replica, 2 logical."""
    wal_log_hints: bool
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int
    track_commit_timestamp: bool
    max_align: int
    float_format: float
    block_size_bytes: int
    relation_segment_blocks: int
    wal_block_size_bytes: int
    wal_segment_size_bytes: int
    name_data_length: int
    index_max_keys: int
    toast_max_chunk_size_bytes: int
    large_object_chunk_size_bytes: int
    float8_by_value: bool
    data_checksum_version: int
    mock_authentication_nonce: bytes = field(repr=False)

    @classmethod
    def parse(cls, data: bytes) -> ControlFile:
        """Parse the content of global/pg_control (the bytes behind the CRC are not looked at).

        Raises CorruptedError: too short, wrong CRC, or a server of other layout than the one that this package knows.
        """
        if len(data) < _CONTROL.size + _CRC.size:
            raise CorruptedError(f"pg_control of {len(data)} bytes")
        if google_crc32c.value(data[: _CONTROL.size]) != _CRC.unpack_from(data, _CONTROL.size)[0]:
            raise CorruptedError("pg_control has a wrong CRC")
        fields = list(_CONTROL.unpack_from(data))
        try:
            fields[3] = DbState(fields[3])
        except ValueError:
            raise CorruptedError(f"pg_control has the unknown state {fields[3]}") from None
        fields[6] = CheckPoint.parse(fields[6])
        control = cls(*fields)
        layout = (
            control.control_version,
            control.catalog_version,
            control.max_align,
            control.float_format,
            control.block_size_bytes,
            control.wal_block_size_bytes,
            control.wal_segment_size_bytes,
        )
        if layout != (
            CONTROL_VERSION,
            CATALOG_VERSION,
            8,
            _FLOAT_FORMAT,
            8192,
            WAL_BLOCK_SIZE_BYTES,
            WAL_SEGMENT_SIZE_BYTES,
        ):
            raise CorruptedError(f"pg_control is not of a PostgreSQL 16 that is built as ours: {layout}")
        return control

    def of_standby(self, lsn: int) -> ControlFile:
        """Of a standby whose last restartpoint was this file's checkpoint and whose files are those of `lsn`: as if it
        had been killed there. It replays from the checkpoint's redo on, skips by page LSN what the pages have already,
        and takes no queries before `lsn` (xlogrecovery.c, CheckRecoveryConsistency)."""
        return dataclasses.replace(
            self,
            state=DbState.IN_ARCHIVE_RECOVERY,
            min_recovery_lsn=lsn,
            min_recovery_timeline=self.checkpoint.this_timeline,
            backup_start_lsn=0,
            backup_end_lsn=0,
            backup_end_required=False,
        )

    def serialize(self) -> bytes:
        """The whole file, CONTROL_FILE_SIZE_BYTES long."""
        fields = [getattr(self, name) for name in _CONTROL_FIELDS]
        fields[6] = self.checkpoint.serialize()
        data = _CONTROL.pack(*fields)
        return (data + _CRC.pack(google_crc32c.value(data))).ljust(CONTROL_FILE_SIZE_BYTES, b"\0")


_CONTROL_FIELDS: Final = tuple(f.name for f in dataclasses.fields(ControlFile))
