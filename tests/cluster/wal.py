"""A client of a safekeeper's WAL port: what a pageserver would say."""

from __future__ import annotations

from keylake.cluster import Cluster, RunningProject
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.errors import UnavailableError
from shared.framed_tcp import connect
from shared.tls import client_context
from shared.wire.frames import ERROR, ErrorFrame
from shared.wire.walstream import MAX_FRAME_SIZE_BYTES, WAL, Subscribe, SubscribeFlags, parse_wal


async def first_wal(cluster: Cluster, project: RunningProject, port: int, lsn: int) -> bytes:
    """The first bytes of the timeline's log from `lsn` on that the safekeeper at this port sends. Raises its error."""
    issuer = TokenIssuer.load(cluster.layout.keys / "pageserver.json")
    project_id = project.project.project_id
    token = issuer.issue(Service.SAFEKEEPER, [Scope.WAL_READ], project_id=project_id)
    context = client_context(cluster.layout.ca_certificate)
    connection = await connect(Service.SAFEKEEPER, Address(port=port), context, token, MAX_FRAME_SIZE_BYTES)
    try:
        request = Subscribe(project_id, project.timeline.timeline_id, lsn, 0, SubscribeFlags.NONE)
        await connection.send(request.pack())
        while frames := await connection.receive():
            for kind, payload in frames:
                if kind == WAL:
                    start, data = parse_wal(payload)
                    assert start == lsn
                    assert data
                    return bytes(data)
                if kind == ERROR:
                    raise ErrorFrame.parse(payload).exception()
    finally:
        connection.abort()
        await connection.close()
    raise UnavailableError("the safekeeper closed the connection")
