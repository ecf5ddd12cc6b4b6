"""Microsoft's unmodified SDKs against customercloud: uses of keys, who may use them, each refusal to the letter."""

from __future__ import annotations

import secrets
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from azure.core.exceptions import ClientAuthenticationError
from azure.identity import ClientSecretCredential
from azure.keyvault.keys import ApiVersion
from azure.keyvault.keys.crypto import (
    EncryptionAlgorithm,
    KeyWrapAlgorithm,
    SignatureAlgorithm,
)

from customercloud.azure.access import Mode, Permission, Role
from customercloud.azure.admin import VaultRequest
from customercloud.azure_client import AzureCustomer, AzureEndpoint, ClientSecret
from customercloud.faults import Faults, Outage
from shared.errors import ConflictError, NotFoundError
from tests.fixtures.azure import API, Raw, crypto, error_of, named_vault, refusal
from tests.fixtures.kms_customer_azure import AzureTenant, azure_tenant

if TYPE_CHECKING:
    from tests.fixtures.customercloud import StartCloud
    from tests.fixtures.kms_customer_azure import AzureTenant

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("localhost_names")]


# ── cryptography ───────────────────────────────────────────────────────────────────────────────────────────────────


ENCRYPTION = ("RSA-OAEP", "RSA-OAEP-256", "RSA1_5")


def test_wrap_locally_unwrap_remotely(azure: AzureTenant) -> None:
    """The SDK wraps with the public key that it fetched: both sides agree on every algorithm."""
    client = azure.customer.keys.get_cryptography_client(azure.key_name)
    for algorithm in map(KeyWrapAlgorithm, ENCRYPTION):
        wrapped = client.wrap_key(algorithm, b"k" * 32)
        assert client.unwrap_key(algorithm, wrapped.encrypted_key).key == b"k" * 32
    client.close()


@pytest.mark.parametrize(("there", "back"), [("wrapkey", "unwrapkey"), ("encrypt", "decrypt")])
def test_remote_round_trips(azure: AzureTenant, raw: Raw, there: str, back: str) -> None:
    current = azure.customer.keys.get_key(azure.key_name).properties.version
    for algorithm, version in product(ENCRYPTION, ("", "/", f"/{current}")):
        answer = raw("POST", f"/keys/{azure.key_name}{version}/{there}", json={"alg": algorithm, "value": "a2V5"})
        assert answer.status_code == 200
        kid, value = answer.json()["kid"], answer.json()["value"]
        assert kid.endswith(f"/keys/{azure.key_name}/{current}")
        assert "=" not in value
        opened = raw("POST", f"{kid}/{back}", json={"alg": algorithm, "value": value})
        assert opened.json() == {"kid": kid, "value": "a2V5"}


def test_signatures(azure: AzureTenant) -> None:
    client = azure.customer.keys.get_cryptography_client(azure.key_name)
    for family, (bits, size) in product(("RS", "PS"), (("256", 32), ("384", 48), ("512", 64))):
        algorithm, digest = SignatureAlgorithm(family + bits), secrets.token_bytes(size)
        signed = client.sign(algorithm, digest)
        assert client.verify(algorithm, digest, signed.signature).is_valid
        assert not client.verify(algorithm, secrets.token_bytes(size), signed.signature).is_valid
    client.close()


def test_verify_remotely_and_a_digest_of_the_wrong_size(azure: AzureTenant, raw: Raw) -> None:
    path = f"/keys/{azure.key_name}"
    short = raw("POST", f"{path}/sign", json={"alg": "RS256", "value": "a2V5"})
    assert error_of(short)[:2] == (400, "BadParameter")
    digest = "A" * 43
    signature = raw("POST", f"{path}/sign", json={"alg": "PS256", "value": digest}).json()["value"]
    for value, valid in ((signature, True), ("A" * len(signature), False)):
        body = {"alg": "PS256", "digest": digest, "value": value}
        assert raw("POST", f"{path}/verify", json=body).json() == {"value": valid}


