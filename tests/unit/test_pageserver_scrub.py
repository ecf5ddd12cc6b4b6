"""The object store held against the index, and files of it looked at."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from keylake.object_files import Placed, inspect_index, inspect_layer
from pageserver.layer.name import LayerKind, layer_name
from pageserver.remote_timeline import VOID
from pageserver.tenants import Tenants
from pageserver.timeline import Timeline
from shared.api.pageserver import FindingKind, Findings, ScrubReport
from shared.errors import (
    ConflictError,
    CorruptedError,
    IntegrityError,
    InvalidInputError,
    KeyAccessError,
    NotFoundError,
    UnavailableError,
)
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep import Pace
from shared.storage.faulty import FaultyObjectStore, Operation
from shared.storage.local import LocalObjectStore
from shared.storage.memory import MemoryObjectStore
from tests.fixtures.pageserver import REL, WAL, Engine, engine, record
from tests.fixtures.realm import Realm
from tests.unit.test_pageserver_compaction import BLOCKS, EAGER, filled, grow, objects
from tests.unit.test_pageserver_key_upkeep import FAST
from tests.unit.test_pageserver_tenants import environment
from tests.unit.test_pageserver_timeline import put


async def scrub(on: Engine, timeline: Timeline) -> ScrubReport:
    return await timeline.scrubber.run(on.lease.kek_version, on.lease.dek_floor)


def named(report: Findings) -> dict[str, FindingKind]:
    assert report.more_findings == 0
    return {finding.object: finding.kind for finding in report.findings}


async def test_a_healthy_timeline_has_no_findings(tmp_path: Path) -> None:
    async with engine(tmp_path, config=EAGER) as one:
        timeline, _ = await filled(one)
        await timeline.compactor.compact(force=True)
        await grow(timeline, 2)
        report = await scrub(one, timeline)
        assert report.findings == []
        assert not report.damaged
        assert report.layers == timeline.layer_count
        assert report.size_bytes == timeline.layer_size_bytes
        assert report.objects == len(await objects(one.store, "/"))


async def test_every_kind_of_finding(tmp_path: Path) -> None:
    """Damage that the local copies hide."""
    async with engine(tmp_path, config=EAGER) as one:
        timeline, _ = await filled(one, layers=6)
        prefix = f"projects/{one.project_id}/timelines/{one.timeline_id}/"
        names = sorted(key.removeprefix(prefix) for key in await objects(one.store) if not key.endswith(".key"))
        gone, unwrapped, altered, cut, foreign, swapped, _ = names
        await one.store.delete(prefix + gone)
        await one.store.delete(prefix + unwrapped + ".key")
        whole = await one.store.get(prefix + altered)
        await one.store.put(prefix + altered, whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
        await one.store.put(prefix + cut, (await one.store.get(prefix + cut))[:-1])
        await one.store.put(prefix + foreign + ".key", b"rubbish")
        await one.store.put(prefix + swapped, await one.store.get(prefix + foreign))
        late = layer_name(LayerKind.IMAGE, 0x1000, 0x1001, 99, "ab" * 8)
        strays = [f"layers/{late}", "layers/what", "index/0000000000000001", "elsewhere"]
        for stray in strays:
            await one.store.put(prefix + stray, b"x")
        report = await scrub(one, timeline)
        assert named(report) == {
            gone: FindingKind.MISSING,
            unwrapped + ".key": FindingKind.MISSING,
            altered: FindingKind.UNREADABLE,
            cut: FindingKind.UNREADABLE,
            foreign: FindingKind.UNREADABLE,
            swapped: FindingKind.UNREADABLE,
            **dict.fromkeys(strays, FindingKind.ORPHAN),
        }
        assert report.damaged
        [detail] = [finding.detail for finding in report.findings if finding.object == strays[0]]
        assert detail == "of generation 99, which comes after this pageserver's 1"


async def test_keys_that_are_older_than_they_should_be(tmp_path: Path) -> None:
    async with engine(tmp_path, config=EAGER) as one:
        timeline, _ = await filled(one, layers=2)
        (some, *_) = sorted(key for key in await objects(one.store) if key.endswith(".key") and "delta" in key)
        old = await one.store.get(some)
        one.keys.rotate(one.project_id)
        report = await scrub(one, timeline)
        assert {finding.kind for finding in report.findings} == {FindingKind.OUTDATED_KEY}
        assert len(report.findings) == timeline.layer_count + 2, "layers, and two versions of the index"
        assert not report.damaged
        await timeline.keys.rewrap(2, Pace(FAST))
        assert (await scrub(one, timeline)).findings == []
        await one.store.put(some, old)  # an old copy of the envelope is back: whoever did that, the index knows better
        [finding] = (await scrub(one, timeline)).findings
        assert finding.kind is FindingKind.WRONG_KEY
        assert some.endswith(finding.object + ".key")


async def test_versions_of_the_index_are_opened_too(tmp_path: Path) -> None:
    """The one before the newest is what a slow writer's rival falls back on; nobody reads it in ordinary times."""
    async with engine(tmp_path, config=EAGER) as one:
        timeline, _ = await filled(one, layers=3)
        prefix = f"projects/{one.project_id}/timelines/{one.timeline_id}/"
        slots = [key for key in await objects(one.store, "/index/") if not key.endswith(".key")]
        assert len(slots) == 2
        for slot in slots:
            name, whole, envelope = (
                slot.removeprefix(prefix),
                await one.store.get(slot),
                await one.store.get(slot + ".key"),
            )
            other = slots[slots.index(slot) - 1]
            for damaged, beside in (
                (whole[:-1], envelope),
                (whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:], envelope),
                (await one.store.get(other), await one.store.get(other + ".key")),
                (whole, b"rubbish"),
            ):
                await one.store.put(slot, damaged)
                await one.store.put(slot + ".key", beside)
                assert named(await scrub(one, timeline)) == {name: FindingKind.UNREADABLE}
            await one.store.put(slot, VOID)
            assert named(await scrub(one, timeline)) == {}, "a slot that a loader closed"
            await one.store.put(slot, whole)
            await one.store.put(slot + ".key", envelope)
        assert named(await scrub(one, timeline)) == {}


