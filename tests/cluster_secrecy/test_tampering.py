"""Altered, moved, truncated, replayed bytes of the object store and of the pageserver's disk: never wrong data.

Every case changes files under a running pageserver, and makes it forget and load everything again (an operator's
revocation and its end). What it then serves must be an integrity error, or all bytes of the database as they were. Then
the files are put back, and it must serve again without anybody's help.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import asyncpg
import pytest
import pytest_asyncio

from keylake.cluster import Cluster, RunningProject
from pageserver.remote_timeline import VOID
from shared.api.compute import EndpointState
from shared.errors import ERRORS_BY_CODE, IntegrityError, KeyAccessError, KeylakeError, NotFoundError, UnavailableError
from shared.lsn import Lsn
from tests.cluster_secrecy.storage import Place, all_stream, stop_and_settle, without_keys
from tests.cluster_secrecy.tampering import (
    Change,
    become,
    changed,
    chunks_of,
    cut,
    extend,
    flip,
    in_chunks,
    preserved,
    put,
    remove,
    swapped,
)
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

ROWS = "select count(*), md5(string_agg(t::text, '|' order by n)) from t"


@dataclass(slots=True)
class Subject:
    """One timeline whose bytes are known."""

    place: Place
    project: RunningProject
    lsn: int = 0
    digest: str = ""
    rows: tuple[object, ...] = ()

    @property
    def objects(self) -> Path:
        root = self.place.cluster.layout.objects
        return root / "projects@" / f"{self.place.project_id}@" / "timelines@" / f"{self.place.timeline_id}@"

    @property
    def indexes(self) -> Path:
        return self.objects / "index@"

    @property
    def cache(self) -> Path:
        """What the pageserver keeps of it on its own disk."""
        root = self.place.cluster.layout.pageserver_cache
        return root / "projects" / str(self.place.project_id) / "timelines" / str(self.place.timeline_id)

    def layer(self, kind: str) -> Path:
        """The first of a kind, and a delta that is not the only one."""
        return sorted(path for path in (self.objects / "layers@").glob(f"{kind}-*") if path.suffix != ".key")[0]

    def slots(self) -> list[Path]:
        """Versions of the index, oldest first."""
        return sorted(path for path in self.indexes.iterdir() if path.suffix != ".key")

    @staticmethod
    def key(path: Path) -> Path:
        return path.with_name(f"{path.name}.key")

    async def take(self) -> None:
        info = await self.place.caught_up()
        self.lsn = info.last_record_lsn.value
        self.digest = await self.place.everything(self.lsn)


@dataclass(slots=True)
class Scene:
    cluster: Cluster
    subjects: list[Subject]
    image: Subject
    """Layers under test are its image layers."""
    delta: Subject
    """Another timeline of the same project; layers under test are its delta layers."""
    other: Subject
    """Of another project."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene() -> AsyncIterator[Scene]:
    async with ForkedCluster(settings={"compute": {"poll_interval_s": 0.2}}) as cluster:
        first = await cluster.create_project("first")
        second = await cluster.create_project("second", first.project.workspace_id)
        timeline = await cluster.client.create_timeline(first.project.project_id, "other")
        endpoint = await cluster.client.create_endpoint(timeline, "other")
        sibling = RunningProject(first.project, timeline, endpoint, cluster.client.connection(endpoint))
        subjects = [Subject(Place.of(cluster, p.timeline), p) for p in (first, sibling, second)]
        await asyncio.gather(*(fill(subject) for subject in subjects))
        yield Scene(cluster, subjects, *subjects)


async def fill(subject: Subject, batches: Sequence[int] = (0, 1)) -> None:
    """Rows in two delta layers, so that there are three versions of the index, of which two are kept."""
    cluster, project = subject.place.cluster, subject.project
    connection = await asyncpg.connect(**project.connection.asyncpg_arguments(), timeout=60)
    await connection.execute("create table if not exists t (n int primary key, body text)")
    for batch in batches:
        await connection.execute(
            "insert into t select n, md5(n::text) from generate_series($1::int, $1 + 1999) n", batch * 2000
        )
        subject.rows = tuple(await connection.fetchrow(ROWS) or ())
        if batch != batches[-1]:
            await all_stream(subject.place)
            await subject.place.caught_up()
            await subject.place.checkpoint()
    await connection.close()
    await stop_and_settle(project, cluster)
    await subject.place.checkpoint()
    await subject.take()


