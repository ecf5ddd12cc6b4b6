"""An object store that shows an older timeline than it was given: safekeepers remember what they were told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pageserver.announced import announced_lsn
from pageserver.attached import Environment
from pageserver.tenants import Tenants
from pageserver.walreceiver import Peer, RolledBackError, WalReceiver
from shared.api.safekeeper import CreateTimeline
from shared.auth import Service
from shared.config import Address
from shared.errors import IntegrityError
from shared.ids import ProjectId, TimelineId
from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.tls import client_context
from shared.wal.reader import RawRecord, WalStreamDecoder
from shared.wire.walstream import Feedback
from tests.fixtures.pageserver import INITDB_LSN, Engine, engine
from tests.fixtures.realm import Realm
from tests.fixtures.safekeeper_nodes import NodeBench, nodes
from tests.fixtures.waiting import wait_until
from tests.fixtures.wal import SYSTEM_IDENTIFIER
from tests.unit.test_pageserver_tenants import environment

START = WAL_SEGMENT_SIZE_BYTES + 40


def peers(benches: Sequence[NodeBench]) -> list[Peer]:
    return [Peer(bench.node_id, bench.donor.address) for bench in benches]


async def announced(realm: Realm, asked: Sequence[Peer], project_id: ProjectId, timeline_id: TimelineId) -> int:
    context = client_context(realm.ca_certificate)
    return await announced_lsn(project_id, timeline_id, asked, realm.issuers[Service.PAGESERVER], context)


async def tell(bench: NodeBench, remote_consistent_lsn: int, project_id: ProjectId, timeline_id: TimelineId) -> None:
    """The node has a log up to there, and a pageserver has said that all of it is in layers."""
    assert bench.node is not None
    request = CreateTimeline(system_identifier=SYSTEM_IDENTIFIER, start_lsn=Lsn(remote_consistent_lsn))
    made = await bench.node.create(project_id, timeline_id, request)
    made.feedback(Feedback(0, remote_consistent_lsn))


async def test_the_most_that_any_safekeeper_was_told_counts(tmp_path: Path) -> None:
    async with nodes(tmp_path, START) as benches:
        realm, ids = benches[0].realm, (benches[0].project_id, TimelineId.new())
        asked = peers(benches)
        assert await announced(realm, asked, *ids) == 0, "none has the timeline"
        for bench, lsn in zip(benches, (START + 100, START + 304), strict=False):
            await tell(bench, lsn, *ids)
        assert await announced(realm, asked, *ids) == START + 304
        assert await announced(realm, asked[::2], *ids) == START + 100
        nobody = Peer("safekeeper-9", Address(port=1))
        assert await announced(realm, [nobody, asked[1]], *ids) == START + 304
        assert await announced(realm, [nobody], *ids) == 0


def on_empty_disk(one: Engine, realm: Realm, asked: list[Peer]) -> Environment:
    return replace(environment(one, one.store, realm), peers=asked)


async def test_a_pageserver_with_an_empty_disk_refuses_what_was_rolled_back(tmp_path: Path) -> None:
    async with nodes(tmp_path, START, count=1) as benches, engine(tmp_path / "first") as one:
        await one.create()
        ids = one.project_id, one.timeline_id
        await tell(benches[0], INITDB_LSN + 8, *ids)
        async with engine(tmp_path / "second", like=one) as two:
            async with Tenants(on_empty_disk(two, benches[0].realm, peers(benches))) as tenants:
                with pytest.raises(IntegrityError, match="announced as durable"):
                    await tenants.loaded(*ids, timeout_s=20)
                assert "announced as durable" in tenants.fault
            nobody = [Peer("safekeeper-9", Address(port=1))]
            async with Tenants(on_empty_disk(two, benches[0].realm, nobody)) as tenants:
                await tenants.loaded(*ids, timeout_s=20)


async def test_a_safekeeper_that_comes_later_is_heard_too(tmp_path: Path) -> None:
    async with nodes(tmp_path, START, count=1) as benches:
        bench, timeline_id = benches[0], TimelineId.new()
        await tell(bench, START + 304, bench.project_id, timeline_id)

        async def ingest(records: Sequence[RawRecord]) -> None:
            raise AssertionError("there are none")

        def receiver(known_lsn: int) -> WalReceiver:
            return WalReceiver(
                bench.project_id,
                timeline_id,
                peers(benches),
                bench.realm.issuers[Service.PAGESERVER],
                client_context(bench.realm.ca_certificate),
                WalStreamDecoder(START + 304, system_identifier=SYSTEM_IDENTIFIER),
                ingest,
                lambda: known_lsn,
            )

        with pytest.raises(ExceptionGroup) as caught:
            await asyncio.wait_for(receiver(START + 303).run(), 20)
        assert caught.group_contains(RolledBackError)
        good = receiver(START + 304)
        running = asyncio.create_task(good.run())
        assert await wait_until(lambda: good.commit_lsn) == START + 304
        running.cancel()
        await asyncio.wait([running])
