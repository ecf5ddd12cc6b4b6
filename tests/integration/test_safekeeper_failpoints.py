"""A safekeeper dies by SIGKILL at every step that persists or sends, under load, and comes back with nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import httpx
import pytest

import safekeeper
from safekeeper.control_file import FILE_NAME
from safekeeper.remote_wal import RemotePiece
from shared.api.common import ArmFailpoints
from shared.auth import Scope, Service
from shared.config import Address
from shared.errors import InvalidInputError, KeylakeError, NotFoundError, PermissionDeniedError
from shared.failpoints import VARIABLE, Failpoints, arm, arm_instead, refuse_failpoints
from shared.http import ServiceClient
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
TRIMMING_STEPS = ["piece-before-removal:1"]
"""The control file says that the log begins later, and the piece that it is about is still there."""
MORE_STEPS = [
    "control-renamed:1",
    "control-durable:1",
    "control-written:3",
    "piece-key-written:1",
    "frame-written:1",
    "acknowledge-before-send:2",
    "offload-before-put:1",
    "piece-before-removal:1",
]
MORE_TRIMMING_STEPS = [
    "log-begun:1",
    "trim-before-control:1",
    "trim-files-removed:1",
    "offloaded-pieces-removed:1",  # of the object store; their envelopes are still there
    "trim-objects-removed:1",
]
BY_API = {"frame-written:3", "acknowledge-sent:2"}
"""Armed while it runs: every commit gets there. Others may be passed once and for all before anybody can ask."""
ALL = os.environ.get("KEYLAKE_ALL_FAILPOINTS") == "1"  # make crash-anywhere


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

    async def write_segments(self, segments: int) -> None:
        """So many times 16 MiB of WAL, most of it zeros."""
        for _ in range(segments):
            await self.primary.execute("SELECT pg_switch_wal()")
            await self.commit()

    async def feed_back(self, client: SafekeeperClient | None = None) -> None:
        """What the pageserver tells the victim, or another one: all is committed, and in layers."""
        with contextlib.suppress(KeylakeError, OSError):
            client = client or self.clients[-1]
            status = await client.status()
            connection = await client.subscribe(status.flush_lsn.value, 0, SubscribeFlags.STATUS_ONLY)
            await connection.send(Feedback(status.flush_lsn.value, status.flush_lsn.value).pack())
            await connection.receive()
            await connection.close()

    async def kill_at(self, step: str) -> None:
        """Under load."""
        self.victim.environment = {VARIABLE: "" if step in BY_API else step}
        await self.victim.start()
        if step in BY_API:
            await self.arm(step)
        await self.lead()
        async with asyncio.timeout(20):
            while not self.victim_is_dead:
                await self.commit()
                await self.feed_back()
        assert self.victim.process is not None
        assert self.victim.process.returncode == -signal.SIGKILL, step

    async def arm(self, order: str) -> None:
        """Raises the victim's error."""
        async with self.victim.client() as client:
            path = "/v1/failpoints"
            await client.request("POST", path, body=ArmFailpoints(order=order))

    async def have_heard(self) -> None:
        """Each trims by what it has heard, and until it has heard the same it looks in vain for what peers trimmed."""

        async def found() -> bool:
            for client in self.clients_up:
                await self.feed_back(client)
                start = await begins_at(client)
                try:
                    await client.read(start, start + 1)
                except KeylakeError:
                    return False
            return True

        await wait_until(found, 20)

    @property
    def clients_up(self) -> list[SafekeeperClient]:
        return [c for c in self.clients if c.safekeeper.process is not None and c.safekeeper.process.poll() is None]

    async def have_all(self) -> None:
        """Every safekeeper that is up has the primary's WAL, from where its log begins."""
        end = (await self.primary.flush_lsn()).value
        for client in self.clients_up:

            async def reaches(client: SafekeeperClient) -> bool:
                return (await client.status()).flush_lsn.value >= end

            await wait_until(partial(reaches, client), 20)
            start = await begins_at(client)
            assert await client.read(start, end) == self.primary.wal(start, end)
        assert await self.primary.value("SELECT count(*) FROM t") == self.rows

    @property
    def victim_is_dead(self) -> bool:
        assert self.victim.process is not None
        return self.victim.process.poll() is not None


async def begins_at(client: SafekeeperClient) -> int:
    status = await client.status()
    return status.flush_lsn.value - status.wal_size_bytes


