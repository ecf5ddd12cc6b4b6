"""The Google adapter against a real customercloud process: what every kind of "no", silence and recovery is judged as.

The suite of all adapters (test_kms_contract) runs the same customer; here is what is Google's own.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from customercloud.faults import ErrorKind, Faults, Outage, Service
from keymanager.kms.base import DenialReason, KeyState, KmsCall, KmsError, KmsProvider, Verdict
from keymanager.kms.calls import CallLimits
from keymanager.kms.gcp import GoogleKms, GoogleKmsConfig
from keymanager.providers.google import KIND, GoogleSettings
from shared.api.keymanager import GoogleKey
from shared.clock import SystemClock
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey
from shared.errors import InvalidInputError
from tests.fixtures.google import new_google_tenant
from tests.fixtures.kms_adapter import surroundings
from tests.fixtures.kms_customer_google import GoogleCustomer, google_customer
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fixtures.customercloud import StartCloud
    from tests.fixtures.google import GoogleTenant
    from tests.fixtures.kms_customers import KmsCustomer

pytestmark = pytest.mark.integration

CONTEXT = EncryptionContext({"keylake:account": "acc-1", "keylake:project": "prj-1"})


class ShiftedClock(SystemClock):
    """The adapter's idea of the time; the cloud keeps its own. So a token seems old while KMS still takes it."""

    ahead = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.ahead


class Provider:
    """An adapter with what it told its observer."""

    def __init__(self, config: GoogleKmsConfig) -> None:
        self.calls: list[KmsCall] = []
        self.clock = ShiftedClock()
        self.kms = GoogleKms(config, observer=self.calls.append, clock=self.clock)

    def operations(self) -> list[str]:
        return [call.operation for call in self.calls]


@asynccontextmanager
async def provider(config: GoogleKmsConfig) -> AsyncIterator[Provider]:
    made = Provider(config)
    try:
        yield made
    finally:
        await made.kms.aclose()


async def failure(call: Awaitable[object]) -> KmsError:
    with pytest.raises(KmsError) as caught:
        await call
    return caught.value


@pytest.fixture
def key(google: GoogleTenant) -> str:
    return google.key()


@pytest.fixture
async def vendor(google: GoogleTenant, key: str) -> AsyncIterator[Provider]:
    async with provider(google.kms_config(key)) as made:
        yield made


