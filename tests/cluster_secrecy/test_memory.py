"""Keys leave memory: all writable memory of every live process is searched for them, and for what ciphers make of them.

While the customer allows it they must be found (the positive control), each in the one service that needs it. After a
revocation, and after the last lease has run out by itself, they must not be found anywhere. The customer's cloud is
not searched: it is the customer's HSM.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from compute.sealed_log import KEY_LABEL as LOG_KEY_LABEL
from compute.sealed_log import read_batches
from compute.volume.base import VolumeKind
from compute.volume.key_channel import KEY_LABEL as VOLUME_KEY_LABEL
from compute.volume.sealed_blocks import block_key
from customercloud.faults import Faults, KeyFaults, Outage
from keylake.cluster import Cluster, RunningProject
from shared.api.compute import EndpointState
from shared.api.keymanager import KeyState, Role
from shared.crypto.aead import AeadKey, counter_nonce
from shared.crypto.derive import derive_key
from shared.crypto.secret import SecretKey
from shared.errors import IntegrityError, KeyAccessError, KeylakeError, UnavailableError
from tests.cluster.people import shred_by_two
from tests.cluster.processes import below
from tests.cluster_secrecy import disks, lazy, memory
from tests.cluster_secrecy.canaries import search
from tests.cluster_secrecy.keys import plaintext_keys
from tests.cluster_secrecy.storage import Place
from tests.fixtures.waiting import wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root reads the memory of processes that are not dumpable"),
]

CANARY = "pelican"
"""300 times in a row, stored as they are. Pieces of up to 1 KiB may stay in memory until it is used again
(shared/hardening.py), so more than that is searched for."""
ROWS = "rows"
REDO = "redo worker"
OWNERS = {"KEK": "keymanager", "DEK of wal": "safekeeper", "DEK of projects": "pageserver"}
"""Beginning of a key's name → the service that may have it."""


LEASE_TTL_S = 2.0
AGENTS_KEYS = {("compute.agent", "boot key", "raw"), *(("compute.agent", "log key", f) for f in ("raw", "schedule"))}
"""(process, key, form), on any volume. The boot key is no cipher's."""
VOLUMES_KEYS = {
    ("compute.volume", "volume key", "raw"),
    ("compute.volume", "block key", "raw"),
    ("compute.volume", "block key", "schedule"),
}
"""Of a lazy one's server."""


@dataclass(slots=True)
class Tenant:
    cluster: Cluster
    key_arn: str
    project: RunningProject
    canary: str = CANARY
    keys: dict[str, bytes] = field(default_factory=dict)
    lsn: int = 0
    """Both of the last `work`: every key that there was, and the end of the WAL."""

    async def work(self) -> None:
        """Rows in every cache: the compute's, the safekeepers' tail, the pageserver's memory and its object store."""
        await wait_until(self.endpoint_starts, 30)
        connection = await asyncpg.connect(**self.project.connection.asyncpg_arguments(), timeout=60)
        await connection.execute("create table if not exists t (x text)")
        await connection.execute("alter table t alter x set storage plain")
        await connection.execute("insert into t select repeat($1, 300) from generate_series(1, 20)", self.canary)
        await connection.close()
        place = Place.of(self.cluster, self.project.timeline)
        self.lsn = (await place.caught_up()).last_record_lsn.value
        await place.checkpoint()
        await place.everything(self.lsn)
        self.keys = some(await plaintext_keys(self.cluster, self.project.project.project_id))

    async def endpoint_starts(self) -> bool:
        """False while somebody does not have the keys back yet."""
        try:
            await self.cluster.client.start_endpoint(self.project.endpoint.endpoint_id)
        except KeylakeError:
            return False
        return True

    async def boot_keys(self) -> BootKeys:
        """Of its compute, which has something in its log then."""
        connection = await asyncpg.connect(**self.project.connection.asyncpg_arguments(), timeout=60)
        await connection.execute("do $$ begin raise warning 'for the log'; end $$")
        await connection.close()
        return BootKeys.find(self.cluster)

    def search(self, boot_keys: BootKeys | None = None) -> list[memory.Finding]:
        """For all keys that there were when work was done last, and for the rows; and for these."""
        patterns = {(name, form): data for name, key in self.keys.items() for form, data in forms(name, key).items()}
        patterns[ROWS, "raw"] = (self.canary * 200).encode()
        if boot_keys is not None:
            patterns |= boot_keys.patterns
        return memory.search(process_names(self.cluster), patterns)

    async def left(self, boot_keys: BootKeys) -> list[memory.Finding | str]:
        """Keys and rows. And redo workers: what one has at hand may be too short to be searched for."""
        workers = [name for name in process_names(self.cluster).values() if name == REDO]
        return [*await asyncio.to_thread(self.search, boot_keys), *workers]

    async def refuses_everything(self) -> bool:
        """Neither the pageserver nor a safekeeper gives a byte away."""
        place = Place.of(self.cluster, self.project.timeline)
        for index in range(len(self.cluster.ports.safekeepers)):
            if not await refused(place.wal(index, self.lsn - 8, self.lsn)):
                return False
        return await refused(place.everything(self.lsn))

    async def project_is(self, state: KeyState) -> None:
        async def look() -> bool:
            return (await self.cluster.client.project(self.project.project.project_id)).state is state

        await wait_until(look, 30)

    async def sealed(self) -> None:
        """Returns when every instance has acknowledged the last revocation."""

        async def look() -> bool:
            found = await self.cluster.client.revocations(self.project.project.project_id)
            return bool(found) and all(each.sealed_after_s is not None for each in found)

        await wait_until(look, 30)


