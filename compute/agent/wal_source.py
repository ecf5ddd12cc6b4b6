"""The committed WAL of one timeline, from the safekeepers: what a replica replays.

One safekeeper is followed at a time, and of what it sends only what lies below its own commit_lsn is handed on, as the
STATUS frames of that same connection say. A safekeeper raises it only while its log is the current term's, and no
election cuts a log below it (safekeeper/acceptor.py): these bytes are the same everywhere, for ever. What a quorum
holds would not do, because it may end in half a record, which the next term cuts off to write other bytes there;
commit_lsn comes from the pageserver, which says it at ends of records (pageserver/walreceiver.py).

When one is gone, votes, or has had nothing new for a while, the next one is asked for what follows.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Final

from shared.auth import Service
from shared.config import Address
from shared.errors import KeylakeError
from shared.framed_tcp import connect
from shared.ids import ProjectId, TimelineId
from shared.telemetry import get_logger
from shared.wire.frames import ERROR, ErrorFrame, ProtocolError
from shared.wire.walstream import MAX_FRAME_SIZE_BYTES, STATUS, WAL, Status, Subscribe, SubscribeFlags, parse_wal

_log = get_logger(__name__)
_PATIENCE_S: Final = 10.0
"""One that has had nothing new for as long may have been cut off from the others."""
_RETRY_DELAY_S: Final = 0.2
_MAX_HELD_BYTES: Final = 16 << 20
"""Of what is not known to be committed."""


class WalSource:
    def __init__(
        self,
        project_id: ProjectId,
        timeline_id: TimelineId,
        safekeepers: Sequence[Address],
        context: ssl.SSLContext,
        token: Callable[[], str],
    ) -> None:
        """`safekeepers`: their WAL ports. `token`: gives one that is good for the project's WAL now."""
        self._project_id = project_id
        self._timeline_id = timeline_id
        self._safekeepers = tuple(safekeepers)
        self._context = context
        self._token = token
        self.end_lsn = 0
        """How far the log is known to reach, committed or not."""
        self.problem = ""
        """Why nothing comes; empty while one is connected."""

    async def read(self, lsn: int) -> AsyncGenerator[memoryview, None]:
        """Pieces from `lsn` on, without end: whoever cannot be reached is asked again."""
        failures = 0
        for address in itertools.cycle(self._safekeepers):
            try:
                async with aclosing(self._session(address, lsn)) as pieces:
                    async for piece in pieces:
                        lsn += len(piece)
                        failures = 0
                        yield piece
            except KeylakeError as error:
                failures += 1
                if failures >= len(self._safekeepers):
                    self.problem = str(error)
                if failures in (1, 10, 100):
                    _log.info("a safekeeper gives no WAL", port=address.port, code=error.code, reason=str(error))
                await asyncio.sleep(_RETRY_DELAY_S)

    async def _session(self, address: Address, lsn: int) -> AsyncGenerator[memoryview, None]:
        """From one of them, until it has nothing new. Raises KeylakeError."""
        connection = await connect(Service.SAFEKEEPER, address, self._context, self._token(), MAX_FRAME_SIZE_BYTES)
        clock = asyncio.get_running_loop().time
        held: deque[memoryview] = deque()  # from `lsn` on
        received_lsn, commit_lsn = lsn, 0
        try:
            await connection.send(
                Subscribe(self._project_id, self._timeline_id, lsn, 0, SubscribeFlags.NONE).pack(),
            )
            deadline_s = clock() + _PATIENCE_S
            while received_lsn - lsn <= _MAX_HELD_BYTES:
                try:
                    async with asyncio.timeout_at(deadline_s):
                        frames = await connection.receive()
                except TimeoutError:
                    return
                if not frames:
                    return
                for kind, payload in frames:
                    if kind == STATUS:
                        status = Status.parse(payload)
                        commit_lsn = status.commit_lsn
                        self.end_lsn = max(self.end_lsn, status.flush_lsn)
                        self.problem = ""
                    elif kind == WAL:
                        start_lsn, data = parse_wal(payload)
                        if start_lsn != received_lsn:
                            raise ProtocolError("WAL from a safekeeper is not contiguous")
                        held.append(data)
                        received_lsn += len(data)
                    elif kind == ERROR:
                        raise ErrorFrame.parse(payload).exception()
                    else:
                        raise ProtocolError(f"unexpected frame type {kind:#x} from a safekeeper")
                while held and lsn < commit_lsn:
                    data = held.popleft()
                    piece = data[: commit_lsn - lsn]
                    if len(piece) < len(data):
                        held.appendleft(data[len(piece) :])
                    lsn += len(piece)
                    yield piece
                    deadline_s = clock() + _PATIENCE_S
        finally:
            await connection.close()
