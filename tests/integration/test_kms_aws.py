"""The AWS adapter against a real customercloud process: what every kind of "no", silence and recovery is judged as."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from customercloud.aws.admin import RoleRequest, UserRequest
from customercloud.aws.identity import trust_policy_document
from customercloud.faults import ErrorKind, Faults, Outage, Service
from keymanager.kms.aws import AwsKms, AwsKmsConfig
from keymanager.kms.base import DenialReason, KeyState, KmsProvider, Verdict
from keymanager.kms.calls import CallLimits
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey
from shared.errors import InvalidInputError
from tests.fixtures.aws_import import external_key, import_material
from tests.fixtures.kms_adapter import Observed, failure, observed

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant, CloudProcess, StartCloud
    from tests.fixtures.s3 import S3Server

pytestmark = pytest.mark.integration

CONTEXT = EncryptionContext({"keylake:account": "acc-1", "keylake:project": "prj-1"})


def provider(config: AwsKmsConfig) -> AbstractAsyncContextManager[Observed]:
    return observed(lambda observer, clock: AwsKms(config, observer=observer, clock=clock))


@pytest.fixture
def key(aws: AwsTenant) -> str:
    return aws.customer.create_key(role_arn=aws.role_arn)


@pytest.fixture
async def vendor(aws: AwsTenant, key: str) -> AsyncIterator[Observed]:
    async with provider(aws.kms_config(key)) as made:
        yield made


# ── work ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_kek_is_generated_and_unwrapped(aws: AwsTenant, vendor: Observed, key: str) -> None:
    provider_: KmsProvider = vendor.kms  # it is one
    kek = await provider_.generate_kek(CONTEXT)
    assert kek.key_version == aws.customer.describe(key)["CurrentKeyMaterialId"]
    again = await provider_.unwrap(kek.wrapped, CONTEXT)
    assert again.matches(kek.plaintext)
    other = await provider_.generate_kek(CONTEXT)
    assert not other.plaintext.matches(kek.plaintext)


async def test_an_existing_secret_is_wrapped(vendor: Observed) -> None:
    secret = SecretKey.generate()
    wrapped = await vendor.kms.wrap(secret, CONTEXT)
    assert not secret.wiped
    assert len(wrapped.key_version) == 64
    assert (await vendor.kms.unwrap(wrapped.wrapped, CONTEXT)).matches(secret)


async def test_rotation_old_blobs_open_and_rewrap_moves_them(aws: AwsTenant, vendor: Observed, key: str) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    new_version = aws.customer.rotate(key)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    moved = await vendor.kms.rewrap(kek.wrapped, CONTEXT)
    assert moved.key_version == new_version != kek.key_version
    assert (await vendor.kms.unwrap(moved.wrapped, CONTEXT)).matches(kek.plaintext)
    assert (await vendor.kms.describe()).key_version == new_version


async def test_describe_in_every_state(aws: AwsTenant, vendor: Observed, key: str) -> None:
    description = await vendor.kms.describe()
    assert (description.key_id, description.state, description.deletion_date) == (key, KeyState.ENABLED, None)
    aws.customer.disable(key)
    assert (await vendor.kms.describe()).state is KeyState.DISABLED
    date = aws.customer.schedule_deletion(key)
    description = await vendor.kms.describe()
    assert (description.state, description.deletion_date) == (KeyState.PENDING_DELETION, date)


async def test_every_call_can_be_found_in_the_customers_log(aws: AwsTenant, vendor: Observed, key: str) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    aws.customer.disable(key)
    denied = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert vendor.operations() == ["AssumeRole", "GenerateDataKey", "Decrypt", "Decrypt"]
    assert vendor.calls[2].key_version == kek.key_version
    assert vendor.calls[3].error is denied
    assert all(call.duration_s > 0 for call in vendor.calls)
    by_request = {record["requestID"]: record for record in aws.customer.events()}
    joined = [by_request[call.request_id] for call in vendor.calls if call.request_id]
    assert [record["eventName"] for record in joined] == vendor.operations()
    assert joined[3]["errorCode"] == "DisabledException"
    assert joined[1]["requestParameters"]["encryptionContext"] == dict(CONTEXT.pairs)


async def test_the_session_is_shared_and_assumed_once(aws: AwsTenant, vendor: Observed) -> None:
    await asyncio.gather(*(vendor.kms.generate_kek(CONTEXT) for _ in range(10)))
    assert vendor.operations().count("AssumeRole") == 1


async def test_without_a_role_the_credentials_are_used_as_they_are(aws: AwsTenant, key: str) -> None:
    config = replace(
        aws.kms_config(key, role_arn=None, external_id=None),
        access_key_id=aws.names.customer.access_key_id,
        secret_access_key=aws.names.customer.secret_access_key,
    )
    async with provider(config) as own:
        kek = await own.kms.generate_kek(CONTEXT)
        assert (await own.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        assert own.operations() == ["GenerateDataKey", "Decrypt"]


# ── no ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

Change = Callable[["AwsTenant", str], object]


@pytest.mark.parametrize(
    ("revoke", "reason", "restore"),
    [
        pytest.param(
            lambda aws, key: aws.customer.disable(key),
            DenialReason.DISABLED,
            lambda aws, key: aws.customer.enable(key),
            id="disabled",
        ),
        pytest.param(
            lambda aws, key: aws.customer.schedule_deletion(key),
            DenialReason.PENDING_DELETION,
            lambda aws, key: (aws.customer.cancel_deletion(key), aws.customer.enable(key)),
            id="scheduled for deletion",
        ),
        pytest.param(
            lambda aws, key: aws.customer.deny_role(key, aws.role_arn),
            DenialReason.ACCESS_DENIED,
            lambda aws, key: aws.customer.allow_role(key, aws.role_arn),
            id="denied by the key policy",
        ),
        pytest.param(
            lambda aws, key: aws.customer.remove_role(key, aws.role_arn),
            DenialReason.ACCESS_DENIED,
            lambda aws, key: aws.customer.allow_role(key, aws.role_arn),
            id="taken out of the key policy",
        ),
        pytest.param(
            lambda aws, key: aws.admin.delete_role(aws.account_id, aws.role_name),
            DenialReason.PRINCIPAL_DENIED,
            lambda aws, key: _give_back_role(aws, key),
            id="role deleted",
        ),
    ],
)
async def test_revocations_are_denials_and_can_be_taken_back(
    aws: AwsTenant, vendor: Observed, key: str, revoke: Change, reason: DenialReason, restore: Change
) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    await asyncio.to_thread(revoke, aws, key)
    for call in (
        vendor.kms.unwrap(kek.wrapped, CONTEXT),
        vendor.kms.generate_kek(CONTEXT),
        vendor.kms.wrap(kek.plaintext, CONTEXT),
        vendor.kms.rewrap(kek.wrapped, CONTEXT),
    ):
        error = await failure(call)
        assert (error.verdict, error.reason) == (Verdict.DENIED, reason)
        assert error.request_id is not None
    await asyncio.to_thread(restore, aws, key)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


def _give_back_role(aws: AwsTenant, key: str) -> None:
    trust = trust_policy_document([aws.names.vendor.arn], aws.names.external_id)
    aws.admin.put_role(aws.account_id, aws.role_name, RoleRequest(trust_policy=trust))
    aws.customer.allow_role(key, aws.role_arn)


async def test_own_material_that_the_customer_deletes_is_a_denial_and_can_be_brought_back(aws: AwsTenant) -> None:
    kms, secret = aws.customer.kms, secrets.token_bytes(32)
    key = external_key(kms)
    aws.customer.allow_role(key, aws.role_arn)
    imported = import_material(kms, key, secret)
    async with provider(aws.kms_config(key)) as vendor:
        kek = await vendor.kms.generate_kek(CONTEXT)
        assert kek.key_version == imported["KeyMaterialId"]
        kms.delete_imported_key_material(KeyId=key)
        error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
        assert (error.verdict, error.reason) == (Verdict.DENIED, DenialReason.INVALID_STATE)
        assert (await vendor.kms.describe()).state is KeyState.OTHER
        import_material(kms, key, secret)
        assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


async def test_a_cancelled_deletion_leaves_the_key_disabled(aws: AwsTenant, vendor: Observed, key: str) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    aws.customer.schedule_deletion(key)
    aws.customer.cancel_deletion(key)
    assert (await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))).reason is DenialReason.DISABLED


async def test_a_destroyed_key_is_not_found(aws: AwsTenant, vendor: Observed, key: str) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    aws.customer.schedule_deletion(key)
    aws.admin.complete_deletion(key)
    for call in (vendor.kms.unwrap(kek.wrapped, CONTEXT), vendor.kms.describe()):
        error = await failure(call)
        assert (error.verdict, error.reason) == (Verdict.DENIED, DenialReason.NOT_FOUND)


async def test_a_wrong_external_id_is_a_denial(aws: AwsTenant, key: str) -> None:
    async with provider(aws.kms_config(key, external_id="of-somebody-else")) as wrong:
        error = await failure(wrong.kms.generate_kek(CONTEXT))
        assert (error.verdict, error.reason) == (Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
        assert error.operation == "AssumeRole"


async def test_withdrawn_trust_is_noticed_when_the_session_is_renewed(
    aws: AwsTenant, vendor: Observed, key: str
) -> None:
    """Not later: that KMS would still take the old session is no reason to go on using it."""
    kek = await vendor.kms.generate_kek(CONTEXT)
    trust = trust_policy_document([f"arn:aws:iam::{aws.account_id}:root"], None)
    aws.admin.put_role(aws.account_id, aws.role_name, RoleRequest(trust_policy=trust))
    await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    vendor.clock.ahead = timedelta(minutes=13)  # of 15
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert (error.verdict, error.reason) == (Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
    assert vendor.operations() == ["AssumeRole", "GenerateDataKey", "Decrypt", "AssumeRole"]


# ── not a no ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_wrong_context_and_damaged_blobs_are_corrupt(aws: AwsTenant, vendor: Observed, key: str) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    damaged = bytearray(kek.wrapped)
    damaged[-1] ^= 1
    other_key = aws.customer.create_key(role_arn=aws.role_arn)
    async with provider(aws.kms_config(other_key)) as other:
        foreign = (await other.kms.generate_kek(CONTEXT)).wrapped
    for blob, context in (
        (kek.wrapped, CONTEXT.with_pairs(more="1")),
        (kek.wrapped, EncryptionContext({})),
        (bytes(damaged), CONTEXT),
        (kek.wrapped[:-1], CONTEXT),
        (b"x", CONTEXT),
        (b"", CONTEXT),
        (bytes(6145), CONTEXT),
        (foreign, CONTEXT),
    ):
        for call in (vendor.kms.unwrap(blob, context), vendor.kms.rewrap(blob, context)):
            assert (await failure(call)).verdict is Verdict.CORRUPT


async def test_a_blob_of_a_live_key_does_not_stand_in_for_a_disabled_one(
    aws: AwsTenant, vendor: Observed, key: str
) -> None:
    """Why Decrypt names the key: without it the swapped blob opens, and the disabled key looks alive."""
    live = aws.customer.create_key(role_arn=aws.role_arn)
    async with provider(aws.kms_config(live)) as other:
        swapped = (await other.kms.generate_kek(CONTEXT)).wrapped
    aws.customer.disable(key)
    assert (await failure(vendor.kms.unwrap(swapped, CONTEXT))).verdict is Verdict.CORRUPT
    unnamed = aws.role_client().decrypt(CiphertextBlob=swapped, EncryptionContext=dict(CONTEXT.pairs))
    assert unnamed["KeyId"] == live


@pytest.mark.parametrize(
    ("faults", "verdict"),
    [
        (Faults(outage=Outage.REFUSE), Verdict.UNREACHABLE),
        (Faults(outage=Outage.HANG), Verdict.UNREACHABLE),
        (Faults(latency_s=30), Verdict.UNREACHABLE),
        (Faults(throttle_rate=1), Verdict.THROTTLED),
        *((Faults(error_rate=1, error_kind=kind), Verdict.UNREACHABLE) for kind in ErrorKind),
    ],
    ids=lambda value: value.model_dump_json(exclude_defaults=True) if isinstance(value, Faults) else str(value),
)
@pytest.mark.parametrize("warm", [True, False], ids=["session", "no session"])
async def test_a_cloud_in_trouble_is_never_a_denial(
    aws: AwsTenant, key: str, faults: Faults, verdict: Verdict, warm: bool
) -> None:
    """The key is disabled besides: a broken cloud's answer proves nothing about that."""
    async with provider(aws.kms_config(key, limits=CallLimits(read_timeout_s=0.4, deadline_s=1.5))) as vendor:
        if warm:
            await vendor.kms.generate_kek(CONTEXT)
        with aws.admin.during(faults):
            error = await failure(vendor.kms.generate_kek(CONTEXT))
            assert (error.verdict, error.reason) == (verdict, None)
        await vendor.kms.generate_kek(CONTEXT)


