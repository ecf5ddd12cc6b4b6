"""What is in a sealed piece of WAL, described: its records, their headers and the blocks that they are about; no data.

The safekeeper opens it, under the project's lease: no DEK leaves it, and nothing opens it once the keys are gone. It is
the very piece that is asked for, part of the log or not: found by its name, on this node's disk or in the object store,
and known by the digest of its bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

from safekeeper import piece_file
from safekeeper.inspection import MAX_PIECE_SIZE_BYTES, whole_frames
from safekeeper.offload import KeysOf, OpenedPiece
from safekeeper.remote_wal import RemotePiece, RemoteWal
from safekeeper.wal_segment import PieceCipher, PieceHeader, PieceId
from shared.api.safekeeper import InspectWal, WalBlock, WalContent, WalRecord
from shared.crypto.envelope import Envelope
from shared.errors import NotFoundError, UnavailableError
from shared.lsn import Lsn
from shared.storage.base import ObjectNotFoundError
from shared.wal.reader import RawRecord, WalStreamDecoder
from shared.wal.record import parse_record
from shared.wal.rmgr import RMGR_NAMES, RmgrId

MAX_RECORDS: Final = 10_000
_CHUNK_SIZE_BYTES: Final = 256 * 1024
Read = Callable[[int, int], Awaitable[bytes]]


class PieceInspector:
    """Of one timeline's pieces: those in `directory`, which this node has sealed, and those in the object store."""

    def __init__(self, directory: Path, node_id: str, remote: RemoteWal | None, keys_of: KeysOf) -> None:
        self._directory = directory
        self._node_id = node_id
        self._remote = remote
        self._keys_of = keys_of

    async def open(self, request: InspectWal) -> OpenedPiece:
        """Raises NotFoundError when there is no such piece here, or it has other bytes; KeyAccessError,
        UnavailableError, IntegrityError."""
        content, envelope, node_id = await self._sealed(request.name)
        content = content[: request.sealed_size_bytes]
        if hashlib.sha256(content).hexdigest() != request.sha256:
            raise NotFoundError("this safekeeper has other bytes under that name")
        header = PieceHeader.parse(content)
        index = whole_frames(content, header)
        key, aad = await self._keys_of(node_id).unwrap(header.piece, envelope)
        source = RemotePiece(header.piece, header.start_lsn, index.end_lsn, node_id)
        return OpenedPiece(source, content, PieceCipher(key, aad, header), index)

    async def _sealed(self, name: str) -> tuple[bytes, Envelope, str]:
        """(piece, envelope, who sealed it). A name leads nowhere but to a piece: it is parsed."""
        offloaded, piece = RemotePiece.parse(name), PieceId.parse(name)
        try:
            if offloaded is not None and self._remote is not None:
                content, envelope = await self._remote.fetch(offloaded)
                return content, envelope, offloaded.node_id
            if piece is not None:
                content, envelope = await asyncio.to_thread(self._read, piece)
                return content, envelope, self._node_id
        except (FileNotFoundError, ObjectNotFoundError):
            pass
        except OSError as error:
            raise UnavailableError(f"the piece cannot be read: {error.strerror}") from None
        raise NotFoundError("there is no such piece of WAL")

    def _read(self, piece: PieceId) -> tuple[bytes, Envelope]:
        path, key_path = piece_file.paths(self._directory, piece)
        with path.open("rb") as file:
            content = file.read(MAX_PIECE_SIZE_BYTES)
        return content, Envelope.parse(key_path.read_bytes())


async def describe_piece(
    opened: OpenedPiece, timeline_start_lsn: int, system_identifier: int, executor: Executor
) -> WalContent:
    """Raises CorruptedError when it is not WAL, IntegrityError when a frame is not genuine, KeyWipedError."""
    source = opened.source
    if source.start_lsn == source.end_lsn:
        return WalContent(records=[], more=False)

    async def read(lsn: int, size_bytes: int) -> bytes:
        return await asyncio.to_thread(opened.read, lsn, lsn + size_bytes)

    return await describe_wal(read, source.start_lsn, source.end_lsn, timeline_start_lsn, system_identifier, executor)


async def describe_wal(
    read: Read, start_lsn: int, end_lsn: int, timeline_start_lsn: int, system_identifier: int, executor: Executor
) -> WalContent:
    """The records that begin and end in [start_lsn, end_lsn). One that began before is not among them; without the
    beginning of the log they are found from the next page on.

    `read(lsn, size)` answers at least one byte before end_lsn. Raises CorruptedError when the log is not WAL.
    """
    decoder = WalStreamDecoder(
        start_lsn, system_identifier=system_identifier, synchronise=start_lsn != timeline_start_lsn
    )
    loop = asyncio.get_running_loop()
    found: list[WalRecord] = []
    while decoder.next_lsn < end_lsn and len(found) < MAX_RECORDS:
        lsn = decoder.next_lsn
        chunk = await read(lsn, min(_CHUNK_SIZE_BYTES, end_lsn - lsn))
        found += await loop.run_in_executor(executor, _records, decoder, lsn, chunk)
        if decoder.next_lsn < lsn + len(chunk):
            break  # zeros where a record should start
    return WalContent(records=found[:MAX_RECORDS], more=len(found) >= MAX_RECORDS and decoder.end_lsn < end_lsn)


def _records(decoder: WalStreamDecoder, lsn: int, chunk: bytes) -> list[WalRecord]:
    return [_described(raw) for raw in decoder.feed(lsn, chunk)]


def _described(raw: RawRecord) -> WalRecord:
    start_lsn, end_lsn, data = raw
    record = parse_record(data)
    header = record.header
    known = header.rmgr_id in RmgrId.__members__.values()
    return WalRecord(
        start_lsn=Lsn(start_lsn),
        end_lsn=Lsn(end_lsn),
        resource_manager=RMGR_NAMES[RmgrId(header.rmgr_id)] if known else f"number {header.rmgr_id}",
        info=header.info,
        xid=header.xid,
        size_bytes=header.total_length_bytes,
        blocks=[
            WalBlock(
                tablespace=block.rel[0],
                database=block.rel[1],
                relfilenumber=block.rel[2],
                fork=block.fork,
                block=block.block_number,
                has_image=block.image is not None,
            )
            for block in record.blocks
        ],
    )
