"""Two keymanagers under a running workload: the one that leads is killed, or stopped, and clients notice nothing."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from time import monotonic

import pytest
import pytest_asyncio

from keylake.client import KeylakeClient
from keylake.cluster import Cluster, RunningProject
from keylake.demo.ledger import Ledger
from keylake.process import ServiceProcess
from shared.api.keymanager import KeymanagerStatus, LeaseInfo
from shared.auth import TokenIssuer
from shared.config import Address
from shared.errors import NotLeaderError
from tests.cluster.bank import Bank, audit, open_bank
from tests.cluster.primary import Session, connect
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]

NAMES = ("keymanager", "keymanager-2")


@dataclass
class Place:
    cluster: Cluster
    project: RunningProject
    ledger: Ledger
    rounds: int = 0

    async def connect(self) -> Session:
        return await connect(self.project)

    def bank(self) -> Bank:
        self.rounds += 1
        return Bank(self.connect, self.ledger, f"r{self.rounds}", 3)

    def keymanager(self, name: str) -> KeylakeClient:
        """One of them, whoever leads."""
        client = self.cluster.client
        addresses = replace(client.addresses, keymanager=Address(port=self.cluster.ports.keymanagers[name]))
        return KeylakeClient(addresses, client.ca_certificate, TokenIssuer.load(self.cluster.layout.admin_key))

    def leases(self, status: KeymanagerStatus) -> dict[str, LeaseInfo]:
        """By holder."""
        project_id = self.project.project.project_id
        return {lease.node_id: lease for lease in status.leases if lease.project_id == project_id}

    async def check(self) -> None:
        connection = await self.connect()
        problems = await audit(connection, self.ledger)
        await connection.close()
        assert not problems, problems


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    """With the ttls that everybody has by default."""
    async with ForkedCluster(keymanagers=2) as cluster:
        place = Place(cluster, await cluster.create_project("bank"), Ledger())
        await open_bank(place.connect)
        yield place


async def all_hold_leases_of(place: Place, leader: ServiceProcess, holders: set[str]) -> None:
    """Returns when `leader` leads, and all of them have sessions with it and leases of which most is left."""

    async def look() -> bool:
        try:
            status = await client.keymanager_status()
        except NotLeaderError:
            return False
        leases = place.leases(status)
        enough_s = status.lease_ttl_s * 0.6
        return status.instances >= len(holders) and all(
            name in leases and leases[name].remaining_s > enough_s for name in holders
        )

    async with place.keymanager(leader.name) as client:
        await wait_until(look, 30)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_no_transaction_fails_when_the_leader_goes(place: Place, how: signal.Signals) -> None:
    leader = await place.cluster.leader()
    [standby] = [place.cluster.service(name) for name in NAMES if name != leader.name]
    before = await place.cluster.client.keymanager_status()
    holders = set(place.leases(before))
    assert {"pageserver", "safekeeper-1", "safekeeper-2", "safekeeper-3"} <= holders
    async with place.bank() as bank:
        await bank.commits(50)
        began = monotonic()
        leader.send_signal(how)
        await all_hold_leases_of(place, standby, holders)
        # Longer than every lease that the old leader has granted.
        while monotonic() < began + before.lease_ttl_s * 1.5:  # commits all the while
            await bank.commits(20)
        if how is signal.SIGSTOP:
            leader.send_signal(signal.SIGCONT)
        else:
            await leader.kill()  # it is dead; wait for the process
            await leader.start()
        await bank.commits(50)
        await all_hold_leases_of(place, standby, holders)
    assert place.ledger.errors_since(began) == []
    assert not place.ledger.unknown
    status = await place.cluster.client.keymanager_status()
    assert (status.node_id, status.epoch) == (standby.name, before.epoch + 1)
    await place.check()