async def test_what_belongs_to_no_timeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    async with engine(tmp_path / "layers", config=EAGER) as one:
        await one.create()
        project, gone = one.project_id, TimelineId.new()
        await one.store.put(f"wal/{project}/{one.timeline_id}/some", b"of a timeline that is here")
        await one.store.put(f"wal/{ProjectId.new()}/{gone}/some", b"of another project")
        strays = [f"projects/{project}/timelines/{gone}/", f"wal/{project}/{gone}/"]
        async with Tenants(environment(one, one.store, Realm.create(tmp_path / "pki"))) as tenants:
            await tenants.loaded(project, one.timeline_id, timeout_s=20)
            assert (await tenants.strays(project)).findings == []
            await one.store.put(f"{strays[0]}layers/x", b"never listed")
            await one.store.put(f"{strays[1]}x", b"of a timeline that was deleted")
            report = await tenants.strays(project)
            assert named(report) == dict.fromkeys(strays, FindingKind.ORPHAN)
            assert not report.damaged
            with pytest.raises(NotFoundError):
                await tenants.strays(ProjectId.new())


async def test_while_everything_changes(tmp_path: Path) -> None:
    """What goes away meanwhile is no finding; one run at a time; lost keys end it."""
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store, config=EAGER) as one:
        timeline, _ = await filled(one)
        hold = store.hold(Operation.GET)
        looking = asyncio.create_task(scrub(one, timeline))
        await hold.reached.wait()
        with pytest.raises(ConflictError):
            await scrub(one, timeline)
        await timeline.compactor.compact(force=True)
        await timeline.history.collect()
        hold.release.set()
        assert (await looking).findings == []
        hold = store.hold(Operation.GET)
        looking = asyncio.create_task(scrub(one, timeline))
        await hold.reached.wait()
        revoking = asyncio.create_task(one.keys.revoke(one.project_id))
        await asyncio.sleep(0)
        hold.release.set()
        with pytest.raises(KeyAccessError):
            await looking
        await revoking


async def test_files_by_themselves_and_what_is_in_them(tmp_path: Path) -> None:
    root = tmp_path / "store"
    async with engine(tmp_path / "cache", store=await LocalObjectStore.open(root), config=EAGER) as one:
        timeline, _ = await filled(one, layers=2)
        await put(timeline, (REL.block_key(0), WAL, record(9, b"secret value")))
        await timeline.checkpoint()
        (delta, *_) = sorted(path for path in root.rglob("delta-*") if path.suffix != ".key")
        index = max(path for path in root.rglob("index@/*") if path.suffix != ".key")
        shown = inspect_layer(delta)
        assert (shown["kind"], shown["generation"], shown["lsn_start"]) == ("delta", 1, "0/1001")
        assert shown["envelope"]["kek_version"] == 1
        assert inspect_index(index)["slot"] == int(index.name, 16)
        with pytest.raises(CorruptedError):
            inspect_layer(index)
        with pytest.raises(CorruptedError):
            inspect_index(delta)
        with pytest.raises(NotFoundError):
            inspect_layer(delta.with_name(delta.name[:-1] + "0"))

        # Their content is the pageserver's to tell, while it has the keys.
        async def content(path: Path, sealed: bytes) -> dict[str, Any]:
            placed = Placed.of(path)
            assert (placed.project_id, placed.timeline_id) == (one.project_id, one.timeline_id)
            return await timeline.inspector.describe(placed.name, hashlib.sha256(sealed).hexdigest())

        described = await content(delta, delta.read_bytes())
        assert (described["keys"], described["values"]) == (BLOCKS, BLOCKS)
        assert described["blocks"][0]["blocks"] == BLOCKS
        assert "secret" not in json.dumps(described)
        listed = await content(index, index.read_bytes())
        assert {layer["name"] for layer in listed["layers"]} >= {delta.name}
        with pytest.raises(ConflictError, match="other bytes"):
            await content(delta, b"another")
        with pytest.raises(NotFoundError):
            await content(delta.with_name(delta.name[:-1] + "0"), b"")
        with pytest.raises(InvalidInputError):
            Placed.of(tmp_path / delta.name)
        with pytest.raises(InvalidInputError):
            Placed.of(Path("/projects/prj-1/timelines/tl-1/layers/x"))
        tampered = bytearray(delta.read_bytes())
        tampered[-1] ^= 1
        delta.write_bytes(tampered)
        with pytest.raises(IntegrityError):
            await content(delta, bytes(tampered))
        await one.keys.revoke(one.project_id)
        with pytest.raises((KeyAccessError, UnavailableError)):
            await content(index, index.read_bytes())