BAD_VALUES: list[tuple[Any, str]] = [
    ({"alg": "RSA-OAEP-256"}, "Property 'value' is required.\r\n"),
    ({"value": "a2V5"}, "Property 'alg' is required.\r\n"),
    ({"alg": "RSA-OAEP-256", "value": ""}, "Property 'value' is required.\r\n"),
    (
        {"alg": "RSA-OAEP-256", "value": "no+base64url/"},
        "Content of 'value' is not base64url.\r\nProperty 'value' is required.\r\n",
    ),
    (
        {"alg": "RSA-OAEP-256", "value": "A"},
        "Content of 'value' is not base64url.\r\nProperty 'value' is required.\r\n",
    ),
    ({"alg": "RSA-OAEP-256", "value": 7}, "Property  has invalid value\r\n"),
    ({"alg": "ROT13", "value": "a2V5"}, "Property  has invalid value\r\n"),
    ({"alg": "RSA-OAEP-256", "value": "a2V5"}, "The parameter is incorrect.\r\n"),
    ({"alg": "RSA-OAEP-256", "value": "A" * 10_000}, "The parameter is incorrect.\r\n"),
]


def test_bad_values(azure: AzureTenant, raw: Raw) -> None:
    for body, message in BAD_VALUES:
        answer = raw("POST", f"/keys/{azure.key_name}/unwrapkey", json=body)
        assert error_of(answer) == (400, "BadParameter", message), body


def test_what_another_version_wrapped_does_not_open(azure: AzureTenant, raw: Raw) -> None:
    path = f"/keys/{azure.key_name}"
    wrapped = raw("POST", f"{path}/wrapkey", json={"alg": "RSA-OAEP-256", "value": "a2V5"}).json()
    body = {"alg": "RSA-OAEP-256", "value": wrapped["value"]}
    azure.customer.rotate(azure.key_name)
    unversioned = raw("POST", f"{path}/unwrapkey", json=body)
    assert error_of(unversioned) == (400, "BadParameter", "The parameter is incorrect.\r\n")
    assert raw("POST", f"{wrapped['kid']}/unwrapkey", json=body).json()["value"] == "a2V5"
    missing = raw("POST", f"{path}/{'0' * 32}/unwrapkey", json=body)
    assert error_of(missing)[:2] == (404, "KeyNotFound")


# ── what a key's attributes forbid ─────────────────────────────────────────────────────────────────────────────────

ALL = ("wrapKey", "encrypt", "sign", "unwrapKey", "decrypt", "verify")


def attempt(raw: Raw, name: str, operation: str) -> tuple[int, str | None, str]:
    """(status, inner code, message) of an operation that would be bad in no other way than the one tested."""
    bodies = {
        "sign": {"alg": "RS256", "value": "A" * 43},
        "verify": {"alg": "RS256", "digest": "A" * 43, "value": "A" * 342},
    }
    body = bodies.get(operation, {"alg": "RSA-OAEP-256", "value": "a2V5"})
    answer = raw("POST", f"/keys/{name}/{operation.lower()}", json=body).json()
    error = answer.get("error", {})
    status = 200 if not error else 400 if error["code"] == "BadParameter" else 403
    return status, (error.get("innererror") or {}).get("code"), error.get("message", "")


def test_disabled(azure: AzureTenant, raw: Raw) -> None:
    azure.customer.disable(azure.key_name)
    for operation in ALL:
        message = f"Operation {operation} is not allowed on a disabled key."
        assert attempt(raw, azure.key_name, operation) == (403, "KeyDisabled", message)
    assert azure.customer.keys.get_key(azure.key_name).properties.enabled is False