@contextlib.asynccontextmanager
async def cluster(directory: Path, settings: dict[str, object] | None = None) -> AsyncIterator[Cluster]:
    async with primary_postgres() as primary, safekeeper_processes(directory, settings=settings) as processes:
        await primary.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        start = await primary.insert_lsn()
        async with timeline_clients(processes, primary.system_identifier, start.value) as clients:
            made = Cluster(primary, processes, clients)
            assert await made.lead() == start
            await primary.require_quorum([process.node_id for process in processes])
            await made.commit()
            yield made


def offloading(directory: Path) -> dict[str, object]:
    return {
        "object_store": {"url": (directory / "objects").as_uri()},
        "offload_interval_s": 0.1,
        "wal_keep_size_bytes": 0,
        "wal_history_size_bytes": 64 * 1024 * 1024,
    }


@pytest.mark.integration
async def test_it_dies_at_every_step_and_nothing_is_lost(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        victim = made.victim
        victim.settings = offloading(tmp_path)
        victim.kill()
        for step in [*STEPS, *(MORE_STEPS if ALL else [])]:
            await made.commit()  # it will lack this
            await made.kill_at(step)

        victim.environment = {VARIABLE: ""}
        await victim.start()
        with pytest.raises(InvalidInputError, match="name:count"):
            await made.arm("frame-written")
        issuer = victim.realm.issuers[Service.COMPUTE]
        address, ca = Address(port=victim.http_port), victim.realm.ca_certificate
        async with ServiceClient(Service.SAFEKEEPER, address, ca, issuer, frozenset({Scope.STATUS_READ})) as stranger:
            with pytest.raises(PermissionDeniedError):
                await stranger.request("POST", "/v1/failpoints", body=ArmFailpoints(order="frame-written:1"))
        victim.kill()
        victim.environment = {}
        await victim.start()
        with pytest.raises(NotFoundError):
            await made.arm("frame-written:1")
        await made.lead()
        await made.commit()
        await made.have_all()
        # Part of that was read from the object store, where each piece has an envelope and no piece is there twice.
        names = {path.name for path in (tmp_path / "objects").rglob("*") if RemotePiece.parse(path.name)}
        assert len(names) >= 2


@pytest.mark.integration
async def test_it_dies_at_every_step_of_trimming_and_goes_on_where_its_donors_logs_begin(tmp_path: Path) -> None:
    async with cluster(tmp_path, offloading(tmp_path)) as made:
        victim, others = made.victim, made.clients[:-1]
        victim.kill()
        away_at_lsn = (await made.primary.flush_lsn()).value
        await made.write_segments(5)

        async def have_trimmed() -> bool:
            for client in others:
                await made.feed_back(client)
            return all([await begins_at(client) > away_at_lsn for client in others])

        await wait_until(have_trimmed, 20)
        # At the first one it dies while it catches up from logs that begin behind its own end; then it has something
        # to trim itself.
        for step in [*(MORE_TRIMMING_STEPS if ALL else []), *TRIMMING_STEPS]:
            await made.write_segments(1)
            await made.kill_at(step)
        victim.environment = {}
        await victim.start()
        await made.lead()
        await made.commit()
        await made.have_heard()
        await made.have_all()
        assert await begins_at(made.clients[-1]) > away_at_lsn
        # A donor is gone: the one that was away, and one that trimmed, are a majority with the whole log.
        made.processes[0].kill()
        await made.lead()
        await made.commit()
        await made.have_all()


def test_every_step_that_has_a_name_is_among_them() -> None:
    sources = "".join(path.read_text() for path in Path(safekeeper.__path__[0]).glob("*.py"))
    names = set(re.findall(r'failpoint\(f?"([^"]+)"\)', sources))
    # Of files that are replaced; a safekeeper has one.
    names = {name.replace("{path.name}", FILE_NAME) for name in names}
    dies_at = {step.partition(":")[0] for step in (*STEPS, *MORE_STEPS, *TRIMMING_STEPS, *MORE_TRIMMING_STEPS)}
    assert len(names) > 15
    assert names == dies_at


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
    refuse_failpoints("0.0.0.0")  # noqa: S104 - none is armed, or can be
    with pytest.raises(InvalidInputError):
        arm_instead("here:1")
    try:
        for order in ("here:1", ""):
            arm({VARIABLE: order})
            refuse_failpoints("127.0.0.1")
            for host in ("0.0.0.0", "10.1.2.3", "safekeeper-1", "::"):  # noqa: S104
                with pytest.raises(InvalidInputError):
                    refuse_failpoints(host)
    finally:
        arm({})
