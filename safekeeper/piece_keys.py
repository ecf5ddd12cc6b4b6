"""Keys of WAL pieces: the project's lease, and one DEK per piece under it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from safekeeper.wal_segment import OBJECT_KIND, PieceId
from shared.api.keymanager import ObjectName
from shared.crypto.aead import AeadKey
from shared.crypto.envelope import Envelope
from shared.errors import LeaseExpiredError
from shared.ids import ProjectId, TimelineId
from shared.lease import CutHandler, KeyLossHandler, KeySource, Lease, nothing_to_cut


class ProjectKeys:
    """The lease on one project's keys, asked for when it is first needed."""

    def __init__(
        self, source: KeySource, project_id: ProjectId, on_loss: KeyLossHandler, cut: CutHandler = nothing_to_cut
    ) -> None:
        self.source = source
        self.project_id = project_id
        self._on_loss = on_loss
        self._cut = cut
        self._lease: Lease | None = None
        self._acquiring = asyncio.Lock()

    async def acquire(self) -> Lease:
        """A lease that is live now. Raises KeyAccessError, UnavailableError."""
        if self._lease is None:
            async with self._acquiring:
                if self._lease is None:
                    self._lease = await self.source.acquire(self.project_id, self._on_loss, self._cut)
        self._lease.check()
        return self._lease

    def check(self) -> None:
        """Raises KeyAccessError unless the lease is live now."""
        if self._lease is None:
            raise LeaseExpiredError("there is no live lease on the project's keys")
        self._lease.check()

    @property
    def live(self) -> bool:
        return self._lease is not None and self._lease.live

    @property
    def lease(self) -> Lease | None:
        """None before it was asked for."""
        return self._lease

    async def release(self) -> None:
        if self._lease is not None:
            self._lease = None
            await self.source.release(self.project_id)


class PieceKeys:
    """DEKs of one timeline's pieces on this node."""

    def __init__(self, project: ProjectKeys, timeline_id: TimelineId, node_id: str) -> None:
        self.project = project
        self._timeline_id = timeline_id
        self._node_id = node_id

    async def generate(self, piece: PieceId) -> tuple[AeadKey, Envelope, bytes]:
        """(DEK, envelope, context AAD) of a new piece. Raises KeyAccessError, UnavailableError."""
        await self.project.acquire()
        [(key, envelope)] = await self.project.source.generate(self.project.project_id, [self._object(piece)])
        return key, envelope, await self._context_aad(piece)

    async def unwrap(self, piece: PieceId, envelope: Envelope) -> tuple[AeadKey, bytes]:
        """(DEK, context AAD). Raises KeyAccessError, IntegrityError, UnavailableError."""
        await self.project.acquire()
        [key] = await self.project.source.unwrap(self.project.project_id, [(self._object(piece), envelope)])
        return key, await self._context_aad(piece)

    async def rewrap(self, pieces: Sequence[tuple[PieceId, Envelope]]) -> list[Envelope]:
        """The same DEKs under the KEK in force. Raises KeyAccessError, UnavailableError, IntegrityError."""
        await self.project.acquire()
        named = [(self._object(piece), envelope) for piece, envelope in pieces]
        return await self.project.source.rewrap(self.project.project_id, named)

    def _object(self, piece: PieceId) -> ObjectName:
        return ObjectName(timeline_id=self._timeline_id, object_name=piece.object_name(self._node_id), kind=OBJECT_KIND)

    async def _context_aad(self, piece: PieceId) -> bytes:
        lease = await self.project.acquire()
        name = piece.object_name(self._node_id)
        return lease.scope.object_context(self._timeline_id, name, OBJECT_KIND).to_aad()
