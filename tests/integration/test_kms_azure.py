"""The Azure adapter against a real customercloud process: what each kind of "no", silence and recovery is judged as."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from customercloud.azure.access import Mode, Permission
from customercloud.azure.admin import VaultRequest
from customercloud.azure.identity import FederatedCredential
from customercloud.faults import ErrorKind, Faults, Outage, Service
from keymanager.kms.azure import AzureKms, AzureKmsConfig
from keymanager.kms.azure_blob import AzureBlob
from keymanager.kms.base import DenialReason, KeyState, KmsCall, KmsError, KmsProvider, Verdict
from keymanager.kms.calls import CallLimits
from keymanager.providers.azure import KIND, AzureSettings
from shared.api.keymanager import AzureKey
from shared.clock import SystemClock
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey
from tests.fixtures.kms_adapter import surroundings
from tests.fixtures.kms_customer_azure import AzureTenant, azure_customer, azure_tenant
from tests.fixtures.kms_customers import KmsCustomer

if TYPE_CHECKING:
    from tests.fixtures.customercloud import CloudProcess, StartCloud

pytestmark = pytest.mark.integration

CONTEXT = EncryptionContext({"keylake:account": "acc-1", "keylake:project": "prj-1"})
OTHER_CONTEXT = EncryptionContext({"keylake:account": "acc-1", "keylake:project": "prj-2"})


class ShiftedClock(SystemClock):
    """The adapter's idea of the time; the cloud keeps its own. So a token seems old while the vault still takes it."""

    ahead = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.ahead


class Provider:
    """An adapter with what it told its observer."""

    def __init__(self, config: AzureKmsConfig) -> None:
        self.calls: list[KmsCall] = []
        self.clock = ShiftedClock()
        self.kms = AzureKms(config, observer=self.calls.append, clock=self.clock)

    def operations(self) -> list[str]:
        return [call.operation for call in self.calls]


@asynccontextmanager
async def provider(config: AzureKmsConfig) -> AsyncIterator[Provider]:
    made = Provider(config)
    try:
        yield made
    finally:
        await made.kms.aclose()


async def failure(call: Awaitable[object]) -> KmsError:
    with pytest.raises(KmsError) as caught:
        await call
    return caught.value


def verdict(error: KmsError) -> tuple[Verdict, DenialReason | None, str]:
    return error.verdict, error.reason, error.provider_code


@pytest.fixture
def azure(shared_cloud: CloudProcess) -> Iterator[AzureTenant]:
    with azure_tenant(shared_cloud) as tenant:
        yield tenant


@pytest.fixture
async def vendor(azure: AzureTenant) -> AsyncIterator[Provider]:
    async with provider(azure.kms_config()) as made:
        yield made


