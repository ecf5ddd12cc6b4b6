"""Keys that a safekeeper loses while it sends: it says that nothing is left when that is true."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest

from safekeeper import timeline as timeline_module
from safekeeper.piece_file import PieceFile
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.wire.walstream import Subscribe, SubscribeFlags
from tests.fixtures.safekeeper_nodes import elect, nodes
from tests.fixtures.wal import WalBuilder
from tests.integration.test_safekeeper_elections import records

START = WAL_SEGMENT_SIZE_BYTES + 40


async def test_nothing_is_said_while_a_thread_reads_for_a_subscription(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hangs. What it gives in the end is opened by a thread, which nobody can cancel."""
    begun, finish = threading.Event(), threading.Event()
    read = PieceFile.read

    def slow(self: PieceFile, lsn: int, end_lsn: int, max_size_bytes: int) -> bytes:
        begun.set()
        finish.wait(20)
        return read(self, lsn, end_lsn, max_size_bytes)

    monkeypatch.setattr(PieceFile, "read", slow)
    monkeypatch.setattr(timeline_module, "_SUBSCRIPTION_END_S", 0.05)
    async with nodes(tmp_path, START, count=1) as [bench]:
        await elect([bench], 1, of=1)
        await bench.write(1, START, records(WalBuilder(START), random.Random(1), 5))
        assert await bench.timeline.read(START, 1)
        bench.timeline._store._cache.wipe()
        connection = await bench._connect(bench.donor, bench.project_id)
        subscribe = Subscribe(bench.project_id, bench.timeline_id, START, 0, SubscribeFlags.NONE)
        await connection.send(subscribe.pack())
        assert await asyncio.to_thread(begun.wait, 20)
        revoking = asyncio.create_task(bench.keys.revoke(bench.project_id))
        again = asyncio.create_task(bench.keys.revoke(bench.project_id))  # a second one says no more than the first
        done, _ = await asyncio.wait({revoking, again}, timeout=0.3)
        said = list(bench.keys.acknowledgements)
        finish.set()
        assert not done
        assert not said
        for each in (revoking, again):
            assert "subscriptions_gone" in await each
        assert not bench.timeline.subscriptions
        await connection.close()