# ── work ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_keks_are_generated_wrapped_and_unwrapped(vendor: Provider) -> None:
    provider_: KmsProvider = vendor.kms  # it is one
    kek = await provider_.generate_kek(CONTEXT)
    assert kek.key_version == "1"
    assert (await provider_.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    other = await provider_.generate_kek(CONTEXT)
    assert not other.plaintext.matches(kek.plaintext)
    secret = SecretKey.generate()
    wrapped = await provider_.wrap(secret, CONTEXT)
    assert not secret.wiped
    assert (await provider_.unwrap(wrapped.wrapped, CONTEXT)).matches(secret)


async def test_rotation_old_blobs_open_and_rewrap_moves_them(google: GoogleTenant, vendor: Provider, key: str) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    google.customer.rotate(key)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    moved = await vendor.kms.rewrap(kek.wrapped, CONTEXT)
    assert (kek.key_version, moved.key_version) == ("1", "2")
    google.customer.kms.destroy_crypto_key_version(name=f"{key}/cryptoKeyVersions/1")
    assert (await vendor.kms.unwrap(moved.wrapped, CONTEXT)).matches(kek.plaintext)
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert error.reason is DenialReason.PENDING_DELETION, "the old version decides about the old blob"
    assert (await vendor.kms.describe()).key_version == "2"


async def test_describe_in_every_state(google: GoogleTenant, vendor: Provider, key: str) -> None:
    description = await vendor.kms.describe()
    assert (description.key_id, description.state) == (key, KeyState.ENABLED)
    assert (description.key_version, description.deletion_date) == ("1", None)
    google.customer.disable(key)
    assert (await vendor.kms.describe()).state is KeyState.DISABLED
    google.customer.schedule_destruction(key)
    description = await vendor.kms.describe()
    assert description.state is KeyState.PENDING_DELETION
    assert description.deletion_date is not None
    assert timedelta(days=29) < description.deletion_date - datetime.now(UTC) <= timedelta(days=30)
    google.admin.complete_destruction(key)
    assert (await vendor.kms.describe()).state is KeyState.OTHER


async def test_every_call_can_be_found_in_the_customers_log(google: GoogleTenant, vendor: Provider, key: str) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    google.customer.disable(key)
    denied = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert vendor.operations() == ["GenerateAccessToken", "Encrypt", "Decrypt", "Decrypt"]
    assert vendor.calls[1].key_version == "1"
    assert vendor.calls[3].error is denied
    assert all(call.duration_s > 0 for call in vendor.calls)
    by_reason = {
        entry["protoPayload"]["requestMetadata"]["requestAttributes"].get("reason"): entry["protoPayload"]
        for entry in google.entries()
    }
    joined = [by_reason[call.request_id] for call in vendor.calls]
    assert [payload["methodName"] for payload in joined] == vendor.operations()
    assert joined[3]["status"]["code"] == 9
    assert joined[1]["authenticationInfo"]["principalEmail"] == google.names.service_account
    delegation = joined[1]["authenticationInfo"]["serviceAccountDelegationInfo"]
    assert delegation[0]["firstPartyPrincipal"]["principalEmail"] == google.names.vendor.email


async def test_the_token_is_shared_and_made_once(vendor: Provider) -> None:
    await asyncio.gather(*(vendor.kms.generate_kek(CONTEXT) for _ in range(10)))
    assert vendor.operations().count("GenerateAccessToken") == 1


async def test_without_an_account_our_own_identity_is_used(google: GoogleTenant, key: str) -> None:
    google.customer.allow(key, f"serviceAccount:{google.names.vendor.email}")
    async with provider(google.kms_config(key, service_account=None)) as own:
        kek = await own.kms.generate_kek(CONTEXT)
        assert (await own.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        assert own.operations() == ["Encrypt", "Decrypt"]


# ── the contract, as the suite of all adapters has it ──────────────────────────────────────────────────────────────


@pytest.fixture
def customer(google: GoogleTenant) -> GoogleCustomer:
    return GoogleCustomer(google)


@pytest.mark.parametrize(
    ("revoke", "restore"),
    [("disable", "enable"), ("schedule_deletion", "cancel_deletion"), ("deny", "allow"), ("destroy", None)],
)
async def test_revocations_are_denials_and_can_be_taken_back(
    customer: KmsCustomer, revoke: str, restore: str | None
) -> None:
    assert {revoke, restore or revoke} <= customer.can
    calls: list[KmsCall] = []
    kms = customer.provider(calls.append)
    try:
        kek = await kms.generate_kek(CONTEXT)
        await asyncio.to_thread(getattr(customer, revoke))
        for call in (
            kms.unwrap(kek.wrapped, CONTEXT),
            kms.generate_kek(CONTEXT),
            kms.wrap(kek.plaintext, CONTEXT),
            kms.rewrap(kek.wrapped, CONTEXT),
        ):
            error = await failure(call)
            assert error.verdict is Verdict.DENIED
            assert error.reason in customer.denial_reasons[revoke]
            assert error.request_id is not None
        if restore is not None:
            await asyncio.to_thread(getattr(customer, restore))
            assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        ids = {call.request_id for call in calls}
        assert ids <= customer.audit_request_ids()
    finally:
        await kms.aclose()


async def test_wrong_context_and_damaged_blobs_are_corrupt(customer: KmsCustomer) -> None:
    kms, other = customer.provider(), customer.other_key_provider()
    try:
        kek = await kms.generate_kek(CONTEXT)
        damaged = bytearray(kek.wrapped)
        damaged[-1] ^= 1
        foreign = (await other.generate_kek(CONTEXT)).wrapped
        for blob, context in (
            (kek.wrapped, CONTEXT.with_pairs(more="1")),
            (kek.wrapped, EncryptionContext({})),
            (bytes(damaged), CONTEXT),
            (kek.wrapped[:-1], CONTEXT),
            (b"x", CONTEXT),
            (b"", CONTEXT),
            (bytes(70_000), CONTEXT),
            (foreign, CONTEXT),
        ):
            for call in (kms.unwrap(blob, context), kms.rewrap(blob, context)):
                assert (await failure(call)).verdict is Verdict.CORRUPT
        customer.disable()
        assert (await failure(kms.unwrap(foreign, CONTEXT))).verdict is Verdict.CORRUPT, "it does not stand in"
    finally:
        await asyncio.gather(kms.aclose(), other.aclose())


async def test_propagation_disabling_and_iam_are_late_enabling_is_not(customer: KmsCustomer) -> None:
    kms = customer.provider()
    try:
        kek = await kms.generate_kek(CONTEXT)
        for change, undo in ((customer.disable, customer.enable), (customer.deny, customer.allow)):
            customer.propagation_delay(1.0)
            await asyncio.to_thread(change)
            await kms.unwrap(kek.wrapped, CONTEXT)

            async def denied() -> bool:
                try:
                    await kms.unwrap(kek.wrapped, CONTEXT)
                except KmsError as error:
                    return error.verdict is Verdict.DENIED
                return False

            await wait_until(denied, 5)
            if change == customer.deny:
                customer.propagation_delay(0.0)  # a grant takes its time, too; this one is not measured
            await asyncio.to_thread(undo)
            await kms.unwrap(kek.wrapped, CONTEXT)
    finally:
        await kms.aclose()


async def test_a_killed_cloud_is_unreachable_and_a_restarted_one_opens_old_keys(
    start_cloud: StartCloud, tmp_path: Path
) -> None:
    cloud = start_cloud()
    with google_customer(cloud, tmp_path) as customer:
        kms = customer.provider()
        try:
            kek = await kms.generate_kek(CONTEXT)
            await asyncio.to_thread(cloud.stop, kill=True)
            error = await failure(kms.unwrap(kek.wrapped, CONTEXT))
            assert (error.verdict, error.request_id) == (Verdict.UNREACHABLE, None)
            await asyncio.to_thread(cloud.start)
            assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
            await asyncio.to_thread(customer.disable)
            await asyncio.to_thread(customer.restart_cloud, kill=True)
            assert (await failure(kms.unwrap(kek.wrapped, CONTEXT))).reason is DenialReason.DISABLED
        finally:
            await kms.aclose()


# ── no, in Google's own ways ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_withdrawn_token_creator_role_is_noticed_when_the_token_is_renewed(
    google: GoogleTenant, vendor: Provider
) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    google.withdraw_impersonation()
    await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    vendor.clock.ahead = timedelta(minutes=13)  # of 15
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert (error.verdict, error.reason) == (Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
    assert error.operation == "GenerateAccessToken"
    assert error.request_id in {call.request_id for call in vendor.calls}


async def test_a_deleted_account_ends_its_tokens_at_once(google: GoogleTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    google.admin.delete_account(google.names.service_account)
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert (error.verdict, error.reason) == (Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
    assert vendor.operations()[2:] == ["Decrypt", "GenerateAccessToken"]
    refused = vendor.calls[2].error
    assert refused is not None
    assert (refused.verdict, refused.provider_code) == (Verdict.AMBIGUOUS, "UNAUTHENTICATED")


async def test_a_key_that_does_not_exist_and_a_key_that_we_may_not_see(google: GoogleTenant, key: str) -> None:
    """Without a right in the project the two look the same."""
    missing = f"{key}-other"
    async with provider(google.kms_config(missing)) as vendor:
        assert (await failure(vendor.kms.generate_kek(CONTEXT))).reason is DenialReason.ACCESS_DENIED
    google.customer.allow(key.rpartition("/cryptoKeys/")[0], google.member)
    async with provider(google.kms_config(missing)) as vendor:
        error = await failure(vendor.kms.generate_kek(CONTEXT))
        assert (error.verdict, error.reason) == (Verdict.DENIED, DenialReason.NOT_FOUND)


# ── not a no ───────────────────────────────────────────────────────────────────────────────────────────────────────


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
@pytest.mark.parametrize("warm", [True, False], ids=["token", "no token"])
async def test_a_cloud_in_trouble_is_never_a_denial(
    google: GoogleTenant, key: str, faults: Faults, verdict: Verdict, warm: bool
) -> None:
    async with provider(google.kms_config(key, limits=CallLimits(read_timeout_s=0.4, deadline_s=1.5))) as vendor:
        if warm:
            await vendor.kms.generate_kek(CONTEXT)
        with google.admin.during(faults):
            error = await failure(vendor.kms.generate_kek(CONTEXT))
            assert (error.verdict, error.reason) == (verdict, None)
        await vendor.kms.generate_kek(CONTEXT)


async def test_names_that_do_not_resolve_and_certificates_that_do_not_verify(
    google: GoogleTenant, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    for changes in (
        {"iam_endpoint_url": "https://iam.invalid:1"},
        {"kms_endpoint_url": "https://kms.invalid:1"},
        {"ca_bundle": None},
        {"kms_endpoint_url": google.cloud.url.replace("https", "http")},
    ):
        async with provider(google.kms_config(key, **changes)) as wrong:
            assert (await failure(wrong.kms.generate_kek(CONTEXT))).verdict is Verdict.UNREACHABLE


async def test_our_own_credentials_are_ambiguous(google: GoogleTenant, key: str, tmp_path: Path) -> None:
    """Nobody's key is revoked because the vendor lost its own key."""
    content = google.names.vendor.credentials_file
    for name, changed in (
        ("ghost", content | {"client_email": "ghost@vendor-project.iam.gserviceaccount.com"}),
        ("other key", content | {"private_key_id": "0" * 40}),
        ("user", {"type": "authorized_user"}),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(changed))
        async with provider(google.kms_config(key, credentials_file=path)) as wrong:
            error = await failure(wrong.kms.generate_kek(CONTEXT))
            assert (error.verdict, error.reason) == (Verdict.AMBIGUOUS, None)
    other = new_google_tenant(google.cloud, tmp_path, f"vendor-{secrets.token_hex(4)}")
    try:
        other.admin.delete_account(other.names.vendor.email)
        async with provider(other.kms_config(other.key())) as deleted:
            assert (await failure(deleted.kms.generate_kek(CONTEXT))).verdict is Verdict.AMBIGUOUS
    finally:
        other.close()


async def test_the_deadline_holds_when_every_thread_is_busy(google: GoogleTenant, key: str) -> None:
    config = google.kms_config(key, limits=CallLimits(max_concurrency=1, read_timeout_s=3.0, deadline_s=0.5))
    async with provider(config) as vendor:
        await vendor.kms.generate_kek(CONTEXT)
        with google.admin.during(Faults(outage=Outage.HANG)):
            started_s = time.monotonic()
            errors = await asyncio.gather(*(failure(vendor.kms.generate_kek(CONTEXT)) for _ in range(3)))
            assert time.monotonic() - started_s < 1.5
        assert {(e.verdict, e.provider_code) for e in errors} == {(Verdict.UNREACHABLE, "DeadlineExceeded")}


# ── tokens ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_tokens_are_renewed_before_they_expire(google: GoogleTenant, key: str) -> None:
    google.admin.set_faults(Faults(session_lifetime_s=3.0))
    async with provider(google.kms_config(key)) as vendor:
        kek = await vendor.kms.generate_kek(CONTEXT)
        deadline = datetime.now(UTC) + timedelta(seconds=4.5)
        while datetime.now(UTC) < deadline:
            await vendor.kms.unwrap(kek.wrapped, CONTEXT)
        assert vendor.operations().count("GenerateAccessToken") >= 2
        assert all(call.error is None for call in vendor.calls), "no call ever met an expired token"


async def test_iam_out_of_reach_does_not_end_a_token_that_kms_still_takes(
    google: GoogleTenant, vendor: Provider
) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    google.admin.set_faults(Faults(outage=Outage.REFUSE, services=frozenset({Service.GOOGLE_IAM})))
    vendor.clock.ahead = timedelta(minutes=13)  # of 15: to be renewed
    for _ in range(3):
        assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    assert vendor.operations()[2:] == ["GenerateAccessToken", "Decrypt", "Decrypt", "Decrypt"], "not every time"
    vendor.clock.ahead = timedelta(minutes=16)  # expired
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert (error.verdict, error.operation) == (Verdict.UNREACHABLE, "GenerateAccessToken")
    google.admin.clear_faults()
    vendor.clock.ahead = timedelta(0)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


# ── configuration ──────────────────────────────────────────────────────────────────────────────────────────────────


KEY_NAME = "projects/customer-1/locations/global/keyRings/r/cryptoKeys/k"


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_name": f"{KEY_NAME}/cryptoKeyVersions/1"},
        {"key_name": KEY_NAME.replace("customer-1", "Customer")},
        {"key_name": f"{KEY_NAME}\n"},
        {"key_name": ""},
        {"session_duration_s": 3601},
    ],
)
def test_configurations_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        GoogleKmsConfig(**({"key_name": KEY_NAME} | wrong))


async def test_the_factory_makes_providers_as_the_settings_say(google: GoogleTenant, key: str) -> None:
    settings = GoogleSettings(
        kms_endpoint_url=google.cloud.url,
        iam_endpoint_url=google.cloud.url,
        ca_bundle=google.cloud.ca_bundle,
        credentials_file=google.credentials_file,
    )
    calls: list[KmsCall] = []
    model = GoogleKey(key_name=key, service_account=google.names.service_account)
    kms = KIND.connect(model, settings, surroundings(calls.append))
    try:
        kek = await kms.generate_kek(CONTEXT)
        assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        assert [call.operation for call in calls] == ["GenerateAccessToken", "Encrypt", "Decrypt"]
    finally:
        await kms.aclose()


ACCOUNT = "keylake-kms@customer-1.iam.gserviceaccount.com"


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_name": f"{KEY_NAME}/cryptoKeyVersions/1"},
        {"key_name": KEY_NAME.replace("cryptoKeys/k", f"cryptoKeys/{'k' * 64}")},
        {"key_name": f"/{KEY_NAME}"},
        {"service_account": "person@customer.example"},
        {"service_account": f"{ACCOUNT}:generateAccessToken"},
        {"service_account": f"a/../b{ACCOUNT}"},
        {"service_account": ""},
        {"provider": "aws"},
    ],
)
def test_keys_that_are_refused(wrong: dict[str, str]) -> None:
    good = {"key_name": KEY_NAME, "service_account": ACCOUNT}
    assert GoogleKey.model_validate(good).provider == "google"
    with pytest.raises(ValidationError):
        GoogleKey.model_validate(good | wrong)


async def test_keys_and_tokens_stay_out_of_logs_and_records(
    google: GoogleTenant, vendor: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    """Even at DEBUG, where the SDK writes down whole requests."""
    with caplog.at_level("DEBUG"):
        kek = await vendor.kms.generate_kek(CONTEXT)
        await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    raw = bytes(kek.plaintext.reveal())
    told = caplog.text + repr(vendor.calls) + json.dumps(google.entries()) + google.cloud.log
    for secret in (raw.hex(), repr(raw)[2:-1], "ya29."):
        assert secret not in told


async def test_one_customers_account_opens_no_key_of_anothers(google: GoogleTenant, key: str) -> None:
    """What one customer granted the vendor opens no key of another customer's."""
    other = new_google_tenant(google.cloud, google.directory)
    try:
        config = replace(google.kms_config(key), service_account=other.names.service_account)
        async with provider(config) as foreign:
            error = await failure(foreign.kms.generate_kek(CONTEXT))
            assert (error.verdict, error.reason) == (Verdict.DENIED, DenialReason.ACCESS_DENIED)
    finally:
        other.close()