async def test_a_stopped_cloud_is_unreachable_and_a_restarted_one_opens_old_keys(start_cloud: StartCloud) -> None:
    cloud = start_cloud()
    aws = _tenant(cloud)
    try:
        key = aws.customer.create_key(role_arn=aws.role_arn)
        async with provider(aws.kms_config(key)) as vendor:
            kek = await vendor.kms.generate_kek(CONTEXT)
            await asyncio.to_thread(cloud.stop, kill=True)
            started_s = time.monotonic()
            error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
            assert (error.verdict, error.request_id) == (Verdict.UNREACHABLE, None)
            assert time.monotonic() - started_s < 4.5
            await asyncio.to_thread(cloud.start)
            assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    finally:
        aws.close()


def _tenant(cloud: CloudProcess) -> AwsTenant:
    from tests.fixtures.customercloud import new_tenant

    return new_tenant(cloud)


async def test_names_that_do_not_resolve_and_certificates_that_do_not_verify(aws: AwsTenant, key: str) -> None:
    nowhere = "https://kms.invalid:1"
    for changes in (
        {"kms_endpoint_url": nowhere, "sts_endpoint_url": nowhere},
        {"ca_bundle": None},
        {"sts_endpoint_url": aws.cloud.url.replace("https", "http")},
    ):
        async with provider(aws.kms_config(key, **changes)) as wrong:
            assert (await failure(wrong.kms.generate_kek(CONTEXT))).verdict is Verdict.UNREACHABLE


