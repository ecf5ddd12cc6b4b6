"""Keys through everything that can happen to them, beside an oracle: every DEK opens if and only if the oracle says so.

A real keymanager process over TLS, on a real PostgreSQL, with CMKs in three (simulated) clouds through the vendors' own
SDKs. The oracle (`tests/fixtures/keys_oracle.py`) knows of a project: which CMK is it under and does its customer allow
it, did an operator revoke it, which DEKs did it get, and which KEKs were destroyed by the nodes' own word. Rotations,
replacements, moves and re-keys change nothing of what opens; a retirement ends what a node said that it does not need.

CI runs few examples, always the same. `make fuzz-keys EXAMPLES=500` runs others, as many as wanted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shared.api.keymanager import (
    CreateKeyConfiguration,
    KeyState,
    KeyUse,
    ObjectName,
    RetiredKeks,
    RevokeRequest,
)
from shared.errors import ConflictError, IntegrityError, InvalidInputError, KeyAccessError, RevokedError
from shared.ids import KeyConfigurationId, WorkspaceId
from tests.fixtures.customercloud import new_tenant
from tests.fixtures.key_source_contract import NONCE, Losses, named
from tests.fixtures.keymanager import Keymanager
from tests.fixtures.keys_oracle import Cmk, Configuration, Dek, Known, Loop, World
from tests.fixtures.kms_customer_aws import aws_customer
from tests.fixtures.kms_customer_azure import azure_customer
from tests.fixtures.kms_customer_google import google_customer
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust
    from tests.fixtures.kms_clouds import KmsClouds
    from tests.fixtures.kms_customers import KmsCustomer

pytestmark = pytest.mark.integration

T = TypeVar("T")
EXAMPLES: Final = int(os.environ.get("KEYLAKE_KEY_EXAMPLES", "0"))
"""0: those of CI."""


NUMBERS: Final = st.integers(0, 5)
"""Which one, modulo how many there are."""


class Keys(RuleBasedStateMachine):
    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.cmks = [Cmk(customer) for customer in self.world.customers]
        self.configurations: list[Configuration] = []
        self.projects: list[Known] = []

    @initialize(numbers=st.permutations(range(3)))
    def two_customers(self, numbers: list[int]) -> None:
        """Two key configurations, a project under each, and a DEK in each of them; and a third without any."""
        self.cmks = [self.cmks[number] for number in numbers]
        for cmk in self.cmks[:2]:
            self.configurations.append(self._run(self._configure(cmk)))
            self.projects.append(self._run(self._create_project(self.configurations[-1])))
            self.projects[-1].deks += self._run(self._generate(self.projects[-1], 1))
        self.configurations.append(self._run(self._configure(self.cmks[2])))

    # --- things come into being ---

    @rule(number=NUMBERS)
    @precondition(lambda self: len(self.configurations) < 4)
    def new_configuration(self, number: int) -> None:
        """Tried when it is made: only a key that may be used becomes one."""
        cmk = self.cmks[number % 3]
        if cmk.allowed:
            self.configurations.append(self._run(self._configure(cmk)))
        else:
            with pytest.raises(InvalidInputError):
                self._run(self._configure(cmk))

    @rule(number=NUMBERS)
    @precondition(lambda self: len(self.configurations) > 2)
    def delete_configuration(self, number: int) -> None:
        """Refused while a workspace or a project is under it, whatever its key is good for."""
        configuration = self.configurations[number % len(self.configurations)]
        with pytest.raises(ConflictError):
            self._run(self._delete(configuration))
        if configuration.had_project:
            return
        self._run(self._delete_workspace(configuration))
        if any(known.configuration is configuration for known in self.projects):
            with pytest.raises(ConflictError):
                self._run(self._delete(configuration))
            configuration.workspace_id = self._run(self._create_workspace(configuration.key_configuration_id))
        else:
            self._run(self._delete(configuration))
            self.configurations.remove(configuration)

    @rule(number=NUMBERS)
    @precondition(lambda self: len(self.projects) < 4)
    def new_project(self, number: int) -> None:
        configuration = self.configurations[number % len(self.configurations)]
        if configuration.cmk.allowed:
            self.projects.append(self._run(self._create_project(configuration)))
        else:
            with pytest.raises(RevokedError):
                self._run(self._create_project(configuration))

    @rule(number=NUMBERS, count=st.integers(1, 2))
    def write(self, number: int, count: int) -> None:
        """New DEKs come under the newest KEK, or not at all."""
        known = self._project(number)
        if known.state is KeyState.ACTIVE:
            made = self._run(self._generate(known, count))
            assert {dek.envelope.kek_version for dek in made} == {known.kek_version}
            known.deks += made
        else:
            with pytest.raises(KeyAccessError):
                self._run(self._generate(known, count))

    # --- what the customer and the operator do to them ---

    @rule(number=NUMBERS, deletion=st.booleans())
    def customer_changes_its_mind(self, number: int, deletion: bool) -> None:
        cmk = self.cmks[number % 3]
        if not cmk.allowed:
            cmk.give_back()
        elif deletion:
            cmk.customer.schedule_deletion()
            cmk.pending_deletion = True
        else:
            cmk.customer.disable()
            cmk.enabled = False
        self._look_at(cmk)

    @rule(number=NUMBERS)
    def operator_changes_its_mind(self, number: int) -> None:
        known = self._project(number)
        restore = f"/v1/projects/{known.project_id}:restore"
        if known.held:
            self._run(self._revoke(known))  # again: nothing changes
            self._run(self._post(restore))
        else:
            with pytest.raises(ConflictError):
                self._run(self._post(restore))
            self._run(self._revoke(known))
        known.held = not known.held

    # --- rotations ---

    @rule(number=NUMBERS)
    def rotate_kek(self, number: int) -> None:
        known = self._project(number)
        path = f"/v1/projects/{known.project_id}/keks:rotate"
        if known.state is KeyState.ACTIVE:
            self._run(self._post(path))
            known.kek_version += 1
        else:
            with pytest.raises(KeyAccessError):
                self._run(self._post(path))

    @rule(number=NUMBERS, rotate=st.booleans())
    def rotate_cmk_and_rewrap(self, number: int, rotate: bool) -> None:
        """A new version: what the old one wrapped still opens. Afterwards every KEK is wrapped by one version."""
        configuration = self.configurations[number % len(self.configurations)]
        path = f"/v1/key-configurations/{configuration.key_configuration_id}:rewrap"
        if not configuration.cmk.allowed:
            # Refused when it is used; or before, where a key that is to be deleted names no current version. Where it
            # still does, there may be nothing to do.
            with contextlib.suppress(KeyAccessError, ConflictError):
                self._run(self._post(path))
            configuration.cmk.give_back()
            self._look_at(configuration.cmk)
        if rotate:
            configuration.cmk.customer.rotate()
        self._run(self._post(path))
        assert len(self._run(self._cmk_versions(configuration))) <= 1

    @rule(number=NUMBERS, to=NUMBERS)
    def replace_cmk(self, number: int, to: int) -> None:
        """To any cloud. What the old key is good for must not matter any more afterwards."""
        configuration, new = self.configurations[number % len(self.configurations)], self.cmks[to % 3]
        if new is configuration.cmk:
            return
        if configuration.cmk.allowed and new.allowed:
            self._run(self._replace(configuration, new))
            configuration.cmk = new
        else:
            with pytest.raises((KeyAccessError, InvalidInputError)):
                self._run(self._replace(configuration, new))

    @rule(number=NUMBERS, to=NUMBERS)
    def move_to_another_configuration(self, number: int, to: int) -> None:
        """Its KEKs, and nobody else's. From then on it is the other customer's yes and no that counts."""
        known, target = self._project(number), self.configurations[to % len(self.configurations)]
        source = known.configuration
        if target is source or (source.cmk.allowed and target.cmk.allowed):
            self._run(self._move(known, target))
            known.configuration = target
        else:
            with pytest.raises(KeyAccessError):
                self._run(self._move(known, target))

    # --- what nodes do so that an old KEK may go ---

    @rule(number=NUMBERS)
    def rekey(self, number: int) -> None:
        known = self._project(number)
        if known.state is KeyState.ACTIVE:
            self._run(self._rekey(known))
            known.kek_version += 1
            known.dek_floor = known.kek_version
        else:
            with pytest.raises(KeyAccessError):
                self._run(self._rekey(known))

    @rule(number=NUMBERS)
    def wrap_again(self, number: int) -> None:
        """The same DEKs, under the newest KEK. Below the floor of a re-key: other DEKs, and the data sealed anew."""
        known = self._project(number)
        deks = [dek for dek in known.deks if known.opens(dek)]
        if not deks:
            return
        if known.state is not KeyState.ACTIVE:
            with pytest.raises(KeyAccessError):
                self._run(self._rewrap(known, deks))
            return
        old = [dek for dek in deks if dek.envelope.dek_version < known.dek_floor]
        kept = [dek for dek in deks if dek.envelope.dek_version >= known.dek_floor]
        self._run(self._rewrap(known, kept))
        if old:
            for dek in old:
                assert self._run(self._open(known, dek, dek.name)) == b"row"
            known.deks = [dek for dek in known.deks if dek not in old] + self._run(self._generate(known, len(old)))
        left = {dek.envelope.kek_version for dek in known.deks if known.opens(dek)}
        assert left == {known.kek_version}

    @rule(number=NUMBERS, lie=st.booleans())
    def report(self, number: int, lie: bool) -> None:
        """What the node keeps; one that lies has only itself to blame."""
        known = self._project(number)
        uses = [] if lie else [dek.use for dek in known.deks if known.opens(dek)]
        if known.state is KeyState.ACTIVE:
            self._run(self._report(known, uses))
            known.kek_floor = max(known.kek_floor, min([known.kek_version, *(use.kek_version for use in uses)]))
        else:
            with pytest.raises(KeyAccessError):
                self._run(self._report(known, uses))

    @rule(number=NUMBERS, dry_run=st.booleans())
    def retire(self, number: int, dry_run: bool) -> None:
        """Also of a project whose keys are revoked: to destroy takes no key."""
        known = self._project(number)
        if known.old and not known.retirable and not dry_run:
            with pytest.raises(ConflictError):
                self._run(self._retire(known, dry_run=dry_run))
            return
        done = self._run(self._retire(known, dry_run=dry_run))
        assert done.retired == known.retirable
        assert {use.kek_version for use in done.in_use} == known.old - set(known.retirable)
        if not dry_run:
            known.destroyed |= set(done.retired)

    # --- and what else can happen ---

    @rule()
    def kill_keymanager(self) -> None:
        if self.world.kills_left == 0:
            return
        self.world.kills_left -= 1
        self.world.manager.kill()
        self._run(self.world.manager.start())

    @rule(number=NUMBERS, to=NUMBERS)
    def swap(self, number: int, to: int) -> None:
        """An envelope opens for its own project and object only."""
        known, other = self._project(number), self._project(to)
        for dek in known.deks[-1:]:
            if known.state is KeyState.ACTIVE:
                with pytest.raises(IntegrityError):
                    self._run(self._open(known, dek, named()))
            if other is not known and other.state is KeyState.ACTIVE:
                with pytest.raises(IntegrityError):
                    self._run(self._open(other, dek, dek.name))

    # --- what always holds ---

    @invariant()
    def every_dek_opens_iff_the_oracle_says_so(self) -> None:
        for known in self.projects:
            self._run(self._check(known))

    async def _check(self, known: Known) -> None:
        async def agrees() -> bool:
            project = await self.world.manager.project(known.project_id)
            return project.state is known.state and known.lease.live == (known.state is KeyState.ACTIVE)

        await wait_until(agrees)  # a return is over when the revocation before it is sealed
        if known.state is KeyState.ACTIVE:
            await self._look_into(known)
        else:
            for dek in known.deks[:1]:
                with pytest.raises(RevokedError):
                    await self._open(known, dek, dek.name)
            assert known.project_id not in (await self.world.manager.status()).plaintext_keks

    # --- hands ---

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.world.loop.run(work)

    def _project(self, number: int) -> Known:
        return self.projects[number % len(self.projects)]

    def _look_at(self, cmk: Cmk) -> None:
        """The watcher's probe, now; an hour apart otherwise, so that nothing else changes a state."""
        for configuration in self.configurations:
            if configuration.cmk is cmk:
                self._run(self._post(f"/v1/workspaces/{configuration.workspace_id}:revalidate"))

    async def _configure(self, cmk: Cmk) -> Configuration:
        body = CreateKeyConfiguration(name=f"kc-{secrets.token_hex(4)}", key=cmk.customer.cmk, probe_interval_s=3600)
        async with self.world.manager.keylake() as keylake:
            made = await keylake.create_key_configuration(body)
        return Configuration(made.key_configuration_id, await self._create_workspace(made.key_configuration_id), cmk)

    async def _create_workspace(self, key_configuration_id: KeyConfigurationId) -> WorkspaceId:
        async with self.world.manager.keylake() as keylake:
            workspace = await keylake.create_workspace(f"w-{secrets.token_hex(4)}", key_configuration_id)
        return workspace.workspace_id

    async def _delete_workspace(self, configuration: Configuration) -> None:
        async with self.world.manager.keylake() as keylake:
            await keylake.delete_workspace(configuration.workspace_id)

    async def _delete(self, configuration: Configuration) -> None:
        async with self.world.manager.keylake() as keylake:
            await keylake.delete_key_configuration(configuration.key_configuration_id)

    async def _create_project(self, configuration: Configuration) -> Known:
        async with self.world.manager.keylake() as keylake:
            project = await keylake.create_project(configuration.workspace_id, f"p-{secrets.token_hex(4)}")
        configuration.had_project = True
        lease = await self.world.holder.acquire(project.project_id, Losses())
        return Known(project.project_id, configuration, lease)

    async def _generate(self, known: Known, count: int) -> list[Dek]:
        names = [named() for _ in range(count)]
        reader = self.world.reader
        try:
            await reader.acquire(known.project_id, Losses())
            made = await reader.generate(known.project_id, names)
            return [
                Dek(name, envelope, key.seal(NONCE, b"row", b""))
                for name, (key, envelope) in zip(names, made, strict=True)
            ]
        finally:
            await reader.release(known.project_id)

    async def _open(self, known: Known, dek: Dek, name: ObjectName) -> bytes:
        reader = self.world.reader
        try:
            await reader.acquire(known.project_id, Losses())
            [key] = await reader.unwrap(known.project_id, [(name, dek.envelope)])
            return bytes(key.open(NONCE, dek.sealed, b""))
        finally:
            await reader.release(known.project_id)

    async def _look_into(self, known: Known) -> None:
        """All DEKs under one lease: those that open in one request, each of the others for itself."""
        reader = self.world.reader
        opening = [dek for dek in known.deks if known.opens(dek)]
        try:
            await reader.acquire(known.project_id, Losses())
            keys = (
                await reader.unwrap(known.project_id, [(dek.name, dek.envelope) for dek in opening]) if opening else []
            )
            for dek, key in zip(opening, keys, strict=True):
                assert key.open(NONCE, dek.sealed, b"") == b"row"
            for dek in known.deks:
                if not known.opens(dek):
                    with pytest.raises(IntegrityError):
                        await reader.unwrap(known.project_id, [(dek.name, dek.envelope)])
        finally:
            await reader.release(known.project_id)

    async def _rewrap(self, known: Known, deks: list[Dek]) -> None:
        reader = self.world.reader
        try:
            await reader.acquire(known.project_id, Losses())
            made = await reader.rewrap(known.project_id, [(dek.name, dek.envelope) for dek in deks]) if deks else []
        finally:
            await reader.release(known.project_id)
        for dek, envelope in zip(deks, made, strict=True):
            dek.envelope = envelope

    async def _report(self, known: Known, uses: list[KeyUse]) -> None:
        reader = self.world.reader
        try:
            await reader.acquire(known.project_id, Losses())
            await reader.report(known.project_id, known.kek_version, uses)
        finally:
            await reader.release(known.project_id)

    async def _retire(self, known: Known, *, dry_run: bool) -> RetiredKeks:
        async with self.world.manager.keylake() as keylake:
            return await keylake.retire_keks(known.project_id, dry_run=dry_run)

    async def _rekey(self, known: Known) -> None:
        async with self.world.manager.keylake() as keylake:
            assert (await keylake.rekey(known.project_id)).dek_floor == known.kek_version + 1

    async def _move(self, known: Known, target: Configuration) -> None:
        async with self.world.manager.keylake() as keylake:
            moved = await keylake.move_project(known.project_id, target.key_configuration_id)
        assert moved.key_configuration_id == target.key_configuration_id

    async def _cmk_versions(self, configuration: Configuration) -> set[str]:
        mine = [known for known in self.projects if known.configuration is configuration]
        projects = [await self.world.manager.project(known.project_id) for known in mine]
        return {kek.cmk_key_version for project in projects for kek in project.keks if not kek.destroyed}

    async def _post(self, path: str) -> None:
        async with self.world.manager.client() as http:
            await http.request("POST", path, timeout_s=60)

    async def _revoke(self, known: Known) -> None:
        path = f"/v1/projects/{known.project_id}:revoke"
        async with self.world.manager.client() as http:
            await http.request("POST", path, body=RevokeRequest(reason="a rule"), timeout_s=60)

    async def _replace(self, configuration: Configuration, new: Cmk) -> None:
        async with self.world.manager.keylake() as keylake:
            await keylake.replace_key(configuration.key_configuration_id, new.customer.cmk)

            async def done() -> bool:
                return await keylake.replacement(configuration.key_configuration_id) is None

            await wait_until(done)

    def teardown(self) -> None:
        """The customers' keys are the next example's, too."""
        self._run(self._release())
        for cmk in self.cmks:
            if not cmk.allowed:
                cmk.give_back()

    async def _release(self) -> None:
        for known in self.projects:
            await self.world.holder.release(known.project_id)