# --- what is served ---


def keys_dropped(*subjects: Subject) -> AbstractAsyncContextManager[None]:
    return without_keys(subjects[0].place.cluster, *{subject.place.project_id for subject in subjects})


async def forget(*subjects: Subject) -> None:
    """Make the pageserver read everything again, from the object store."""
    async with keys_dropped(*subjects):
        for subject in subjects:
            for path in subject.cache.glob("layers/*"):
                path.write_bytes(b"")  # not removed: the pageserver may have it open


async def cached(subject: Subject) -> None:
    """Returns when nothing is being fetched any more: what has been read is on the local disk, too."""
    for layer in (subject.objects / "layers@").glob("*[!y]"):
        local, size_bytes = subject.cache / "layers" / layer.name, layer.stat().st_size
        await wait_until(partial(_has_size, local, size_bytes))


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.exists() and path.stat().st_size == size_bytes


async def outcome(subject: Subject, *, heed_fault: bool = True) -> str | KeylakeError:
    """What the pageserver makes of it once it is done with loading: everything (its digest), or an error.

    `heed_fault`: take what its status says for an answer. A fault stands there until loading has succeeded.
    """
    place = subject.place

    async def look() -> str | KeylakeError | None:
        try:
            return await place.everything(subject.lsn)
        except (KeyAccessError, UnavailableError):
            info = await place.pageserver_info()
            code, _, message = (info.fault if info is not None and heed_fault else "").partition(": ")
            return ERRORS_BY_CODE[code](message) if code not in ("", UnavailableError.code) else None
        except NotFoundError as error:
            return None if "not loaded yet" in str(error) else error
        except KeylakeError as error:
            return error

    found = await wait_until(look)
    assert isinstance(found, str | KeylakeError)
    return found


async def assert_refused(subject: Subject) -> None:
    found = await outcome(subject)
    assert found != subject.digest, "nobody has noticed"
    assert isinstance(found, IntegrityError), f"wrong data, or the wrong error: {found!r}"


async def assert_served(subject: Subject) -> None:
    assert await outcome(subject, heed_fault=False) == subject.digest


async def assert_recovers(subject: Subject) -> None:
    """As `assert_served`, for a timeline that could not even be attached: that is tried again every second."""

    async def look() -> str | None:
        found = await outcome(subject, heed_fault=False)
        return None if isinstance(found, IntegrityError) else str(found)

    assert await wait_until(look) == subject.digest


@asynccontextmanager
async def forgotten_again(*subjects: Subject) -> AsyncIterator[None]:
    """Around a change: afterwards all is well again, and the pageserver finds out by itself."""
    for subject in subjects:
        await cached(subject)
    yield
    await forget(*subjects)
    for subject in subjects:
        await assert_served(subject)


# --- layers ---

HEADER = {"magic": 0, "version": 4, "suite": 5, "reserved": 6, "chunk size": 9, "reserved at the end": 15}
LAYER_CHANGES: dict[str, Change] = {
    **{f"header: {name}": flip(at) for name, at in HEADER.items()},
    "header: chunk size, to another good one": put(8, (32 * 1024).to_bytes(4, "big")),
    "header: null suite": put(5, b"\xff"),
    "first byte of the first chunk": flip(16, 7),
    "tag of the first chunk": flip(16 + 64 * 1024),
    "footer": flip(-20),
    "last tag": flip(-1),
    "cut at the first chunk's end": lambda data: data[:16] + chunks_of(data)[1][0],
    "cut before the last chunk": in_chunks(lambda chunks: chunks[:-1]),
    "cut inside of the last chunk": cut(-9),
    "cut inside of the header": cut(10),
    "emptied": become(b""),
    "removed": remove,
    "two chunks changed places": in_chunks(lambda chunks: [chunks[1], chunks[0], *chunks[2:]]),
    "first chunk twice": in_chunks(lambda chunks: [chunks[0], chunks[0], *chunks[2:]]),
    "first chunk dropped": in_chunks(lambda chunks: chunks[1:]),
    "zeros of the same length": lambda data: bytes(len(data)),
}


T = TypeVar("T")


def in_turn(cases: Sequence[T]) -> list[Sequence[T]]:
    """As many as share one test, at whose end all must be served again: reading everything takes its time."""
    return [cases[at : at + 5] for at in range(0, len(cases), 5)]


