"""A keymanager dies by SIGKILL at every step of a rotation that persists or calls out, and the same request again
finishes what was begun: every DEK opens, no KEK is lost or made twice, and the old CMK is not needed any more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

import keymanager as package
from customercloud.client import VENDOR_ACTIONS
from shared.api.keymanager import AwsKey, KeyConfiguration, KeyUse, MoveProject, Project, Workspace
from shared.errors import ConflictError, KeylakeError, NotFoundError
from shared.failpoints import VARIABLE
from shared.ids import KeyConfigurationId, ProjectId
from tests.fixtures.key_source_contract import Losses
from tests.fixtures.waiting import wait_until
from tests.integration.test_keymanager_replacement import Bench
from tests.integration.test_keymanager_retirement import retire, wrapped
from tests.integration.test_keymanager_rotation import Sealed, rewrap, rotate, versions

if TYPE_CHECKING:
    from shared.keyclient import KeyClient
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration

PROJECTS = 2


class Place:
    """One key configuration with some projects, through all that is asked of it."""

    def __init__(self, manager: Keymanager) -> None:
        self.manager = manager
        self.bench = Bench(manager, {})
        self.things: list[tuple[ProjectId, Sealed]] = []
        self.projects: list[ProjectId] = []

    async def populate(self) -> None:
        self.cmk = await self.new_cmk()
        self.configuration_id, workspace = await self.bind(self.cmk)
        for _ in range(PROJECTS):
            self.projects.append((await self.manager.create_project(workspace)).project_id)
        await self.seal()

    async def bind(self, cmk: str) -> tuple[KeyConfigurationId, Workspace]:
        configuration, workspace = await self.manager.bind(cmk, probe_interval_s=3600)
        return configuration.key_configuration_id, workspace

    @contextlib.asynccontextmanager
    async def node(self) -> AsyncIterator[KeyClient]:
        async with self.manager.key_client() as keys:
            for project_id in self.projects:
                await keys.acquire(project_id, Losses())
            yield keys

    async def seal(self) -> None:
        async with self.node() as keys:
            for project_id in self.projects:
                self.things.append((project_id, await Sealed.make(keys, project_id)))

    async def check(self) -> None:
        async with self.node() as keys:
            for project_id, thing in self.things:
                await thing.check(keys, project_id)

    # --- the customer ---

    async def new_cmk(self) -> str:
        tenant = self.manager.tenant
        return await asyncio.to_thread(tenant.customer.create_key, role_arn=tenant.role_arn)

    async def disable(self, cmk: str) -> None:
        await asyncio.to_thread(self.manager.tenant.customer.disable, cmk)

    def aws_key(self, cmk: str) -> AwsKey:
        tenant = self.manager.tenant
        return AwsKey(key_arn=cmk, role_arn=tenant.role_arn, external_id=tenant.names.external_id)

    # --- what is stored ---

    async def key(self) -> object:
        async with self.manager.client() as client:
            path = f"/v1/key-configurations/{self.configuration_id}"
            return (await client.call(KeyConfiguration, "GET", path)).key

    async def stored(self, query: str) -> list[Any]:
        connection = await asyncpg.connect(self.manager.dsn)
        try:
            return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    async def live_keks(self) -> list[Any]:
        """(project, version, CMK's version) of every KEK that is not destroyed."""
        query = "SELECT project_id, kek_version, cmk_key_version FROM keymanager.kek WHERE wrapped IS NOT NULL"
        return await self.stored(query)

    async def nothing_is_being_replaced(self) -> None:
        assert await self.stored("SELECT 1 FROM keymanager.replacement") == []
        assert await self.stored("SELECT 1 FROM keymanager.staged_kek") == []

    async def recorded(self, action: str) -> int:
        """How often it is on record that this was done."""
        return sum(record["outcome"] == "ok" for record in await self.manager.audit(action))


class Job:
    """What is asked for."""

    recorded_as = ""

    def __init__(self, place: Place) -> None:
        self.place, self.manager = place, place.manager
        self.records = 0
        """Of what was asked for, before."""

    async def prepare(self) -> None: ...

    async def ask(self) -> None:
        """The same every time, until it is done. Raises what a person would see."""
        raise NotImplementedError

    async def check(self) -> int:
        """That it is done. How many records of it there are to be: one for each that was done, none for a replay."""
        raise NotImplementedError


class RotateKek(Job):
    recorded_as = "kek.rotate"

    async def prepare(self) -> None:
        self.project_id = self.place.projects[0]
        self.before = await self.manager.project(self.project_id)

    async def ask(self) -> None:
        await rotate(self.manager, self.project_id, from_version=len(self.before.keks))

    async def check(self) -> int:
        now = await self.manager.project(self.project_id)
        assert now.keks[:-1] == self.before.keks
        assert [version for version, _ in versions(now)] == list(range(1, len(self.before.keks) + 2))
        await self.place.seal()
        newest = {thing.envelope.kek_version for project_id, thing in self.place.things if project_id == now.project_id}
        assert max(newest) == len(now.keks)
        return 1


class RewrapCmk(Job):
    recorded_as = "kek.rewrap"

    async def prepare(self) -> None:
        self.version = await asyncio.to_thread(self.manager.tenant.customer.rotate, self.place.cmk)
        self.canaries = await self.place.recorded("canary.rewrap")

    async def ask(self) -> None:
        await rewrap(self.manager, self.place.configuration_id)

    async def check(self) -> int:
        keks = await self.place.live_keks()
        assert {version for _, _, version in keks} == {self.version}
        canary = await self.place.stored("SELECT canary_cmk_key_version FROM keymanager.key_configuration")
        assert (self.version,) in canary
        assert (await rewrap(self.manager, self.place.configuration_id)).outdated == 0
        assert await self.place.recorded("canary.rewrap") == self.canaries + 1
        return len(keks)


class ReplaceCmk(Job):
    recorded_as = "kek.stage"

    async def prepare(self) -> None:
        self.new = await self.place.new_cmk()

    async def ask(self) -> None:
        key = self.place.aws_key(self.new)
        with contextlib.suppress(ConflictError):  # it went on by itself, and is done
            await self.place.bench.begin(self.place.configuration_id, key)
        await self.place.bench.done(self.place.configuration_id, key)

    async def check(self) -> int:
        assert await self.place.key() == self.place.aws_key(self.new)
        await self.place.nothing_is_being_replaced()
        await self.place.disable(self.place.cmk)
        self.place.cmk = self.new
        return len(await self.place.live_keks())


class AbortReplacement(Job):
    """Of one that waits: its CMK wraps canaries, and no KEKs."""

    recorded_as = "kek.stage"

    async def prepare(self) -> None:
        tenant = self.manager.tenant
        self.new = await asyncio.to_thread(tenant.customer.create_key)
        document = tenant.customer.policy(self.new)
        for_canaries = {"Null": {"kms:EncryptionContext:keylake:canary-of": "false"}}
        of_role = {"Effect": "Allow", "Principal": {"AWS": tenant.role_arn}, "Resource": "*"}
        allowed = [
            of_role | {"Action": list(VENDOR_ACTIONS), "Condition": for_canaries},
            of_role | {"Action": "kms:DescribeKey"},
        ]
        document["Statement"] += allowed
        await asyncio.to_thread(tenant.customer.put_policy, self.new, document)
        await self.place.bench.begin(self.place.configuration_id, self.place.aws_key(self.new))

    async def ask(self) -> None:
        with contextlib.suppress(NotFoundError):  # nothing is left to give up
            await self.place.bench.abort(self.place.configuration_id)

    async def check(self) -> int:
        assert await self.place.key() == self.place.aws_key(self.place.cmk)
        await self.place.nothing_is_being_replaced()
        await self.place.disable(self.new)
        return 0


class RetireKek(Job):
    recorded_as = "kek.destroy"

    async def prepare(self) -> None:
        self.project_id = self.place.projects[0]
        self.version = len((await rotate(self.manager, self.project_id)).keks)
        async with self.place.node() as keys:
            for project_id, thing in self.place.things:
                if project_id == self.project_id:
                    [thing.envelope] = await keys.rewrap(project_id, [(thing.thing, thing.envelope)])
            kept = KeyUse(kek_version=self.version, dek_version=1, objects=1, size_bytes=1)
            await keys.report(self.project_id, self.version, [kept])
        self.old = sum((await wrapped(self.manager, self.project_id)).values()) - 1

    async def ask(self) -> None:
        await retire(self.manager, self.project_id)

    async def check(self) -> int:
        left = await wrapped(self.manager, self.project_id)
        assert left == {version: version == self.version for version in range(1, self.version + 1)}
        return self.old


class MoveProjects(Job):
    recorded_as = "project.move_key"

    async def prepare(self) -> None:
        self.new = await self.place.new_cmk()
        self.target, _ = await self.place.bind(self.new)

    async def ask(self) -> None:
        async with self.manager.client() as client:
            for project_id in self.place.projects:
                body = MoveProject(key_configuration_id=self.target)
                await client.call(Project, "POST", f"/v1/projects/{project_id}:move-key", body=body)

    async def check(self) -> int:
        for project_id in self.place.projects:
            assert (await self.manager.project(project_id)).key_configuration_id == self.target
        await self.place.disable(self.place.cmk)
        self.place.cmk, self.place.configuration_id = self.new, self.target
        return PROJECTS


# A process that is to die at a step finishes the one before first: no two neighbours are of one kind.
STEPS: list[tuple[type[Job], str]] = [
    (RotateKek, "kek-made:1"),  # by the KMS; nobody else knows
    (RewrapCmk, "canary-rewrapped:1"),
    (RotateKek, "kek-stored:1"),  # and nobody was told
    (RewrapCmk, "kek-rewrapped:2"),
    (ReplaceCmk, "stage-wrapped:2"),
    (RetireKek, "retirement-stored:1"),
    (ReplaceCmk, "switch-stored:1"),
    (AbortReplacement, "abort-halted:1"),
]
MORE_STEPS: list[tuple[type[Job], str]] = [
    (RewrapCmk, "canary-rewrap-stored:1"),
    (ReplaceCmk, "replacement-tried:1"),
    (RewrapCmk, "kek-rewrap-stored:1"),
    (ReplaceCmk, "replacement-begun:1"),
    (RewrapCmk, "kek-rewrap-stored:2"),
    (ReplaceCmk, "stage-unwrapped:1"),
    (MoveProjects, "move-wrapped:1"),
    (ReplaceCmk, "stage-wrapped:1"),
    (MoveProjects, "move-stored:1"),
    (ReplaceCmk, "stage-stored:1"),
    (AbortReplacement, "abort-stored:1"),
    (ReplaceCmk, "stage-stored:2"),
    (MoveProjects, "move-stored:2"),
    (RetireKek, "retirement-written:1"),  # but not committed
    (ReplaceCmk, "switch-written:1"),  # but not committed
]


async def begin(job: Job, step: str) -> None:
    """Returns when the keymanager has died of it."""
    await job.prepare()
    job.records = await job.place.recorded(job.recorded_as)
    with contextlib.suppress(KeylakeError):
        await job.ask()
    process = job.manager.process
    assert process is not None
    await wait_until(lambda: process.poll() is not None)
    assert process.returncode == -signal.SIGKILL, step


async def finish(job: Job) -> None:
    await job.ask()
    expected = job.records + await job.check()
    assert await job.place.recorded(job.recorded_as) == expected
    await job.place.check()


async def test_it_dies_at_every_step_and_what_was_asked_for_is_done_once(keymanager: Keymanager) -> None:
    everything = os.environ.get("KEYLAKE_ALL_FAILPOINTS") == "1"  # make crash-anywhere
    keymanager.options["rotation_check_interval_s"] = 3600  # nothing is done by itself
    place, last = Place(keymanager), None
    await place.populate()
    keymanager.kill()
    for make, step in STEPS + (MORE_STEPS if everything else []):
        keymanager.environment = {VARIABLE: step}
        await keymanager.start()
        if last is not None:
            await finish(last)
        await begin(last := make(place), step)
    keymanager.environment = {}
    await keymanager.start()
    assert last is not None
    await finish(last)
    # Nothing is in memory but what is stored.
    keymanager.kill()
    await keymanager.start()
    await place.check()
    assert (await keymanager.verify_audit()).intact


def test_every_step_that_has_a_name_is_died_at() -> None:
    sources = Path(package.__path__[0]).rglob("*.py")
    named = {name for source in sources for name in re.findall(r'failpoint\("([a-z-]+)"\)', source.read_text())}
    assert {step.partition(":")[0] for _, step in STEPS + MORE_STEPS} == named