async def test_our_own_credentials_and_rights_are_ambiguous(aws: AwsTenant, key: str) -> None:
    """Nobody's key is revoked because the vendor lost its own access key."""
    for changes in ({"access_key_id": "AKIAGHOSTGHOSTGHOST1"}, {"secret_access_key": "wrong"}):
        async with provider(aws.kms_config(key, **changes)) as wrong:
            error = await failure(wrong.kms.generate_kek(CONTEXT))
            assert (error.verdict, error.reason) == (Verdict.AMBIGUOUS, None)
    await asyncio.to_thread(aws.admin.put_user, aws.names.vendor.account_id, "keylake", UserRequest())
    async with provider(aws.kms_config(key)) as without_rights:
        assert (await failure(without_rights.kms.generate_kek(CONTEXT))).verdict is Verdict.AMBIGUOUS


async def test_the_deadline_holds_when_every_thread_is_busy(aws: AwsTenant, key: str) -> None:
    config = aws.kms_config(key, limits=CallLimits(max_concurrency=1, read_timeout_s=8.0, deadline_s=2.0))
    async with provider(config) as vendor:
        await vendor.kms.generate_kek(CONTEXT)
        with aws.admin.during(Faults(outage=Outage.HANG)):
            started_s = time.monotonic()
            errors = await asyncio.gather(*(failure(vendor.kms.generate_kek(CONTEXT)) for _ in range(3)))
            assert time.monotonic() - started_s < 6
        assert {(e.verdict, e.provider_code) for e in errors} == {(Verdict.UNREACHABLE, "DeadlineExceeded")}


