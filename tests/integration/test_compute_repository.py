"""The compute manager's database: who the members are, read with a term, changed only while no later one is; and who
may log in, by term, too."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import asyncpg
import pytest

import shared.table_files
from compute.agent.protocol import LoginRole, LoginRoles, role_digest
from compute.proposer import Membership
from compute.repository import Repository
from shared.errors import NotFoundError, UnavailableError
from shared.ids import EndpointId, ProjectId
from shared.table_files import rewrite_tables
from shared.wire.scram import ScramVerifier
from tests.fixtures.keymanager import metadata_dsn, metadata_server

__all__ = ["metadata_dsn", "metadata_server"]  # fixtures

pytestmark = pytest.mark.integration

UNTIL = datetime(2199, 1, 2, 3, 4, 5, 600000, tzinfo=UTC)


async def test_a_seat_changes_only_while_no_later_term_is_reserved(metadata_dsn: str) -> None:
    async with Repository(metadata_dsn, "compute") as repository:
        timeline_id = (await repository.add_timeline(ProjectId.new(), "main")).timeline_id
        await repository.safekeeper_told(timeline_id, "safekeeper-2")
        first = await repository.reserve_term(timeline_id, 1)
        assert (first.term, first.membership) == (1, Membership())
        seats = [await repository.new_seat(timeline_id) for _ in range(2)]
        assert seats == [1, 2]
        rival = await repository.reserve_term(timeline_id, 1, next_generation=True)
        assert rival.membership == Membership(1), "whoever votes in it votes in no earlier one"
        assert not await repository.change_seat(timeline_id, "safekeeper-2", 1, first.term)
        assert (await repository.timeline(timeline_id)).membership == Membership(1)
        assert await repository.change_seat(timeline_id, "safekeeper-2", 2, rival.term)
        changed = Membership(1, {"safekeeper-2": 2})
        assert (changed.seat("safekeeper-2"), changed.seat("safekeeper-1")) == (2, 0)
        # Whoever comes later knows of it.
        assert (await repository.reserve_term(timeline_id, 1)).membership == changed
        [row] = await repository.timelines_on("safekeeper-2")
        assert (row.timeline_id, row.membership) == (timeline_id, changed)
        assert await repository.timelines_on("safekeeper-1") == []


async def test_who_may_log_in_is_what_the_latest_compute_said(metadata_dsn: str) -> None:
    def roles(*names: str, nonce: str = "5a") -> LoginRoles:
        verifiers = {name: ScramVerifier.compute(name, b"0123456789abcdef", 1).serialize() for name in names}
        return LoginRoles(
            roles={
                role_digest(bytes.fromhex(nonce * 32), name.encode()): LoginRole(verifier=text, valid_until=UNTIL)
                for name, text in verifiers.items()
            },
            mock_nonce=nonce * 32,
        )

    first, second = EndpointId.new(), EndpointId.new()
    async with Repository(metadata_dsn, "compute") as repository:
        timeline_id = (await repository.add_timeline(ProjectId.new(), "main")).timeline_id
        nothing = await repository.listed_role(timeline_id, b"anna")
        assert (nothing.last_term, nothing.term, nothing.role, nothing.is_branch) == (0, None, None, False)
        await repository.reserve_term(timeline_id, 5)
        await repository.keep_login_roles(timeline_id, 5, first, roles("anna", "Zo\u00eb"))
        anna = await repository.listed_role(timeline_id, b"anna")
        assert (anna.last_term, anna.term, anna.endpoint_id, anna.mock_nonce) == (5, 5, str(first), "5a" * 32)
        assert anna.role is not None
        assert ScramVerifier.parse(anna.role.verifier).check_password("anna")
        assert anna.role.valid_until == UNTIL
        assert (await repository.listed_role(timeline_id, "Zo\u00eb".encode())).role is not None
        for name in (b"nobody", b"ann", b"verifier", b"Zo\xeb"):
            assert (await repository.listed_role(timeline_id, name)).role is None
        # A list replaces the one before as a whole, and never a later one.
        await repository.reserve_term(timeline_id, 7)
        assert (await repository.listed_role(timeline_id, b"anna")).last_term == 7
        await repository.keep_login_roles(timeline_id, 7, second, roles("berta", nonce="a5"))
        await repository.keep_login_roles(timeline_id, 6, first, roles("anna"))
        assert (await repository.listed_role(timeline_id, b"anna")).role is None
        berta = await repository.listed_role(timeline_id, b"berta")
        assert (berta.term, berta.endpoint_id, berta.mock_nonce) == (7, str(second), "a5" * 32)
        assert berta.role is not None
        await repository.delete_timeline(timeline_id)
        with pytest.raises(NotFoundError):
            await repository.listed_role(timeline_id, b"berta")


async def test_what_a_snapshot_still_sees_is_not_written_anew_as_if_it_were_gone(
    metadata_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, reader = await asyncpg.connect(metadata_dsn), await asyncpg.connect(metadata_dsn)
    try:
        await connection.execute("CREATE TABLE secrets (text text); INSERT INTO secrets VALUES ('canary-1')")
        async with reader.transaction(isolation="repeatable_read"):
            await reader.fetchval("SELECT 1")  # a snapshot, and no lock
            await connection.execute("DELETE FROM secrets")
            monkeypatch.setattr(shared.table_files, "_TIMEOUT_S", 0.2)
            with pytest.raises(UnavailableError, match="stays in its file while a transaction is open"):
                await rewrite_tables(connection, ["secrets"])
            monkeypatch.undo()
            rewriting = asyncio.create_task(rewrite_tables(connection, ["secrets"]))
            await asyncio.sleep(0.3)
            assert not rewriting.done()
        await rewriting
        assert await connection.fetchval("SELECT pg_relation_size('secrets')") == 0
    finally:
        await connection.close()
        await reader.close()
