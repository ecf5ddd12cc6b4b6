"""The demo: the product's main job on real input, with everything checked that it claims."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import asyncpg

from keylake.client import START_TIMEOUT_S, Connection
from keylake.demo import evidence, ledger
from keylake.demo.pgbench import run_pgbench
from keylake.demo.report import Report
from keylake.demo.target import Target
from keylake.reconcile.core import Kind
from keylake.reconcile.logs import calls_of
from keylake.reconcile.run import compare_now
from shared.api.compute import Endpoint, EndpointState
from shared.api.keymanager import AwsKey, CreateKeyConfiguration, KeyState, Project, Revocation, Workspace
from shared.errors import KeylakeError, RevokedError
from shared.kms_log import LoggedCall, Recorded

SCALE: Final = 10
CLIENTS: Final = 4
REVOCATION_BOUND_S: Final = 5.0
_POLL_S: Final = 0.02

_PLANT: Final = """
CREATE TABLE {name} (id int PRIMARY KEY, body text);
INSERT INTO {name} SELECT n, '{row}' || n FROM generate_series(1, 500) n;
CREATE INDEX ON {name} (body);
UPDATE {name} SET body = body || '{update}' WHERE id % 5 = 0;
"""


_RESET: Final = "UPDATE pgbench_{table} SET {column} = 0 WHERE {column} <> 0"
_SORT: Final = """
SELECT '{word}' || n FROM generate_series(1, 20000) n ORDER BY md5(n::text) DESC OFFSET 19999
"""
_COUNT: Final = "SELECT count(*) FROM {name}"


@dataclass(slots=True)
class Canaries:
    """Words that occur nowhere else. If one is found in stored bytes, something leaks."""

    table: str = field(default_factory=lambda: f"canary_t{secrets.token_hex(8)}")
    row: str = field(default_factory=lambda: f"canary-r{secrets.token_hex(12)}")
    update: str = field(default_factory=lambda: f"canary-u{secrets.token_hex(12)}")
    error: str = field(default_factory=lambda: f"canary-e{secrets.token_hex(12)}")
    sort: str = field(default_factory=lambda: f"canary-s{secrets.token_hex(12)}")

    def all(self) -> list[str]:
        return [self.table, self.row, self.update, self.error, self.sort]


class Story:
    """Chapters in order. Each leaves the system running for the next."""

    def __init__(self, target: Target, report: Report) -> None:
        self._target = target
        self._client = target.client
        self._report = report
        self._canaries = Canaries()
        self._ledger = ledger.Ledger()
        self._key_arn = ""
        self._workspace: Workspace
        self._project: Project
        self._endpoint: Endpoint
        self._connection: Connection

    async def run(self) -> None:
        chapters: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("The customer makes a key, Keylake a project under it", self._make_project),
            (f"pgbench at scale {SCALE}, through the proxy", self._pgbench),
            ("The same bytes, as they are stored", self._look_at_bytes),
            ("Under load: a safekeeper is killed, then the compute", self._kill_things),
            ("The pageserver loses its disk", self._wipe_pageserver),
            ("The customer disables the key", self._revoke),
            ("The customer enables it again", self._restore),
            ("What the customer's audit log says", self._audit),
        ]
        for number, (title, chapter) in enumerate(chapters, 1):
            with self._report.chapter(f"{number}. {title}"):
                await chapter()

    async def _connect(self) -> asyncpg.Connection[Any]:
        connection: asyncpg.Connection[Any] = await asyncpg.connect(
            **self._connection.asyncpg_arguments(), timeout=START_TIMEOUT_S, command_timeout=60
        )
        return connection

    # --- 1 ---

    async def _make_project(self) -> None:
        report, customer = self._report, self._target.customer
        self._key_arn = await customer.create_key()
        report.say(f"CMK {self._key_arn}")
        key = AwsKey(
            key_arn=self._key_arn, role_arn=customer.bootstrap.role_arn, external_id=customer.bootstrap.external_id
        )
        begun = monotonic()
        configuration = await self._client.create_key_configuration(
            CreateKeyConfiguration(name=f"demo-{secrets.token_hex(4)}", key=key)
        )
        self._workspace = await self._client.create_workspace("demo", configuration.key_configuration_id)
        self._project = await self._client.create_project(self._workspace.workspace_id, "demo")
        timeline = await self._client.create_timeline(self._project.project_id)
        created = await self._client.create_endpoint(timeline)
        self._endpoint = created
        self._connection = self._client.connection(created)
        report.time("key configuration, workspace, project, endpoint", monotonic() - begun)
        begun = monotonic()
        connection = await self._connect()
        version = await connection.fetchval("SELECT version()")
        await connection.close()
        report.time("first connection (starts the compute)", monotonic() - begun, str(version).split(" on ")[0])
        await self._refresh_endpoint()
        report.say(f"volume: {self._endpoint.volume}")
        report.check("the compute runs", self._endpoint.state is EndpointState.RUNNING)

    async def _refresh_endpoint(self) -> None:
        self._endpoint = await self._client.endpoint(self._endpoint.endpoint_id)

    # --- 2 ---

    async def _pgbench(self) -> None:
        report = self._report
        begun = monotonic()
        # G: rows are made on the server; what matters here is the WAL.
        await run_pgbench(self._connection, "-i", "-s", str(SCALE), "-I", "dtGvp", "-q")
        report.time(f"pgbench -i -s {SCALE}", monotonic() - begun, f"{SCALE * 100_000:,} accounts")
        begun = monotonic()
        output = await run_pgbench(self._connection, "-c", "4", "-T", "5", "-n")
        tps = re.search(r"tps = ([0-9.]+)", output)
        failed = re.search(r"number of failed transactions: ([0-9]+)", output)
        report.time(
            "pgbench -c 4 -T 5 (TPC-B)", monotonic() - begun, f"{float(tps[1]):,.0f} commits/s" if tps else output
        )
        report.check("no transaction failed", failed is not None and failed[1] == "0", output)
        connection = await self._connect()
        await connection.execute("TRUNCATE pgbench_history")
        for table, column in (("accounts", "abalance"), ("tellers", "tbalance"), ("branches", "bbalance")):
            await connection.execute(_RESET.format(table=table, column=column))
        await self._plant(connection)
        await connection.close()

    async def _plant(self, connection: asyncpg.Connection[Any]) -> None:
        canaries = self._canaries
        await connection.execute(_PLANT.format(name=canaries.table, row=canaries.row, update=canaries.update))
        with contextlib.suppress(asyncpg.PostgresError):
            await connection.execute(f"SELECT '{canaries.error}'::int")
        # A sort beyond work_mem goes to temporary files.
        await connection.execute("SET work_mem = '64kB'")
        await connection.fetch(_SORT.format(word=canaries.sort))

    # --- 3 ---

    async def _look_at_bytes(self) -> None:
        report = self._report
        await self._wait_until_stored()
        total = 0
        for name, roots in self._target.persistent().items():
            findings = await evidence.search(roots, self._canaries.all())
            total += findings.size_bytes
            claim = f"{name}: none of {len(self._canaries.all())} canaries"
            report.check(
                f"{claim} in {findings.size_bytes / 1e6:,.1f} MB, {findings.files} files",
                not findings.found,
                str(findings.found[:3]),
            )
        report.check("that was the whole database and more", total > 100e6, f"only {total} bytes")
        largest = max(
            (p for p in evidence.files_below(self._target.persistent()["object store"])), key=lambda p: p.stat().st_size
        )
        data = await asyncio.to_thread(largest.read_bytes)
        report.say(f"the largest object, {largest.name}, {len(data) / 1e6:.1f} MB:")
        for line in evidence.hex_lines(data):
            report.say(f"[dim]{line}[/dim]")
        entropy = evidence.entropy_bits_per_byte(data)
        report.check(f"it looks like noise: {entropy:.4f} bits per byte", entropy > 7.99)

    async def _wait_until_stored(self) -> None:
        """Until the pageserver has ingested what the safekeepers hold, so that there is something to look at."""
        begun = monotonic()
        async with asyncio.timeout(120):
            while True:
                status = await self._client.pageserver_status()
                mine = [t for t in status.timelines if t.project_id == self._project.project_id]
                keepers = [
                    await self._client.safekeeper_status(i) for i in range(len(self._client.addresses.safekeepers))
                ]
                held = sorted(
                    t.flush_lsn for k in keepers for t in k.timelines if t.project_id == self._project.project_id
                )
                if mine and len(held) > 1 and mine[0].last_record_lsn >= held[len(held) // 2]:
                    break
                await asyncio.sleep(0.1)
        self._report.time("pageserver has caught up with the quorum", monotonic() - begun)
        self._report.say(
            f"{mine[0].layers} layers, {mine[0].layer_size_bytes / 1e6:.1f} MB sealed; "
            f"{mine[0].in_memory_size_bytes / 1e6:.1f} MB not sealed yet, in memory only"
        )

    # --- 4 ---

    async def _kill_things(self) -> None:
        report = self._report
        async with ledger.Load(self._connect, SCALE, CLIENTS, self._ledger) as load:
            await load.wait_for_commits(500)
            begun = monotonic()
            await self._target.kill("safekeeper-2")
            report.say("safekeeper-2 gets SIGKILL")
            await load.wait_for_commits(500)
            await self._target.start("safekeeper-2")
            await load.wait_for_commits(500)
            report.check(
                "no client saw an error while one safekeeper was gone",
                not self._ledger.errors_since(begun),
                str(self._ledger.errors_since(begun)[:2]),
            )
            report.time("longest pause of any client meanwhile", self._ledger.longest_gap_s)
            report.say("the compute gets SIGKILL")
            await self._client.kill_endpoint(self._endpoint.endpoint_id)
            killed = monotonic()
            await load.wait_for_commits(CLIENTS)
            first = min(at for at in self._ledger.acknowledged.values() if at > killed)
            report.time("compute killed → next commit acknowledged", first - killed, "election, basebackup, start")
            await load.wait_for_commits(500)
        await self._check_ledger()

    async def _check_ledger(self) -> None:
        connection = await self._connect()
        problems = await ledger.check(connection, self._ledger)
        planted = await connection.fetchval(_COUNT.format(name=self._canaries.table))
        await connection.close()
        known, unknown = len(self._ledger.acknowledged), len(self._ledger.unknown)
        self._report.check(
            f"all {known:,} acknowledged commits are there, none twice, TPC-B sums agree ({unknown} outcomes unknown)",
            not problems and planted == 500,
            "; ".join(problems),
        )

    # --- 5 ---

    async def _wipe_pageserver(self) -> None:
        report = self._report
        await self._target.kill("pageserver")
        await self._target.wipe_pageserver_disk()
        report.say("pageserver killed, its disk wiped; only the object store and the safekeepers are left")
        begun = monotonic()
        await self._target.start("pageserver")
        await self._client.stop_endpoint(self._endpoint.endpoint_id)
        await self._check_ledger()
        report.time("pageserver restarted → a new compute, all data read", monotonic() - begun)

    # --- 6 ---

    async def _revoke(self) -> None:
        report = self._report
        async with ledger.Load(self._connect, SCALE, CLIENTS, self._ledger) as load:
            await load.wait_for_commits(200)
            begun = monotonic()
            await self._target.customer.disable(self._key_arn)
            disabled = monotonic()
            report.say("CMK disabled in the customer's cloud")
            await self._poll(lambda: len(self._errors_sent(begun)) >= CLIENTS)
            first = min(at for at, _, _ in self._ledger.errors_since(begun))
            report.time("CMK disabled → connections end", first - disabled)
            await self._poll_endpoint(EndpointState.STOPPED)
            report.time("CMK disabled → compute gone", monotonic() - disabled)
            revocation = await self._poll_revocation()
            # The KMS said no for the first time between `disabled` and the revocation's own clock.
            report.time("CMK disabled → last instance sealed", monotonic() - disabled, self._instances(revocation))
            sealed_within = monotonic() - disabled
        errors = self._errors_sent(begun)
        # Whose COMMIT was under way is told in the detail that its outcome is not known.
        messages = {message.partition("\n")[0] for _, _, message in errors}
        report.check(
            f"clients got SQLSTATE {RevokedError.sqlstate} with one clear message, and no other",
            len(messages) == 1 and {code for _, code, _ in errors} == {RevokedError.sqlstate},
            str(errors[:3]),
        )
        for _, _, message in errors[:1]:
            report.say(f"[dim]“{message}”[/dim]")
        late = [number for number, at in self._ledger.acknowledged.items() if at > disabled + REVOCATION_BOUND_S]
        report.check("no commit was acknowledged after that", not late, f"{len(late)} were")
        report.check(f"sealed within {REVOCATION_BOUND_S:g} s", sealed_within <= REVOCATION_BOUND_S)
        report.check(
            "every instance acknowledged, or was fenced by its lease",
            all(i.outcome != "pending" for i in revocation.instances),
        )
        await self._check_sealed()

    def _errors_sent(self, since: float) -> list[tuple[float, str, str]]:
        """Errors that came from the server; one without an SQLSTATE is the driver's word for an ended connection."""
        return [error for error in self._ledger.errors_since(since) if re.fullmatch("[0-9A-Z]{5}", error[1])]

    def _instances(self, revocation: Revocation) -> str:
        slowest = max((i.after_s or 0.0 for i in revocation.instances), default=0.0)
        return f"{len(revocation.instances)} instances, the slowest {slowest * 1000:.0f} ms after the verdict"

    async def _check_sealed(self) -> None:
        """Nothing opens any more: not a connection, not a page, not a key."""
        try:
            connection = await self._connect()
            await connection.close()
            refused = False
        except asyncpg.PostgresError as error:
            refused = getattr(error, "sqlstate", None) == RevokedError.sqlstate
        self._report.check("a new connection is refused with the same SQLSTATE", refused)
        project = await self._client.project(self._project.project_id)
        self._report.check("the project is REVOKED", project.state is KeyState.REVOKED, project.state.value)
        try:
            await self._client.start_endpoint(self._endpoint.endpoint_id)
            refusal = ""
        except KeylakeError as error:
            refusal = error.code
        self._report.check(
            "no compute can be started: the objects do not open", refusal == RevokedError.code, refusal or "started"
        )
        status = await self._client.keymanager_status()
        mine = self._project.project_id
        self._report.check("the keymanager holds no plaintext KEK of the project", mine not in status.plaintext_keks)
        pages = await self._client.pageserver_status()
        in_memory = sum(t.in_memory_size_bytes for t in pages.timelines if t.project_id == mine)
        self._report.check(
            "the pageserver holds no plaintext of it and no redo worker",
            in_memory == 0 and mine not in pages.redo_workers,
        )

    # --- 7 ---

    async def _restore(self) -> None:
        report = self._report
        begun = monotonic()
        await self._target.customer.enable(self._key_arn)
        report.say("CMK enabled in the customer's cloud")
        async with asyncio.timeout(60):
            while True:
                try:
                    connection = await self._connect()
                    await connection.fetchval("SELECT 1")
                    break
                except ledger.CLIENT_ERRORS:
                    await asyncio.sleep(_POLL_S)
        report.time("CMK enabled → first query answered", monotonic() - begun)
        await connection.close()
        await self._check_ledger()

    # --- 8 ---

    async def _audit(self) -> None:
        report = self._report
        verification = await self._client.verify_audit()
        report.check(f"our audit chain is intact: {verification.records} records", verification.intact)

        async def read_log(recorded: Recorded) -> list[LoggedCall]:
            return list(calls_of(await self._target.customer.audit_log(), "aws", recorded))

        result = (await compare_now(self._client, read_log, "aws", [self._key_arn])).result
        for (who, operation, outcome), count in sorted(result.by_operation.items()):
            report.say(f"{who:10} {operation:24} {outcome:20} {count:5}")
        ours = [finding for finding in result.findings if finding.kind is Kind.NOT_LOGGED]
        report.check(
            f"each of our {result.joined} recorded KMS calls is in the customer's log, under the same request id",
            not ours and result.joined > 0,
            str(ours[:3]),
        )
        report.check(
            "and every use of the key in the customer's log is one that we recorded",
            result.findings == ours,
            str(result.findings[:3]),
        )

    # --- waiting ---

    async def _poll(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - the condition lies in another process
                await asyncio.sleep(_POLL_S)

    async def _poll_endpoint(self, state: EndpointState, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            await self._refresh_endpoint()
            while self._endpoint.state is not state:
                await asyncio.sleep(_POLL_S)
                await self._refresh_endpoint()

    async def _poll_revocation(self, timeout_s: float = 30.0) -> Revocation:
        async with asyncio.timeout(timeout_s):
            while True:
                found = await self._client.revocations(self._project.project_id)
                sealed = [r for r in found if r.sealed_after_s is not None]
                if sealed:
                    return max(sealed, key=lambda r: r.detected_at)
                await asyncio.sleep(_POLL_S)