def test_disabled_in_a_vault_that_lets_the_public_key_be_used(azure: AzureTenant, raw: Raw) -> None:
    settings = VaultRequest(tenant_id=azure.tenant_id, public_operations_on_disabled_keys=True)
    azure.admin.put_vault(azure.names.vault, settings)
    try:
        azure.customer.disable(azure.key_name)
        refused = {operation for operation in ALL if attempt(raw, azure.key_name, operation)[1] == "KeyDisabled"}
        assert refused == {"sign", "unwrapKey", "decrypt"}
    finally:
        azure.admin.put_vault(
            azure.names.vault, settings.model_copy(update={"public_operations_on_disabled_keys": False})
        )


@pytest.mark.parametrize(
    ("dates", "inner"),
    [
        ({"expires_on": datetime(2021, 1, 1, tzinfo=UTC)}, "KeyExpired"),
        ({"not_before": datetime(2121, 1, 1, tzinfo=UTC)}, "KeyNotYetValid"),
    ],
)
def test_dates_bar_making_and_not_opening(azure: AzureTenant, raw: Raw, dates: dict[str, Any], inner: str) -> None:
    azure.customer.keys.update_key_properties(azure.key_name, **dates)
    assert {operation: attempt(raw, azure.key_name, operation)[1] for operation in ALL} == {
        "wrapKey": inner, "encrypt": inner, "sign": inner, "unwrapKey": None, "decrypt": None, "verify": None,
    }  # fmt: skip


def test_operations_that_the_key_does_not_have(azure: AzureTenant, raw: Raw) -> None:
    azure.customer.keys.update_key_properties(azure.key_name, key_operations=["unwrapKey"])
    for operation in ALL:
        expected = None if operation == "unwrapKey" else "KeyOperationForbidden"
        assert attempt(raw, azure.key_name, operation)[1] == expected
    assert attempt(raw, azure.key_name, "decrypt")[2] == "Operation decrypt is not permitted on this key."


# ── who ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bare(azure: AzureTenant, secret: ClientSecret) -> AzureCustomer:
    endpoint = AzureEndpoint(azure.cloud.url, azure.cloud.url, azure.cloud.ca_bundle, verify_challenge_resource=False)
    return AzureCustomer(endpoint, secret)


def test_rbac(azure: AzureTenant, name: str) -> None:
    with bare(azure, ClientSecret.of(azure.vendor)) as vendor:
        status, code, inner, message = refusal(lambda: vendor.create_key(name))
        assert (status, code, inner) == (403, "Forbidden", "ForbiddenByRbac")
        assert "Action: 'Microsoft.KeyVault/vaults/keys/create/action'\r\n" in message
        assert f"/vaults/default/keys/{name}'\r\n" in message
        assert "DecisionReason: 'DeniedWithNoValidRBAC'" in message
        assert f"appid={azure.vendor.client_id};oid={azure.vendor.object_id};" in message
        vendor.keys.get_key(azure.key_name)  # the role on this one key
        assert refusal(lambda: list(vendor.keys.list_properties_of_keys()))[2] == "ForbiddenByRbac"
        # Whether there is such a key is nobody's business who may not ask.
        assert refusal(lambda: vendor.keys.get_key(name))[2] == "ForbiddenByRbac"
        azure.admin.assign(azure.names.vault, azure.vendor.object_id, Role.CRYPTO_OFFICER)
        vendor.create_key(name)
        azure.admin.unassign(azure.names.vault, azure.vendor.object_id)
        assert refusal(lambda: vendor.keys.get_key(azure.key_name))[2] == "ForbiddenByRbac"