async def refused(asked: Awaitable[object]) -> bool:
    """False for who was cut off by the end of the lease, too: that is no answer."""
    try:
        await asked
    except KeyAccessError:
        return True
    except UnavailableError:
        pass
    return False


def opens_a_log(key: bytes, cluster: Cluster) -> bool:
    """Is it the key of a compute whose sealed log lies here?"""
    for path in (cluster.layout.data / "compute-logs").glob("*.log.*"):
        aad = b"keylake compute log 1\0" + path.name.partition(".")[0].encode()
        for counter, sealed in read_batches(path.read_bytes())[:1]:
            with suppress(IntegrityError):
                AeadKey(SecretKey(key)).open(counter_nonce(counter), sealed, aad)
                return True
    return False


@dataclass(frozen=True, slots=True)
class BootKeys:
    """Of a compute that runs, found as a thief with root would: every slot of the key arenas is tried."""

    keys: dict[str, bytes]
    """Name → 32 bytes. Two of the agent; on a lazy volume two more, of its server."""

    @classmethod
    def find(cls, cluster: Cluster) -> BootKeys:
        """Of the one compute that runs."""
        [found] = cls.find_all(cluster)
        return found

    @classmethod
    def find_all(cls, cluster: Cluster) -> list[BootKeys]:
        pids = process_names(cluster)
        agents = {key for pid, name in pids.items() if name == "compute.agent" for key in memory.key_slots(pid)}
        servers = {key for pid, name in pids.items() if name == "compute.volume" for key in memory.key_slots(pid)}
        computes = []
        for boot_key in agents:
            log_key, volume_key = derived(boot_key, LOG_KEY_LABEL), derived(boot_key, VOLUME_KEY_LABEL)
            if log_key in agents and opens_a_log(log_key, cluster):
                found = {"boot key": boot_key, "log key": log_key}
                if volume_key in servers:
                    found |= {"volume key": volume_key, "block key": block_key(SecretKey(volume_key), 0).copied()}
                computes.append(cls(found))
        return computes

    @property
    def patterns(self) -> dict[tuple[str, str], bytes]:
        return {(name, form): data for name, key in self.keys.items() for form, data in memory.forms(key).items()}


def derived(key: bytes, label: bytes) -> bytes:
    return derive_key(SecretKey(key), label).copied()


def some(keys: dict[str, bytes]) -> dict[str, bytes]:
    """The KEKs, what one safekeeper seals with, each branch's newest index, the newest layer: each key makes a search
    slower."""
    pieces = [name for name in keys if name.startswith("DEK of wal/safekeeper-1/")]
    indexes = {name.partition("/index/")[0]: name for name in sorted(keys) if "/index/" in name}
    layer = max(name for name in keys if "/layers/delta-" in name)
    keks = [name for name in keys if name.startswith("KEK")]
    return {name: keys[name] for name in (*keks, *pieces, *indexes.values(), layer)}


