"""Pieces of WAL in the object store: names, put, find, fetch, remove.

    wal/<project>/<timeline>/<segment>.<term>.<start>-<end>.<sequence>.<node>         a piece, as that node sealed it
    wal/<project>/<timeline>/<segment>.<term>.<start>-<end>.<sequence>.<node>.key     its envelope

All numbers in hexadecimal, 16 digits but for the sequence. A piece keeps the bytes and the DEK that it had on the
node's disk; so it stays bound to `wal/<node>/<file name>`. What is here is committed: of one term there is one log, so
any node's piece that covers a position has the right bytes for it, and whoever looks for WAL takes any.

The envelope is put before the piece, both only if absent, and the piece is removed before its envelope: a piece that is
there can be opened. Only envelopes are ever replaced, by wraps of the same DEK.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from safekeeper.wal_segment import KEY_SUFFIX, PieceId
from shared.crypto.envelope import Envelope
from shared.errors import IntegrityError, UnavailableError
from shared.failpoints import failpoint
from shared.ids import ProjectId, TimelineId
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.storage.base import ObjectExistsError, ObjectNotFoundError, ObjectStore

_NAME: Final = re.compile(
    r"([0-9a-f]{16})\.([0-9a-f]{16})\.([0-9a-f]{16})-([0-9a-f]{16})\.([0-9a-f]{4,8})\.([A-Za-z0-9_-]{1,64})", re.ASCII
)


def project_prefix(project_id: ProjectId) -> str:
    """Every offloaded piece of the project's WAL, of whatever timeline and node, starts with it."""
    return f"wal/{project_id}/"


def timeline_prefix(project_id: ProjectId, timeline_id: TimelineId) -> str:
    """The same, of one timeline."""
    return f"{project_prefix(project_id)}{timeline_id}/"


@dataclass(frozen=True, slots=True)
class RemotePiece:
    """One piece in the object store: WAL [start_lsn, end_lsn) of one segment and term."""

    piece: PieceId
    start_lsn: int
    end_lsn: int
    node_id: str

    @property
    def name(self) -> str:
        segment, term, sequence = self.piece
        return f"{segment:016x}.{term:016x}.{self.start_lsn:016x}-{self.end_lsn:016x}.{sequence:04x}.{self.node_id}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None when it is not the name of a piece that can be."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        segment, term, start, end, sequence = (int(match[group], 16) for group in range(1, 6))
        found = cls(PieceId(segment, term, sequence), start, end, match[6])
        fits = segment * WAL_SEGMENT_SIZE_BYTES <= start < end <= found.piece.segment_end_lsn
        return found if fits and found.name == name else None

    def covers(self, term: int, start_lsn: int, end_lsn: int) -> bool:
        return self.piece.term == term and self.start_lsn <= start_lsn and end_lsn <= self.end_lsn


class RemoteWal:
    """The offloaded WAL of one timeline. All methods raise StoreUnavailableError, StoreDeniedError."""

    def __init__(self, store: ObjectStore, project_id: ProjectId, timeline_id: TimelineId) -> None:
        self._store = store
        self._prefix = timeline_prefix(project_id, timeline_id)

    async def objects(self, beginning: str = "") -> dict[str, int]:
        """Everything below the timeline's prefix that begins so: name → size in bytes."""
        start = len(self._prefix)
        return {info.key[start:]: info.size_bytes async for info in self._store.list(self._prefix + beginning)}

    async def pieces(self, segment_number: int | None = None) -> list[RemotePiece]:
        """What is there, of one segment or of all. A store may hide the newest for a while."""
        narrowed = "" if segment_number is None else f"{segment_number:016x}."
        names = [info.key async for info in self._store.list(self._prefix + narrowed)]
        return [
            piece
            for name in names
            if not name.endswith(KEY_SUFFIX) and (piece := RemotePiece.parse(name.removeprefix(self._prefix)))
        ]

    async def envelopes(self) -> list[tuple[RemotePiece, Envelope, int]]:
        """(piece, envelope, size of the piece, 0 when it is not there) of every envelope. Raises CorruptedError."""
        found = {info.key: info.size_bytes async for info in self._store.list(self._prefix)}
        envelopes = []
        for key in found:
            piece = RemotePiece.parse(key.removeprefix(self._prefix).removesuffix(KEY_SUFFIX))
            if piece is None or not key.endswith(KEY_SUFFIX):
                continue
            try:
                envelope = Envelope.parse(await self._store.get(key))
            except ObjectNotFoundError:
                continue  # removed just now
            envelopes.append((piece, envelope, found.get(key.removesuffix(KEY_SUFFIX), 0)))
        return envelopes

    async def put(self, piece: RemotePiece, content: bytes, envelope: Envelope) -> None:
        """Durable and listed when this returns. Again after a failure: changes nothing that is there.

        Raises IntegrityError when something else lies under the piece's name; UnavailableError when it is not listed
        (yet).
        """
        key = self._prefix + piece.name
        for name, data in ((key + KEY_SUFFIX, envelope.serialize()), (key, content)):
            failpoint("offload-before-put")
            try:
                await self._store.put_if_absent(name, data)
            except ObjectExistsError:
                continue  # an attempt of before: the name has the node, and a sequence number that is used once
        if (await self._store.head(key)).size_bytes != len(content):
            raise IntegrityError("another object lies under the name of an offloaded WAL piece")
        listed = {info.key async for info in self._store.list(key)}
        if not {key, key + KEY_SUFFIX} <= listed:
            raise UnavailableError("the object store does not list the WAL piece that was put")

    async def fetch(self, piece: RemotePiece) -> tuple[bytes, Envelope]:
        """(sealed piece, envelope). Raises ObjectNotFoundError, CorruptedError."""
        key = self._prefix + piece.name
        return await self._store.get(key), Envelope.parse(await self._store.get(key + KEY_SUFFIX))

    async def replace_envelope(self, piece: RemotePiece, envelope: Envelope) -> None:
        await self._store.put(self._prefix + piece.name + KEY_SUFFIX, envelope.serialize())

    async def remove_before(self, lsn: int) -> None:
        """All pieces that end at or before `lsn`, and envelopes without a piece."""
        named = (RemotePiece.parse(name.removesuffix(KEY_SUFFIX)) for name in await self.objects())
        await self.remove(list({piece.name: piece for piece in named if piece and piece.end_lsn <= lsn}.values()))

    async def remove(self, pieces: Sequence[RemotePiece]) -> None:
        """Nothing happens for what is not there."""
        await self._store.delete_many([self._prefix + piece.name for piece in pieces])
        failpoint("offloaded-pieces-removed")
        await self._store.delete_many([self._prefix + piece.name + KEY_SUFFIX for piece in pieces])
