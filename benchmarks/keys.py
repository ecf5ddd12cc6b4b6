"""The key side's figures: KMS calls per rotation and per GB, lease renewals of one keymanager, latency of DEKs.

KMS calls are counted in the customer's own log, not by us. Renewals are asked for by real sessions (TLS, WebSocket, a
name and a lease each), SESSIONS of them in one other process, as fast as they are answered; what counts is how many a
second of the keymanager's CPU answers, because its clients share the machine with it. An instance renews at half of its
ttl, so SESSIONS of them ask for SESSIONS / (ttl / 2) renewals per second. What 10,000 ask for is measured with 10,000,
in `python -m benchmarks.revocation --runs 0 --fleet 10000`: a renewal costs more there.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import asyncpg

from benchmarks.harness import Row
from keylake.cluster import Cluster, RunningProject
from shared.api.keymanager import Grant, ObjectName, Project, Revoke, Role, TokenConfirmed
from shared.auth import TokenIssuer
from shared.clock import SystemClock
from shared.config import Address
from shared.crypto.envelope import Envelope
from shared.ids import InstanceId, ProjectId, TimelineId, TokenId
from shared.keyclient import KeyClient
from shared.keysession import KeySession, SessionIdentity, SessionOpener, dial_over_tls, session_tokens
from shared.lease import KeyLoss
from shared.tls import client_context

PROJECTS: Final = 20
SESSIONS: Final = 1000
RENEWING_S: Final = 10.0
DEKS: Final = 500
CACHED_READS: Final = 20_000
WRITTEN_MB: Final = 128
_OPENED_AT_ONCE: Final = 16


async def measure() -> list[Row]:
    rows: list[Row] = []
    async with Cluster() as cluster:
        key = await cluster.customer.create_key()
        configuration = await cluster.create_key_configuration(key)
        workspace = await cluster.client.create_workspace("bench", configuration.key_configuration_id)
        projects = [await cluster.client.create_project(workspace.workspace_id, f"p{n}") for n in range(PROJECTS)]
        rows += await _rotation(cluster, key, len(projects))
        rows += await _latency(cluster, projects)
        rows += await _renewals(cluster, projects[0].project_id)
        running = await cluster.create_project("written", workspace.workspace_id)
        rows += await _data_path(cluster, key, running)
    return rows


# --- KMS calls ---


async def _calls(cluster: Cluster, key: str) -> list[dict[str, Any]]:
    """What the customer's log has of our uses of the key, the watcher's canary left out."""
    role = cluster.customer.bootstrap.role_arn
    return [
        record
        for record in await cluster.customer.audit_log()
        if any(resource.get("ARN") == key for resource in record.get("resources") or [])
        and record["userIdentity"].get("sessionContext", {}).get("sessionIssuer", {}).get("arn") == role
        and "keylake:kek" in str(record.get("requestParameters"))
    ]


async def _rotation(cluster: Cluster, key: str, keks: int) -> list[Row]:
    before = len(await _calls(cluster, key))
    await asyncio.to_thread(cluster.customer.aws.rotate, key)
    [configuration] = await cluster.client.key_configurations()
    begun = perf_counter()
    await cluster.client.rewrap(configuration.key_configuration_id)
    elapsed_s = perf_counter() - begun
    made = len(await _calls(cluster, key)) - before
    return [
        Row(
            f"KMS calls to rotate a CMK with {keks} KEKs (and any amount of data)",
            f"{made} calls, {elapsed_s:.2f} s",
            f"{keks} KEKs",
            made / keks,
            "1 per KEK",
            made == keks,
        )
    ]


async def _data_path(cluster: Cluster, key: str, project: RunningProject) -> list[Row]:
    """Rows are written, and read after the compute was started again, so that every page comes from the storage."""
    arguments = project.connection.asyncpg_arguments()
    connection = await asyncpg.connect(**arguments, timeout=120)
    await connection.execute("CREATE TABLE t (n int, body text)")
    before = len(await _calls(cluster, key))
    start_lsn = await connection.fetchval("SELECT pg_current_wal_lsn()")
    for part in range(8):
        await connection.execute(
            "INSERT INTO t SELECT n, repeat(md5(n::text), 32) FROM generate_series($1::int, $2::int) n",
            part * WRITTEN_MB * 128,
            (part + 1) * WRITTEN_MB * 128,
            timeout=600,
        )
    written = await connection.fetchval("SELECT pg_current_wal_lsn() - $1::pg_lsn", start_lsn)
    await connection.close()
    await cluster.client.stop_endpoint(project.endpoint.endpoint_id)
    connection = await asyncpg.connect(**arguments, timeout=120)
    read = await connection.fetchval("SELECT sum(length(body)) FROM t", timeout=600)
    await connection.close()
    made = len(await _calls(cluster, key)) - before
    return [
        Row(
            "KMS calls while data is written and read",
            f"{made} calls",
            f"{int(written) / 1e6:.0f} MB of WAL written, {int(read) / 1e6:.0f} MB read",
            None,
            "0",
            made == 0,
        )
    ]


# --- latency of DEKs ---


async def _nothing(loss: KeyLoss) -> dict[str, float]:
    return {}


@asynccontextmanager
async def _key_client(cluster: Cluster) -> AsyncIterator[KeyClient]:
    """A pageserver's, under another name."""
    issuer = TokenIssuer.load(cluster.layout.keys / "pageserver.json")
    address, ca = Address(port=cluster.ports.keymanager), cluster.layout.ca_certificate
    async with KeyClient(
        address, ca, session_tokens(issuer), role=Role.PAGESERVER, node_id=f"bench-{os.getpid()}"
    ) as client:
        yield client