# ── sessions ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_sessions_are_renewed_before_they_expire(aws: AwsTenant, key: str) -> None:
    aws.admin.set_faults(Faults(session_lifetime_s=1.0))
    async with provider(aws.kms_config(key)) as vendor:
        kek = await vendor.kms.generate_kek(CONTEXT)
        deadline = datetime.now(UTC) + timedelta(seconds=2.5)
        while datetime.now(UTC) < deadline:
            await vendor.kms.unwrap(kek.wrapped, CONTEXT)
        assert vendor.operations().count("AssumeRole") >= 3
        assert all(call.error is None for call in vendor.calls), "no call ever met an expired session"


async def test_a_session_that_ended_early_is_replaced_once(aws: AwsTenant, vendor: Observed, key: str) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    aws.admin.delete_role(aws.account_id, aws.role_name)
    _give_back_role(aws, key)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    assert vendor.operations() == ["AssumeRole", "GenerateDataKey", "Decrypt", "AssumeRole", "Decrypt"]
    refused = vendor.calls[2].error
    assert refused is not None
    assert refused.provider_code == "UnrecognizedClientException"


async def test_sts_out_of_reach_does_not_end_a_session_that_kms_still_takes(
    aws: AwsTenant, vendor: Observed, key: str
) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    aws.admin.set_faults(Faults(outage=Outage.REFUSE, services=frozenset({Service.STS})))
    vendor.clock.ahead = timedelta(minutes=13)  # of 15: to be renewed
    for _ in range(3):
        assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    assert vendor.operations()[2:] == ["AssumeRole", "Decrypt", "Decrypt", "Decrypt"], "STS is not asked every time"
    vendor.clock.ahead = timedelta(minutes=14)
    await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    assert vendor.operations()[-2:] == ["AssumeRole", "Decrypt"]
    vendor.clock.ahead = timedelta(minutes=16)  # expired
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert (error.verdict, error.operation) == (Verdict.UNREACHABLE, "AssumeRole")
    aws.admin.clear_faults()
    vendor.clock.ahead = timedelta(0)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


