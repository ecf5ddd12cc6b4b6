"""An old KEK is destroyed when nothing is left under it, never before; and nothing brings it back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import asyncpg
import pytest

from shared.api.keymanager import KeyStatus, KeyUse, RetiredKeks, RevokeRequest, Role
from shared.errors import ConflictError, IntegrityError, KeyAccessError, NotFoundError, RevokedError, UnavailableError
from shared.ids import ProjectId
from shared.migrate import load_migrations, migrate
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.waiting import wait_until
from tests.integration.test_keymanager_rotation import Sealed, rewrap, rotate

if TYPE_CHECKING:
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration


async def retire(keymanager: Keymanager, project_id: ProjectId, *, dry_run: bool = False) -> RetiredKeks:
    async with keymanager.client() as client:
        path = f"/v1/projects/{project_id}/keks:retire"
        return await client.call(RetiredKeks, "POST", path, params={"dry_run": dry_run})


async def status(keymanager: Keymanager, project_id: ProjectId) -> KeyStatus:
    async with keymanager.client() as client:
        return await client.call(KeyStatus, "GET", f"/v1/projects/{project_id}/keks")


def use(kek_version: int, dek_version: int = 1) -> KeyUse:
    return KeyUse(kek_version=kek_version, dek_version=dek_version, objects=3, size_bytes=1000)


async def wrapped(keymanager: Keymanager, project_id: ProjectId) -> dict[int, bool]:
    """Version → is its wrapped KEK still in the database?"""
    connection = await asyncpg.connect(keymanager.dsn)
    try:
        query = "SELECT kek_version, wrapped FROM keymanager.kek WHERE project_id = $1"
        rows = await connection.fetch(query, str(project_id))
        return {row["kek_version"]: row["wrapped"] is not None for row in rows}
    finally:
        await connection.close()


async def test_a_kek_goes_when_the_last_node_has_let_go_of_it(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    assert (await retire(keymanager, project_id)).retired == []  # the current one is never old
    async with (
        keymanager.key_client(Role.SAFEKEEPER, "safekeeper-1") as one,
        keymanager.key_client(Role.PAGESERVER, "pageserver-1") as two,
    ):
        await one.acquire(project_id, Losses())
        await two.acquire(project_id, Losses())
        kept, moved = await Sealed.make(one, project_id), await Sealed.make(two, project_id)
        await rotate(keymanager, project_id)
        with pytest.raises(ConflictError, match=r"KEK 1, safekeeper-1: it was given keys and has not said yet"):
            await retire(keymanager, project_id)

        await two.report(project_id, 2, [use(2)])
        await one.report(project_id, 2, [use(1), use(2)])
        looked = await retire(keymanager, project_id, dry_run=True)
        assert looked.retired == []
        [why] = looked.in_use
        assert (why.node_id, why.kek_version) == ("safekeeper-1", 1)
        assert why.reason == "it keeps 3 objects, 1000 bytes, under this version"
        await one.report(project_id, 2, [use(1).model_copy(update={"superseded": True}), use(2)])
        [why] = (await retire(keymanager, project_id, dry_run=True)).in_use
        assert why.reason.endswith(", 3 of them old versions that the bucket keeps: a full re-key removes those")
        with pytest.raises(ConflictError, match="3 objects, 1000 bytes"):
            await retire(keymanager, project_id)
        await kept.check(one, project_id)

        [moved.envelope] = await two.rewrap(project_id, [(moved.thing, moved.envelope)])
        [kept.envelope] = await one.rewrap(project_id, [(kept.thing, kept.envelope)])
        old = Sealed(kept.thing, kept.envelope, kept.data)
        await one.report(project_id, 2, [])
        assert (await retire(keymanager, project_id, dry_run=True)).retired == [1]
        assert await wrapped(keymanager, project_id) == {1: True, 2: True}
        await one.aclose()  # its word holds while it is away
        assert (await retire(keymanager, project_id)).retired == [1]
        assert (await retire(keymanager, project_id)).retired == []
        assert await wrapped(keymanager, project_id) == {1: False, 2: True}
        await moved.check(two, project_id)
        await kept.check(two, project_id)
        assert old.envelope.dek_version == 1

    keymanager.kill()
    await keymanager.start()
    found = await status(keymanager, project_id)
    assert [(k.kek_version, k.destroyed, k.destroyed_at is not None) for k in found.keks] == [
        (1, True, True),
        (2, False, False),
    ]
    async with keymanager.key_client(Role.PAGESERVER, "pageserver-1") as two:
        await two.acquire(project_id, Losses())
        await kept.check(two, project_id)
    assert [r["details"]["kek_version"] for r in await keymanager.audit("kek.destroy")] == ["1"]
    assert (await keymanager.verify_audit()).intact


async def test_what_a_destroyed_kek_wrapped_does_not_open(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        lost = await Sealed.make(keys, project_id)
        await rotate(keymanager, project_id)
        await keys.report(project_id, 2, [])  # a node that lies harms its own data only
        assert (await retire(keymanager, project_id)).retired == [1]
        await keys.release(project_id)
        await keys.acquire(project_id, Losses())
        with pytest.raises(IntegrityError, match="destroyed"):
            await lost.check(keys, project_id)
        with pytest.raises(IntegrityError):
            await keys.rewrap(project_id, [(lost.thing, lost.envelope)])


@contextlib.asynccontextmanager
async def backup(dsn: str) -> AsyncIterator[str]:
    """A copy of a database that nobody uses: Postgres waits for the backends of whoever was killed just now."""
    server, _, name = dsn.rpartition("/")
    copy = f"{name}_backup"
    connection = await asyncpg.connect(f"{server}/postgres")
    try:
        await connection.execute(f"CREATE DATABASE {copy} TEMPLATE {name}")
        yield f"{server}/{copy}"
        await connection.execute(f"DROP DATABASE {copy} WITH (FORCE)")
    finally:
        await connection.close()


async def test_what_an_older_metadata_database_opens(keymanager: Keymanager, cmk: str) -> None:
    """What was wrapped by then, though it was destroyed since, by whichever version of the CMK; and nothing else."""
    configuration, workspace = await keymanager.bind(cmk)
    project_id = (await keymanager.create_project(workspace)).project_id
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        then = await Sealed.make(keys, project_id)
    keymanager.kill()
    async with backup(keymanager.dsn) as older:
        await keymanager.start()
        await asyncio.to_thread(keymanager.tenant.customer.rotate, cmk)
        assert (await rewrap(keymanager, configuration.key_configuration_id)).rewrapped == 1
        await rotate(keymanager, project_id)
        async with keymanager.key_client() as keys:
            await keys.acquire(project_id, Losses())
            [moved] = await keys.rewrap(project_id, [(then.thing, then.envelope)])
            since = [Sealed(then.thing, moved, then.data), await Sealed.make(keys, project_id)]
            await keys.report(project_id, 2, [use(2)])
            assert (await retire(keymanager, project_id)).retired == [1]
            await keys.release(project_id)
            await keys.acquire(project_id, Losses())
            with pytest.raises(IntegrityError, match="destroyed"):
                await then.check(keys, project_id)
        keymanager.kill()

        keymanager.dsn = older
        await keymanager.start()
        async with keymanager.key_client() as keys:
            await keys.acquire(project_id, Losses())
            await then.check(keys, project_id)
            for _ in range(2):
                for thing in since:
                    with pytest.raises(IntegrityError, match="a KEK that this project does not have"):
                        await thing.check(keys, project_id)
                # Another KEK of the same number is not taken for the lost one.
                assert [kek.kek_version for kek in (await rotate(keymanager, project_id)).keks][:2] == [1, 2]
        assert (await keymanager.verify_audit()).intact
        keymanager.kill()


async def test_a_node_that_looked_before_the_rotation_says_nothing_about_it(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        await keys.report(project_id, 1, [])
        await keys.report(project_id, 99, [])  # nor can it speak of versions to come
        await rotate(keymanager, project_id)
        with pytest.raises(ConflictError, match="it has not looked since"):
            await retire(keymanager, project_id)


async def test_retirement_races_with_rotation_and_rewrap(keymanager: Keymanager, cmk: str) -> None:
    """Every DEK opens at the end, whatever the order was; the database and the answers agree on what is destroyed."""
    project_id = (await keymanager.new_project(cmk)).project_id
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project_id, Losses())
        things = [await Sealed.make(keys, project_id) for _ in range(20)]

        async def upkeep() -> None:
            for _ in range(10):
                version = lease.kek_version
                for thing in things:
                    [thing.envelope] = await keys.rewrap(project_id, [(thing.thing, thing.envelope)])
                uses = [use(thing.envelope.kek_version) for thing in things]
                await keys.report(project_id, version, uses)

        async def turn() -> None:
            for _ in range(5):
                await rotate(keymanager, project_id)

        async def retire_often() -> list[int]:
            gone: list[int] = []
            for _ in range(20):
                try:
                    gone += (await retire(keymanager, project_id)).retired
                except ConflictError:
                    await asyncio.sleep(0)
            return gone

        _, _, gone = await asyncio.gather(upkeep(), turn(), retire_often())
        await wait_until(lambda: lease.kek_version == 6)
        await upkeep()
        gone += (await retire(keymanager, project_id)).retired if len(gone) < 5 else []
        assert sorted(gone) == [1, 2, 3, 4, 5]
        assert await wrapped(keymanager, project_id) == {version: version == 6 for version in range(1, 7)}
        await keys.release(project_id)
        await keys.acquire(project_id, Losses())
        for thing in things:
            await thing.check(keys, project_id)


async def test_wraps_are_counted_and_unwraps_noted(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        made = await keys.generate(project_id, names := [named(f"n{i}") for i in range(512)])
        await rotate(keymanager, project_id)
        before = {kek.kek_version: kek.wraps for kek in (await status(keymanager, project_id)).keks}
        items = [(name, envelope) for name, (_, envelope) in zip(names, made, strict=True)]
        for _ in range(9):
            await keys.rewrap(project_id, items)
        after = {kek.kek_version: kek.wraps for kek in (await status(keymanager, project_id)).keks}
        assert after[1] == before[1]
        assert after[2] - before[2] >= 9 * 512
        assert all(kek.last_unwrap_at is None for kek in (await status(keymanager, project_id)).keks)
    keymanager.kill()
    await keymanager.start()
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        await keys.unwrap(project_id, items[:1])
        assert [kek.last_unwrap_at is not None for kek in (await status(keymanager, project_id)).keks] == [True, False]


async def test_a_rekey_is_a_rotation_that_leases_and_restarts_know_of(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project_id, Losses())
        assert (lease.kek_version, lease.dek_floor) == (1, 0)
        async with keymanager.client() as client:
            begun = await client.call(KeyStatus, "POST", f"/v1/projects/{project_id}:rekey")
        assert (begun.dek_floor, len(begun.keks)) == (2, 2)
        await wait_until(lambda: (lease.kek_version, lease.dek_floor) == (2, 2))
    keymanager.kill()
    await keymanager.start()
    assert (await status(keymanager, project_id)).dek_floor == 2
    with pytest.raises(NotFoundError):
        await retire(keymanager, ProjectId.new())
    with pytest.raises(NotFoundError):
        await status(keymanager, ProjectId.new())


async def test_rewraps_across_a_revocation_and_a_kill_of_the_keymanager(keymanager: Keymanager, cmk: str) -> None:
    """What was answered opens, what was not is asked again; nothing is answered while the project is stopped."""
    project_id = (await keymanager.new_project(cmk)).project_id
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project_id, Losses())
        things = [await Sealed.make(keys, project_id) for _ in range(50)]
        await rotate(keymanager, project_id)
        stopped = asyncio.Event()

        async def work() -> int:
            refused = 0
            while not stopped.is_set():
                for thing in things:
                    try:
                        [thing.envelope] = await keys.rewrap(project_id, [(thing.thing, thing.envelope)])
                    except KeyAccessError:
                        refused += 1
                        await asyncio.sleep(0.01)
                    except UnavailableError:
                        continue  # no answer: it is asked again in the next round
                    await asyncio.sleep(0)
            return refused

        working = asyncio.create_task(work())
        async with keymanager.client() as client:
            await client.request("POST", f"/v1/projects/{project_id}:revoke", body=RevokeRequest(reason="an incident"))
        await keymanager.wait_sealed(project_id)
        with pytest.raises(RevokedError):
            await keys.rewrap(project_id, [(things[0].thing, things[0].envelope)])
        async with keymanager.client() as client:
            await client.request("POST", f"/v1/projects/{project_id}:restore")
        await wait_until(lambda: lease.live)
        await rotate(keymanager, project_id)
        keymanager.kill()
        await keymanager.start()
        await wait_until(
            lambda: working.done() or (lease.live and all(thing.envelope.kek_version == 3 for thing in things))
        )
        stopped.set()
        assert await working > 0
        await keys.report(project_id, 3, [use(3)])
        assert (await retire(keymanager, project_id)).retired == [1, 2]
        await keys.release(project_id)
        await keys.acquire(project_id, Losses())
        for thing in things:
            await thing.check(keys, project_id)


async def test_who_was_given_keys_before_this_was_written_down_must_report_first(metadata_dsn: str) -> None:
    """The migration of an installation that is in use: every node that stores data may keep something."""
    migrations = load_migrations("keymanager")
    connection = await asyncpg.connect(metadata_dsn, server_settings={"search_path": "keymanager"})
    try:
        await migrate(connection, "keymanager", migrations[:2])
        await connection.execute(
            """
            INSERT INTO account VALUES ('acc-1', 'a', now());
            INSERT INTO key_configuration VALUES
                ('kc-1', 'acc-1', 'k', '{}', 0, 1, '', '', 'ALLOWED', '', NULL, now(), now());
            INSERT INTO workspace VALUES ('ws-1', 'acc-1', 'w', 'kc-1', now());
            INSERT INTO project VALUES ('prj-1', 'ws-1', 'p', false, false, 'ACTIVE', '', now());
            INSERT INTO node VALUES ('safekeeper-1', 'kid', 1, 'inst-1'), ('proxy-1', 'kid', 1, 'inst-2');
            INSERT INTO instance VALUES
                ('inst-0', 'safekeeper-1', 'safekeeper', now()), ('inst-1', 'safekeeper-1', 'safekeeper', now()),
                ('inst-2', 'proxy-1', 'proxy', now());
            """
        )
        await migrate(connection, "keymanager", migrations)
        rows = await connection.fetch("SELECT project_id, node_id, kek_floor, reported_at FROM key_user")
        assert [tuple(row) for row in rows] == [("prj-1", "safekeeper-1", 1, None)]
    finally:
        await connection.close()