@pytest.fixture
def world(
    tmp_path: Path, trust: Trust, metadata_dsn: str, shared_cloud: CloudProcess, kms_clouds: KmsClouds
) -> Iterator[World]:
    with ExitStack() as stack:
        cloud = kms_clouds.customercloud
        customers: list[KmsCustomer] = [
            stack.enter_context(aws_customer(cloud)),
            stack.enter_context(azure_customer(cloud)),
            stack.enter_context(google_customer(cloud, kms_clouds.directory)),
        ]
        manager = Keymanager(tmp_path, trust, metadata_dsn, new_tenant(shared_cloud))
        stack.callback(manager.tenant.close)
        for customer in customers:
            manager.options |= customer.keymanager_settings
        manager.options |= {"kms_deadline_s": 30.0, "kms_read_timeout_s": 20.0}  # a busy machine is no outage
        loop = Loop()
        stack.callback(loop.close)
        try:
            loop.run(manager.start())
            reader = manager.key_client(node_id="reader")
            holder = manager.key_client(node_id="holder")
            loop.run(reader.__aenter__())
            loop.run(holder.__aenter__())
            yield World(loop, manager, customers, reader, holder, EXAMPLES or 2)
            loop.run(reader.__aexit__(None, None, None))
            loop.run(holder.__aexit__(None, None, None))
            assert manager.stop() == 0
            assert manager.errors() == []
        finally:
            if manager.process is not None and manager.process.poll() is None:
                manager.kill()


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_every_dek_opens_iff_the_oracle_says_so(world: World) -> None:
    Keys.world = world
    run_state_machine_as_test(
        Keys,
        settings=settings(
            max_examples=EXAMPLES or 20,
            stateful_step_count=50 if EXAMPLES else 20,
            derandomize=not EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            phases=[Phase.generate],  # a life is a second or more: a shorter one is not worth hundreds of them
        ),
    )
