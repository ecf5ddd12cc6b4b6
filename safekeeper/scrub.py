"""Offloaded WAL against the log: what is missing, left over, unreadable, or under a key that it should not be.

Every piece of the timeline in the object store, whoever put it, is read as a whole and every frame of it opened; and
what this node's control file says to lie there is looked for. Nothing is changed. Sealed anew, pieces come and go while
this runs: one that is gone when its turn comes is skipped, and what is missing is looked for twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from safekeeper.log_map import Extent, LogMap, Place
from safekeeper.offload import RemoteReader
from safekeeper.remote_wal import RemotePiece, RemoteWal
from safekeeper.wal_segment import KEY_SUFFIX
from shared.api.pageserver import Finding, FindingKind
from shared.api.safekeeper import WalScrubReport
from shared.errors import ConflictError, IntegrityError, NotFoundError
from shared.storage.base import ObjectNotFoundError

MAX_FINDINGS: Final = 1000


class WalScrubber:
    """One run at a time. `current` gives the log's map."""

    def __init__(
        self, remote: RemoteWal, reader: RemoteReader, current: Callable[[], LogMap], limit: Callable[[], int]
    ) -> None:
        """`limit`: what ends before may have been trimmed by a peer."""
        self._limit = limit
        self._remote = remote
        self._reader = reader
        self._current = current
        self._running = asyncio.Lock()

    async def run(self, kek_version: int, dek_floor: int) -> WalScrubReport:
        """`kek_version`, `dek_floor`: what should be in force. What is under older keys is reported as outdated.

        Raises ConflictError while another run is under way; KeyAccessError, UnavailableError, StoreDeniedError.
        """
        if self._running.locked():
            raise ConflictError("the timeline's WAL is being looked at already")
        async with self._running:
            # Before the listing: whatever the map says by now is listed.
            offloaded = [extent for extent in self._current().extents if extent.place is not Place.LOCAL]
            objects = await self._remote.objects()
            findings: list[Finding] = []
            pieces: list[RemotePiece] = []
            for name in sorted(objects):
                piece = RemotePiece.parse(name.removesuffix(KEY_SUFFIX))
                if piece is None:
                    findings.append(_finding(FindingKind.ORPHAN, name, "no piece of WAL has such a name"))
                elif not name.endswith(KEY_SUFFIX):
                    pieces.append(piece)
                elif piece.name not in objects and piece.end_lsn > self._trimmed_lsn:
                    findings.append(_finding(FindingKind.ORPHAN, name, "an envelope without its piece"))
            for piece in pieces:
                found = await self._examine(piece, kek_version, dek_floor)
                if found is not None:
                    findings.append(found)
            findings += await self._missing(offloaded, pieces)
            return WalScrubReport(
                pieces=len(pieces),
                size_bytes=sum(objects[piece.name] for piece in pieces),
                objects=len(objects),
                findings=findings[:MAX_FINDINGS],
                more_findings=max(0, len(findings) - MAX_FINDINGS),
            )

    @property
    def _trimmed_lsn(self) -> int:
        """What ends before may be there or not, in whole or in part: some node is just trimming it, or did or will."""
        return max(self._current().oldest_lsn, self._limit())

    async def _examine(self, piece: RemotePiece, kek_version: int, dek_floor: int) -> Finding | None:
        """The first thing that is wrong with a piece."""
        try:
            envelope = await self._reader.verify(piece)
        except ObjectNotFoundError:
            left = await self._remote.objects(piece.name)
            if piece.name in left and piece.name + KEY_SUFFIX not in left:
                return _finding(FindingKind.MISSING, piece.name + KEY_SUFFIX)
            return None  # sealed anew meanwhile
        except (IntegrityError, NotFoundError) as error:  # also of the KEK that it is under
            return _finding(FindingKind.UNREADABLE, piece.name, str(error))
        held = any(_holds(extent, piece) for extent in self._current().extents)
        if not held and piece.end_lsn > self._trimmed_lsn:
            return _finding(FindingKind.ORPHAN, piece.name, "the log has no WAL of this term there")
        if envelope.kek_version < kek_version or envelope.dek_version < dek_floor:
            detail = f"KEK version {envelope.kek_version}, DEK of version {envelope.dek_version}"
            return _finding(FindingKind.OUTDATED_KEY, piece.name, detail)
        return None

    async def _missing(self, offloaded: Iterable[Extent], listed: Sequence[RemotePiece]) -> list[Finding]:
        found = []
        for extent in offloaded:
            if extent.end_lsn is not None and extent.end_lsn <= self._trimmed_lsn:
                continue
            if _covered(extent, listed) or _covered(extent, await self._remote.pieces(extent.piece.segment_number)):
                continue
            segment, term, _ = extent.piece
            name = f"{segment:016x}.{term:016x}.{extent.start_lsn:016x}-{extent.end_lsn:016x}"
            detail = "it is on this safekeeper's disk, too" if extent.place is Place.BOTH else ""
            found.append(_finding(FindingKind.MISSING, name, detail))
        return found


def _covered(extent: Extent, pieces: Iterable[RemotePiece]) -> bool:
    assert extent.end_lsn is not None  # noqa: S101 - only closed ones are offloaded
    return any(piece.covers(extent.piece.term, extent.start_lsn, extent.end_lsn) for piece in pieces)


def _holds(extent: Extent, piece: RemotePiece) -> bool:
    """Does the log have WAL of the piece's term where the piece is?"""
    behind = extent.end_lsn is not None and extent.end_lsn <= piece.start_lsn
    return extent.piece.term == piece.piece.term and extent.start_lsn < piece.end_lsn and not behind


def _finding(kind: FindingKind, name: str, detail: str = "") -> Finding:
    return Finding(kind=kind, object=name, detail=detail)
