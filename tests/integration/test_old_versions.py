"""A re-key in a bucket with versioning: what was replaced and deleted counts, and goes, but for what a lock holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shared.api.key_upkeep import KeyUpkeepStatus
from shared.crypto.envelope import Envelope
from shared.errors import IntegrityError
from shared.key_upkeep import KeyUpkeep, Pace, UpkeepProject
from shared.old_versions import OldVersions
from shared.storage.base import StoreDeniedError
from shared.storage.faulty import FaultyObjectStore
from shared.storage.memory import MemoryObjectStore
from shared.storage.s3_client import narrow_code
from shared.storage.versions import OldVersion
from tests.fixtures.pageserver import engine
from tests.fixtures.safekeeper_nodes import nodes
from tests.fixtures.waiting import wait_until
from tests.fixtures.wal import WalBuilder
from tests.integration.test_safekeeper_offload import START, Bench
from tests.integration.test_storage_purge import versioned
from tests.unit.test_pageserver_key_upkeep import FAST, filled, pages, project_keys

if TYPE_CHECKING:
    from tests.fixtures.s3 import S3Server

pytestmark = pytest.mark.integration

FOREIGN = "somebody's own.key"
"""No key of ours: a space is in it."""


def envelopes(owner: Any, bucket: str) -> dict[tuple[str, str], tuple[Envelope, bool]]:
    """Every version of every envelope in the bucket, by (key, version): itself, and whether it is current."""
    found = {}
    for page in owner.get_paginator("list_object_versions").paginate(Bucket=bucket):
        for each in page.get("Versions", ()):
            if each["Key"].endswith(".key") and not each["Key"].endswith(FOREIGN):
                body = owner.get_object(Bucket=bucket, Key=each["Key"], VersionId=each["VersionId"])["Body"].read()
                found[each["Key"], each["VersionId"]] = Envelope.parse(body), each["IsLatest"]
    return found


def oldest(owner: Any, bucket: str) -> tuple[int, int]:
    """(KEK version, DEK version) of what is under the oldest, current or not."""
    found = [envelope for envelope, _ in envelopes(owner, bucket).values()]
    return min(each.kek_version for each in found), min(each.dek_version for each in found)


def sealed_versions(owner: Any, bucket: str) -> set[tuple[str, str]]:
    """(key, version) of all that is no envelope and not current."""
    pages = owner.get_paginator("list_object_versions").paginate(Bucket=bucket)
    versions = [each for page in pages for each in page.get("Versions", ())]
    return {(each["Key"], each["VersionId"]) for each in versions if not each["IsLatest"] and ".key" not in each["Key"]}


async def left(project: UpkeepProject) -> dict[tuple[int, int, bool], int]:
    """(KEK version, DEK version, superseded) → objects, by a census."""
    counters = (await project.census()).values()
    return {
        (use.kek_version, use.dek_version, use.superseded): use.objects
        for counter in counters
        for use in counter.uses()
    }


async def whole_pass(project: UpkeepProject) -> list[str]:
    lease, pace = project.lease, Pace(FAST)
    assert lease is not None
    await project.rekey(lease.dek_floor, pace)
    await project.rewrap(lease.kek_version, pace)
    return await project.remove_old_versions(lease.kek_version, lease.dek_floor)


async def test_a_pageservers_old_versions_count_and_go_with_a_rekey(tmp_path: Path, s3_server: S3Server) -> None:
    async with versioned(s3_server) as (store, owner, bucket), engine(tmp_path / "a", store=store) as one:
        timeline = await filled(one)
        keys, want = project_keys(one, timeline), await pages(timeline)
        foreign = {"Bucket": bucket, "Key": f"keylake/projects/{one.project_id}/timelines/{FOREIGN}"}
        owner.put_object(**foreign)
        owner.delete_object(**foreign)
        before = await left(keys)
        assert before[1, 1, False]
        deleted = before[1, 1, True]  # versions of the index from before the last two
        assert deleted == sum(not current for _, current in envelopes(owner, bucket).values()) > 0

        # A re-wrap replaces envelopes, and takes those that it has replaced. What was deleted stays, and is counted.
        one.keys.rotate(one.project_id)
        assert await whole_pass(keys) == []
        after = await left(keys)
        assert {versions for versions, objects in after.items() if not versions[2]} == {(2, 1, False), (2, 2, False)}
        assert after[1, 1, True] > deleted  # the versions of the index that the re-wrap has made old, too
        assert not any(version.replaced for version in [each async for each in store.old_versions("")])
        assert sealed_versions(owner, bucket)

        # A re-key takes all of it, and nothing that is current.
        one.keys.rotate(one.project_id, rekey=True)
        assert await whole_pass(keys) == []
        assert {versions[:2] for versions in await left(keys)} == {(3, 3)}
        assert oldest(owner, bucket) == (3, 3)
        for version in (1, 2):
            one.keys.destroy(one.project_id, version)
        assert await pages(timeline) == want
        async with engine(tmp_path / "b", like=one) as two:
            assert await pages(await two.open()) == want

        # What is left of a timeline that was deleted is of the project, too.
        await one.store.delete_many([info.key async for info in one.store.list()])
        nothing = project_keys(one)
        assert (await left(nothing)).keys() == {(3, 3, True)}
        assert await nothing.remove_old_versions(4, 4) == []
        assert await left(nothing) == {}
        assert envelopes(owner, bucket) == {}


async def test_offloaded_wal_that_was_replaced_goes_too(tmp_path: Path, s3_server: S3Server) -> None:
    async with versioned(s3_server) as (store, owner, bucket), nodes(tmp_path, START, objects=store) as made:
        first, second, _ = made
        bench = Bench(made, FaultyObjectStore(store), WalBuilder(START))
        for _ in range(3):
            await bench.reign([first, second])
        for node in (first, second):
            await bench.offload(node)
        assert first.node is not None
        assert second.node is not None
        one, two = (node.project_keys(first.project_id) for node in (first.node, second.node))
        first.keys.rotate(first.project_id, rekey=True)
        for node in made:
            node.keys._grant(node.keys._held[node.project_id])
        pace = Pace(FAST)
        await one.rekey(2, pace)
        counter = (await one.census())[first.timeline_id]
        found = {(use.kek_version, use.dek_version, use.superseded): use for use in counter.shared()}
        assert found[1, 1, True].objects == 2
        assert found[1, 1, True].size_bytes > 2 * 9000, "two pieces"
        assert oldest(owner, bucket) == (1, 1)
        await two.rekey(2, pace)
        assert await asyncio.gather(*(node.remove_old_versions(2, 2) for node in (one, two))) == [[], []]
        assert {use.dek_version for use in (await two.census())[first.timeline_id].shared()} == {2}
        assert oldest(owner, bucket) == (2, 2)
        assert not sealed_versions(owner, bucket)
        assert await first.log() == bench.data


async def test_what_a_lock_holds_is_named_and_goes_when_it_has_ended(tmp_path: Path, s3_server: S3Server) -> None:
    locked = {"ObjectLockEnabledForBucket": True}
    async with versioned(s3_server, **locked) as (store, owner, bucket), engine(tmp_path, store=store) as one:
        timeline = await filled(one)
        keys = project_keys(one, timeline)
        old = next(iter(sealed_versions(owner, bucket)))
        where = dict(zip(("Key", "VersionId"), old, strict=True), Bucket=bucket)
        owner.put_object_legal_hold(**where, LegalHold={"Status": "ON"})
        one.keys.rotate(one.project_id, rekey=True)
        upkeep = KeyUpkeep(one.keys, FAST, lambda: [keys])

        async def idle() -> KeyUpkeepStatus | None:
            status = await upkeep.status("pageserver-1", keys)
            return None if status.working or upkeep._due(keys, upkeep._states[keys.project_id]) else status

        running = asyncio.create_task(upkeep.run())
        try:
            status = await wait_until(idle)
            [named] = status.held
            assert (status.held_versions, status.fault) == (1, "")
            assert named == f"{old[0].removeprefix('keylake/')} version {old[1]}: AccessDenied"
            # What it holds can still be opened: its envelope is there, and counted.
            assert (await left(keys))[1, 1, True] == 1
            assert sealed_versions(owner, bucket) >= {old}
            assert oldest(owner, bucket) == (1, 1)

            owner.put_object_legal_hold(**where, LegalHold={"Status": "OFF"})
            upkeep.wake(keys.project_id)
            status = await wait_until(idle)
            assert (status.held, status.held_versions) == ([], 0)
            assert oldest(owner, bucket) == (2, 2)
        finally:
            running.cancel()
            await asyncio.wait([running])


async def test_nobody_says_100_percent_who_cannot_look(tmp_path: Path, s3_server: S3Server) -> None:
    async with versioned(s3_server) as (store, owner, bucket), engine(tmp_path, store=store) as one:
        keys = project_keys(one, await filled(one))
        key = next(key for (key, _), (_, current) in envelopes(owner, bucket).items() if current)
        for body in (b"rubbish", owner.get_object(Bucket=bucket, Key=key)["Body"].read()):
            owner.put_object(Bucket=bucket, Key=key, Body=body)
        with pytest.raises(IntegrityError, match="may keep a key in use"):
            await keys.census()
    blind = OldVersions(Blind(403, "AccessDenied"), "projects/")
    with pytest.raises(StoreDeniedError, match="s3:ListBucketVersions and s3:GetObjectVersion are needed"):
        await blind.count({}, shared=False)
    assert await OldVersions(Blind(501, "NotImplemented"), "projects/").remove(9, 9) == []


class Blind(MemoryObjectStore):
    """A store that answers so when it is asked for versions."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__()
        self._refusal = narrow_code(status, code)

    async def old_versions(self, prefix: str) -> AsyncIterator[OldVersion]:
        raise self._refusal
        yield

    async def get_version(self, version: OldVersion) -> bytes:
        raise AssertionError

    async def delete_old_versions(self, versions: Sequence[OldVersion]) -> dict[OldVersion, str]:
        raise AssertionError
