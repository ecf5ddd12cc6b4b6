"""A safekeeper dies by SIGKILL at every step that persists or sends, under load, and comes back with nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import httpx
import pytest

from safekeeper.remote_wal import RemotePiece
from shared.errors import InvalidInputError, KeylakeError
from shared.failpoints import VARIABLE, Failpoints, arm, refuse_failpoints
from shared.lsn import Lsn
from shared.wire.walstream import Feedback, SubscribeFlags
from tests.fixtures.safekeeper_postgres import Primary, primary_postgres
from tests.fixtures.safekeeper_process import (
    SafekeeperClient,
    SafekeeperProcess,
    elect,
    safekeeper_processes,
    timeline_clients,
)
from tests.fixtures.waiting import wait_until

STEPS = [
    "control-written:1",  # the vote: written, but not in force
    "control-durable:2",  # the election's result and its clip
    "vote-before-reply:1",
    "recovery-appended:1",
    "piece-made:1",  # made, but not part of the log
    "control-renamed:3",  # part of the log, but empty
    "frame-written:3",
    "frame-durable:3",
    "acknowledge-sent:2",
    "offload-before-put:2",  # its envelope is there, the piece is not
    "offload-put:1",  # it is there, and the control file does not know
    "piece-before-removal:2",
]
if os.environ.get("KEYLAKE_ALL_FAILPOINTS") == "1":  # make crash-anywhere
    STEPS += [
        "control-renamed:1",
        "control-durable:1",
        "control-written:3",
        "piece-key-written:1",
        "frame-written:1",
        "acknowledge-before-send:2",
        "offload-before-put:1",
        "piece-before-removal:1",
    ]


class Cluster:
    def __init__(
        self, primary: Primary, processes: Sequence[SafekeeperProcess], clients: Sequence[SafekeeperClient]
    ) -> None:
        self.primary = primary
        self.processes = processes
        self.clients = clients
        self.victim = processes[-1]
        self.term = 0
        self.rows = 0

    async def commit(self) -> None:
        await self.primary.execute("INSERT INTO t SELECT count(*), repeat('v', 900) FROM t")
        self.rows += 1

    async def lead(self) -> Lsn:
        """Elect, and stream to whoever follows. The victim may die at any moment."""
        while True:
            self.term += 1
            with contextlib.suppress(KeylakeError):
                start = await elect(list(self.clients), self.term)
                break
        for client in self.clients:
            with contextlib.suppress(KeylakeError, httpx.HTTPError):
                await client.stream(self.term, start, self.primary.address)
        return start

    async def feed_back(self) -> None:
        """What the pageserver tells the victim: all is committed, and in layers."""
        with contextlib.suppress(KeylakeError, OSError):
            client = self.clients[-1]
            status = await client.status()
            connection = await client.subscribe(status.flush_lsn.value, 0, SubscribeFlags.STATUS_ONLY)
            await connection.send(Feedback(status.flush_lsn.value, status.flush_lsn.value).pack())
            await connection.receive()
            await connection.close()

    @property
    def victim_is_dead(self) -> bool:
        assert self.victim.process is not None
        return self.victim.process.poll() is not None


@contextlib.asynccontextmanager
async def cluster(directory: Path) -> AsyncIterator[Cluster]:
    async with primary_postgres() as primary, safekeeper_processes(directory) as processes:
        await primary.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        start = await primary.insert_lsn()
        async with timeline_clients(processes, primary.system_identifier, start.value) as clients:
            made = Cluster(primary, processes, clients)
            assert await made.lead() == start
            await primary.require_quorum([process.node_id for process in processes])
            await made.commit()
            yield made


@pytest.mark.integration
async def test_it_dies_at_every_step_and_nothing_is_lost(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        victim = made.victim
        start = (await made.clients[0].status()).timeline_start_lsn.value
        victim.settings = {
            "object_store": {"url": (tmp_path / "objects").as_uri()},
            "offload_interval_s": 0.1,
            "wal_keep_size_bytes": 0,
        }
        victim.kill()
        for step in STEPS:
            await made.commit()  # it will lack this
            victim.environment = {VARIABLE: step}
            await victim.start()
            await made.lead()
            async with asyncio.timeout(20):
                while not made.victim_is_dead:
                    await made.commit()
                    await made.feed_back()
            assert victim.process is not None
            assert victim.process.returncode == -signal.SIGKILL, step

        victim.environment = {}
        await victim.start()
        await made.lead()
        await made.commit()
        end = (await made.primary.flush_lsn()).value
        expected = made.primary.wal(start, end)
        for client in made.clients:

            async def reaches(client: SafekeeperClient) -> bool:
                return (await client.status()).flush_lsn.value >= end

            await wait_until(partial(reaches, client), 20)
            assert await client.read(start, end) == expected
        assert await made.primary.value("SELECT count(*) FROM t") == made.rows
        # Part of that was read from the object store, where each piece has an envelope and no piece is there twice.
        names = {path.name for path in (tmp_path / "objects").rglob("*") if RemotePiece.parse(path.name)}
        assert len(names) >= 2


def test_an_order_that_cannot_be_read_or_is_not_for_this_machine_alone_is_refused() -> None:
    for order in ("control-written", "control-written:0", ":1", "a:b", "a:-1"):
        with pytest.raises(InvalidInputError):
            Failpoints(order)
    due = Failpoints("here:2,there:1")
    assert [due.due("here"), due.due("here"), due.due("here"), due.due("nowhere"), due.due("there")] == [
        False,
        True,
        False,
        False,
        True,
    ]
    refuse_failpoints("0.0.0.0")  # noqa: S104 - none is armed
    arm({VARIABLE: "here:1"})
    try:
        refuse_failpoints("127.0.0.1")
        for host in ("0.0.0.0", "10.1.2.3", "safekeeper-1", "::"):  # noqa: S104
            with pytest.raises(InvalidInputError):
                refuse_failpoints(host)
    finally:
        arm({})