# ── work ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_kek_is_generated_and_unwrapped(azure: AzureTenant, vendor: Provider) -> None:
    provider_: KmsProvider = vendor.kms  # it is one
    kek = await provider_.generate_kek(CONTEXT)
    assert kek.key_version == azure.customer.keys.get_key(azure.key_name).properties.version
    assert (await provider_.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    other = await provider_.generate_kek(CONTEXT)
    assert not other.plaintext.matches(kek.plaintext)


async def test_an_existing_secret_is_wrapped_and_never_sent(azure: AzureTenant, vendor: Provider) -> None:
    secret = SecretKey.generate()
    wrapped = await vendor.kms.wrap(secret, CONTEXT)
    assert not secret.wiped
    assert (await vendor.kms.unwrap(wrapped.wrapped, CONTEXT)).matches(secret)
    # What the vault opened is another key than the secret.
    blob = AzureBlob.parse(wrapped.wrapped)
    client = azure.customer.keys.get_cryptography_client(azure.key_name)
    sent = SecretKey(client.unwrap_key("RSA-OAEP-256", blob.wrapped).key)  # type: ignore[arg-type]
    assert not sent.matches(secret)
    client.close()


async def test_a_blob_opens_under_its_own_context_only(vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    for context in (OTHER_CONTEXT, EncryptionContext({}), CONTEXT.with_pairs(more="x")):
        error = await failure(vendor.kms.unwrap(kek.wrapped, context))
        assert verdict(error) == (Verdict.CORRUPT, None, "SealedKekDoesNotOpen")


async def test_wrapping_is_remote_and_read_back(azure: AzureTenant, vendor: Provider) -> None:
    """Both calls stand in the customer's log, with the ids that we saw."""
    kek = await vendor.kms.generate_kek(CONTEXT)
    assert vendor.operations() == ["GetToken", "WrapKey", "UnwrapKey"]
    assert [call.key_version for call in vendor.calls] == [None, kek.key_version, kek.key_version]
    logged = {record["correlationId"]: record for record in azure.events()}
    names = [logged[call.request_id]["operationName"] for call in vendor.calls if call.request_id]
    assert names == ["Sign-in activity", "KeyWrap", "KeyUnwrap"]
    unwrap = logged[vendor.calls[2].request_id or ""]
    assert unwrap["identity"]["claim"] == {"appid": azure.vendor.client_id, "oid": azure.vendor.object_id}
    assert unwrap["properties"]["id"] == f"{azure.cloud.url}/keys/{azure.key_name}/{kek.key_version}"
    assert unwrap["properties"]["algorithm"] == "RSA-OAEP-256"


async def test_rotation_old_blobs_open_and_rewrap_moves_them(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    new_version = azure.customer.rotate(azure.key_name)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    moved = await vendor.kms.rewrap(kek.wrapped, CONTEXT)
    assert moved.key_version == new_version != kek.key_version
    assert (await vendor.kms.unwrap(moved.wrapped, CONTEXT)).matches(kek.plaintext)
    assert (await vendor.kms.describe()).key_version == new_version


async def test_an_old_version_that_is_disabled_denies_its_blobs_only(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    azure.customer.rotate(azure.key_name)
    azure.customer.keys.update_key_properties(azure.key_name, kek.key_version, enabled=False)
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert verdict(error) == (Verdict.DENIED, DenialReason.DISABLED, "KeyDisabled")
    await vendor.kms.generate_kek(CONTEXT)


async def test_larger_keys(azure: AzureTenant) -> None:
    name = f"cmk-{secrets.token_hex(6)}"
    azure.customer.create_key(name, 3072)
    azure.allow(name)
    async with provider(azure.kms_config(key_name=name)) as large:
        kek = await large.kms.generate_kek(CONTEXT)
        assert (await large.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


async def test_describe_in_every_state(azure: AzureTenant, vendor: Provider) -> None:
    description = await vendor.kms.describe()
    assert description.key_id == f"{azure.cloud.url}/keys/{azure.key_name}"
    assert (description.state, description.deletion_date) == (KeyState.ENABLED, None)
    azure.customer.keys.update_key_properties(azure.key_name, expires_on=datetime.now(UTC) - timedelta(days=1))
    assert (await vendor.kms.describe()).state is KeyState.OTHER
    azure.customer.disable(azure.key_name)
    assert (await vendor.kms.describe()).state is KeyState.DISABLED
    date = azure.customer.delete(azure.key_name)
    description = await vendor.kms.describe()
    assert (description.state, description.deletion_date) == (KeyState.PENDING_DELETION, date)
    azure.customer.purge(azure.key_name)
    error = await failure(vendor.kms.describe())
    assert verdict(error) == (Verdict.DENIED, DenialReason.NOT_FOUND, "KeyNotFound")


async def test_one_token_serves_calls_that_start_together(vendor: Provider) -> None:
    await asyncio.gather(*(vendor.kms.generate_kek(CONTEXT) for _ in range(8)))
    assert vendor.operations().count("GetToken") == 1


# ── the customer says no ───────────────────────────────────────────────────────────────────────────────────────────

Change = Callable[[AzureTenant], object]

DENIALS: dict[str, tuple[Change, DenialReason, str, Change]] = {
    "disabled": (
        lambda azure: azure.customer.disable(azure.key_name),
        DenialReason.DISABLED,
        "KeyDisabled",
        lambda azure: azure.customer.enable(azure.key_name),
    ),
    "deleted": (
        lambda azure: azure.customer.delete(azure.key_name),
        DenialReason.PENDING_DELETION,
        "KeyNotFound",
        lambda azure: azure.customer.recover(azure.key_name),
    ),
    "role taken away": (
        lambda azure: azure.deny(azure.key_name),
        DenialReason.ACCESS_DENIED,
        "ForbiddenByRbac",
        lambda azure: azure.allow(azure.key_name),
    ),
    "operation not allowed": (
        lambda azure: azure.customer.keys.update_key_properties(azure.key_name, key_operations=["sign"]),
        DenialReason.INVALID_STATE,
        "KeyOperationForbidden",
        lambda azure: azure.customer.keys.update_key_properties(
            azure.key_name, key_operations=["wrapKey", "unwrapKey"]
        ),
    ),
}


@pytest.mark.parametrize("name", list(DENIALS))
async def test_denials_and_recovery(azure: AzureTenant, vendor: Provider, name: str) -> None:
    change, reason, code, back = DENIALS[name]
    kek = await vendor.kms.generate_kek(CONTEXT)
    change(azure)
    unwrap = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert verdict(unwrap) == (Verdict.DENIED, reason, code)
    assert unwrap.request_id in {record["correlationId"] for record in azure.events()}
    assert verdict(await failure(vendor.kms.generate_kek(CONTEXT))) == (Verdict.DENIED, reason, code)
    assert verdict(await failure(vendor.kms.rewrap(kek.wrapped, CONTEXT))) == (Verdict.DENIED, reason, code)
    back(azure)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


async def test_a_purged_key_is_gone(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    azure.customer.delete(azure.key_name)
    azure.customer.purge(azure.key_name)
    gone = (Verdict.DENIED, DenialReason.NOT_FOUND, "KeyNotFound")
    assert verdict(await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))) == gone
    azure.customer.create_key(azure.key_name)  # another key of the same name
    assert verdict(await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))) == gone
    await vendor.kms.generate_kek(CONTEXT)


async def test_who_may_not_see_deleted_keys_takes_them_for_gone(azure: AzureTenant) -> None:
    """In a vault with access policies the right to use a key does not bring the right to read it."""
    vault = azure.names.vault
    settings = VaultRequest(tenant_id=azure.tenant_id, mode=Mode.ACCESS_POLICY)
    use = frozenset({Permission.WRAP, Permission.UNWRAP})
    azure.admin.put_policy(vault, azure.vendor.object_id, use)
    azure.admin.put_vault(vault, settings)
    try:
        async with provider(azure.kms_config()) as user:
            kek = await user.kms.generate_kek(CONTEXT)
            error = await failure(user.kms.describe())
            assert verdict(error) == (Verdict.DENIED, DenialReason.ACCESS_DENIED, "AccessDenied")
            azure.customer.delete(azure.key_name)
            error = await failure(user.kms.unwrap(kek.wrapped, CONTEXT))
            assert verdict(error) == (Verdict.DENIED, DenialReason.NOT_FOUND, "KeyNotFound")
            azure.admin.put_policy(vault, azure.vendor.object_id, frozenset({Permission.GET, Permission.WRAP}))
            error = await failure(user.kms.unwrap(kek.wrapped, CONTEXT))
            assert verdict(error) == (Verdict.DENIED, DenialReason.ACCESS_DENIED, "AccessDenied")
    finally:
        azure.admin.put_vault(vault, settings.model_copy(update={"mode": Mode.RBAC}))


async def test_an_expired_key_unwraps_and_does_not_wrap(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    azure.customer.keys.update_key_properties(azure.key_name, expires_on=datetime.now(UTC) - timedelta(minutes=1))
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    error = await failure(vendor.kms.generate_kek(CONTEXT))
    assert verdict(error) == (Verdict.DENIED, DenialReason.INVALID_STATE, "KeyExpired")


async def test_nothing_is_wrapped_under_a_disabled_key_even_where_the_service_would(
    azure: AzureTenant, vendor: Provider
) -> None:
    """azure-sdk-for-python#45342: the wrap itself succeeds there."""
    vault = azure.names.vault
    settings = VaultRequest(tenant_id=azure.tenant_id, public_operations_on_disabled_keys=True)
    azure.admin.put_vault(vault, settings)
    try:
        azure.customer.disable(azure.key_name)
        error = await failure(vendor.kms.generate_kek(CONTEXT))
        assert verdict(error) == (Verdict.DENIED, DenialReason.DISABLED, "KeyDisabled")
        assert vendor.operations() == ["GetToken", "WrapKey", "UnwrapKey"]
        assert vendor.calls[1].error is None
    finally:
        azure.admin.put_vault(vault, settings.model_copy(update={"public_operations_on_disabled_keys": False}))


# ── blobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_blobs_of_other_keys_are_refused_without_a_call(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    calls = len(vendor.calls)
    other = azure.new_key()
    async with provider(azure.kms_config(key_name=other)) as another:
        error = await failure(another.kms.unwrap(kek.wrapped, CONTEXT))
        assert verdict(error) == (Verdict.CORRUPT, None, "BlobOfAnotherKey")
        assert another.calls == []
    for garbage in (b"", b"KLAZ", secrets.token_bytes(500), kek.wrapped[:-1], kek.wrapped + b"\0", bytes(100_000)):
        error = await failure(vendor.kms.unwrap(garbage, CONTEXT))
        assert verdict(error) == (Verdict.CORRUPT, None, "ImpossibleBlob")
    assert len(vendor.calls) == calls


async def test_a_tampered_blob_is_corrupt_and_denies_nothing(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    blob = AzureBlob.parse(kek.wrapped)
    flipped = bytes([blob.wrapped[0] ^ 1]) + blob.wrapped[1:]
    for wrapped, sealed in ((flipped, blob.sealed), (blob.wrapped, bytes([blob.sealed[0] ^ 1]) + blob.sealed[1:])):
        error = await failure(vendor.kms.unwrap(AzureBlob(blob.key_id, wrapped, sealed).serialize(), CONTEXT))
        assert (error.verdict, error.reason) == (Verdict.CORRUPT, None)
    # Wrapped by the right key, but no key of ours: too short.
    client = azure.customer.keys.get_cryptography_client(azure.key_name, key_version=blob.key_id.version)
    short = client.wrap_key("RSA-OAEP-256", b"16 bytes of text").encrypted_key  # type: ignore[arg-type]
    client.close()
    error = await failure(vendor.kms.unwrap(AzureBlob(blob.key_id, short, blob.sealed).serialize(), CONTEXT))
    assert verdict(error) == (Verdict.CORRUPT, None, "NotAKey")


# ── our own side ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_wrong_secret_of_ours_is_ambiguous(azure: AzureTenant) -> None:
    async with provider(azure.kms_config(client_secret="not the secret")) as wrong:
        error = await failure(wrong.kms.generate_kek(CONTEXT))
        assert verdict(error) == (Verdict.AMBIGUOUS, None, "AADSTS7000215")
        assert (error.operation, wrong.operations()) == ("GetToken", ["GetToken"])
        assert error.request_id in {record["correlationId"] for record in azure.events()}
        assert "not the secret" not in f"{error} {error!r} {wrong.calls} {azure.kms_config()!r}"


async def test_an_expired_secret_is_ambiguous(azure: AzureTenant) -> None:
    secret = azure.admin.replace_secret(azure.vendor.client_id, datetime.now(UTC) - timedelta(hours=1))
    async with provider(azure.kms_config(client_secret=secret)) as late:
        error = await failure(late.kms.generate_kek(CONTEXT))
        assert verdict(error) == (Verdict.AMBIGUOUS, None, "AADSTS7000222")


async def test_no_secret_at_all_is_ambiguous(azure: AzureTenant) -> None:
    async with provider(azure.kms_config(client_secret=None)) as without:
        error = await failure(without.kms.generate_kek(CONTEXT))
        assert verdict(error) == (Verdict.AMBIGUOUS, None, "NoCredential")


async def test_an_unknown_tenant_is_ambiguous(azure: AzureTenant) -> None:
    async with provider(azure.kms_config(tenant_id="99999999-9999-4999-8999-999999999999")) as lost:
        error = await failure(lost.kms.generate_kek(CONTEXT))
        assert (error.verdict, error.provider_code) == (Verdict.AMBIGUOUS, "AADSTS90002")


async def test_the_vaults_check_of_the_challenge_is_on_unless_told_otherwise(azure: AzureTenant) -> None:
    """An address is nobody's subdomain: the SDK sends no token there."""
    async with provider(azure.kms_config(verify_challenge_resource=True)) as strict:
        error = await failure(strict.kms.generate_kek(CONTEXT))
        assert verdict(error) == (Verdict.AMBIGUOUS, None, "ValueError")


async def test_a_removed_principal_is_denied_when_its_token_has_run_out(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    azure.admin.remove_principal(azure.tenant_id, azure.vendor.object_id)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)  # the token lives on
    vendor.clock.ahead = timedelta(seconds=azure.kms_config().token_max_age_s + 1)
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert verdict(error) == (Verdict.DENIED, DenialReason.PRINCIPAL_DENIED, "AADSTS700016")


async def test_a_disabled_principal_is_denied_and_comes_back(azure: AzureTenant) -> None:
    azure.admin.set_principal_enabled(azure.tenant_id, azure.vendor.object_id, enabled=False)
    async with provider(azure.kms_config()) as disabled:
        error = await failure(disabled.kms.generate_kek(CONTEXT))
        assert verdict(error) == (Verdict.DENIED, DenialReason.PRINCIPAL_DENIED, "AADSTS7000112")
        azure.admin.set_principal_enabled(azure.tenant_id, azure.vendor.object_id, enabled=True)
        await disabled.kms.generate_kek(CONTEXT)


async def test_a_token_that_cannot_be_renewed_is_used_until_it_expires(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    outage = azure.faults(outage=Outage.REFUSE).model_copy(update={"services": frozenset({Service.ENTRA})})
    with azure.admin.during(outage):
        vendor.clock.ahead = timedelta(seconds=1000)
        assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        vendor.clock.ahead = timedelta(hours=2)
        error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
        assert (error.verdict, error.operation) == (Verdict.UNREACHABLE, "GetToken")
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


async def test_a_token_that_the_vault_takes_no_more_is_replaced_once(azure: AzureTenant) -> None:
    async with provider(azure.kms_config()) as vendor:
        with azure.admin.during(Faults(session_lifetime_s=1)):
            kek = await vendor.kms.generate_kek(CONTEXT)
        vendor.clock.ahead = timedelta(seconds=-3600)  # so that the adapter does not know
        await asyncio.sleep(1.5)
        assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        assert vendor.operations()[-3:] == ["UnwrapKey", "GetToken", "UnwrapKey"]
        rejected = vendor.calls[-3].error
        assert rejected is not None
        assert verdict(rejected) == (Verdict.AMBIGUOUS, None, "Unauthorized")


async def test_workload_identity_needs_no_secret(azure: AzureTenant, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    issuer, subject = "https://issuer.example", "system:serviceaccount:keylake:keymanager"
    azure.admin.trust(
        azure.vendor.client_id, FederatedCredential(issuer=issuer, subject=subject, public_key_pem=pem.decode())
    )
    token = tmp_path / "token"

    def write(signing_key: ec.EllipticCurvePrivateKey, **claims: object) -> None:
        good = {"iss": issuer, "sub": subject, "aud": "api://AzureADTokenExchange", "exp": int(time.time()) + 600}
        token.write_text(jwt.encode(good | claims, signing_key, algorithm="ES256"))

    write(key)
    async with provider(azure.kms_config(client_secret=None, federated_token_file=token)) as vendor:
        await vendor.kms.generate_kek(CONTEXT)
    for code, signing_key, claims in (
        ("AADSTS700213", key, {"sub": "somebody else"}),
        ("AADSTS700213", key, {"aud": "https://elsewhere.example"}),
        ("AADSTS700024", key, {"exp": int(time.time()) - 600}),
        ("AADSTS700027", ec.generate_private_key(ec.SECP256R1()), {}),
    ):
        write(signing_key, **claims)
        async with provider(azure.kms_config(client_secret=None, federated_token_file=token)) as refused:
            error = await failure(refused.kms.generate_kek(CONTEXT))
            assert verdict(error) == (Verdict.AMBIGUOUS, None, code)


# ── bad days ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", list(ErrorKind))
async def test_server_errors_are_unreachable(azure: AzureTenant, vendor: Provider, kind: ErrorKind) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    with azure.admin.during(azure.faults(error_rate=1, error_kind=kind)):
        assert (await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))).verdict is Verdict.UNREACHABLE
        async with provider(azure.kms_config()) as fresh:
            error = await failure(fresh.kms.unwrap(kek.wrapped, CONTEXT))
            assert (error.verdict, error.operation) == (Verdict.UNREACHABLE, "GetToken")


async def test_throttling(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    with azure.admin.during(azure.faults(throttle_rate=1)):
        started_s = time.monotonic()
        error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
        assert verdict(error) == (Verdict.THROTTLED, None, "Throttled")
        async with provider(azure.kms_config()) as fresh:
            assert (await failure(fresh.kms.unwrap(kek.wrapped, CONTEXT))).verdict is Verdict.THROTTLED
        assert time.monotonic() - started_s < 1  # nobody waited for Retry-After
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


@pytest.mark.parametrize("outage", [Outage.REFUSE, Outage.HANG])
async def test_outages_end_within_the_deadline(azure: AzureTenant, outage: Outage) -> None:
    config = azure.kms_config(limits=CallLimits(read_timeout_s=0.3, deadline_s=0.6))
    async with provider(config) as vendor:
        kek = await vendor.kms.generate_kek(CONTEXT)
        with azure.admin.during(azure.faults(outage=outage)):
            started_s = time.monotonic()
            error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
            assert (error.verdict, error.reason) == (Verdict.UNREACHABLE, None)
            async with provider(config) as fresh:
                assert (await failure(fresh.kms.unwrap(kek.wrapped, CONTEXT))).verdict is Verdict.UNREACHABLE
            assert time.monotonic() - started_s < 3
        assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


async def test_a_revocation_that_spreads_slowly(azure: AzureTenant, vendor: Provider) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    with azure.admin.during(azure.faults(propagation_delay_s=1.0)):
        azure.customer.disable(azure.key_name)
        disabled_s = time.monotonic()
        assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        denied: KmsError | None = None
        while denied is None and time.monotonic() - disabled_s < 10:
            try:
                await vendor.kms.unwrap(kek.wrapped, CONTEXT)
            except KmsError as error:
                denied = error
            await asyncio.sleep(0.02)
        assert denied is not None
        assert denied.reason is DenialReason.DISABLED
        assert time.monotonic() - disabled_s > 0.9


async def test_the_keymanagers_factory_makes_a_working_provider(azure: AzureTenant) -> None:
    azure_settings = AzureSettings(
        client_secrets={azure.vendor.client_id: SecretStr(azure.vendor.client_secret)},
        authority=azure.cloud.url,
        disable_instance_discovery=True,
        verify_challenge_resource=False,
        ca_bundle=azure.cloud.ca_bundle,
    )
    key = AzureKey(
        vault_url=azure.cloud.url,
        key_name=azure.key_name,
        tenant_id=azure.tenant_id,
        client_id=azure.vendor.client_id,
    )
    calls: list[KmsCall] = []
    around = surroundings(calls.append)
    kms = KIND.connect(key, azure_settings, around)
    another = key.model_copy(update={"client_id": azure.names.vendor.client_id})
    unknown = KIND.connect(another, azure_settings, around)
    try:
        kek = await kms.generate_kek(CONTEXT)
        assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
        assert (await failure(unknown.unwrap(kek.wrapped, CONTEXT))).provider_code == "NoCredential"
    finally:
        await kms.aclose()
        await unknown.aclose()
    assert calls[0].operation == "GetToken"


# ── the contract of every adapter ──────────────────────────────────────────────────────────────────────────────────


async def test_the_customer_of_the_contract_suite(start_cloud: StartCloud) -> None:
    cloud = start_cloud()
    with azure_customer(cloud) as made:
        customer: KmsCustomer = made  # it is one
        calls: list[KmsCall] = []
        kms = customer.provider(calls.append)
        other = customer.other_key_provider()
        try:
            kek = await kms.generate_kek(CONTEXT)
            assert (await failure(other.unwrap(kek.wrapped, CONTEXT))).verdict is Verdict.CORRUPT
            for change, back in (
                ("disable", customer.enable),
                ("schedule_deletion", customer.cancel_deletion),
                ("deny", customer.allow),
            ):
                getattr(customer, change)()
                error = await failure(kms.unwrap(kek.wrapped, CONTEXT))
                assert error.verdict is Verdict.DENIED
                assert error.reason in customer.denial_reasons[change]
                back()
                assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
            customer.rotate()
            for kill in (True, False):
                customer.restart_cloud(kill=kill)
                assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
            assert (await kms.rewrap(kek.wrapped, CONTEXT)).key_version != kek.key_version
            customer.outage(Outage.REFUSE)
            assert (await failure(kms.unwrap(kek.wrapped, CONTEXT))).verdict is Verdict.UNREACHABLE
            customer.throttle(1)
            assert (await failure(kms.unwrap(kek.wrapped, CONTEXT))).verdict is Verdict.THROTTLED
            customer.outage(Outage.NONE)
            customer.destroy()
            error = await failure(kms.unwrap(kek.wrapped, CONTEXT))
            assert error.reason in customer.denial_reasons["destroy"]
            answered = {call.request_id for call in calls if call.request_id is not None}
            assert answered <= customer.audit_request_ids()
        finally:
            await kms.aclose()
            await other.aclose()