def test_access_policies(azure: AzureTenant) -> None:
    vault = f"v{secrets.token_hex(6)}"
    azure.admin.put_vault(vault, VaultRequest(tenant_id=azure.tenant_id, mode=Mode.ACCESS_POLICY))
    customer, vendor = azure.names.customer, azure.vendor
    azure.admin.put_policy(vault, customer.object_id, frozenset({Permission.CREATE, Permission.GET}))
    azure.admin.assign(vault, vendor.object_id, Role.ADMINISTRATOR)  # which counts for nothing here
    with named_vault(azure, vault) as owner, named_vault(azure, vault, ClientSecret.of(vendor)) as other:
        owner.create_key("cmk")
        status, code, inner, message = refusal(lambda: owner.delete("cmk"))
        assert (status, code, inner) == (403, "Forbidden", "AccessDenied")
        assert "does not have keys delete permission on key vault '" in message
        assert f"appid={customer.client_id};oid={customer.object_id};" in message
        assert refusal(lambda: other.keys.get_key("cmk"))[2] == "AccessDenied"
        azure.admin.put_policy(vault, vendor.object_id, frozenset({Permission.GET}))
        other.keys.get_key("cmk")
        azure.admin.put_policy(vault, vendor.object_id, frozenset())
        assert refusal(lambda: other.keys.get_key("cmk"))[2] == "AccessDenied"


def token_of(azure: AzureTenant, scope: str, **changes: str) -> str:
    values = {"client_id": azure.vendor.client_id, "client_secret": azure.vendor.client_secret} | changes
    with ClientSecretCredential(
        azure.tenant_id,
        **values,
        authority=azure.cloud.url,
        disable_instance_discovery=True,
        connection_verify=str(azure.cloud.ca_bundle),
    ) as credential:
        return credential.get_token(scope).token


def test_the_challenge(azure: AzureTenant, raw: Raw) -> None:
    answer = raw("GET", f"/keys/{azure.key_name}", headers={})
    assert error_of(answer) == (401, "Unauthorized", "AKV10000: Request is missing a Bearer or PoP token.")
    assert answer.headers["www-authenticate"] == (
        f'Bearer authorization="{azure.cloud.url}/{azure.tenant_id}", resource="https://vault.azure.net"'
    )


def test_tokens_that_the_vault_does_not_take(azure: AzureTenant, raw: Raw) -> None:
    good = token_of(azure, "https://vault.azure.net/.default")
    header, payload, signature = good.split(".")
    elsewhere = token_of(azure, "https://management.azure.com/.default")
    stranger = azure.admin.put_principal("33333333-3333-4333-8333-333333333333")
    with ClientSecretCredential(
        stranger.tenant_id, stranger.client_id, stranger.client_secret, authority=azure.cloud.url,
        disable_instance_discovery=True, connection_verify=str(azure.cloud.ca_bundle),
    ) as credential:  # fmt: skip
        foreign = credential.get_token("https://vault.azure.net/.default").token
    with azure.admin.during(Faults(session_lifetime_s=0.001)):
        expired = token_of(azure, "https://vault.azure.net/.default")
    for token, start in (
        (elsewhere, "AKV10022: Invalid audience. Expected https://vault.azure.net, found: https://management"),
        (foreign, "AKV10032: Invalid issuer. Expected one of https://sts.windows.net/"),
        (expired, "[TokenExpired]"),
        (f"{header}.{payload}.{signature[:-8]}AAAAAAAA", "AKV10046"),
        (f"{header}.{elsewhere.split('.')[1]}.{signature}", "AKV10046"),
        (f"eyJhbGciOiJub25lIn0.{payload}.", "AKV10046"),
        ("rubbish", "AKV10046"),
        ("x" * 20_000, "AKV10000"),
    ):
        answer = raw("GET", f"/keys/{azure.key_name}", headers={"Authorization": f"Bearer {token}"})
        status, code, message = error_of(answer)
        assert (status, code) == (401, "Unauthorized")
        assert message.startswith(start)
        assert "www-authenticate" in answer.headers
    allowed = raw("GET", f"/keys/{azure.key_name}", headers={"Authorization": f"Bearer {good}"})
    assert allowed.status_code == 200