@pytest.mark.parametrize("names", in_turn(list(LAYER_CHANGES)), ids=" | ".join)
async def test_an_altered_layer_is_refused(scene: Scene, names: Sequence[str]) -> None:
    subjects = [scene.image, scene.delta]
    async with forgotten_again(*subjects):
        for change in (LAYER_CHANGES[name] for name in names):
            with changed((scene.image.layer("image"), change), (scene.delta.layer("delta"), change)):
                await forget(*subjects)
                for subject in subjects:
                    await assert_refused(subject)


async def test_any_chunk_altered_anywhere_never_gives_wrong_data(scene: Scene) -> None:
    """Chunks that nobody asks for are not read, so this is about the answer and not about being noticed."""
    rng = random.Random(20261122)
    subjects = [scene.image, scene.delta]
    noticed = 0
    for _ in range(4):
        changes = [
            (path, flip(rng.randrange(16, path.stat().st_size), rng.randrange(8)))
            for path in (scene.image.layer("image"), scene.delta.layer("delta"))
        ]
        with changed(*changes):
            await forget(*subjects)
            for subject in subjects:
                found = await outcome(subject)
                assert found == subject.digest or isinstance(found, IntegrityError), found
                noticed += found != subject.digest
    assert noticed > 0
    async with forgotten_again(*subjects):
        pass


async def test_bytes_behind_a_layer_are_not_looked_at(scene: Scene) -> None:
    """Its length stands in the sealed index."""
    path = scene.image.layer("image")
    async with forgotten_again(scene.image):
        with changed((path, extend(path.read_bytes()[16:70_000]))):
            await forget(scene.image)
            await assert_served(scene.image)


async def test_layers_do_not_pass_for_one_another(scene: Scene) -> None:
    """Between projects, between timelines of one project, between layers of one timeline; with their keys or without.

    Their keys do not matter: the index has them, too.
    """
    one, deltas = scene.image, sorted((scene.delta.objects / "layers@").glob("delta-*[!y]"))
    pairs = {
        "projects": (one, one.layer("image"), scene.other.layer("image")),
        "timelines": (one, one.layer("image"), scene.delta.layer("image")),
        "layers": (scene.delta, deltas[0], deltas[1]),
    }
    for subject, path, other in pairs.values():
        async with forgotten_again(subject):
            for with_keys in (False, True):
                with swapped(*[(path, other), (subject.key(path), subject.key(other))][: 1 + with_keys]):
                    await forget(subject)
                    await assert_refused(subject)


async def test_a_layers_key_object_is_a_spare(scene: Scene) -> None:
    """The index has a copy, so nothing depends on it; key rotation will."""
    key = scene.image.key(scene.image.layer("image"))
    for change in (flip(60), remove, cut(50)):
        async with forgotten_again(scene.image):
            with changed((key, change)):
                await forget(scene.image)
                await assert_served(scene.image)


# --- the index ---

ENVELOPE = {"magic": 0, "version": 4, "suite": 5, "KEK id": 9, "KEK version": 17, "nonce": 20}
ENVELOPE |= {"wrapped DEK": 40, "its tag": 77, "commitment": 90, "reserved": 117}
INDEX_CHANGES: dict[str, Change] = {
    **{f"header: {name}": flip(at) for name, at in HEADER.items()},
    "header: null suite": put(5, b"\xff"),
    "first byte": flip(16),
    "last tag": flip(-1),
    "cut": cut(-1),
    "header only": cut(16),
    "emptied": become(b""),
    "a byte more": extend(b"\0"),
    "twice": lambda data: data + data[16:],
    "void": become(VOID),
}
KEY_CHANGES: dict[str, Change] = {
    **{name: flip(at) for name, at in ENVELOPE.items()},
    "cut": cut(-1),
    "a byte more": extend(b"\0"),
    "removed": remove,
}


ALL_INDEX_CHANGES = [*INDEX_CHANGES, *(f"key: {name}" for name in KEY_CHANGES)]


def index_change(slot: Path, name: str) -> tuple[Path, Change]:
    if name.startswith("key: "):
        return Subject.key(slot), KEY_CHANGES[name.removeprefix("key: ")]
    return slot, INDEX_CHANGES[name]


