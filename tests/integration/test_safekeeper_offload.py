"""WAL in the object store: it leaves the disk only when that is safe, and whoever needs it gets it back."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from safekeeper import piece_file
from safekeeper.inspection import describe_piece
from safekeeper.log_map import Place
from safekeeper.offload import OffloadTuning
from safekeeper.remote_wal import RemotePiece, RemoteWal, project_prefix
from safekeeper.wal_segment import PieceId
from shared.api.pageserver import FindingKind
from shared.api.safekeeper import CreateTimeline, InspectWal, TermStart
from shared.errors import (
    ConflictError,
    IntegrityError,
    InvalidInputError,
    KeyAccessError,
    NotFoundError,
    UnavailableError,
)
from shared.key_upkeep import Pace, UpkeepTuning
from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.storage.faulty import FaultyObjectStore, Moment, Operation
from shared.storage.memory import MemoryObjectStore
from shared.wire.walstream import Feedback
from tests.fixtures.safekeeper_nodes import NodeBench, elect, nodes
from tests.fixtures.waiting import in_the_end
from tests.fixtures.wal import SYSTEM_IDENTIFIER, WalBuilder

START = WAL_SEGMENT_SIZE_BYTES + 40
FAST = Pace(UpkeepTuning(rewraps_per_s=1e9, rekeyed_bytes_per_s=1e12))


@dataclass
class Bench:
    """Three safekeepers and the object store of all of them."""

    nodes: list[NodeBench]
    store: FaultyObjectStore
    wal: WalBuilder
    term: int = 0

    async def reign(self, voters: list[NodeBench] | None = None, size: int = 3000) -> None:
        """A term in which some WAL is written, to `voters`; the pieces of the term before are closed by it."""
        voters = voters or self.nodes
        self.term += 1
        chosen = await elect(voters, self.term)
        before = len(self.wal.data)
        assert chosen.start_lsn == START + before
        for _ in range(3):
            self.wal.append_noop(size)
        for bench in voters:
            await bench.write(self.term, chosen.start_lsn, bytes(self.wal.data[before:]))

    async def feedback(self, bench: NodeBench, *, stored: bool = True) -> None:
        """As from the pageserver: everything is committed, and perhaps in layers."""
        end_lsn = bench.timeline.flush_lsn
        bench.timeline.feedback(Feedback(end_lsn, end_lsn if stored else 0))

    async def offload(self, bench: NodeBench, *, stored: bool = True) -> None:
        await self.feedback(bench, stored=stored)
        await bench.timeline.offload()

    @property
    def data(self) -> bytes:
        return bytes(self.wal.data)

    async def keys(self) -> list[str]:
        return [info.key async for info in self.store.list()]

    @property
    def puts(self) -> int:
        return sum(call.operation is Operation.PUT_IF_ABSENT for call in self.store.calls)

    def remote(self) -> RemoteWal:
        return RemoteWal(self.store, self.nodes[0].project_id, self.nodes[0].timeline_id)


@contextlib.asynccontextmanager
async def bench_of(directory: Path) -> AsyncIterator[Bench]:
    store = FaultyObjectStore(MemoryObjectStore())
    async with nodes(directory, START, objects=store) as made:
        yield Bench(made, store, WalBuilder(START))


def places(bench: NodeBench) -> list[Place]:
    return [extent.place for extent in bench.timeline._control.state.log.extents]


def piece_files(bench: NodeBench) -> int:
    return sum(path.suffix != ".key" for path in bench.directory.glob("timelines/*/*/0*"))


async def test_wal_leaves_the_disk_only_when_it_is_safe_and_is_read_from_anywhere(tmp_path: Path) -> None:
    async with bench_of(tmp_path) as bench:
        first, second, third = bench.nodes
        await bench.reign()
        await bench.reign()
        await first.timeline.offload()
        assert places(first) == [Place.LOCAL, Place.LOCAL], "nobody has said that it is committed"
        await bench.offload(first, stored=False)
        assert places(first) == [Place.BOTH, Place.LOCAL], "the pageserver has no layers of it yet"
        assert piece_files(first) == 2
        await bench.offload(first)
        assert places(first) == [Place.REMOTE, Place.LOCAL], "open pieces stay"
        assert piece_files(first) == 1
        assert await first.log() == bench.data

        # Others find what is there, and put nothing.
        puts = bench.puts
        await bench.offload(second)
        assert bench.puts == puts
        assert places(second) == [Place.REMOTE, Place.LOCAL]
        assert await second.log() == bench.data, "sealed by the first, read by the second"

        # It survives a crash, and an election: the end of the log is found as ever.
        await first.crash()
        await first.start()
        await first.timeline.make_ready()
        assert await first.log() == bench.data
        await bench.reign([first, second])
        assert await first.log() == bench.data

        # One that was away for hours gets what nobody has on a disk any more.
        for node in (first, second):
            await bench.offload(node)
        await third.timeline.aclose()
        await third.crash()
        await third.start()
        await bench.reign()
        assert await third.log() == bench.data
        assert [e.term for e in third.timeline.status().term_history] == [1, 2, 3, 4]

        # No lease, no plaintext, wherever it lies.
        await first.keys.revoke(first.project_id)
        with pytest.raises((KeyAccessError, UnavailableError)):
            await first.timeline.read(START, 100)
        await first.keys.restore(first.project_id)
        assert await first.log() == bench.data


async def test_a_lost_disk_is_filled_with_wal_that_is_in_the_object_store_only(tmp_path: Path) -> None:
    async with bench_of(tmp_path) as bench:
        first, second, _ = bench.nodes
        for _ in range(3):
            await bench.reign([first, second])
        for node in (first, second):
            await bench.offload(node)
        empty = bench.nodes[2]
        assert empty.node is not None
        await empty.node.delete(empty.project_id, empty.timeline_id)
        request = CreateTimeline(system_identifier=SYSTEM_IDENTIFIER, start_lsn=Lsn(START))
        await empty.node.create(empty.project_id, empty.timeline_id, request)
        await bench.reign()
        assert await empty.log() == bench.data


async def test_wal_that_is_in_layers_is_trimmed_everywhere_and_who_lacks_it_goes_on_behind(tmp_path: Path) -> None:
    async with bench_of(tmp_path) as bench:
        first, second, third = bench.nodes
        for node in bench.nodes:  # one that never loses a disk, one that is away, one that hears late
            await node.stop()
            node.offload = OffloadTuning(interval_s=3600, keep_size_bytes=0, history_size_bytes=0)
            await node.start()
        await bench.reign()
        await third.crash()
        for _ in range(3):
            await bench.reign([first, second])
        for node in (first, second):
            await bench.offload(node, stored=False)
        assert places(first) == [Place.BOTH] * 3 + [Place.LOCAL]
        assert len(await bench.keys()) == 6, "committed, but not in layers"

        kept_from = first.timeline._control.state.log.extents[-1].start_lsn
        await bench.offload(first)
        assert places(first) == [Place.LOCAL]
        assert (first.timeline.start_lsn, piece_files(first), await bench.keys()) == (kept_from, 1, [])
        assert await first.log() == bench.data[kept_from - START :]
        with pytest.raises(InvalidInputError, match="begins behind"):
            await first.timeline.read(kept_from - 1, 10)
        # Who has not heard yet that it is in layers misses it, and puts it again; that goes with the rest.
        assert {finding.kind for finding in (await second.timeline.scrub()).findings} == {FindingKind.MISSING}
        await second.timeline.offload()
        await bench.offload(second)
        assert (second.timeline.start_lsn, piece_files(second), await bench.keys()) == (kept_from, 1, [])
        assert not (await second.timeline.scrub()).findings

        # It survives a crash, also one before the objects went; and the end of the log is found without what is gone.
        left_over = RemotePiece(PieceId(1, 1, 9), START, kept_from, second.node_id).name
        for suffix in ("", ".key"):
            await bench.store.put(f"wal/{first.project_id}/{first.timeline_id}/{left_over}{suffix}", b"x")
        await first.crash()
        await first.start()
        await first.timeline.make_ready()
        assert first.timeline.start_lsn == kept_from
        await first.timeline.offload()
        assert await bench.keys() == []
        # Who was away, and who has a new disk, go on where the donor's log begins; and are members as any.
        await third.start()
        await bench.reign()
        assert third.timeline.start_lsn == kept_from
        assert await third.log() == bench.data[kept_from - START :]
        assert second.node is not None
        await second.node.delete(second.project_id, second.timeline_id)
        await second.create(START)
        await bench.reign([third, second])
        await first.crash()
        await bench.reign([second, third])
        for node in (second, third):
            assert await node.log() == bench.data[kept_from - START :]
            await bench.offload(node)
            assert not (await node.timeline.scrub()).findings


async def test_a_donor_that_has_not_heard_what_was_trimmed_hears_it_before_its_term_begins(tmp_path: Path) -> None:
    """Its peer trimmed what it has in the object store only, and is gone: a follower that lacks that would wait for it
    for ever, and so would the term."""
    async with bench_of(tmp_path) as bench:
        gone, donor, behind = bench.nodes
        for node in bench.nodes:
            await node.stop()
            node.offload = OffloadTuning(interval_s=3600, keep_size_bytes=0, history_size_bytes=20_000)
            await node.start()
        await bench.reign()
        for _ in range(2):
            await bench.reign([gone, donor])
        await bench.offload(donor)
        assert places(donor) == [Place.REMOTE] * 2 + [Place.LOCAL], "of the margin"
        for _ in range(2):
            await bench.reign([gone, donor])
        await bench.offload(gone)
        trimmed_lsn, in_layers_lsn = gone.timeline.start_lsn, gone.timeline.flush_lsn
        assert trimmed_lsn > behind.timeline.flush_lsn
        await gone.crash()
        await donor.crash()  # it forgets what it still had in memory
        await donor.start()

        term = bench.term + 1
        vote, _ = [await node.vote(term) for node in (donor, behind)]
        elected = term, [*vote.term_history, TermStart(term=term, start_lsn=vote.flush_lsn)], donor.donor
        await donor.elected(*elected)
        following = asyncio.create_task(behind.elected(*elected))
        with pytest.raises(UnavailableError, match="does not show"):
            await donor.log()
        assert donor.timeline.wire_status().commit_lsn < in_layers_lsn, "it does not know what is committed"
        donor.timeline.feedback(Feedback(0, in_layers_lsn))
        await donor.timeline.offload()
        await following
        assert behind.timeline.start_lsn == trimmed_lsn
        assert await behind.log() == bench.data[trimmed_lsn - START :]


@pytest.mark.parametrize("moment", list(Moment))
async def test_whatever_operation_fails_at_first_is_done_in_the_end(tmp_path: Path, moment: Moment) -> None:
    """Offload, read back, re-wrap, re-key and trim. What a safekeeper does not use: pieces are read as a whole, and
    objects go by the many."""
    used = [each for each in Operation if each not in (Operation.GET_RANGE, Operation.DELETE)]
    async with bench_of(tmp_path) as bench:
        first, second, _ = bench.nodes
        for node in (first, second):
            await node.stop()
            node.offload = OffloadTuning(interval_s=3600, keep_size_bytes=0, history_size_bytes=40_000)
            await node.start()
        for _ in range(3):
            await bench.reign()
        for number, operation in enumerate(used):
            for _ in range(2):
                await bench.reign()
            begun_at = first.timeline.start_lsn
            bench.store.fail(operation, times=3, moment=moment)
            for node in (first, second):
                await in_the_end(functools.partial(bench.offload, node))
                assert set(places(node)[:-1]) == {Place.REMOTE}
                node.timeline._store.drop_keys()
                assert await in_the_end(node.log) == bench.data[node.timeline.start_lsn - START :]
            assert (first.timeline.start_lsn > begun_at) == (number > 0), "from the second time on, WAL is trimmed"

            version = first.keys.rotate(first.project_id, rekey=bool(number % 2))
            for node in bench.nodes:
                node.keys._grant(node.keys._held[node.project_id])
            lease = second.keys._held[second.project_id].lease
            upkeep = second.timeline.key_upkeep
            await in_the_end(functools.partial(upkeep.rekey, lease.dek_floor, FAST))
            await in_the_end(functools.partial(upkeep.rewrap, version, FAST))
            assert bench.store.quiet, f"{operation} failed as often as was ordered"
            assert {envelope.kek_version for _, envelope, _ in await bench.remote().envelopes()} == {version}
            for node in (first, second):
                node.timeline._store.drop_keys()
                assert await node.log() == bench.data[node.timeline.start_lsn - START :]
                assert not node.timeline.fault
        # What failed deletes left is gone, too.
        assert {piece.start_lsn >= first.timeline.start_lsn for piece in await bench.remote().pieces()} == {True}
        for node in (first, second):
            assert (await node.timeline.scrub()).findings == []


async def test_an_object_store_that_fails_is_slow_or_shows_old_lists(tmp_path: Path) -> None:
    async with bench_of(tmp_path) as bench:
        first, second, _ = bench.nodes
        store = bench.store
        await bench.reign()
        await bench.reign()
        for moment in Moment:
            for operation in (Operation.LIST, Operation.PUT_IF_ABSENT, Operation.HEAD):
                store.fail(operation, times=2, moment=moment)
        store.delay(Operation.PUT_IF_ABSENT, 0.01)
        store.reorder(random.Random(1), 0.002)
        failures = 0
        while places(first) == [Place.LOCAL, Place.LOCAL]:
            try:
                await bench.offload(first)
            except UnavailableError:
                failures += 1
            assert await first.log() == bench.data
        assert failures >= 3
        assert places(first) == [Place.REMOTE, Place.LOCAL]
        assert len(await bench.keys()) == 2, "one piece and its envelope, however often it was tried"
        store.heal()

        await store.freeze_lists()
        await bench.reign()
        with pytest.raises(UnavailableError):
            await bench.offload(second)
        assert places(second)[1] is Place.LOCAL, "nobody would find it"
        store.heal()
        await bench.offload(second)
        assert places(second) == [Place.REMOTE, Place.REMOTE, Place.LOCAL]

        # Gone for a while: said so, and nothing is lost by it.
        store.fail(Operation.LIST, times=2)
        first.timeline._store.drop_keys()
        with pytest.raises(UnavailableError):
            await first.log()
        store.heal()
        assert await first.log() == bench.data


async def test_altered_and_exchanged_objects_are_refused_and_the_node_goes_on(tmp_path: Path) -> None:
    async with bench_of(tmp_path) as bench:
        first = bench.nodes[0]
        await bench.reign()
        await bench.reign()
        await bench.reign()
        await bench.offload(first)
        keys = [key for key in await bench.keys() if not key.endswith(".key")]
        good = {key: await bench.store.get(key) for key in keys}
        rng = random.Random(7)
        for _ in range(20):
            key = rng.choice(keys)
            altered = bytearray(good[key])
            altered[rng.randrange(len(altered))] ^= 1 << rng.randrange(8)
            await bench.store.put(key, altered)
            first.timeline._store.drop_keys()
            with pytest.raises(IntegrityError):
                await first.log()
            await bench.store.put(key, good[key])
        await bench.store.put(keys[0], good[keys[1]])
        first.timeline._store.drop_keys()
        with pytest.raises(IntegrityError):
            await first.log()
        await bench.store.put(keys[0], good[keys[0]])
        assert await first.log() == bench.data
        assert not first.timeline.fault
        # An envelope of another piece.
        envelope = await bench.store.get(keys[0] + ".key")
        await bench.store.put(keys[0] + ".key", await bench.store.get(keys[1] + ".key"))
        await first.keys.release(first.project_id)
        with pytest.raises((IntegrityError, KeyAccessError)):
            await first.log()
        await bench.store.put(keys[0] + ".key", envelope)


async def test_keys_of_offloaded_wal_are_renewed_by_whoever_is_there(tmp_path: Path) -> None:
    async with bench_of(tmp_path) as bench:
        first, second, _ = bench.nodes
        await bench.reign()
        await bench.reign()
        await bench.reign()
        for node in (first, second):
            await bench.offload(node)
        sealed_by = {piece.node_id for piece in await bench.remote().pieces()}
        assert sealed_by == {"safekeeper-1"}
        censuses = [await node.timeline.key_upkeep.census() for node in (first, second)]
        assert censuses[0].shared() == censuses[1].shared(), "both say what is offloaded, as what others count, too"
        assert sum(use.objects for use in censuses[0].shared()) == len(await bench.remote().pieces())

        # Re-wrap: the first is gone; the second does it.
        first.keys.rotate(first.project_id)
        for node in bench.nodes:
            node.keys._grant(node.keys._held[node.project_id])
        before = {key: await bench.store.get(key) for key in await bench.keys() if not key.endswith(".key")}
        await second.timeline.key_upkeep.rewrap(2, FAST)
        versions = {envelope.kek_version for _, envelope, _ in await bench.remote().envelopes()}
        assert versions == {2}
        assert {key: await bench.store.get(key) for key in before} == before, "data is not touched"
        assert {use.kek_version for use in (await second.timeline.key_upkeep.census()).uses()} == {2}
        assert await first.log() == await second.log() == bench.data

        # Re-key: new pieces, new DEKs, the old ones are gone; those who read find the new ones.
        await second.timeline.key_upkeep.rekey(2, FAST)
        assert not before.keys() & set(await bench.keys())
        assert {use.dek_version for use in (await second.timeline.key_upkeep.census()).uses()} == {2}
        assert {piece.node_id for piece in await bench.remote().pieces()} == {"safekeeper-2"}
        first.timeline._store.drop_keys()
        assert await first.log() == await second.log() == bench.data
        await bench.reign()
        assert await second.log() == bench.data

        # A project that is shredded takes everything with it.
        await bench.store.put("wal/prj-ffffffffffffffff/other", b"of another project")
        assert first.node is not None
        assert (await first.node.delete_project(first.project_id)).total.objects >= 2
        assert await bench.keys() == ["wal/prj-ffffffffffffffff/other"]
        assert project_prefix(first.project_id) == f"wal/{first.project_id}/"


async def test_a_scrub_names_what_is_wrong_with_offloaded_wal(tmp_path: Path) -> None:
    async with bench_of(tmp_path) as bench:
        first, second, third = bench.nodes
        for _ in range(6):
            await bench.reign([first, second])
        for node in (first, second):
            await bench.offload(node)
        pieces = [piece.name for piece in await bench.remote().pieces()]
        for node in (first, second):
            report = await node.timeline.scrub()
            assert (report.pieces, report.objects, report.findings) == (5, 10, [])
            assert report.size_bytes > len(bench.data) * 5 // 6
        assert (await third.timeline.scrub()).findings[0].detail == "the log has no WAL of this term there"

        prefix = f"wal/{first.project_id}/{first.timeline_id}/"
        gone, unwrapped, altered, swapped, good = pieces
        await bench.store.delete(prefix + gone)
        await bench.store.delete(prefix + unwrapped + ".key")
        whole = await bench.store.get(prefix + altered)
        await bench.store.put(prefix + altered, whole[:-1] + bytes([whole[-1] ^ 1]))
        await bench.store.put(prefix + swapped, await bench.store.get(prefix + good))
        await bench.store.put(prefix + "what", b"x")
        report = await first.timeline.scrub()
        assert report.damaged
        assert {finding.object: finding.kind for finding in report.findings} == {
            gone + ".key": FindingKind.ORPHAN,
            gone[: gone.index("-") + 17]: FindingKind.MISSING,
            unwrapped + ".key": FindingKind.MISSING,
            altered: FindingKind.UNREADABLE,
            swapped: FindingKind.UNREADABLE,
            "what": FindingKind.ORPHAN,
        }
        await bench.store.delete_many([prefix + name for name in (gone + ".key", unwrapped, altered, swapped, "what")])
        await bench.store.delete_many([prefix + name + ".key" for name in (altered, swapped)])
        first.keys.rotate(first.project_id)
        first.keys._grant(first.keys._held[first.project_id])
        kinds = {finding.object: finding.kind for finding in (await first.timeline.scrub()).findings}
        assert kinds.pop(good) is FindingKind.OUTDATED_KEY
        assert set(kinds.values()) == {FindingKind.MISSING}
        assert len(kinds) == 4


def asked(name: str, content: bytes) -> InspectWal:
    sealed = content[: describe_piece(content, None).sealed_size_bytes]
    return InspectWal(name=name, sealed_size_bytes=len(sealed), sha256=hashlib.sha256(sealed).hexdigest())


async def test_the_very_piece_that_is_asked_for_is_described_wherever_it_lies(tmp_path: Path) -> None:
    async with bench_of(tmp_path) as bench:
        first, second, _ = bench.nodes
        await bench.reign()
        await bench.reign()
        path = min(path for path in first.directory.glob("timelines/*/*/0*") if path.suffix != ".key")
        local = asked(path.name, path.read_bytes())
        found = await first.timeline.describe(local)
        assert [record.resource_manager for record in found.records] == ["XLOG"] * 3
        with pytest.raises(NotFoundError, match="other bytes"):
            await second.timeline.describe(local)
        altered = bytearray(path.read_bytes())
        altered[local.sealed_size_bytes - 1] ^= 1
        path.write_bytes(altered)
        with pytest.raises(NotFoundError, match="other bytes"):
            await first.timeline.describe(local)
        with pytest.raises(IntegrityError):
            await first.timeline.describe(asked(path.name, bytes(altered)))
        await bench.offload(second)
        for name in ("../control", "control", path.name[:-1], path.name[:-1] + "9"):
            with pytest.raises(NotFoundError, match="no such piece"):
                await first.timeline.describe(asked(path.name, bytes(altered)).model_copy(update={"name": name}))
        [piece] = await bench.remote().pieces()
        content, _ = await bench.remote().fetch(piece)
        for node in (first, second):
            assert await node.timeline.describe(asked(piece.name, content)) == found


async def test_a_scrub_meets_pieces_that_are_sealed_anew(tmp_path: Path) -> None:
    """What comes and goes meanwhile is no finding; one run at a time."""
    async with bench_of(tmp_path) as bench:
        first = bench.nodes[0]
        for _ in range(4):
            await bench.reign([first, bench.nodes[1]])
        await bench.offload(first)
        hold = bench.store.hold(Operation.GET)
        looking = asyncio.create_task(first.timeline.scrub())
        await hold.reached.wait()
        with pytest.raises(ConflictError):
            await first.timeline.scrub()
        first.keys.rotate(first.project_id, rekey=True)
        first.keys._grant(first.keys._held[first.project_id])
        await first.timeline.key_upkeep.rekey(2, FAST)
        hold.release.set()
        assert (await looking).findings == []
        assert (await first.timeline.scrub()).findings == []


async def test_a_node_that_deletes_a_timeline_takes_nothing_from_the_others(tmp_path: Path) -> None:
    """What it has put is what its peers have nowhere else. It goes when nobody has the timeline any more."""
    async with bench_of(tmp_path) as bench:
        first, second, third = bench.nodes
        for _ in range(2):
            await bench.reign([first, second])
        for node in (first, second):
            await bench.offload(node)
        assert {piece.node_id for piece in await bench.remote().pieces()} == {"safekeeper-1"}
        stored = await bench.keys()
        ids = first.project_id, first.timeline_id
        for node in (first, second):
            assert node.node is not None
            with pytest.raises(ConflictError):
                await node.node.delete_offloaded(*ids)
        assert first.node is not None
        await first.node.delete(*ids)
        assert await bench.keys() == stored
        second.timeline._store.drop_keys()
        assert await second.log() == bench.data
        await bench.reign([second, third])
        assert await third.log() == bench.data, "one that was away gets what lies in the object store only"

        await bench.store.put("wal/prj-ffffffffffffffff/other", b"of another project")
        for node in (second, third):
            assert node.node is not None
            await node.node.delete(*ids)
        assert len(await bench.keys()) > len(stored)
        for _ in range(2):
            await first.node.delete_offloaded(*ids)
            assert await bench.keys() == ["wal/prj-ffffffffffffffff/other"]


@pytest.mark.parametrize("damage", ["gone", "altered", "cut", "without envelope", "under another envelope"])
async def test_a_peers_piece_is_read_before_the_local_one_goes(tmp_path: Path, damage: str) -> None:
    async with bench_of(tmp_path) as bench:
        first, second, _ = bench.nodes
        for _ in range(3):
            await bench.reign()
        for node in (first, second):
            await bench.offload(node, stored=False)
        assert places(second) == [Place.BOTH, Place.BOTH, Place.LOCAL]
        piece, other = [key for key in await bench.keys() if not key.endswith(".key")]
        content = await bench.store.get(piece)
        match damage:
            case "gone":
                await bench.store.delete(piece)
            case "altered":
                await bench.store.put(piece, content[:-1] + bytes([content[-1] ^ 1]))
            case "cut":
                await bench.store.put(piece, content[:-1])
            case "without envelope":
                await bench.store.delete(piece + ".key")
            case _:
                await bench.store.put(piece + ".key", await bench.store.get(other + ".key"))
        await bench.offload(second)
        assert places(second) == [Place.BOTH, Place.REMOTE, Place.LOCAL]
        assert piece_files(second) == 2
        assert "safekeeper-2" in {each.node_id for each in await bench.remote().pieces()}, "its own one is put instead"
        await bench.offload(second)
        assert places(second) == [Place.REMOTE, Place.REMOTE, Place.LOCAL]
        second.timeline._store.drop_keys()
        assert await second.log() == bench.data, "the damaged one, if it is there, is not in the way"


async def test_without_a_lease_nothing_leaves_the_disk(tmp_path: Path) -> None:
    """What nobody can open now may as well be rubbish."""
    async with bench_of(tmp_path) as bench:
        first = bench.nodes[0]
        await bench.reign()
        await bench.reign()
        await bench.offload(first, stored=False)
        await first.keys.revoke(first.project_id)
        with pytest.raises(KeyAccessError):
            await bench.offload(first)
        assert places(first) == [Place.BOTH, Place.LOCAL]
        await first.keys.restore(first.project_id)
        await bench.offload(first)
        assert places(first) == [Place.REMOTE, Place.LOCAL]


async def test_files_that_the_disk_does_not_remove_go_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench_of(tmp_path) as bench:
        first = bench.nodes[0]
        await bench.reign()
        await bench.reign()

        def refuse(*arguments: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(piece_file, "discard", refuse)
            await bench.offload(first)
        assert places(first) == [Place.REMOTE, Place.LOCAL]
        assert piece_files(first) == 2
        await first.crash()
        await first.start()
        assert piece_files(first) == 1
        await first.timeline.make_ready()
        assert await first.log() == bench.data


def test_names_of_pieces_are_parsed_or_refused() -> None:
    rng = random.Random(3)
    name = "0000000000000001.0000000000000002.0000000001000028-0000000001000100.0003.safekeeper-1"
    piece = RemotePiece.parse(name)
    assert piece is not None
    assert piece.name == name
    assert piece.covers(2, 0x1000028, 0x1000100)
    assert not piece.covers(3, 0x1000028, 0x1000100)
    assert not piece.covers(2, 0x1000028, 0x1000101)
    for _ in range(2000):
        altered = bytearray(name.encode())
        for _ in range(rng.randint(1, 3)):
            altered[rng.randrange(len(altered))] = rng.randrange(32, 127)
        found = RemotePiece.parse(altered.decode())
        assert found is None or found.name == altered.decode()