def test_refusals_of_the_token_endpoint(azure: AzureTenant) -> None:
    scope = "https://vault.azure.net/.default"
    refusals: list[tuple[str, str, dict[str, str]]] = [
        ("AADSTS7000215: Invalid client secret provided.", scope, {"client_secret": "wrong"}),
        ("AADSTS700016: Application with identifier", scope, {"client_id": azure.tenant_id}),
        ("AADSTS500011: The resource principal named", "http://vault.azure.net/.default", {}),
        ("AADSTS1002012: The provided value for scope", "https://vault.azure.net/read", {}),
    ]
    for start, asked, changes in refusals:
        with pytest.raises(ClientAuthenticationError) as caught:
            token_of(azure, asked, **changes)
        assert caught.value.message.startswith(f"Authentication failed: {start}")


def test_the_token_endpoint_answers_other_requests_too(azure: AzureTenant, raw: Raw) -> None:
    base = f"/{azure.tenant_id}"
    form = {"client_id": azure.vendor.client_id, "grant_type": "client_credentials", "scope": "x/.default"}
    for change, code in (
        ({"grant_type": "password"}, 70003),
        ({"client_secret": ""}, 7000218),
        ({"client_assertion": "x", "client_assertion_type": "y"}, 50027),
    ):
        answer = raw("POST", f"{base}/oauth2/v2.0/token", data=form | change, headers={}).json()
        assert answer["error_codes"] == [code]
        assert answer["error_description"].startswith(f"AADSTS{code}: ")
    assert raw("GET", f"{base}/oauth2/v2.0/token").status_code == 404
    document = raw("GET", f"{base}/v2.0/.well-known/openid-configuration").json()
    assert document["token_endpoint"] == f"{azure.cloud.url}{base}/oauth2/v2.0/token"
    published = raw("GET", httpx.URL(document["jwks_uri"]).path).json()["keys"][0]
    assert (published["kty"], published["use"]) == ("RSA", "sig")
    unknown = raw("GET", "/99999999-9999-4999-8999-999999999999/v2.0/.well-known/openid-configuration")
    assert (unknown.status_code, unknown.json()["error_codes"]) == (400, [90002])


# ── requests that no SDK sends ─────────────────────────────────────────────────────────────────────────────────────


def test_versions_of_the_api(azure: AzureTenant, raw: Raw) -> None:
    path = f"/keys/{azure.key_name}"
    for version in ApiVersion:
        assert raw("GET", path, params={"api-version": version.value}).status_code == 200, version
    unknown = error_of(raw("GET", path, params={"api-version": "1999-01-01"}))
    assert unknown[:2] == (400, "BadParameter")
    assert unknown[2].startswith("The specified version (1999-01-01) is not recognized.")
    assert error_of(raw("GET", path, params={})) == (400, "BadParameter", "api-version must be specified")


def test_names_methods_sizes_and_garbage(azure: AzureTenant, raw: Raw) -> None:
    name = error_of(raw("GET", "/keys/no_underscores"))
    assert name == (400, "BadParameter", "The request URI contains an invalid name: no_underscores")
    assert error_of(raw("PATCH", "/keys"))[:2] == (405, "MethodNotAllowed")
    assert error_of(raw("POST", f"/keys/{azure.key_name}/dance"))[:2] == (405, "MethodNotAllowed")
    path = f"/keys/{azure.key_name}/wrapkey"
    for body in (b"{", b"\xff\xfe", b"[" * 60_000, b'"x"'):
        assert error_of(raw("POST", path, content=body)) == (400, "BadParameter", "Property  has invalid value\r\n")
    assert error_of(raw("POST", path, content=b"x" * 2_000_000))[:2] == (413, "BadParameter")
    assert error_of(raw("GET", "/keys", params=API | {"maxresults": "26"}))[:2] == (400, "BadParameter")
    assert error_of(raw("GET", "/keys", params=API | {"$skiptoken": "+"}))[:2] == (400, "BadParameter")


def test_unknown_vaults(azure: AzureTenant, raw: Raw) -> None:
    for host, status in (
        ("nosuch.vault.example", 404),
        ("default.vault.example", 401),
        ("[::1]:99999", 401),
        ("", 401),
    ):
        assert raw("GET", "/keys", headers={"Host": host}).status_code == status


