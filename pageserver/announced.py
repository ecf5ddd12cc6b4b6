"""What the safekeepers were told to be durable of a timeline: asked when it is attached, so that an object store that
shows an older index than it was given is found out, also by a pageserver with an empty disk.

Who does not answer in time is not waited for: the timeline's layers are of use without safekeepers, too. What one says
later is compared as well (walreceiver.py).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Final

from pageserver.walreceiver import Peer
from shared.auth import Scope, Service, TokenIssuer
from shared.errors import KeylakeError
from shared.framed_tcp import connect
from shared.ids import ProjectId, TimelineId
from shared.telemetry import get_logger
from shared.wire.frames import ERROR, ErrorFrame, ProtocolError
from shared.wire.walstream import MAX_FRAME_SIZE_BYTES, STATUS, Status, Subscribe, SubscribeFlags

_TIMEOUT_S: Final = 2.0
_log = get_logger(__name__)


async def announced_lsn(
    project_id: ProjectId, timeline_id: TimelineId, peers: Sequence[Peer], issuer: TokenIssuer, context: ssl.SSLContext
) -> int:
    """The highest remote_consistent_lsn that a safekeeper remembers; 0 when none that answers remembers any."""

    async def ask(peer: Peer) -> int:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                token = issuer.issue(Service.SAFEKEEPER, [Scope.WAL_READ], project_id=project_id)
                return await _ask(peer, token, project_id, timeline_id, context)
        except (KeylakeError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
            _log.info("safekeeper was not asked", peer=peer.node_id, timeline_id=str(timeline_id), reason=reason)
            return 0

    return max(await asyncio.gather(*(ask(peer) for peer in peers)), default=0)


async def _ask(peer: Peer, token: str, project_id: ProjectId, timeline_id: TimelineId, context: ssl.SSLContext) -> int:
    connection = await connect(Service.SAFEKEEPER, peer.address, context, token, MAX_FRAME_SIZE_BYTES, _TIMEOUT_S)
    try:
        await connection.send(Subscribe(project_id, timeline_id, 0, 0, SubscribeFlags.STATUS_ONLY).pack())
        kind, payload = await connection.receive_one() or (ERROR, b"")
    finally:
        await connection.close()
    if kind == STATUS:
        return Status.parse(payload).remote_consistent_lsn
    if kind == ERROR and payload:
        raise ErrorFrame.parse(payload).exception()
    raise ProtocolError("a safekeeper did not say its status")