def forms(name: str, key: bytes) -> dict[str, bytes]:
    found = memory.forms(key)
    if not name.startswith("KEK"):
        del found["base64"]  # DEKs are never text
    return found


def process_names(cluster: Cluster) -> dict[int, str]:
    """pid → module, or program; without the customer's cloud."""
    found = {}
    for process in disks.processes(cluster):
        words = process.argv.decode(errors="replace").split("\0")
        name = words[words.index("-m") + 1] if "-m" in words else Path(words[0].split(":")[0]).name
        if name == "postgres" and any("walredo-" in word for word in words):
            name = REDO
        if name != "customercloud":
            found[process.pid] = name
    return found


def owner(key: str) -> str:
    return next(service for beginning, service in OWNERS.items() if key.startswith(beginning))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tenant() -> AsyncIterator[Tenant]:
    settings = {"keymanager": {"lease_ttl_s": LEASE_TTL_S}, "compute": {"poll_interval_s": 0.2}}
    async with Cluster(settings=settings) as cluster:
        key_arn = await cluster.customer.create_key("remembered")
        workspace = await cluster.create_workspace(key_arn, "remembered", probe_interval_s=0.2)
        yield Tenant(cluster, key_arn, await cluster.create_project("remembered", workspace.workspace_id))


async def test_the_schedule_that_is_searched_for_is_that_of_fips_197() -> None:
    """The example of its appendix A.3."""
    schedule = memory.key_schedule(bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"))
    assert len(schedule) == 240
    assert schedule[32:36].hex() == "9ba35411"
    assert schedule[-4:].hex() == "706c631e"


async def test_no_key_can_get_into_swap_or_a_core_dump(tenant: Tenant) -> None:
    """Of no process that is given keys or data in plain text: all but the metadata database's."""
    await wait_until(tenant.endpoint_starts, 30)
    services = [service.pid for service in tenant.cluster.services.values()]
    ours = {process.pid for pid in services for process in below(pid)} | {*services}
    with_arenas = set()
    for pid, name in process_names(tenant.cluster).items():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if pid in ours:
                assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0), name
            arenas = memory.key_arenas(pid)
            if arenas:
                with_arenas.add(name)
            size_bytes = sum(arena.end - arena.start for arena in arenas)
            allowed_bytes, _ = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
            if allowed_bytes == resource.RLIM_INFINITY or size_bytes <= allowed_bytes:
                assert all(arena.locked for arena in arenas), name
    agents = {process for process, _, _ in AGENTS_KEYS | (set() if lazy.why_not() else VOLUMES_KEYS)}
    assert with_arenas >= {*OWNERS.values(), *agents}


async def test_keys_are_in_the_service_that_needs_them_and_nowhere_else(tenant: Tenant) -> None:
    """KEKs of two versions, DEKs of two branches."""
    await tenant.work()
    await tenant.cluster.client.create_branch(tenant.project.timeline, "branch")
    await tenant.cluster.client.rotate_kek(tenant.project.project.project_id)
    await tenant.work()
    assert sum(name.startswith("KEK") for name in tenant.keys) == 2
    assert sum("/index/" in name for name in tenant.keys) == 2
    found = await asyncio.to_thread(tenant.search)
    schedules = {each.key for each in found if each.form == "schedule"}
    for beginning in OWNERS:
        assert any(key.startswith(beginning) for key in schedules), f"{beginning}: the search must find what is there"
    assert sum(key.startswith("KEK") for key in schedules) == 2
    assert [each for each in found if each.key != ROWS and each.process != owner(each.key)] == []
    assert {each.process for each in found if each.key == ROWS} >= {"safekeeper", "pageserver", "postgres", REDO}
    assert "base64" not in {each.form for each in found}, "what the KMS's client parsed is overwritten when it is freed"