# ── several vaults, by name ────────────────────────────────────────────────────────────────────────────────────────


def test_vaults_are_worlds_apart(azure: AzureTenant) -> None:
    other_tenant = "44444444-4444-4444-8444-444444444444"
    owner = azure.admin.put_principal(other_tenant)
    mine, theirs = f"v{secrets.token_hex(6)}", f"v{secrets.token_hex(6)}"
    azure.admin.put_vault(mine, VaultRequest(tenant_id=azure.tenant_id))
    azure.admin.put_vault(theirs, VaultRequest(tenant_id=other_tenant))
    azure.admin.assign(mine, azure.names.customer.object_id, Role.ADMINISTRATOR)
    azure.admin.assign(theirs, owner.object_id, Role.ADMINISTRATOR)
    with named_vault(azure, mine) as first, named_vault(azure, theirs, ClientSecret.of(owner)) as second:
        here, there = first.create_key("cmk"), second.create_key("cmk")
        assert here.id != there.id
        assert here.id is not None
        assert here.id.startswith(f"https://{mine}.vault.localhost:{azure.cloud.port}/keys/cmk/")
        first.delete("cmk")
        assert second.keys.get_key("cmk").id == there.id
    with named_vault(azure, theirs) as intruder, pytest.raises(ClientAuthenticationError):
        intruder.keys.get_key("cmk")
    with pytest.raises(ConflictError):
        azure.admin.put_vault(mine, VaultRequest(tenant_id=other_tenant))
    with pytest.raises(NotFoundError):
        azure.admin.vault("nosuchvault")


# ── what is written down ───────────────────────────────────────────────────────────────────────────────────────────


def test_every_call_is_recorded_the_refused_too(azure: AzureTenant, raw: Raw) -> None:
    path = f"/keys/{azure.key_name}"
    wrapped = raw("POST", f"{path}/wrapkey", json={"alg": "RSA-OAEP-256", "value": "c2VjcmV0IHBsYWludGV4dA"})
    azure.customer.disable(azure.key_name)
    refused = raw("POST", f"{path}/unwrapkey", json={"alg": "RSA-OAEP-256", "value": wrapped.json()["value"]})
    anonymous = raw("GET", path, headers={})
    records = {record["correlationId"]: record for record in azure.events()}
    success, denied, unknown = (records[r.headers["x-ms-request-id"]] for r in (wrapped, refused, anonymous))
    assert (success["category"], success["operationName"], success["resultSignature"]) == (
        "AuditEvent",
        "KeyWrap",
        "OK",
    )
    assert success["properties"]["httpStatusCode"] == 200
    assert success["properties"]["id"] == wrapped.json()["kid"]
    assert success["operationVersion"] == "2025-07-01"
    assert success["resourceId"].endswith("/PROVIDERS/MICROSOFT.KEYVAULT/VAULTS/DEFAULT")
    assert success["identity"]["claim"]["appid"] == azure.names.customer.client_id
    assert (denied["operationName"], denied["properties"]["httpStatusCode"]) == ("KeyUnwrap", 403)
    assert denied["resultDescription"] == "Operation unwrapKey is not allowed on a disabled key."
    assert (unknown["operationName"], unknown["properties"]["httpStatusCode"]) == ("Authentication", 401)
    assert unknown["identity"] == {}
    log = (azure.cloud.state_dir / "azure" / "auditevent.jsonl").read_text()
    for secret in ("c2VjcmV0IHBsYWludGV4dA", wrapped.json()["value"], azure.vendor.client_secret):
        assert secret not in log
        assert secret not in azure.cloud.log
    assert "eyJ" not in log  # no token
    unwraps = list(azure.admin.azure_events(azure.tenant_id, operation="KeyUnwrap"))
    assert {record["operationName"] for record in unwraps} == {"KeyUnwrap"}
    assert not list(azure.admin.azure_events(azure.tenant_id, since=datetime.now(UTC) + timedelta(hours=1)))
    assert not list(azure.admin.azure_events("99999999-9999-4999-8999-999999999999"))
    assert len(azure.admin.azure_audit_log()) >= len(records)
    with azure.admin.during(Faults(trail_delay_s=3600)):
        assert wrapped.headers["x-ms-request-id"] not in {r["correlationId"] for r in azure.events()}