# ── configuration ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_id": "alias/cmk"},
        {"key_id": "arn:aws:kms:eu-central-1:111122223333:alias/cmk"},
        {"key_id": ""},
    ],
)
def test_configurations_that_are_refused(wrong: dict[str, Any]) -> None:
    key = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    with pytest.raises(InvalidInputError):
        AwsKmsConfig(**({"key_id": key, "region": "eu-central-1"} | wrong))


def test_secrets_stay_out_of_reprs(aws: AwsTenant, key: str) -> None:
    config = aws.kms_config(key)
    assert config.secret_access_key is not None
    assert config.secret_access_key not in repr(config)


# ── a second opinion ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["customercloud", "moto"])
def any_aws(request: pytest.FixtureRequest) -> AwsKmsConfig:
    """The parts in which moto is right (crypto and context, not states and policies) hold against both."""
    if request.param == "customercloud":
        aws: AwsTenant = request.getfixturevalue("aws")
        config: AwsKmsConfig = aws.kms_config(aws.customer.create_key(role_arn=aws.role_arn))
        return config
    server: S3Server = request.getfixturevalue("s3_server")
    if server.pid is None:
        pytest.skip("KEYLAKE_TEST_S3_ENDPOINT is not moto")
    import boto3

    client = boto3.session.Session("test", "test", region_name="eu-central-1").client(
        "kms", endpoint_url=server.endpoint
    )
    try:
        key = client.create_key()["KeyMetadata"]["Arn"]
    finally:
        client.close()
    return AwsKmsConfig(
        key_id=key,
        region="eu-central-1",
        access_key_id="test",
        secret_access_key="test",
        role_arn="arn:aws:iam::123456789012:role/any",
        kms_endpoint_url=server.endpoint,
        sts_endpoint_url=server.endpoint,
    )


async def test_contract_of_crypto_and_context(any_aws: AwsKmsConfig) -> None:
    async with provider(any_aws) as made:
        kek = await made.kms.generate_kek(CONTEXT)
        assert (await made.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        secret = SecretKey.generate()
        wrapped = (await made.kms.wrap(secret, CONTEXT)).wrapped
        assert (await made.kms.unwrap(wrapped, CONTEXT)).matches(secret)
        moved = (await made.kms.rewrap(wrapped, CONTEXT)).wrapped
        assert moved != wrapped
        assert (await made.kms.unwrap(moved, CONTEXT)).matches(secret)
        for wrong in (EncryptionContext({}), CONTEXT.with_pairs(more="1")):
            assert (await failure(made.kms.unwrap(kek.wrapped, wrong))).verdict is Verdict.CORRUPT
        damaged = bytearray(kek.wrapped)
        damaged[-1] ^= 1
        assert (await failure(made.kms.unwrap(bytes(damaged), CONTEXT))).verdict is Verdict.CORRUPT
        assert (await made.kms.describe()).state is KeyState.ENABLED


async def test_unwrapped_keys_do_not_linger_in_the_answer_objects(vendor: Observed, tmp_path: Path) -> None:
    """The observer's records, which go into the audit chain, hold no key bytes."""
    kek = await vendor.kms.generate_kek(CONTEXT)
    raw = bytes(kek.plaintext.reveal())
    text = repr(vendor.calls)
    assert raw.hex() not in text
    assert repr(raw) not in text
    assert secrets.compare_digest(raw, bytes((await vendor.kms.unwrap(kek.wrapped, CONTEXT)).reveal()))