@pytest.mark.parametrize("pairs", in_turn(list(zip(ALL_INDEX_CHANGES[::2], ALL_INDEX_CHANGES[1::2], strict=True))))
async def test_an_altered_index_is_refused(scene: Scene, pairs: Sequence[tuple[str, str]]) -> None:
    """Two timelines at a time, each altered in another way."""
    subjects = [scene.image, scene.delta]
    async with forgotten_again(*subjects):
        for names in pairs:
            with preserved(scene.image.indexes), preserved(scene.delta.indexes):
                slots = [subject.slots()[-1] for subject in subjects]
                with changed(*(index_change(slot, name) for slot, name in zip(slots, names, strict=True))):
                    await forget(*subjects)
                    for subject in subjects:
                        await assert_refused(subject)
    await assert_served(scene.other)


async def test_indexes_do_not_pass_for_one_another(scene: Scene) -> None:
    """Another timeline's, another project's, and this timeline's own older version in the newest one's place."""
    subject = scene.image
    newest, older = subject.slots()[-1], subject.slots()[-2]
    others = (scene.delta.slots()[-1], scene.other.slots()[-1], older)
    async with forgotten_again(subject):
        for other, with_key in itertools.product(others, (False, True)):
            pairs = [(newest, other), (subject.key(newest), subject.key(other))][: 1 + with_key]
            with preserved(subject.indexes), swapped(*pairs):
                await forget(subject)
                await assert_refused(subject)


async def test_an_older_index_is_refused_by_whoever_knew_the_newest(scene: Scene) -> None:
    """A rollback: the newest version is gone, and the one before it is genuine."""
    subject = scene.image
    newest = subject.slots()[-1]
    async with forgotten_again(subject):
        for gone in ([newest], [newest, subject.key(newest)]):
            with preserved(subject.indexes):
                for path in gone:
                    path.unlink()
                await forget(subject)
                await assert_refused(subject)


@pytest.mark.parametrize("name", ["ffffffffffffffff", "0000000000000099", "index_part.json", "0000000000000001.bak"])
async def test_an_index_that_nobody_wrote_is_refused(scene: Scene, name: str) -> None:
    subject = scene.image
    async with forgotten_again(subject):
        with preserved(subject.indexes):
            shutil.copy(subject.slots()[-1], subject.indexes / name)
            await forget(subject)
            await assert_refused(subject)


# --- the pageserver's own disk ---

CACHE_CHANGES: dict[str, Change] = {
    "header": flip(1),
    "chunk size": put(8, (32 * 1024).to_bytes(4, "big")),
    "first chunk": flip(16),
    "last tag": flip(-1),
    "cut": cut(100_000),
    "emptied": become(b""),
    "extended": extend(b"x" * 1000),
    "null suite": put(5, b"\xff"),
}


@pytest.mark.parametrize("name", CACHE_CHANGES)
async def test_a_damaged_local_copy_is_fetched_again(scene: Scene, name: str) -> None:
    subject = scene.image
    layer = subject.layer("image")
    local = subject.cache / "layers" / layer.name
    genuine = layer.read_bytes()
    await cached(subject)
    async with keys_dropped(subject):
        local.write_bytes(CACHE_CHANGES[name](local.read_bytes()) or b"")
    await assert_served(subject)
    if name == "extended":
        local.write_bytes(genuine)  # nobody has noticed: what its layer reads of it is genuine
    await wait_until(lambda: local.exists() and local.read_bytes() == genuine)


async def test_a_local_copy_of_another_layer_is_not_taken(scene: Scene) -> None:
    subject = scene.image
    local = subject.cache / "layers" / subject.layer("image").name
    await cached(subject)
    async with keys_dropped(subject):
        shutil.copy(scene.other.layer("image"), local)
    await assert_served(subject)
    await wait_until(lambda: local.exists() and local.read_bytes() == subject.layer("image").read_bytes())


async def test_the_memory_of_the_newest_index_only_ever_refuses(scene: Scene) -> None:
    """It is not sealed: raised it makes the pageserver refuse, unreadable it is as none."""
    subject = scene.image
    seen = subject.cache / "index-seen"
    async with forgotten_again(subject):
        with changed((seen, become(b"4096"))):
            await forget(subject)
            await assert_refused(subject)
    for content in (b"", b"-1", b"9" * 30, b"\xff\xfe"):
        seen.write_bytes(content)
        await forget(subject)
        await assert_served(subject)


