"""A safekeeper process by its real entry point, with a real keymanager and a (simulated) customer's cloud."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shared.api.keymanager import KeyState, Role
from shared.auth import Service
from shared.errors import KeyAccessError, RevokedError, UnavailableError
from shared.ids import TimelineId
from tests.fixtures.realm import Realm
from tests.fixtures.safekeeper_postgres import primary_postgres
from tests.fixtures.safekeeper_process import SafekeeperClient, SafekeeperProcess, elect
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration


@dataclass
class RealSafekeeper(SafekeeperProcess):
    """`python -m safekeeper`, with its key session."""

    manager: Keymanager = field(kw_only=True)

    def spawn(self, environment: Mapping[str, str] | None = None) -> None:
        trust = self.manager.trust
        config = self.directory / f"{self.node_id}.json"
        signing_key = self.directory / "signing.json"
        if not signing_key.exists():
            trust.issuers[Role.SAFEKEEPER].save(signing_key)
        identity = {
            **json.loads(self.realm.identity(Service.SAFEKEEPER).model_dump_json()),
            "ca_certificate": str(trust.ca_certificate),
            "signing_key": str(signing_key),
        }
        settings = {
            "listen": {"port": self.http_port},
            "wal_listen": {"port": self.wal_port},
            "keymanager": {"port": self.manager.port},
            "identity": identity,
            "node_id": self.node_id,
            "data_dir": str(self.data_dir),
        }
        config.write_text(json.dumps(settings))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "safekeeper", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )


@contextlib.asynccontextmanager
async def real_safekeeper(directory: Path, manager: Keymanager) -> AsyncIterator[RealSafekeeper]:
    realm_dir = directory / "realm"
    realm_dir.mkdir()
    process = RealSafekeeper(directory, "safekeeper-1", Realm.create(realm_dir), directory, manager=manager)
    try:
        await process.start()
        yield process
        process.stop()
    finally:
        if process.process is not None and process.process.poll() is None:
            process.kill()


async def test_revocation_stops_the_stream_and_restore_loses_nothing(
    keymanager: Keymanager, cmk: str, tmp_path: Path
) -> None:
    directory = tmp_path / "sk"
    directory.mkdir()
    project = await keymanager.new_project(cmk)
    async with (
        primary_postgres() as primary,
        real_safekeeper(directory, keymanager) as process,
        process.client() as http,
    ):
        await primary.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        start = await primary.insert_lsn()
        client = SafekeeperClient(process, http, project.project_id, TimelineId.new())
        await client.create(primary.system_identifier, start.value)
        assert await elect([client], 1, of=1) == start
        await client.stream(1, start, primary.address)
        await primary.require_quorum(["safekeeper-1"], quorum=1)
        await primary.execute("INSERT INTO t SELECT i, 'before' FROM generate_series(1, 1000) i")

        await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
        await keymanager.wait_state(project.project_id, KeyState.REVOKED)
        revocation = await keymanager.wait_sealed(project.project_id)
        [holder] = revocation.instances
        assert (holder.outcome, holder.node_id) == ("acknowledged", "safekeeper-1")
        assert {"subscriptions_ended", "plaintext_dropped", "stream_stopped"} <= holder.steps_s.keys()
        assert not (await client.status()).streaming
        connection = await primary.connect()
        pending = asyncio.create_task(connection.execute("INSERT INTO t VALUES (2000, 'while revoked')"))
        with pytest.raises(RevokedError):
            await client.read(start.value, start.value + 10)

        # Started anew while revoked, it does not know how far its log reaches: it neither votes nor streams.
        process.kill()
        await process.start()
        with pytest.raises(UnavailableError):
            await client.vote(2)
        with pytest.raises((UnavailableError, KeyAccessError)):
            await client.stream(1, start, primary.address)
        assert "not ready" in (await client.node_status()).fault
        assert (await client.status()).term == 1
        assert not pending.done()

        await asyncio.to_thread(keymanager.tenant.customer.enable, cmk)
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)

        async def again() -> bool:
            try:
                await client.stream(1, start, primary.address)
            except (UnavailableError, KeyAccessError):
                return False
            return True

        await wait_until(again)
        await asyncio.wait_for(pending, 20)
        await connection.close()
        end = (await primary.flush_lsn()).value

        async def caught_up() -> bool:
            return (await client.status()).flush_lsn.value >= end

        await wait_until(caught_up)
        assert await client.read(start.value, end) == primary.wal(start.value, end)
        assert (await client.node_status()).fault == ""


async def test_a_newer_instance_of_the_node_fences_the_older(keymanager: Keymanager, cmk: str, tmp_path: Path) -> None:
    directory = tmp_path / "sk"
    directory.mkdir()
    async with real_safekeeper(directory, keymanager) as process:
        assert process.process is not None
        async with keymanager.key_client(Role.SAFEKEEPER, "safekeeper-1"):
            assert await asyncio.to_thread(process.process.wait, 20) == 0
        assert '"fenced": true' in process.log.read_text()