async def test_nothing_is_left_after_a_revocation(tenant: Tenant) -> None:
    """A lazy volume's server has keys of its own, and pages that it fetched ahead. (What is left in a server that gave
    up its keys, and was not killed yet: tests/integration/test_volume_wipe.py.)"""
    await _search_around_a_revocation(tenant, is_lazy=not lazy.why_not())


async def test_nothing_is_left_when_the_kms_has_not_answered_for_the_grace(tenant: Tenant) -> None:
    await tenant.work()
    boot_keys = await tenant.boot_keys()
    customer = tenant.cluster.customer
    faults = Faults(
        of_keys={tenant.key_arn.rpartition("/")[2]: KeyFaults(outage=Outage.REFUSE)},
        spared_access_key_ids=frozenset({customer.bootstrap.customer.access_key_id}),
    )
    await asyncio.to_thread(customer.simulation.set_faults, faults)
    try:
        await tenant.project_is(KeyState.SUSPENDED)
        await tenant.sealed()
        assert await tenant.left(boot_keys) == []
    finally:
        await asyncio.to_thread(customer.simulation.clear_faults)
        await tenant.project_is(KeyState.ACTIVE)


async def test_nothing_is_left_when_the_last_lease_has_run_out(tenant: Tenant) -> None:
    """Nobody is there to tell anybody: the keymanager is killed."""
    await tenant.work()
    boot_keys = await tenant.boot_keys()
    keymanager = tenant.cluster.service("keymanager")
    await keymanager.kill()
    try:
        await wait_until(tenant.refuses_everything, 30)

        async def nothing_is_left() -> bool:
            return await tenant.left(boot_keys) == []

        await wait_until(nothing_is_left, 60)  # who refuses already may still be busy wiping
    finally:
        await keymanager.start()


async def test_a_boot_key_is_in_its_agent_and_dies_with_it(tenant: Tenant, tmp_path: Path) -> None:
    """On no disk, in no log, argument or environment, not even while it is in use. A replica has its own."""
    cluster, client = tenant.cluster, tenant.cluster.client
    await tenant.work()
    replica = await client.create_endpoint(tenant.project.timeline, "replica", follows=True)
    connections = [
        await asyncpg.connect(**each.asyncpg_arguments(), timeout=60)
        for each in (tenant.project.connection, replace(tenant.project.connection, endpoint_id=replica.endpoint_id))
    ]
    for connection in connections:
        assert await connection.fetchval("select count(*) from t") > 0
        await connection.execute("do $$ begin raise warning 'for the log'; end $$")
    computes = BootKeys.find_all(cluster)
    assert len(computes) == 2
    keys = {f"{name} {number}": key for number, each in enumerate(computes) for name, key in each.keys.items()}
    assert len(set(keys.values())) == len(keys)
    assert await asyncio.to_thread(outside_of_memory, cluster, keys, []) == []
    (tmp_path / "control").write_bytes(b"x" * 1001 + b"y".join(keys.values()))
    assert search([tmp_path], keys).words == keys.keys()
    environ = b"".join(b"KEY=" + key.hex().encode() + b"\0" for key in keys.values())
    assert len(disks.told([disks.Process(1, b"sh", environ, (), ())], keys)) == len(keys)

    both = BootKeys(keys)
    expected = AGENTS_KEYS | (set() if lazy.why_not() else VOLUMES_KEYS)
    found = memory.search(process_names(cluster), both.patterns)
    assert {(each.process, each.key, each.form) for each in found} == {
        (process, f"{key} {number}", form) for number in (0, 1) for process, key, form in expected
    }
    await client.kill_endpoint(tenant.project.endpoint.endpoint_id)

    async def stopped() -> bool:
        return (await client.endpoint(tenant.project.endpoint.endpoint_id)).state is EndpointState.STOPPED

    await wait_until(stopped)
    left = {each.key for each in memory.search(process_names(cluster), both.patterns)}
    assert left in [{name for name in keys if name.endswith(number)} for number in ("0", "1")], "the replica's, all"
    everywhere = [path for paths in disks.persistent(cluster).values() for path in paths]
    assert await asyncio.to_thread(outside_of_memory, cluster, keys, everywhere) == []

    await cluster.customer.disable(tenant.key_arn)
    try:
        await tenant.project_is(KeyState.REVOKED)
        await tenant.sealed()
        assert memory.search(process_names(cluster), both.patterns) == []
    finally:
        for connection in connections:
            connection.terminate()
        await cluster.customer.enable(tenant.key_arn)
        await tenant.project_is(KeyState.ACTIVE)
        await client.delete_endpoint(replica.endpoint_id)


