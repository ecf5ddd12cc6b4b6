"""A provider is one file: `tests/fixtures/keyfile_kms.py` is added to a Keylake that has never heard of it, as its own
distribution would be, and does everything that the others do."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import keylake
from keymanager.providers import ENTRY_POINTS, KINDS
from shared.api.keymanager import CreateKeyConfiguration, KeyState
from shared.cmk import CMK_KEY, CustomerKey
from shared.errors import InvalidInputError, RevokedError
from tests.fixtures.key_source_contract import NONCE, Losses, named
from tests.fixtures.keymanager import special_keymanager
from tests.fixtures.kms_adapter import surroundings
from tests.fixtures.waiting import wait_until
from tests.integration import test_kms_contract as contract

if TYPE_CHECKING:
    from keymanager.kms.base import DenialReason, KmsCallObserver, KmsProvider
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keyfile_kms import KeyFileKey
    from tests.fixtures.keymanager import Keymanager, Trust

pytestmark = pytest.mark.integration

ROOT: Final = Path(keylake.__file__).parent.parent
OPERATIONS: Final = frozenset(
    {"disable", "enable", "schedule_deletion", "cancel_deletion", "destroy", "deny", "allow", "rotate"}
)
CONTRACT: Final = [
    test
    for name, test in sorted(vars(contract).items())
    if name.startswith("test_")
    and inspect.signature(test).parameters.keys() <= {"customer", "kms"}
    and contract.NEEDS.get(name, frozenset()) <= OPERATIONS
]


class KeyFileCustomer:
    """KmsCustomer: the parts of it that a directory has."""

    name = "keyfile"
    can = OPERATIONS

    def __init__(self, directory: Path) -> None:
        from keymanager.kms.base import DenialReason
        from tests.fixtures.keyfile_kms import Device, KeyFileKey

        self.denial_reasons: dict[str, frozenset[DenialReason]] = {
            "disable": frozenset({DenialReason.DISABLED}),
            "schedule_deletion": frozenset({DenialReason.PENDING_DELETION}),
            "destroy": frozenset({DenialReason.NOT_FOUND}),
            "deny": frozenset({DenialReason.ACCESS_DENIED}),
        }
        self.device = Device(directory)
        self.cmk: KeyFileKey = KeyFileKey(name=f"cmk-{secrets.token_hex(4)}", user="keylake")
        self._other = self.cmk.model_copy(update={"name": "other"})
        for key in (self.cmk, self._other):
            self.device.write(key.name, state="Enabled", versions=[secrets.token_hex(32)], users=["keylake"])

    def provider(self, observer: KmsCallObserver = lambda _: None, key: KeyFileKey | None = None) -> KmsProvider:
        from tests.fixtures.keyfile_kms import KIND, KeyFileSettings

        settings = KeyFileSettings(directory=self.device.directory)
        return KIND.connect(key or self.cmk, settings, surroundings(observer))

    def other_key_provider(self) -> KmsProvider:
        return self.provider(key=self._other)

    def disable(self) -> None:
        self.device.write(self.cmk.name, state="Disabled")

    def enable(self) -> None:
        self.device.write(self.cmk.name, state="Enabled")

    def schedule_deletion(self) -> None:
        self.device.write(self.cmk.name, state="Waiting")

    cancel_deletion = enable

    def destroy(self) -> None:
        (self.device.directory / f"{self.cmk.name}.json").unlink()

    def deny(self) -> None:
        self.device.write(self.cmk.name, users=[])

    def allow(self) -> None:
        self.device.write(self.cmk.name, users=["keylake"])

    def rotate(self) -> None:
        versions = self.device.read(self.cmk.name)["versions"]
        self.device.write(self.cmk.name, versions=[*versions, secrets.token_hex(32)])

    def audit_request_ids(self) -> set[str]:
        lines = (self.device.directory / "log.jsonl").read_text().splitlines()
        return {json.loads(line)["request"] for line in lines}


@pytest.fixture
def customer(tmp_path: Path) -> Iterator[KeyFileCustomer]:
    """The kind is known to this process as long as a test needs it: others compare what there is with the docs."""
    from tests.fixtures.keyfile_kms import KeyFileKey

    (tmp_path / "keys").mkdir()
    CustomerKey.kinds["keyfile"] = KeyFileKey
    try:
        yield KeyFileCustomer(tmp_path / "keys")
    finally:
        del CustomerKey.kinds["keyfile"]


@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__.removeprefix("test_"))
async def test_it_does_what_every_adapter_does(customer: KeyFileCustomer, test: Any) -> None:
    async with contract.closing(customer.provider()) as kms:
        given = {"customer": customer, "kms": kms}
        await test(**{name: given[name] for name in inspect.signature(test).parameters})


def test_most_of_the_contract_is_for_it() -> None:
    assert len(CONTRACT) >= 15


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Variables of a Python in which the one file is installed: a distribution that names it is all that there is."""
    metadata = tmp_path / "site" / "keyfile-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: keyfile\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nkeyfile = tests.fixtures.keyfile_kms:KIND\n")
    return {"PYTHONPATH": f"{metadata.parent}:{ROOT}"}


