"""No plaintext of user data and no key on any disk: canaries in every place, and a search of every byte.

The same search of a cluster with the null cipher is the positive control: there it must find them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from compute.volume.base import VolumeKind
from keylake.cluster import Cluster, RunningProject
from shared.api.compute import EndpointState
from shared.errors import IntegrityError, KeylakeError
from shared.ids import EndpointId
from tests.cluster_secrecy import disks, lazy
from tests.cluster_secrecy.canaries import (
    IN_LOG,
    IN_WAL,
    ON_REPLICA,
    STORED,
    VOLATILE,
    WRITTEN_AGAIN,
    Canaries,
    Search,
    plant,
    plant_again,
    plant_on_replica,
    search,
    spellings,
)
from tests.cluster_secrecy.keys import credentials, plaintext_keys
from tests.cluster_secrecy.storage import Place
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True, slots=True)
class LazyVolume:
    """The one volume that has files on a disk."""

    blocks: set[str]
    """Kinds in plain text in the files without a name, the compute's and its replica's, that all of it lies in."""
    search: Search
    """Of these files."""


@dataclass(slots=True)
class Evidence:
    """What was seen of one cluster's life, which is over."""

    home: Path
    canaries: Canaries = field(default_factory=Canaries)
    endpoint_id: EndpointId = field(default_factory=EndpointId.new)
    searches: dict[str, dict[str, Search]] = field(default_factory=dict)
    """When → where → what was found."""
    kinds: dict[str, set[str]] = field(default_factory=dict)
    """Where → kinds of canaries that stand there in plain text."""
    processes: list[disks.Process] = field(default_factory=list)
    keys: dict[str, bytes] = field(default_factory=dict)
    credentials: dict[str, bytes] = field(default_factory=dict)
    readable_by_others: list[str] = field(default_factory=list)
    runtime_dir: Path = Path()
    lazy: LazyVolume | None = None
    tmpfs: set[str] | None = None
    """Kinds of canaries on a tmpfs volume, as Postgres sees them. Both None where there is no FUSE: then the volume of
    everything else is tmpfs."""


async def observe(home: Path, *, null_cipher: bool) -> Evidence:
    """Start a cluster, plant everything, kill its compute, start another one on tmpfs, plant again, stop that, end all;
    look at all disks at each point."""
    evidence = Evidence(home)
    canaries = evidence.canaries
    async with Cluster(home, null_cipher=null_cipher) as cluster:
        evidence.runtime_dir = disks.runtime_dir(cluster)
        project = await cluster.create_project("secrecy")
        evidence.endpoint_id = project.endpoint.endpoint_id
        planted = await plant(canaries, project.connection.asyncpg_arguments())
        assert planted.application_name == canaries.word("application")
        await flushed(cluster, project)
        evidence.processes = disks.processes(cluster)
        evidence.credentials = credentials(cluster) | {"owner's password": project.connection.password.encode()}
        pgdata = volumes(evidence.processes)
        evidence.kinds["volume"] = canaries.kinds_in(pgdata)
        replica = await cluster.client.create_endpoint(project.timeline, "replica", follows=True)
        connection = dataclasses.replace(project.connection, endpoint_id=replica.endpoint_id)
        on_replica = await plant_on_replica(canaries, connection.asyncpg_arguments())
        evidence.processes = disks.processes(cluster)
        [pgdata_of_replica] = set(volumes(evidence.processes)) - set(pgdata)
        evidence.kinds["replica's volume"] = canaries.kinds_in([pgdata_of_replica])
        if not lazy.why_not():
            for each in (*pgdata, pgdata_of_replica):
                await asyncio.to_thread(lazy.flush, each)
            blocks = [server.blocks for server in lazy.servers(evidence.processes, cluster)]
            assert len(blocks) == 2
            evidence.lazy = LazyVolume(canaries.kinds_in(blocks), canaries.search(blocks))
        await asyncio.to_thread(look, evidence, cluster, "while a compute runs")
        for endpoint in (project.endpoint, replica):
            await cluster.client.kill_endpoint(endpoint.endpoint_id)
        await planted.close()
        await on_replica.close()
        await asyncio.to_thread(look, evidence, cluster, "after a compute was killed")
        evidence.keys = await plaintext_keys(cluster)
        evidence.readable_by_others = disks.readable_by_others([home, evidence.runtime_dir])
        if not lazy.why_not():
            await observe_tmpfs(evidence, cluster, project)
    evidence.searches["after the end"] = {"home directory": canaries.search([home])}
    return evidence


async def observe_tmpfs(evidence: Evidence, cluster: Cluster, project: RunningProject) -> None:
    await lazy.use_volume(cluster, VolumeKind.TMPFS)
    planted = await plant_again(evidence.canaries, project.connection.asyncpg_arguments())
    running = disks.processes(cluster)
    evidence.processes += running
    evidence.tmpfs = evidence.canaries.kinds_in(volumes(running))
    await asyncio.to_thread(look, evidence, cluster, "while a compute runs on tmpfs")
    # Gracefully: then it lists for the metadata database who may log in, and a role's name is a canary.
    await cluster.client.stop_endpoint(project.endpoint.endpoint_id)
    await planted.close()