def outside_of_memory(cluster: Cluster, keys: dict[str, bytes], paths: list[Path]) -> list[str]:
    """Where these keys stand: below `paths`, in the files that lazy volumes lie in, in an argv or environ."""
    processes = disks.processes(cluster)
    blocks = [] if lazy.why_not() else [server.blocks for server in lazy.servers(processes, cluster)]
    result = search([*paths, *blocks], keys)
    assert not blocks or result.size_bytes > 1_000_000
    return [*map(str, result.found), *disks.told(processes, keys)]


async def test_nothing_is_left_after_a_revocation_on_tmpfs(tenant: Tenant) -> None:
    if why := lazy.why_not():
        pytest.skip(f"{why}: it is what was looked at before")
    await lazy.use_volume(tenant.cluster, VolumeKind.TMPFS)
    try:
        await wait_until(tenant.endpoint_starts, 30)
        await _search_around_a_revocation(tenant, is_lazy=False)
    finally:
        await lazy.use_volume(tenant.cluster, VolumeKind.AUTO)


async def test_nothing_is_left_of_a_shredded_project(tenant: Tenant) -> None:
    """Its boot key neither."""
    await tenant.cluster.client.stop_endpoint(tenant.project.endpoint.endpoint_id)  # one compute at a time
    workspace_id = tenant.project.project.workspace_id
    project = await tenant.cluster.create_project("doomed", workspace_id)
    tenant = Tenant(tenant.cluster, tenant.key_arn, project, "cormorant")
    await tenant.work()
    boot_keys = await tenant.boot_keys()
    assert {each.key for each in memory.search(process_names(tenant.cluster), boot_keys.patterns)} == {*boot_keys.keys}
    async with AsyncExitStack() as stack:
        await shred_by_two(stack, tenant.cluster, tenant.project.project)
    await tenant.project_is(KeyState.SHREDDED)
    await tenant.sealed()
    assert await tenant.left(boot_keys) == []


async def _search_around_a_revocation(tenant: Tenant, *, is_lazy: bool) -> None:
    arguments = tenant.project.connection.asyncpg_arguments()
    connection = await asyncpg.connect(**arguments, timeout=60)
    await connection.execute("create table if not exists ahead (x text); alter table ahead alter x set storage plain")
    await connection.execute("insert into ahead select repeat($1, 300) from generate_series(1, 400)", CANARY)
    await connection.close()
    await tenant.cluster.client.stop_endpoint(tenant.project.endpoint.endpoint_id)
    await tenant.work()
    connection = await asyncpg.connect(**arguments, timeout=60)
    await connection.execute("begin; declare reading cursor for select x from ahead; fetch 20 from reading")
    boot_keys = BootKeys.find(tenant.cluster)
    found = await asyncio.to_thread(tenant.search, boot_keys)
    before = {(each.process, each.key, each.form) for each in found}
    assert {each for each in before if each[1] in boot_keys.keys} == AGENTS_KEYS | (VOLUMES_KEYS if is_lazy else set())
    assert {process for process, key, _ in before if key == ROWS} >= (
        {"compute.volume", "postgres"} if is_lazy else {"postgres"}
    )
    await tenant.cluster.customer.disable(tenant.key_arn)
    try:
        await tenant.project_is(KeyState.REVOKED)
        await tenant.sealed()
        assert await tenant.left(boot_keys) == []
        revocations = await tenant.cluster.client.revocations(tenant.project.project.project_id)
        newest = max(revocations, key=lambda each: each.detected_at)
        [compute] = [each for each in newest.instances if each.role is Role.COMPUTE]
        assert compute.steps_s.keys() >= {"wipe_boot_key"} | ({"wipe_volume_keys"} if is_lazy else set())
    finally:
        connection.terminate()
        await tenant.cluster.customer.enable(tenant.key_arn)
        await tenant.project_is(KeyState.ACTIVE)