def _name(number: int) -> ObjectName:
    return ObjectName(timeline_id=TimelineId.new(), object_name=f"layer-{number}", kind="layer/1")


async def _latency(cluster: Cluster, projects: Sequence[Project]) -> list[Row]:
    ids = [project.project_id for project in projects]
    deks: dict[ProjectId, list[tuple[ObjectName, Envelope]]] = {}
    async with _key_client(cluster) as client:
        for project_id in ids:
            await client.acquire(project_id, _nothing)
            names = [_name(number) for number in range(DEKS // len(ids) + 1)]
            made = await client.generate(project_id, names)
            deks[project_id] = [(name, envelope) for name, (_, envelope) in zip(names, made, strict=True)]
    keymanager = cluster.service("keymanager")
    await keymanager.stop()
    await keymanager.start()
    async with _key_client(cluster) as client:
        for project_id in ids:
            await client.acquire(project_id, _nothing)

        async def unwrap(project_id: ProjectId, item: tuple[ObjectName, Envelope]) -> None:
            await client.unwrap(project_id, [item])

        cold = [await _seconds(lambda p=p: unwrap(p, deks[p][0])) for p in ids]  # type: ignore[misc]
        warm = [
            await _seconds(lambda p=p, i=i: unwrap(p, i))  # type: ignore[misc]
            for p in ids
            for i in deks[p][1:]
        ]
        cached = [await _seconds(lambda: unwrap(ids[0], deks[ids[0]][0])) for _ in range(CACHED_READS)]
    peer = statistics.median(warm)
    return [
        _latency_row("first DEK of a project after a restart: KEK from the KMS", cold, peer),
        _latency_row("DEK from the keymanager, its KEK in memory", warm, peer),
        _latency_row("DEK from the instance's own cache", cached, peer),
    ]


async def _seconds(work: Callable[[], Awaitable[None]]) -> float:
    begun = perf_counter()
    await work()
    return perf_counter() - begun


def _latency_row(what: str, times: Sequence[float], peer_s: float) -> Row:
    ordered = sorted(times)
    p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    return Row(
        what,
        f"p50 {p50 * 1e3:.3f} ms, p99 {p99 * 1e3:.3f} ms, n = {len(ordered)}",
        f"p50 of a warm KEK, {peer_s * 1e3:.3f} ms",
        p50 / peer_s,
        "reported",
        None,
    )


# --- leases ---


class _Renewing:
    """SessionEvents of an instance that does nothing but hold a lease."""

    def on_grants(self, grants: Sequence[Grant], asked_at_s: float, generation: int) -> None:
        if not all(grant.ttl_s > 0 for grant in grants):
            raise RuntimeError("a lease was refused")

    def on_revoke(self, revoke: Revoke) -> None:
        raise RuntimeError("a project was revoked")

    def on_restored(self, project_id: ProjectId) -> None:
        pass

    def on_delete_data(self, project_ids: Sequence[ProjectId]) -> None:
        pass

    def on_token_confirmed(self, confirmed: TokenConfirmed, asked_at_s: float) -> None:
        pass

    def on_token_revoked(self, token_id: TokenId) -> None:
        pass


async def _renewals(cluster: Cluster, project_id: ProjectId) -> list[Row]:
    keymanager = cluster.service("keymanager")
    ttl_s = (await cluster.client.keymanager_status()).lease_ttl_s
    issuer = TokenIssuer.load(cluster.layout.keys / "pageserver.json")
    context, clock = client_context(cluster.layout.ca_certificate), SystemClock()
    address = Address(port=cluster.ports.keymanager)
    async with AsyncExitStack() as stack:
        limit = asyncio.Semaphore(_OPENED_AT_ONCE)

        async def open_one(number: int) -> KeySession:
            identity = SessionIdentity(Role.PAGESERVER, f"bench-lease-{number}", InstanceId.new())
            opener = SessionOpener([address], dial_over_tls(context), identity, session_tokens(issuer), clock)
            async with limit:
                return await opener.open(_Renewing())

        begun = perf_counter()
        sessions = await asyncio.gather(*(open_one(number) for number in range(SESSIONS)))
        opened_s = perf_counter() - begun
        readers = [asyncio.create_task(session.run()) for session in sessions]
        stack.push_async_callback(_end, sessions, readers)
        await asyncio.gather(*(session.renew([project_id], 60) for session in sessions))
        answered, waits = 0, list[float]()
        cpu_s, begun = _cpu_s(keymanager.pid), perf_counter()

        async def renew(session: KeySession) -> None:
            nonlocal answered
            while perf_counter() - begun < RENEWING_S:
                asked = perf_counter()
                await session.renew([project_id], 60)
                waits.append(perf_counter() - asked)
                answered += 1

        await asyncio.gather(*(renew(session) for session in sessions))
        elapsed_s, cpu_s = perf_counter() - begun, _cpu_s(keymanager.pid) - cpu_s
        memory_mb = _resident_mb(keymanager.pid)
    needed = SESSIONS / (ttl_s / 2)
    per_cpu = answered / cpu_s
    return [
        Row(
            f"lease renewals of one keymanager, {SESSIONS} real sessions, as fast as they are answered",
            f"{per_cpu:.0f} per s of its CPU; {answered / elapsed_s:.0f}/s beside its clients; "
            f"p99 {sorted(waits)[int(len(waits) * 0.99)] * 1e3:.0f} ms",
            f"{needed:.0f}/s: {SESSIONS} instances, ttl {ttl_s:g} s",
            per_cpu / needed,
            ">= 1 on one core",
            per_cpu >= needed,
        ),
        Row(
            f"{SESSIONS} sessions opened",
            f"{SESSIONS / opened_s:.0f}/s; the keymanager then has {memory_mb:.0f} MB",
            "",
            None,
            "reported",
            None,
        ),
    ]


async def _end(sessions: Sequence[KeySession], readers: Sequence[asyncio.Task[None]]) -> None:
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)


def _cpu_s(pid: int) -> float:
    """User and system time of a process (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