async def flushed(cluster: Cluster, project: RunningProject) -> None:
    """Returns when every row is in the object store."""
    place = Place.of(cluster, project.timeline)
    await place.caught_up()
    info = await place.checkpoint()
    assert info.in_memory_size_bytes == 0


def volumes(cluster_processes: list[disks.Process]) -> list[Path]:
    """The computes' data directories, through their postmasters' mount namespaces."""
    found = []
    for process in cluster_processes:
        program, _, arguments = process.argv.partition(b"\0-D\0")
        pgdata = Path(arguments.partition(b"\0")[0].decode())
        if program.endswith(b"/postgres") and pgdata.name == "pgdata":
            found.append(Path(f"/proc/{process.pid}/root") / pgdata.relative_to("/"))
    return found


def look(evidence: Evidence, cluster: Cluster, when: str) -> None:
    places = disks.persistent(cluster) | {"shared memory": disks.shared_memory_of(disks.processes(cluster))}
    evidence.searches[when] = {name: evidence.canaries.search(paths) for name, paths in places.items()}
    for name, paths in places.items():
        evidence.kinds[name] = evidence.kinds.get(name, set()) | evidence.canaries.kinds_in(paths)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sealed(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return await observe(tmp_path_factory.mktemp("sealed"), null_cipher=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unsealed(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return await observe(tmp_path_factory.mktemp("unsealed"), null_cipher=True)


# --- user data ---


async def test_no_canary_is_on_any_disk(sealed: Evidence) -> None:
    for when, places in sealed.searches.items():
        for where, result in places.items():
            assert not result.found, f"{when}, in the {where}: {', '.join(map(str, result.found))}"


async def test_every_part_was_looked_at(sealed: Evidence) -> None:
    """A search that looks at nothing finds nothing."""
    running = sealed.searches["while a compute runs"]
    least_bytes = {
        "object store": 15_000_000,
        "safekeepers": 3_000_000,
        "pageserver's cache": 15_000_000,
        "compute logs": 200,
        "metadata database": 10_000_000,
        "customer's cloud": 1_000,
        "service logs": 1_000,
        "settings and keys": 1_000,
    }
    assert {name: least for name, least in least_bytes.items() if running[name].size_bytes < least} == {}
    killed = sealed.searches["after a compute was killed"]
    assert killed["compute logs"].files > 0, "a killed compute cannot remove its sealed log"
    total = sum(result.size_bytes for result in killed.values())
    assert sealed.searches["after the end"]["home directory"].size_bytes > total * 0.9


async def test_without_encryption_the_same_search_finds_everything(unsealed: Evidence) -> None:
    assert unsealed.kinds["object store"] >= STORED
    assert unsealed.kinds["pageserver's cache"] >= STORED
    assert unsealed.kinds["safekeepers"] >= IN_WAL
    assert unsealed.kinds["compute logs"] >= IN_LOG
    for when in unsealed.searches.keys() - {"after a compute was killed", "after the end"}:
        for name in ("object store", "safekeepers", "pageserver's cache", "compute logs"):
            assert unsealed.searches[when][name].words == {"canary"}, when


async def test_what_is_volatile_was_there_and_never_left_memory(sealed: Evidence, unsealed: Evidence) -> None:
    """Temporary files, temporary and unlogged tables: on the compute's volume in plain text, and nowhere else, whatever
    the cipher."""
    for evidence in (sealed, unsealed):
        assert evidence.kinds["volume"] >= VOLATILE | STORED
        assert evidence.kinds["replica's volume"] >= ON_REPLICA | STORED
        assert evidence.tmpfs is None or evidence.tmpfs >= WRITTEN_AGAIN
        for where in evidence.kinds.keys() - {"volume"}:
            assert not evidence.kinds[where] & VOLATILE, where
        for where in evidence.kinds.keys() - {"replica's volume"}:
            assert not evidence.kinds[where] & ON_REPLICA, where


async def test_what_a_lazy_volume_writes_is_sealed_on_its_disk(sealed: Evidence, unsealed: Evidence) -> None:
    """Temporary files, temporary and unlogged tables, WAL, pages: in the clear for Postgres, and in its volume's file
    only without a cipher."""
    if why := lazy.why_not():
        pytest.skip(why)
    assert sealed.lazy is not None
    assert unsealed.lazy is not None
    for evidence in (sealed.lazy, unsealed.lazy):
        assert evidence.search.size_bytes > 5_000_000, "what was spilled, at least"
    assert unsealed.lazy.blocks >= VOLATILE | IN_WAL | ON_REPLICA
    assert not sealed.lazy.search.found, ", ".join(map(str, sealed.lazy.search.found))


async def test_only_sealed_parts_of_the_null_cluster_hold_canaries(unsealed: Evidence) -> None:
    """What is not sealed holds no user data in the first place."""
    for when in ("while a compute runs", "after a compute was killed"):
        for name in ("metadata database", "customer's cloud", "service logs", "settings and keys", "sockets"):
            found = unsealed.searches[when][name].found
            assert not found, f"{when}, in the {name}: {', '.join(map(str, found))}"


@pytest.mark.parametrize("spelling", spellings(b"any"))
async def test_each_spelling_is_found_wherever_it_stands(tmp_path: Path, spelling: str) -> None:
    """The search itself, at the border of two of its chunks and at any offset."""
    canaries = Canaries()
    needle = spellings(canaries.stem.encode())[spelling]
    for offset in (0, 7, 8 * 1024 * 1024 - len(needle) // 2):
        path = tmp_path / f"at-{offset}"
        path.write_bytes(bytes(offset) + needle + b"\0behind")
        assert {(f.path, f.spelling) for f in canaries.search([tmp_path]).found} >= {(path, spelling)}
        path.write_bytes(bytes(offset) + needle[:-2] + b"\xff\xff")
        assert not canaries.search([tmp_path]).found


# --- where bytes may go ---


async def test_no_process_writes_to_any_other_place(sealed: Evidence) -> None:
    allowed = (sealed.home, sealed.runtime_dir)
    elsewhere = {
        (str(path), process.argv.replace(b"\0", b" ")[:80])
        for process in sealed.processes
        for path in process.written
        if not path.is_relative_to(allowed[0]) and not path.is_relative_to(allowed[1])
    }
    assert not elsewhere
    assert sum(len(process.written) for process in sealed.processes) > 10, "positive control: open files are seen"


async def test_nobody_else_may_read_any_file(sealed: Evidence) -> None:
    assert sealed.readable_by_others == []


# --- keys ---


async def test_no_key_is_on_any_disk(sealed: Evidence, tmp_path: Path) -> None:
    """The test opens all KEKs and DEKs as the customer could, and looks for their bytes."""
    assert sum(name.startswith("KEK") for name in sealed.keys) == 1
    assert sum(name.startswith("DEK") for name in sealed.keys) >= 3 + 2 + 2, "pieces, layers, indexes"
    assert all(len(key) == 32 for key in sealed.keys.values())
    result = await asyncio.to_thread(search, [sealed.home], sealed.keys)
    assert not result.found, ", ".join(map(str, result.found))
    for number, key in enumerate(sealed.keys.values()):  # positive control
        (tmp_path / str(number)).write_bytes(b"x" * 1001 + key + b"y")
    assert search([tmp_path], sealed.keys).words == sealed.keys.keys()


async def test_credentials_are_where_they_belong_and_nowhere_else(sealed: Evidence) -> None:
    """Private keys and passwords are in one file of mode 0600 each, not in logs, databases or objects."""
    belongs = (sealed.home / "keys", sealed.home / "pki", sealed.home / "config")
    cloud = sealed.home / "data" / "customercloud"
    result = await asyncio.to_thread(search, [sealed.home], sealed.credentials)
    strays = [
        finding
        for finding in result.found
        if finding.path.parent not in belongs
        and not (finding.word == "cloud's admin token" and finding.path.is_relative_to(cloud))
    ]
    assert not strays, ", ".join(map(str, strays))
    assert result.words >= sealed.credentials.keys() - {"owner's password", "customer's secret access key"}


async def test_argv_and_environ_hold_no_secret(sealed: Evidence) -> None:
    assert disks.told(sealed.processes, sealed.keys | sealed.credentials) == []
    token = re.compile(rb"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+\.")  # how every JWT begins: {"
    services = {b"keymanager", b"safekeeper", b"pageserver", b"compute", b"compute.proxy", b"compute.agent"}
    services |= set() if sealed.lazy is None else {b"compute.volume"}
    seen: set[bytes] = set()
    for process in sealed.processes:
        seen |= services & set(process.argv.split(b"\0"))
        for text in (process.argv, process.environ):
            assert not token.search(text)
            assert b"PRIVATE KEY" not in text
    assert seen == services, "positive control: all processes were looked at"


# --- the null cipher is for tests ---


@asynccontextmanager
async def reopened(evidence: Evidence) -> AsyncIterator[Cluster]:
    """The disks of the null cluster under services that were started as usual."""
    async with Cluster(evidence.home) as cluster:
        yield cluster


async def test_services_refuse_what_the_null_cipher_sealed(unsealed: Evidence) -> None:
    """Or anybody who can write to a disk could choose not to be encrypted, and what to have written."""
    async with reopened(unsealed) as cluster:
        [timeline] = await cluster.client.timelines((await cluster.client.projects())[0].project_id)
        place = Place.of(cluster, timeline)
        for index in range(3):
            status, _ = await place.safekeeper_status(index)
            assert "null suite is refused" in status.fault
            with pytest.raises(IntegrityError):
                await place.wal(index, timeline.start_lsn.value, timeline.start_lsn.value + 8192)

        async def refusal() -> KeylakeError | None:
            with pytest.raises(KeylakeError) as caught:
                await place.everything(timeline.start_lsn.value)
            return caught.value if isinstance(caught.value, IntegrityError) else None

        await wait_until(refusal)
        with pytest.raises(KeylakeError):
            await cluster.client.start_endpoint(unsealed.endpoint_id)
        assert (await cluster.client.endpoint(unsealed.endpoint_id)).state is EndpointState.STOPPED