@pytest.fixture
async def manager(
    customer: KeyFileCustomer,
    installed: dict[str, str],
    tmp_path: Path,
    trust: Trust,
    metadata_dsn: str,
    shared_cloud: CloudProcess,
) -> AsyncIterator[Keymanager]:
    options = {"keyfile": {"directory": str(customer.device.directory)}}
    async with special_keymanager(tmp_path, trust, metadata_dsn, shared_cloud, **options) as made:
        made.environment |= installed
        await made.start()
        yield made


async def test_a_keymanager_takes_its_keys(manager: Keymanager, customer: KeyFileCustomer) -> None:
    assert "keyfile" not in KINDS, "nothing here knows of it"
    create = CreateKeyConfiguration(name="kc", key=customer.cmk, probe_interval_s=0.1)
    async with manager.keylake() as client, manager.key_client() as keys:
        customer.device.write(customer.cmk.name, without=["Unwrap"])
        with pytest.raises(InvalidInputError, match=rf"allow it Unwrap \(in {customer.cmk.name}.json\)"):
            await client.create_key_configuration(create)
        customer.device.write(customer.cmk.name, without=[])
        made = await client.create_key_configuration(create)
        workspace = await client.create_workspace("w", made.key_configuration_id)
        project_id = (await client.create_project(workspace.workspace_id, "p")).project_id
        lease = await keys.acquire(project_id, Losses())
        name = named()
        [(key, envelope)] = await keys.generate(project_id, [name])
        sealed = key.seal(NONCE, b"row", b"")

        customer.rotate()
        assert (await client.rewrap(made.key_configuration_id)).rewrapped == 1
        customer.disable()
        await manager.wait_state(project_id, KeyState.REVOKED)
        with pytest.raises(RevokedError):
            await keys.unwrap(project_id, [(name, envelope)])
        customer.enable()

        async def live() -> bool:
            return lease.live

        await wait_until(live)
        [again] = await keys.unwrap(project_id, [(name, envelope)])
        assert bytes(again.open(NONCE, sealed, b"")) == b"row"
        [listed] = await client.key_configurations()
        assert CMK_KEY.validate_json(listed.model_dump_json(include={"key"})[len('{"key":') : -1]) == customer.cmk


_LOOK: Final = """
from keylake.reconcile.logs import read_log
from keymanager.config import KeymanagerSettings
from pathlib import Path
import sys
print("KeyFileSettings" in KeymanagerSettings.model_json_schema()["$defs"])
cloud, calls = read_log(Path(sys.argv[1]), lambda _: None)
print(cloud, len(calls))
"""


async def test_settings_and_reconciliation_know_it(customer: KeyFileCustomer, installed: dict[str, str]) -> None:
    async with contract.closing(customer.provider()) as kms:
        await kms.generate_kek(contract.CONTEXT)
    log = customer.device.directory / "log.jsonl"
    seen = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _LOOK, str(log)],
        env=os.environ | installed,
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout == "True\nkeyfile 1\n"
