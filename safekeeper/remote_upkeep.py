"""Keys of a timeline's offloaded WAL: wrapped again, sealed anew, counted.

Every safekeeper of the timeline looks after all of it, whoever put it: a node that is gone for good must not keep an
old KEK in use. So two nodes may do the same work at the same time. That costs, and changes nothing: two wraps of one
DEK under the KEK in force are equally good, and two new pieces of the same WAL are, too.

Invariant: a piece that is there has an envelope that opens. A new piece is there, and listed, before the one that it
replaces goes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final

from safekeeper.offload import KeysOf
from safekeeper.remote_wal import RemotePiece, RemoteWal
from safekeeper.wal_segment import (
    PIECE_HEADER_SIZE_BYTES,
    FrameIndex,
    PieceCipher,
    PieceHeader,
    PieceId,
    index_frames,
    open_frames,
)
from shared.crypto.aead import default_suite
from shared.crypto.envelope import Envelope
from shared.errors import CorruptedError, IntegrityError
from shared.key_upkeep import Pace, UseCounter
from shared.storage.base import ObjectNotFoundError

_BATCH: Final = 256
NewName = Callable[[int, int], Awaitable[PieceId]]
"""(segment number, term) → a piece id of this node that is never given twice."""


class RemoteUpkeep:
    """All methods raise KeyAccessError, UnavailableError, StoreDeniedError, IntegrityError."""

    def __init__(self, remote: RemoteWal, node_id: str, keys_of: KeysOf) -> None:
        self._remote = remote
        self._node_id = node_id
        self._keys_of = keys_of

    async def count(self, counter: UseCounter) -> None:
        for _, envelope, size_bytes in await self._remote.envelopes():
            counter.add(envelope, size_bytes, shared=True)

    async def rewrap(self, kek_version: int, pace: Pace) -> None:
        """Bring every envelope to `kek_version`, or a newer one."""
        by_node: defaultdict[str, list[tuple[RemotePiece, Envelope]]] = defaultdict(list)
        for piece, envelope, _ in await self._remote.envelopes():
            if envelope.kek_version < kek_version:
                by_node[piece.node_id].append((piece, envelope))
        for node_id, outdated in by_node.items():
            for start in range(0, len(outdated), _BATCH):
                batch = outdated[start : start + _BATCH]
                made = await self._keys_of(node_id).rewrap([(piece.piece, envelope) for piece, envelope in batch])
                if any(envelope.kek_version < kek_version for envelope in made):
                    raise IntegrityError("the keymanager wrapped DEKs under an older KEK than the one in force")
                for (piece, _), envelope in zip(batch, made, strict=True):
                    await self._remote.replace_envelope(piece, envelope)
                await pace.rewrapped(len(batch))

    async def rekey(self, dek_floor: int, pace: Pace, new_name: NewName) -> None:
        """Seal every piece under an older DEK than `dek_floor` anew. Plaintext is held while this runs."""
        stored = await self._remote.envelopes()
        new = [piece for piece, envelope, size in stored if envelope.dek_version >= dek_floor and size]
        for piece, envelope, size_bytes in stored:
            if envelope.dek_version >= dek_floor:
                continue
            replaced = any(each.covers(piece.piece.term, piece.start_lsn, piece.end_lsn) for each in new)
            if size_bytes and not replaced:
                made = await self._seal_anew(piece, new_name)
                if made is not None:
                    new.append(made)
                await pace.rekeyed(size_bytes)
            # An envelope without a piece is the rest of an interrupted removal, or of a put that will be done again.
            await self._remote.remove([piece])

    async def _seal_anew(self, old: RemotePiece, new_name: NewName) -> RemotePiece | None:
        """None when somebody else was faster."""
        name = await new_name(old.piece.segment_number, old.piece.term)
        made = RemotePiece(name, old.start_lsn, old.end_lsn, self._node_id)
        # The key first: with plaintext in hand nobody waits for the keymanager.
        key, envelope, aad = await self._keys_of(self._node_id).generate(name)
        target = PieceCipher(key, aad, PieceHeader(name, old.start_lsn, default_suite()))
        try:
            content, old_envelope = await self._remote.fetch(old)
        except ObjectNotFoundError:
            return None
        header = PieceHeader.parse(content)
        if header.piece != old.piece or header.start_lsn != old.start_lsn:
            raise CorruptedError("an offloaded WAL piece is another one than its name says")
        old_key, old_aad = await self._keys_of(old.node_id).unwrap(old.piece, old_envelope)
        source = PieceCipher(old_key, old_aad, header)
        sealed = await asyncio.to_thread(_reseal, content, source, target, old.end_lsn)
        await self._remote.put(made, sealed, envelope)
        return made


def _reseal(content: bytes, source: PieceCipher, target: PieceCipher, end_lsn: int) -> bytes:
    """Frame by frame; the last one ends at `end_lsn`."""
    index = index_frames(content, source.header, end_lsn)
    written = FrameIndex.empty(source.header.start_lsn)
    sealed = bytearray(target.header.serialize())
    for number, plaintext in enumerate(open_frames(source, index, 0, content[PIECE_HEADER_SIZE_BYTES:], index.frames)):
        part = plaintext[: end_lsn - written.end_lsn]
        header, body = target.seal(number, written.end_lsn, part)
        sealed += header + body
        written.append(len(part))
    return bytes(sealed)