# ── bad days and restarts ──────────────────────────────────────────────────────────────────────────────────────────


def test_throttling_and_outage(azure: AzureTenant, raw: Raw) -> None:
    path = f"/keys/{azure.key_name}"
    with azure.admin.during(Faults(throttle_rate=1)):
        answer = raw("GET", path)
        assert error_of(answer)[:2] == (429, "Throttled")
        assert answer.headers["retry-after"] == "1"
        token = raw("POST", f"/{azure.tenant_id}/oauth2/v2.0/token", headers={}, data={"client_id": "x"})
        assert (token.status_code, token.headers["retry-after"]) == (429, "1")
    with azure.admin.during(azure.faults(outage=Outage.REFUSE)):
        assert raw("GET", path).status_code == 200  # the customer is spared
        assert raw("GET", path, headers={}).status_code == 503
    with azure.admin.during(Faults(throttle_rate=0.5)):
        azure.customer.keys.get_key(azure.key_name)  # the SDK asks again, after a second


def test_changes_spread_with_delay(azure: AzureTenant, raw: Raw) -> None:
    with azure.admin.during(Faults(propagation_delay_s=3600)):
        azure.customer.disable(azure.key_name)
        assert azure.customer.keys.get_key(azure.key_name).properties.enabled is False
        assert attempt(raw, azure.key_name, "wrapKey")[0] == 200
        azure.deny(azure.key_name)
        with bare(azure, ClientSecret.of(azure.vendor)) as vendor:
            vendor.keys.get_key(azure.key_name)


def test_everything_survives_sigkill(start_cloud: StartCloud) -> None:
    cloud = start_cloud()
    with azure_tenant(cloud) as azure, closing(Raw(azure)) as raw:
        body = {"alg": "RSA-OAEP-256", "value": "a2V5"}
        wrapped = raw("POST", f"/keys/{azure.key_name}/wrapkey", json=body).json()
        deleted = azure.new_key()
        azure.customer.delete(deleted)
        before = azure.events()
        cloud.stop(kill=True)
        state = (cloud.state_dir / "azure" / "state.sealed").read_bytes()
        for secret in (azure.vendor.client_secret.encode(), azure.key_name.encode(), b"PRIVATE KEY"):
            assert secret not in state
        cloud.start()
        # The token of before the crash, too.
        opened = raw("POST", f"{wrapped['kid']}/unwrapkey", json=body | {"value": wrapped["value"]})
        assert opened.json()["value"] == "a2V5"
        assert azure.events()[: len(before)] == before
        azure.customer.recover(deleted)
        assert raw("GET", f"/keys/{deleted}").status_code == 200


def test_a_foreign_state_file_is_refused(start_cloud: StartCloud) -> None:
    cloud = start_cloud()
    cloud.stop()
    path = cloud.state_dir / "azure" / "state.sealed"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(pytest.fail.Exception):
        cloud.start()
    assert "does not open under this host key" in cloud.log


def test_encryption_algorithms_of_the_sdk(azure: AzureTenant) -> None:
    """Remotely both ways: a client that was not let to read the key has no public key to work with."""
    key_id = azure.customer.keys.get_key(azure.key_name).id
    assert key_id is not None
    client = crypto(azure, key_id)
    for algorithm in (EncryptionAlgorithm.rsa_oaep, EncryptionAlgorithm.rsa_oaep_256, EncryptionAlgorithm.rsa1_5):
        encrypted = client.encrypt(algorithm, b"text")
        assert client.decrypt(algorithm, encrypted.ciphertext).plaintext == b"text"
    client.close()
