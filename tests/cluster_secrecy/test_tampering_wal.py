"""Altered, moved, truncated, replayed bytes of the safekeepers' disks: never wrong WAL, and never a lost commit.

Three safekeepers, three cases at a time: all are killed, each gets its own damage, all are started. What each then
serves must be an integrity error, or its log, byte for byte. Where a part of the log may be missing and nobody can tell
from one disk alone (a rollback), the next election must bring it back from the peers.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import asyncpg
import google_crc32c
import pytest
import pytest_asyncio

from keylake.cluster import Cluster, RunningProject
from safekeeper.control_file import ControlState
from safekeeper.wal_segment import FRAME_HEADER_SIZE_BYTES, PieceHeader, index_frames
from shared.api.compute import EndpointState
from shared.errors import IntegrityError, KeylakeError, NotFoundError, UnavailableError
from shared.lsn import Lsn
from tests.cluster_secrecy.storage import Place, all_stream, stop_and_settle
from tests.cluster_secrecy.tampering import Change, become, cut, extend, flip, put
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

NODES = ("safekeeper-1", "safekeeper-2", "safekeeper-3")
ROWS = "select count(*), md5(string_agg(t::text, '|' order by n)) from t"
BATCH = 500


@dataclass(slots=True)
class Log:
    """One project's log on three safekeepers, with pieces of several terms."""

    cluster: Cluster
    project: RunningProject
    place: Place = field(init=False)
    start_lsn: int = 0
    end_lsn: int = 0
    wal: bytes = b""
    batches: int = 0

    def __post_init__(self) -> None:
        self.place = Place.of(self.cluster, self.project.timeline)

    def files(self, index: int) -> Files:
        return Files(self.cluster.layout.data / NODES[index], self.place, self.end_lsn)

    async def write(self) -> None:
        """One more term: start, rows, graceful stop."""
        connection = await asyncpg.connect(**self.project.connection.asyncpg_arguments(), timeout=60)
        await connection.execute("create table if not exists t (n int primary key, body text)")
        await all_stream(self.place)
        # Several commits, each for itself: several frames in each safekeeper's piece.
        for first in range(self.batches * BATCH, (self.batches + 1) * BATCH, BATCH // 5):
            await connection.execute(
                "insert into t select n, md5(n::text) from generate_series($1::int, $2::int) n",
                first,
                first + BATCH // 5 - 1,
            )
        self.batches += 1
        await connection.close()
        await stop_and_settle(self.project, self.cluster)

    async def settle(self) -> None:
        """What the safekeepers have now is how it should be, and all on their disks."""
        info = await self.place.caught_up()
        self.start_lsn, self.end_lsn = self.project.timeline.start_lsn.value, info.last_record_lsn.value
        self.wal = await self.place.wal(0, self.start_lsn, self.end_lsn)
        for index in range(len(NODES)):
            await wait_until(partial(self.commit_lsn_is_on_disk, index))

    async def commit_lsn_is_on_disk(self, index: int) -> bool:
        _, timeline = await self.place.safekeeper_status(index)
        stored = ControlState.parse(self.files(index).control.read_bytes()).acceptor.commit_lsn
        return timeline is not None and stored == timeline.commit_lsn.value


@dataclass(slots=True)
class Scene:
    """Logs that are damaged side by side, and a project beside them that is not. `kept` has all disks as they should
    be."""

    cluster: Cluster
    logs: list[Log]
    other: RunningProject
    kept: Path

    @property
    def log(self) -> Log:
        """The one that goes on being written."""
        return self.logs[0]

    async def take(self) -> None:
        """What is on the disks now is how it should be."""
        for log in self.logs:
            await log.settle()
        await asyncio.gather(*(self.cluster.service(node).kill() for node in NODES))
        shutil.rmtree(self.kept, ignore_errors=True)
        for node in NODES:
            shutil.copytree(self.cluster.layout.data / node, self.kept / node)
        await asyncio.gather(*(self.cluster.service(node).start() for node in NODES))

    @asynccontextmanager
    async def restarted(self) -> AsyncIterator[None]:
        """All disks as they should be, and inside as a test wants them; then all safekeepers are up."""
        await asyncio.gather(*(self.cluster.service(node).kill() for node in NODES))
        for node in NODES:
            shutil.rmtree(self.cluster.layout.data / node)
            shutil.copytree(self.kept / node, self.cluster.layout.data / node)
        yield
        await asyncio.gather(*(self.cluster.service(node).start() for node in NODES))


@dataclass(frozen=True, slots=True)
class Files:
    """One safekeeper's files of the timeline."""

    node: Path
    place: Place
    end_lsn: int

    @property
    def directory(self) -> Path:
        return self.node / "timelines" / str(self.place.project_id) / str(self.place.timeline_id)

    @property
    def control(self) -> Path:
        return self.directory / "control"

    @property
    def pieces(self) -> list[Path]:
        """Those of the log, oldest first. The last one is open: no control file says where it ends. (The next one may
        have been made ahead of time; it does not count before something is in it.)"""
        control = ControlState.parse(self.control.read_bytes())
        return [self.directory / extent.piece.file_name for extent in control.log.extents]

    def frames(self, piece: Path, end_lsn: int) -> list[tuple[int, int]]:
        """(start, end) of every frame in the file."""
        data = piece.read_bytes()
        index = index_frames(data, PieceHeader.parse(data), end_lsn)
        return list(itertools.pairwise(index.offsets))

    def closed_frames(self) -> list[tuple[int, int]]:
        control = ControlState.parse(self.control.read_bytes())
        return self.frames(self.pieces[0], control.log.extents[0].end_lsn or self.end_lsn)

    def open_frames(self) -> list[tuple[int, int]]:
        return self.frames(self.pieces[-1], self.end_lsn)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with ForkedCluster(settings={"compute": {"poll_interval_s": 0.2}}) as cluster:
        first = await cluster.create_project("first")
        names = ("second", "third", "other")
        *more, other = [await cluster.create_project(name, first.project.workspace_id) for name in names]
        logs = [Log(cluster, project) for project in (first, *more)]
        connection = await asyncpg.connect(**other.connection.asyncpg_arguments(), timeout=60)
        await connection.execute("create table t as select n from generate_series(1, 500) n")
        await connection.close()
        await stop_and_settle(other, cluster)
        for _ in range(3):
            await asyncio.gather(*(log.write() for log in logs))
        scene = Scene(cluster, logs, other, tmp_path_factory.mktemp("kept"))
        await scene.take()
        yield scene


# --- what is served ---


async def served(log: Log, index: int) -> bytes | KeylakeError:
    """The log of one safekeeper, as far as it says that it reaches; or why not."""

    async def look() -> int | KeylakeError | None:
        status, timeline = await log.place.safekeeper_status(index)
        mine = next((f for f in status.fault.split("; ") if str(log.place.timeline_id) in f), "")
        if "not ready" in mine:
            return None
        if mine:
            return IntegrityError(mine)
        return NotFoundError("no such timeline") if timeline is None else timeline.flush_lsn.value

    found = await wait_until(look)
    try:
        # Whatever its status says, it is asked for the bytes.
        return await log.place.wal(index, log.start_lsn, found if isinstance(found, int) else log.end_lsn)
    except UnavailableError as error:
        raise AssertionError("neither bytes nor a reason") from error
    except KeylakeError as error:
        return error


async def assert_refused(log: Log, index: int) -> None:
    found = await served(log, index)
    assert found != log.wal, f"{NODES[index]} has not noticed"
    assert isinstance(found, IntegrityError), f"{NODES[index]}: wrong WAL, or the wrong error: {found!r:.200}"


async def assert_same(log: Log, index: int) -> None:
    found = await served(log, index)
    assert found == log.wal, f"{NODES[index]}: {found!r:.200}"


async def assert_torn(log: Log, index: int) -> None:
    """An election makes it good: `test_an_older_copy_of_a_disk_is_brought_up_to_date`."""
    found = await served(log, index)
    if isinstance(found, bytes):
        assert 0 < len(found) < len(log.wal)
        assert log.wal.startswith(found)
    else:
        assert isinstance(found, IntegrityError)
        assert "committed" in str(found)


# --- damage ---

Damage = Callable[[Scene, Files], None]


def of(choose: Callable[[Files], Path], change: Change) -> Damage:
    def damage(_: Scene, files: Files) -> None:
        path = choose(files)
        before = path.read_bytes()
        after = change(before)
        assert after != before
        if after is None:
            path.unlink()
        else:
            path.write_bytes(after)

    return damage


def control(files: Files) -> Path:
    return files.control


def closed(files: Files) -> Path:
    return files.pieces[0]


def last(files: Files) -> Path:
    return files.pieces[-1]


def key_of(choose: Callable[[Files], Path]) -> Callable[[Files], Path]:
    return lambda files: choose(files).with_name(f"{choose(files).name}.key")


def in_frame(choose: Callable[[Files], list[tuple[int, int]]], number: int, at: int, piece: int) -> Damage:
    """One bit of a frame, `at` from its start or, if negative, from its end."""

    def damage(scene: Scene, files: Files) -> None:
        start, end = choose(files)[number]
        of(lambda files: files.pieces[piece], flip(start + at if at >= 0 else end + at))(scene, files)

    return damage


def rewritten(change: Callable[[bytes, list[tuple[int, int]]], bytes], piece: int) -> Damage:
    """`change` gets the piece and its frames."""

    def damage(scene: Scene, files: Files) -> None:
        frames = files.closed_frames() if piece == 0 else files.open_frames()
        of(lambda files: files.pieces[piece], lambda data: change(data, frames))(scene, files)

    return damage


def crc(data: bytes) -> bytes:
    value: int = google_crc32c.value(data)
    return value.to_bytes(4, "big")


def with_crc(change: Change, length: int) -> Change:
    """The first `length` bytes changed, and the CRC-32C behind them made right: it is no protection from people."""

    def forged(data: bytes) -> bytes:
        body = (change(data) or b"")[:length]
        return body + crc(body) + data[length + 4 :]

    return forged


def copied(source: Callable[[Scene, Files], Files], what: Iterable[str], source_piece: int = 0) -> Damage:
    """A piece ("") and/or its key (".key") of somebody else, in the place of our first one."""

    def damage(scene: Scene, files: Files) -> None:
        ours, theirs = files.pieces[0], source(scene, files).pieces[source_piece]
        for suffix in what:
            shutil.copy(theirs.with_name(theirs.name + suffix), ours.with_name(ours.name + suffix))

    return damage


def peer(scene: Scene, files: Files) -> Files:
    """The same timeline on another safekeeper."""
    node = next(node for node in NODES if node != files.node.name)
    return replace(files, node=scene.kept / node)


def stranger(scene: Scene, files: Files) -> Files:
    """Another project's timeline on this safekeeper."""
    return replace(files, place=Place.of(scene.cluster, scene.other.timeline))


def itself(scene: Scene, files: Files) -> Files:
    return replace(files, node=scene.kept / files.node.name)


CONTROL_FIELDS = {"magic": 0, "version": 4, "name length": 7, "project": 12, "timeline": 33, "reserved": 47}
CONTROL_FIELDS |= {"system identifier": 50, "start": 62, "term": 71, "commit": 78, "sequence": 83, "history length": 87}
CONTROL_FIELDS |= {"pieces": 91, "node": 95, "extent": -20, "CRC": -1}
PIECE_FIELDS = {"magic": 0, "version": 4, "suite": 5, "reserved": 7, "segment": 15, "term": 23, "sequence": 27}
PIECE_FIELDS |= {"start": 33, "CRC": 39}
FRAME_FIELDS = {"CRC": 0, "length": 7, "number": 15, "LSN": 23, "ciphertext": FRAME_HEADER_SIZE_BYTES, "tag": -1}
ENVELOPE = {"magic": 0, "KEK id": 9, "KEK version": 17, "nonce": 20, "wrapped DEK": 40, "commitment": 90}


def swap_frames(data: bytes, frames: list[tuple[int, int]]) -> bytes:
    (a, b), (_, c) = frames[0], frames[1]
    return data[:a] + data[b:c] + data[a:b] + data[c:]


REFUSED: dict[str, Damage] = {
    **{f"control: {name}": of(control, flip(at)) for name, at in CONTROL_FIELDS.items()},
    "control: cut": of(control, cut(-1)),
    "control: a byte more": of(control, extend(b"\0")),
    "control: emptied": of(control, become(b"")),
    "control: removed": of(control, lambda _: None),
    "control: of a peer": lambda scene, files: _copy(peer(scene, files).control, files.control),
    "control: of another project": lambda scene, files: _copy(stranger(scene, files).control, files.control),
    **{f"piece: {name}": of(closed, flip(at)) for name, at in PIECE_FIELDS.items()},
    "piece: null suite and a good CRC": of(closed, with_crc(put(5, b"\xff"), 36)),
    "piece: another start and a good CRC": of(closed, with_crc(flip(35, 3), 36)),
    **{f"first frame: {name}": in_frame(Files.closed_frames, 0, at, 0) for name, at in FRAME_FIELDS.items()},
    **{f"last frame of all: {name}": in_frame(Files.open_frames, -1, at, -1) for name, at in FRAME_FIELDS.items()},
    "a frame in the middle: tag": rewritten(lambda data, f: flip(f[len(f) // 2][1] - 1)(data) or b"", 0),
    "a frame in the middle: zeros": rewritten(
        lambda data, f: put(f[len(f) // 2][0], bytes(f[len(f) // 2][1] - f[len(f) // 2][0]))(data) or b"", 0
    ),
    "first frame: longer, and a good CRC": rewritten(
        lambda data, f: (
            data[: f[0][0]] + _longer(data[f[0][0] : f[0][0] + FRAME_HEADER_SIZE_BYTES]) + data[f[0][0] + 24 :]
        ),
        0,
    ),
    "two frames changed places": rewritten(swap_frames, 0),
    "first frame twice": rewritten(lambda data, f: data[: f[0][1]] + data[f[0][0] : f[0][1]] + data[f[0][1] :], 0),
    "piece: cut at a frame's end": rewritten(lambda data, f: data[: f[-2][1]], 0),
    "piece: cut inside of a frame": rewritten(lambda data, f: data[: f[-1][1] - 5], 0),
    "piece: emptied": of(closed, become(b"")),
    "piece: removed": of(closed, lambda _: None),
    "last piece: something behind its last frame": rewritten(lambda data, f: data[: f[-1][1]] + b"x" * 2000, -1),
    "last piece: removed": of(last, lambda _: None),
    **{f"key: {name}": of(key_of(closed), flip(at)) for name, at in ENVELOPE.items()},
    "key: cut": of(key_of(closed), cut(-1)),
    "key: removed": of(key_of(closed), lambda _: None),
    "last key: wrapped DEK": of(key_of(last), flip(40)),
    "piece of another project": copied(stranger, [""]),
    "piece of another project with its key": copied(stranger, ["", ".key"]),
    "piece of a peer": copied(peer, [""]),
    "piece of a peer with its key": copied(peer, ["", ".key"]),
    "key of a peer": copied(peer, [".key"]),
    "piece of another term with its key": copied(itself, ["", ".key"], 1),
}
TORN: dict[str, Damage] = {
    "last piece: cut at a frame's end": rewritten(lambda data, f: data[: f[len(f) // 2][1]], -1),
    "last piece: cut inside of a frame": rewritten(lambda data, f: data[: f[len(f) // 2][1] - 5], -1),
    "last piece: zeros from a frame on": rewritten(
        lambda data, f: data[: f[len(f) // 2][0]] + bytes(len(data) - f[len(f) // 2][0]), -1
    ),
    "last piece: cut inside of its last frame": rewritten(lambda data, f: data[: f[-1][1] - 5], -1),
    "last piece: last frame never written": rewritten(
        lambda data, f: data[: f[-1][0]] + bytes(f[-1][1] - f[-1][0]), -1
    ),
}
"""The end is missing, as after a crash in the middle of a write. It is refused if this safekeeper knows that it was
committed; commit_lsn is a hint, and one that was away may not have heard it."""
SAME: dict[str, Damage] = {
    "something behind a piece that is closed": of(closed, extend(b"x" * 5000)),
    "zeros behind the last piece": of(last, extend(bytes(5000))),
    "a file that is not part of the log": lambda _, files: _copy(
        files.pieces[0], files.directory / "0000000000000009.0000000000000009.0099"
    ),
}
CASES = {name: (damage, assert_refused) for name, damage in REFUSED.items()}
CASES |= {name: (damage, assert_torn) for name, damage in TORN.items()}
CASES |= {name: (damage, assert_same) for name, damage in SAME.items()}
LOGS = 3
ROUNDS = [list(CASES)[at : at + LOGS * len(NODES)] for at in range(0, len(CASES), LOGS * len(NODES))]


def _copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def _longer(header: bytes) -> bytes:
    fields = (int.from_bytes(header[4:8], "big") + 8).to_bytes(4, "big") + header[8:]
    return crc(fields) + fields


@pytest.mark.parametrize("names", ROUNDS, ids=lambda names: f"{names[0]} … {names[-1]}")
async def test_damage_is_refused_and_nothing_else_suffers(scene: Scene, names: list[str]) -> None:
    """A case for each log on each safekeeper. The other project on the same disks goes on as if nothing was."""
    places = [(log, index) for log in scene.logs for index in range(len(NODES))]
    dealt = list(zip(names, places, strict=False))
    async with scene.restarted():
        for name, (log, index) in dealt:
            CASES[name][0](scene, log.files(index))
    for name, (log, index) in dealt:
        try:
            await CASES[name][1](log, index)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    other = Place.of(scene.cluster, scene.other.timeline)
    for index in range(len(NODES)):
        _, timeline = await other.safekeeper_status(index)
        assert timeline is not None
        start = scene.other.timeline.start_lsn.value
        assert len(await other.wal(index, start, timeline.flush_lsn.value)) == timeline.flush_lsn.value - start


async def test_directories_do_not_pass_for_one_another(scene: Scene) -> None:
    """Of two projects on one safekeeper, and of one project on two safekeepers."""
    async with scene.restarted():
        one, two, three = (scene.log.files(index) for index in range(3))
        exchange(one.directory, stranger(scene, one).directory)
        exchange(two.directory, three.directory)
    for index in range(3):
        await assert_refused(scene.log, index)


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


# --- what a quorum makes good ---


async def rows(scene: Scene) -> None:
    """Start a compute, and compare every row; then stop it."""
    connection = await asyncpg.connect(**scene.log.project.connection.asyncpg_arguments(), timeout=60)
    expected = await connection.fetchrow(
        "select count(*), md5(string_agg(t::text, '|' order by n)) from"
        " (select n, md5(n::text) as body from generate_series(0, $1::int - 1) n) t",
        scene.log.batches * BATCH,
    )
    assert await connection.fetchrow(ROWS) == expected
    await connection.close()


async def test_a_damaged_safekeeper_is_left_out_and_commits_go_on(scene: Scene) -> None:
    async with scene.restarted():
        in_frame(Files.open_frames, -1, -1, -1)(scene, scene.log.files(0))
    await assert_refused(scene.log, 0)
    await rows(scene)
    problem = (await scene.cluster.client.endpoint(scene.log.project.endpoint.endpoint_id)).reason
    assert "safekeeper-1" in problem
    status, _ = await scene.log.place.safekeeper_status(0)
    assert str(scene.log.place.timeline_id) in status.fault
    await scene.cluster.client.stop_endpoint(scene.log.project.endpoint.endpoint_id)
    # Its disk comes back from a copy, older than its peers by now: it is brought up to date.
    await scene.cluster.service("safekeeper-1").kill()
    shutil.rmtree(scene.log.files(0).node)
    shutil.copytree(scene.kept / "safekeeper-1", scene.log.files(0).node)
    await scene.cluster.service("safekeeper-1").start()
    await scene.log.write()
    await scene.take()
    for index in range(3):
        await assert_same(scene.log, index)


async def test_an_older_copy_of_a_disk_is_brought_up_to_date(scene: Scene) -> None:
    """Nobody can tell it from one that was away."""
    async with scene.restarted():
        before = scene.log.end_lsn
    await scene.log.write()
    await roll_back(scene, 0)
    assert await served(scene.log, 0) == scene.log.wal, "the old log, whole"
    _, timeline = await scene.log.place.safekeeper_status(0)
    assert timeline is not None
    assert timeline.flush_lsn == Lsn(before)
    await rows(scene)
    await scene.log.write()
    await scene.take()
    for index in range(3):
        await assert_same(scene.log, index)


async def roll_back(scene: Scene, *indexes: int) -> None:
    await asyncio.gather(*(scene.cluster.service(node).kill() for node in NODES))
    for index in indexes:
        shutil.rmtree(scene.log.files(index).node)
        shutil.copytree(scene.kept / NODES[index], scene.log.files(index).node)
    await asyncio.gather(*(scene.cluster.service(node).start() for node in NODES))


async def test_older_copies_of_a_majority_never_give_older_data(scene: Scene, tmp_path: Path) -> None:
    """A documented limit: two disks at once, as they once were, are a quorum that has lost commits.

    If the third one votes in time, its longer log is taken and nothing is lost. If not, the pageserver knows more than
    the quorum, and no compute starts on it: nobody reads old data as if it were new.
    """
    async with scene.restarted():
        pass
    await scene.log.write()
    await asyncio.gather(*(scene.cluster.service(node).kill() for node in NODES))
    for node in NODES:
        shutil.copytree(scene.cluster.layout.data / node, tmp_path / node)
    await roll_back(scene, 0, 2)
    try:
        await rows(scene)
    except asyncpg.CannotConnectNowError as error:
        assert "end of the log" in str(error)  # noqa: PT017 - it need not be raised
        shutil.rmtree(scene.kept)
        shutil.copytree(tmp_path, scene.kept)
        async with scene.restarted():
            pass
        await rows(scene)
    await scene.log.write()
    await scene.take()


async def test_a_forged_control_file_costs_the_tail_of_one_copy_and_no_commit(scene: Scene) -> None:
    """A documented limit: the control file has a checksum and no seal (it must be readable without the key).

    Who forges it can make a safekeeper forget its newest pieces, or what it promised; WAL he cannot forge. That is one
    rolled back disk, and the quorum deals with it.
    """
    async with scene.restarted():
        path = scene.log.files(0).control
        state = ControlState.parse(path.read_bytes())
        extents = state.log.extents[:-1]
        end = extents[-1].end_lsn
        assert end is not None
        entries = tuple(entry for entry in state.acceptor.history.entries if entry.start_lsn < end)
        history = type(state.acceptor.history).of(entries)
        acceptor = replace(state.acceptor, commit_lsn=end, history=history, term=history.last_term)
        path.write_bytes(replace(state, acceptor=acceptor, log=replace(state.log, extents=extents)).serialize())
    found = await served(scene.log, 0)
    assert isinstance(found, bytes)
    assert 0 < len(found) < len(scene.log.wal)
    assert scene.log.wal.startswith(found), "never other WAL"
    await rows(scene)
    await scene.log.write()
    await scene.take()
    for index in range(3):
        await assert_same(scene.log, index)


async def test_a_majority_of_damaged_safekeepers_stops_everything_and_loses_nothing(scene: Scene) -> None:
    async with scene.restarted():
        for index in (0, 1):
            of(key_of(last), flip(40))(scene, scene.log.files(index))
    endpoint_id = scene.log.project.endpoint.endpoint_id
    with pytest.raises(KeylakeError):
        await scene.cluster.client.start_endpoint(endpoint_id)
    assert (await scene.cluster.client.endpoint(endpoint_id)).state is EndpointState.STOPPED
    async with scene.restarted():
        pass
    await rows(scene)
    await scene.log.write()
    await scene.take()