# --- restarts ---


@asynccontextmanager
async def stopped(cluster: Cluster, *services: str) -> AsyncIterator[None]:
    await asyncio.gather(*(cluster.service(name).kill() for name in services))
    yield
    await asyncio.gather(*(cluster.service(name).start() for name in services))


async def test_a_restart_on_damaged_objects_says_so_and_recovers_when_they_are_back(scene: Scene) -> None:
    subject, client = scene.image, scene.cluster.client
    endpoint_id = subject.project.endpoint.endpoint_id
    with preserved(subject.indexes):
        async with stopped(scene.cluster, "pageserver"):
            slot = subject.slots()[-1]
            slot.write_bytes(flip(-1)(slot.read_bytes()) or b"")
        await assert_refused(subject)
        await assert_served(scene.delta)
        fault = (await client.pageserver_status()).fault
        assert str(subject.place.timeline_id) in fault
        assert "integrity" in fault
        with pytest.raises(KeylakeError, match="does not open"):
            await client.start_endpoint(endpoint_id)
        assert (await client.endpoint(endpoint_id)).state is EndpointState.STOPPED
    await assert_recovers(subject)
    assert not (await client.pageserver_status()).fault


@pytest.mark.parametrize("disk", ["kept", "lost"])
async def test_a_rollback_is_noticed_after_a_restart(scene: Scene, disk: str) -> None:
    """By what the pageserver has seen; on an empty disk, by what the safekeepers remember that they were told."""
    subject = scene.image
    with preserved(subject.indexes):
        async with stopped(scene.cluster, "pageserver"):
            roll_back(subject)
            if disk == "lost":
                shutil.rmtree(scene.cluster.layout.pageserver_cache)
        await assert_refused(subject)
    await assert_recovers(subject)


def roll_back(subject: Subject) -> None:
    newest = subject.slots()[-1]
    newest.unlink()
    subject.key(newest).unlink()


async def test_rolling_back_everything_at_once_is_not_noticed(scene: Scene) -> None:
    """A documented limit (docs/honesty.md): object store and all safekeepers as they once were, and an empty disk.

    What is served then is the old state, whole and consistent; it cannot be told from the newest.
    """
    subject, cluster = scene.other, scene.cluster
    layout = cluster.layout
    services = ["pageserver", "safekeeper-1", "safekeeper-2", "safekeeper-3"]
    directories = [layout.objects, *(layout.safekeeper(n) for n in (1, 2, 3))]
    async with stopped(cluster, *services):
        for directory in directories:
            shutil.copytree(directory, directory.with_name(f"{directory.name}.old"))
    old_lsn, old_digest, old_rows = subject.lsn, subject.digest, subject.rows
    await fill(subject, [2])
    connection = await asyncpg.connect(**subject.project.connection.asyncpg_arguments(), timeout=60)
    await connection.execute("delete from t where n < 1000")
    await connection.close()
    newer = await stop_and_settle(subject.project, cluster)
    assert newer.last_record_lsn > Lsn(old_lsn)
    async with stopped(cluster, *services):
        for directory in directories:
            shutil.rmtree(directory)
            directory.with_name(f"{directory.name}.old").rename(directory)
        shutil.rmtree(layout.pageserver_cache)
    subject.lsn, subject.digest = old_lsn, old_digest
    await assert_served(subject)
    info = await subject.place.caught_up()
    assert info.last_record_lsn == Lsn(old_lsn)
    assert not info.fault
    connection = await asyncpg.connect(**subject.project.connection.asyncpg_arguments(), timeout=60)
    subject.rows = tuple(await connection.fetchrow(ROWS) or ())
    await connection.close()
    assert subject.rows == old_rows
    await stop_and_settle(subject.project, cluster)
    await subject.place.checkpoint()
    await subject.take()


async def test_rows_are_what_they_were(scene: Scene) -> None:
    """The digests of all the other tests, once more in SQL."""
    for subject in scene.subjects:
        connection = await asyncpg.connect(**subject.project.connection.asyncpg_arguments(), timeout=60)
        assert tuple(await connection.fetchrow(ROWS) or ()) == subject.rows
        await connection.close()
        await stop_and_settle(subject.project, scene.cluster)
        await subject.place.checkpoint()
        await subject.take()
