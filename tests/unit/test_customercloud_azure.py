"""Azure's cores: life of a key, who may do what and when it is seen, tokens, requests."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from customercloud.aws.service import Peer
from customercloud.aws.sigv4 import HttpRequest
from customercloud.aws.trail import Trail
from customercloud.azure import rsa
from customercloud.azure.access import (
    ROLE_PERMISSIONS,
    Access,
    AccessPolicy,
    Mode,
    Permission,
    Role,
    RoleAssignment,
    data_action,
)
from customercloud.azure.admin import AzureAdmin, BootstrapRequest
from customercloud.azure.audit import REQUIRED_MEMBERS
from customercloud.azure.bodies import Body, base64url, unbase64url
from customercloud.azure.bundles import parsed_rotation_policy
from customercloud.azure.durations import DurationError, approximate_days, moved
from customercloud.azure.errors import AzureError
from customercloud.azure.identity import ServicePrincipal, SigningKey
from customercloud.azure.keys import Attributes, Key, KeySpec, KeyVersion, RotationAction, RotationPolicy
from customercloud.azure.routes import route
from customercloud.azure.rsa import RsaKey
from customercloud.azure.service import AzureEndpoint
from customercloud.azure.state import SEAL_PURPOSE, AzureState, Snapshot, Vault
from customercloud.azure.tokens import (
    KEY_VAULT_APP_ID,
    KEY_VAULT_AUDIENCE,
    TokenAuthority,
    TokenError,
    claimed_app_id,
)
from customercloud.durable import SealedFile
from customercloud.faults import FaultInjector
from shared.clock import ManualClock

NOW = dt.datetime(2026, 5, 31, 12, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
HOUR = dt.timedelta(hours=1)
AT_ONCE = dt.timedelta(0)
TENANT, OTHER_TENANT = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
PRIVATE_KEY = rsa.generate(2048)
AUTHORITY = TokenAuthority(SigningKey.new())
PRINCIPAL = ServicePrincipal(object_id="oid", client_id="app", tenant_id=TENANT)


def new_version(now: dt.datetime = NOW) -> KeyVersion:
    return KeyVersion.new(KeySpec("RSA", 2048), PRIVATE_KEY, now)


def new_key(**attributes: object) -> Key:
    return Key.new("cmk", new_version(), Attributes.model_validate({"updated": NOW} | attributes))


def refused(call: Callable[[], object]) -> str | None:
    """The inner code (or code) of the refusal; None when there is none."""
    try:
        call()
    except AzureError as error:
        return error.inner or error.code
    return None


def use(key: Key, operation: str, now: dt.datetime, version: str = "", *, public: bool = False) -> str | None:
    return refused(lambda: key.usable(version, operation, now, public_on_disabled=public))


# ── life of a key ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_changes_are_seen_after_the_delay_and_in_order() -> None:
    key = new_key()
    version = key.current.version
    disabled = key.attributes[version].model_copy(update={"enabled": False})
    key = key.update(version, disabled, NOW, HOUR)
    assert use(key, "wrapKey", NOW + HOUR - SECOND) is None
    assert use(key, "wrapKey", NOW + HOUR) == "KeyDisabled"
    # Enabled again at once: not seen before the change that it undoes.
    key = key.update(version, key.attributes[version].model_copy(update={"enabled": True}), NOW + SECOND, AT_ONCE)
    assert use(key, "wrapKey", NOW + HOUR) is None
    assert use(key, "wrapKey", NOW + 2 * SECOND) is None


def test_a_deleted_key_is_seen_until_the_delay_is_over_and_comes_back_as_it_was() -> None:
    key = new_key().delete(90, NOW, HOUR)
    assert key.deleted
    assert key.purge_at == NOW + dt.timedelta(days=90)
    assert use(key, "unwrapKey", NOW) is None
    assert use(key, "unwrapKey", NOW + HOUR) == "KeyNotFound"
    key = key.recover(NOW + 2 * HOUR, AT_ONCE)
    assert use(key, "unwrapKey", NOW + 2 * HOUR) is None
    assert not key.deleted
    assert key.purge_at is None


def test_a_new_version_is_current_and_visible_after_the_delay() -> None:
    key = new_key()
    first = key.current.version
    key = key.add_version(new_version(NOW + SECOND), key.rotated_attributes(NOW + SECOND), HOUR)
    second = key.current.version
    assert key.usable("", "wrapKey", NOW + SECOND, public_on_disabled=False).version == first
    assert use(key, "unwrapKey", NOW + SECOND, second) == "KeyNotFound"
    assert key.usable("", "wrapKey", NOW + 2 * HOUR, public_on_disabled=False).version == second
    assert key.usable(first, "unwrapKey", NOW + 2 * HOUR, public_on_disabled=False).version == first


def test_views_that_nobody_sees_are_dropped() -> None:
    key = new_key()
    for step in range(50):
        now = NOW + step * SECOND
        key = key.update(key.current.version, key.attributes[key.current.version], now, 3 * SECOND)
    assert len(key.views) <= 5


@pytest.mark.parametrize("operation", ["encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey"])
def test_what_attributes_forbid(operation: str) -> None:
    public = operation in ("encrypt", "verify", "wrapKey")
    opening = operation in ("decrypt", "unwrapKey", "verify")
    disabled = new_key(enabled=False)
    assert use(disabled, operation, NOW) == "KeyDisabled"
    assert use(disabled, operation, NOW, public=True) == (None if public else "KeyDisabled")
    others = tuple({"encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey"} - {operation})
    assert use(new_key(key_ops=others), operation, NOW) == "KeyOperationForbidden"
    assert use(new_key(expires=NOW), operation, NOW) == (None if opening else "KeyExpired")
    assert use(new_key(expires=NOW + SECOND), operation, NOW) is None
    assert use(new_key(not_before=NOW + SECOND), operation, NOW) == (None if opening else "KeyNotYetValid")
    assert use(new_key(not_before=NOW), operation, NOW) is None


# ── rotation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def policy(expiry: str | None = None, **trigger: str) -> RotationPolicy:
    action = RotationAction.model_validate({"type": "Rotate"} | trigger)
    return RotationPolicy(actions=(action,), expiry_time=expiry, created=NOW, updated=NOW)


def test_a_key_is_rotated_by_age_or_before_it_expires() -> None:
    by_age = new_key().with_policy(policy(time_after_create="P90D"))
    assert not by_age.is_due_for_rotation(NOW + dt.timedelta(days=90) - SECOND)
    assert by_age.is_due_for_rotation(NOW + dt.timedelta(days=90))
    by_expiry = new_key(expires=NOW + dt.timedelta(days=60)).with_policy(policy("P1Y", time_before_expiry="P30D"))
    assert not by_expiry.is_due_for_rotation(NOW + dt.timedelta(days=29))
    assert by_expiry.is_due_for_rotation(NOW + dt.timedelta(days=30))
    by_policy = new_key().with_policy(policy("P1Y", time_before_expiry="P30D"))  # a first version without a date
    assert not by_policy.is_due_for_rotation(NOW + dt.timedelta(days=334))
    assert by_policy.is_due_for_rotation(NOW + dt.timedelta(days=335))


def test_what_is_not_rotated_by_itself() -> None:
    late = NOW + dt.timedelta(days=1000)
    notify = RotationPolicy(
        actions=(RotationAction(type="Notify", time_before_expiry="P30D"),), created=NOW, updated=NOW
    )
    rotating = policy(time_after_create="P90D")
    for key in (
        new_key(),
        new_key().with_policy(notify),
        new_key(enabled=False).with_policy(rotating),
        new_key().with_policy(rotating).delete(90, NOW, AT_ONCE),
    ):
        assert not key.is_due_for_rotation(late)


def test_a_rotated_version_gets_a_lifetime_of_its_own() -> None:
    key = new_key(expires=NOW + HOUR, not_before=NOW, key_ops=("wrapKey",), tags={"a": "b"})
    attributes = key.with_policy(policy("P1M", time_after_create="P7D")).rotated_attributes(NOW)
    assert attributes.expires == dt.datetime(2026, 6, 30, 12, tzinfo=dt.UTC)
    assert (attributes.not_before, attributes.key_ops, attributes.tags) == (None, ("wrapKey",), {"a": "b"})


def test_deleted_keys_are_purged_when_their_days_are_over() -> None:
    key = new_key().delete(7, NOW, AT_ONCE)
    assert not key.is_due_for_purge(NOW + dt.timedelta(days=7) - SECOND)
    assert key.is_due_for_purge(NOW + dt.timedelta(days=7))


def test_durations() -> None:
    assert moved(NOW, "P1M") == NOW.replace(month=6, day=30)
    assert moved(NOW, "P1Y2M3W4D") == dt.datetime(2027, 7, 31, 12, tzinfo=dt.UTC) + dt.timedelta(days=25)
    assert moved(NOW, "P3M", back=True) == NOW.replace(month=2, day=28)
    assert approximate_days("P1Y1M1W1D") == 365 + 30 + 8


@given(text=st.one_of(st.text(max_size=12), st.from_regex(r"P[0-9YMWD]{0,12}", fullmatch=True)))
def test_durations_parse_or_are_refused(text: str) -> None:
    try:
        later = moved(NOW, text)
    except DurationError:
        return
    assert later >= NOW
    assert approximate_days(text) >= 0
    assert moved(NOW, text, back=True) <= NOW


@pytest.mark.parametrize(
    "members",
    [
        {"lifetimeActions": [{"trigger": {}, "action": {"type": "Rotate"}}]},
        {"lifetimeActions": [{"trigger": {"timeAfterCreate": "P6D"}, "action": {"type": "Rotate"}}]},
        {"lifetimeActions": [{"trigger": {"timeAfterCreate": "P90D"}, "action": {"type": "Notify"}}]},
        {"lifetimeActions": [{"trigger": {"timeAfterCreate": "P90D"}, "action": {"type": "Explode"}}]},
        {"lifetimeActions": [{"trigger": {"timeAfterCreate": "P90D"}}]},
        {"lifetimeActions": "all"},
        {"attributes": {"expiryTime": "P27D"}},
        {"attributes": {"expiryTime": "soon"}},
        {
            "attributes": {"expiryTime": "P30D"},
            "lifetimeActions": [{"trigger": {"timeAfterCreate": "P30D"}, "action": {"type": "Rotate"}}],
        },
    ],
)
def test_policies_that_the_service_refuses(members: dict[str, object]) -> None:
    assert refused(lambda: parsed_rotation_policy(Body(members), None, NOW)) == "BadParameter"


# ── who ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_mode_that_is_set_is_asked() -> None:
    rights = Access(
        policies=(AccessPolicy(object_id="a", permissions=frozenset({Permission.WRAP})),),
        assignments=(RoleAssignment(object_id="b", role=Role.CRYPTO_USER, key_name="CMK"),),
    )
    by_policy = rights.model_copy(update={"mode": Mode.ACCESS_POLICY})
    assert by_policy.allows("a", Permission.WRAP, "any")
    assert not by_policy.allows("a", Permission.UNWRAP, "any")
    assert not by_policy.allows("b", Permission.WRAP, "cmk")
    assert rights.allows("b", Permission.WRAP, "cmk")
    assert not rights.allows("b", Permission.WRAP, "cmk2")
    assert not rights.allows("b", Permission.LIST, None)
    assert not rights.allows("a", Permission.WRAP, "cmk")
    assert not Access().allows("a", Permission.GET, "cmk")


def test_roles_and_actions_are_total() -> None:
    assert set(ROLE_PERMISSIONS) == set(Role)
    assert data_action(Permission.UNWRAP) == "Microsoft.KeyVault/vaults/keys/unwrap/action"
    assert all(data_action(permission) for permission in Permission)
    assert not {Permission.DECRYPT, Permission.SIGN, Permission.DELETE} & ROLE_PERMISSIONS[Role.ENCRYPTION_USER]


def granted(vault: Vault, object_id: str, now: dt.datetime) -> bool:
    return vault.effective_access(object_id, now).allows(object_id, Permission.WRAP, "cmk")


def with_rights(
    vault: Vault, object_ids: tuple[str, ...], changed: str, now: dt.datetime, delay: dt.timedelta
) -> Vault:
    assignments = tuple(RoleAssignment(object_id=o, role=Role.ENCRYPTION_USER) for o in object_ids)
    return vault.with_access(vault.access.model_copy(update={"assignments": assignments}), changed, now, delay)


def test_a_change_of_rights_spreads_and_holds_up_nobody_else() -> None:
    vault = with_rights(Vault(name="v", tenant_id=TENANT), ("a",), "a", NOW, AT_ONCE)
    assert granted(vault, "a", NOW)
    assert vault.views == ()
    vault = with_rights(vault, (), "a", NOW, HOUR)
    assert granted(vault, "a", NOW + HOUR - SECOND)
    assert not granted(vault, "a", NOW + HOUR)
    vault = with_rights(vault, ("b",), "b", NOW + SECOND, AT_ONCE)
    assert granted(vault, "b", NOW + SECOND)
    assert granted(vault, "a", NOW + SECOND)  # still, as before
    vault = with_rights(vault, ("a", "b"), "a", NOW + 2 * SECOND, AT_ONCE)
    assert granted(vault, "a", NOW + HOUR)
    assert granted(vault, "b", NOW + HOUR)


def test_a_change_of_mode_spreads_too() -> None:
    vault = with_rights(Vault(name="v", tenant_id=TENANT), ("a",), "a", NOW, AT_ONCE)
    changed = vault.access.model_copy(update={"mode": Mode.ACCESS_POLICY})
    vault = vault.with_access(changed, None, NOW, HOUR)
    assert granted(vault, "a", NOW)
    assert not granted(vault, "a", NOW + HOUR)


# ── tokens ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def accepted(token: str, now: dt.datetime = NOW, tenant_id: str = TENANT) -> bool:
    try:
        caller = AUTHORITY.verify(token, tenant_id=tenant_id, audiences=frozenset({KEY_VAULT_AUDIENCE}), now=now)
    except TokenError:
        return False
    assert (caller.app_id, caller.object_id, caller.tenant_id) == ("app", "oid", TENANT)
    return True


def test_a_token_holds_for_its_tenant_audience_and_time() -> None:
    token = AUTHORITY.mint(PRINCIPAL, KEY_VAULT_AUDIENCE, NOW, HOUR)
    assert accepted(token)
    assert accepted(token, NOW + HOUR - SECOND)
    assert not accepted(token, NOW + HOUR)
    assert not accepted(token, NOW - HOUR)
    assert not accepted(token, tenant_id=OTHER_TENANT)
    assert accepted(AUTHORITY.mint(PRINCIPAL, KEY_VAULT_APP_ID, NOW, HOUR))
    assert not accepted(AUTHORITY.mint(PRINCIPAL, "https://management.azure.com", NOW, HOUR))
    assert not accepted(TokenAuthority(SigningKey.new()).mint(PRINCIPAL, KEY_VAULT_AUDIENCE, NOW, HOUR))
    assert claimed_app_id(token) == "app"


@given(position=st.integers(0, 10_000), replacement=st.sampled_from("ABCxyz019-_."))
def test_no_altered_token_is_accepted(position: int, replacement: str) -> None:
    token = AUTHORITY.mint(PRINCIPAL, KEY_VAULT_AUDIENCE, NOW, HOUR)
    at = position % (len(token) - 1)  # the last character carries unused bits
    altered = token[:at] + replacement + token[at + 1 :]
    assert accepted(altered) == (altered == token)


@given(text=st.text(max_size=200))
def test_rubbish_is_no_token(text: str) -> None:
    assert not accepted(text)
    claimed_app_id(text)


@pytest.mark.parametrize("algorithm", ["none", "HS256"])
def test_other_algorithms_are_not_taken(algorithm: str) -> None:
    claims = jwt.decode(AUTHORITY.mint(PRINCIPAL, KEY_VAULT_AUDIENCE, NOW, HOUR), options={"verify_signature": False})
    key = "" if algorithm == "none" else "k" * 32
    assert not accepted(jwt.encode(claims, key, algorithm=algorithm))


# ── requests ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE"]), path=st.text("/abkeysdl_.-0", max_size=30))
def test_every_path_is_routed_or_refused(method: str, path: str) -> None:
    for prefix in ("/keys", "/deletedkeys"):
        assert refused(lambda prefix=prefix: route(method, prefix + path)) in (None, "BadParameter", "MethodNotAllowed")  # type: ignore[misc]


def test_a_version_may_be_empty_or_left_out() -> None:
    version = "0" * 32
    for path in ("/keys/cmk/wrapkey", "/keys/cmk//wrapkey"):
        assert (route("POST", path).operation, route("POST", path).version) == ("KeyWrap", "")
    assert route("POST", f"/keys/cmk/{version}/wrapkey").version == version
    for path in ("/keys/cmk", "/keys/cmk/"):
        assert (route("GET", path).operation, route("GET", path).version) == ("KeyGet", "")
    assert route("GET", "/keys/cmk/versions").operation == "KeyListVersions"


@given(data=st.binary(max_size=80))
def test_base64url_comes_back(data: bytes) -> None:
    assert unbase64url(base64url(data)) == data


@given(text=st.text(max_size=40))
def test_other_text_is_no_base64url(text: str) -> None:
    data = unbase64url(text)
    if data is not None:
        assert len(base64url(data)) == len(text.rstrip("="))


@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_bodies_parse_or_are_refused(data: bytes) -> None:
    assert refused(lambda: Body.parse(data).optional_text("alg")) in (None, "BadParameter")


@pytest.mark.parametrize("algorithm", rsa.ENCRYPTION_ALGORITHMS)
def test_encryption_and_its_limits(algorithm: str) -> None:
    key = RsaKey(PRIVATE_KEY)
    secret = secrets.token_bytes(32)
    sealed = key.encrypt(algorithm, secret)
    assert key.decrypt(algorithm, sealed) == secret
    assert refused(lambda: key.encrypt(algorithm, bytes(256))) == "BadParameter"
    if algorithm != "RSA1_5":  # which has no integrity: see RsaKey.decrypt
        flipped = bytes([sealed[0] ^ 1]) + sealed[1:]
        assert refused(lambda: key.decrypt(algorithm, flipped)) == "BadParameter"


class Cloud:
    """The endpoint without a server, on a clock that stands still: a year passes in a test."""

    def __init__(self, directory: Path) -> None:
        self.clock = ManualClock(NOW)
        self.state = AzureState(SealedFile(directory / "state", b"h" * 32, SEAL_PURPOSE))
        self.trail = Trail(directory / "log", REQUIRED_MEMBERS)
        self.faults = FaultInjector()
        self.endpoint = AzureEndpoint(self.state, self.trail, self.faults, self.clock)
        self.names = AzureAdmin(self.state, self.clock, self.endpoint.delay).bootstrap(BootstrapRequest())

    async def __call__(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        caller = self.names.customer
        form = {
            "grant_type": "client_credentials", "client_id": caller.client_id, "client_secret": caller.client_secret,
            "scope": f"{KEY_VAULT_AUDIENCE}/.default",
        }  # fmt: skip
        token = await self._sent("POST", f"/{caller.tenant_id}/oauth2/v2.0/token", urlencode(form).encode())
        headers = [("authorization", f"Bearer {token['access_token']}")]
        return await self._sent(method, path, b"" if body is None else json.dumps(body).encode(), headers)

    async def _sent(
        self, method: str, path: str, body: bytes, headers: Sequence[tuple[str, str]] = ()
    ) -> dict[str, Any]:
        request = HttpRequest(method, path, "api-version=2025-07-01", [("host", "127.0.0.1:1"), *headers], body)
        answer = await self.endpoint.handle(request, Peer("127.0.0.1", True, lambda: asyncio.sleep(0)))
        members: dict[str, Any] = json.loads(answer.body) if answer.body else {}
        return members

    def operations(self) -> list[str]:
        return [entry.record["operationName"] for entry in self.trail.newest_first()]


async def test_time_alone_rotates_and_purges_and_both_are_recorded(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    first = (await cloud("POST", "/keys/cmk/create", {"kty": "RSA"}))["key"]["kid"]
    rotate = {"trigger": {"timeAfterCreate": "P90D"}, "action": {"type": "Rotate"}}
    set_policy = {"lifetimeActions": [rotate], "attributes": {"expiryTime": "P120D"}}
    await cloud("PUT", "/keys/cmk/rotationpolicy", set_policy)
    cloud.clock.advance(89 * 86_400)
    assert (await cloud("GET", "/keys/cmk"))["key"]["kid"] == first
    cloud.clock.advance(2 * 86_400)
    # However many requests meet a key that is due, it is rotated once.
    answers = await asyncio.gather(*(cloud("GET", "/keys/cmk") for _ in range(4)))
    assert first not in {answer["key"]["kid"] for answer in answers[-1:]}
    assert len((await cloud("GET", "/keys/cmk/versions"))["value"]) == 2
    assert cloud.operations().count("KeyRotateIfDue") == 1
    assert (await cloud("GET", "/keys/cmk"))["attributes"]["exp"] == int(cloud.clock.now().timestamp()) + 120 * 86_400
    await cloud("DELETE", "/keys/cmk")
    cloud.clock.advance(90 * 86_400)
    assert (await cloud("GET", "/deletedkeys/cmk"))["error"]["code"] == "KeyNotFound"
    assert cloud.operations().count("KeyPurge") == 1
    assert not cloud.state.snapshot.keys
    await cloud.trail.close()


async def test_what_cannot_be_written_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = Cloud(tmp_path)
    await cloud("POST", "/keys/cmk/create", {"kty": "RSA"})

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(SealedFile, "write", full)
    assert (await cloud("DELETE", "/keys/cmk"))["error"]["code"] == "InternalServerError"
    assert "key" in await cloud("GET", "/keys/cmk")
    await cloud.trail.close()


def test_the_state_comes_back_from_its_json_and_shows_no_secret() -> None:
    key = new_key().with_policy(policy(time_after_create="P90D")).delete(7, NOW, HOUR)
    vault = with_rights(Vault(name="v", tenant_id=TENANT), ("a",), "a", NOW, HOUR)
    snapshot = Snapshot(signing_key=SigningKey.new(), vaults={"v": vault}, keys={"v/cmk": key})
    again = Snapshot.model_validate_json(snapshot.model_dump_json())
    assert again.keys["v/cmk"].current.private_key == PRIVATE_KEY
    assert again.model_dump_json() == snapshot.model_dump_json()
    assert "private_key" not in repr(snapshot)


@pytest.mark.parametrize("result", ["valid", "invalid"])
def test_wycheproof_vectors_of_rsa_oaep(result: str) -> None:
    """Every refusal is the same one: told apart, they would be Manger's oracle. Key Vault knows no labels, so what has
    one does not open."""
    file = Path(__file__).parent.parent / "vectors" / "wycheproof" / "rsa_oaep_2048_sha256.json"
    [group] = json.loads(file.read_text())["testGroups"]
    key = RsaKey(bytes.fromhex(group["privateKeyPkcs8"]))
    vectors = [vector for vector in group["tests"] if vector["result"] == result]
    assert len(vectors) >= 10
    refusals = set()
    for vector in vectors:
        ciphertext = bytes.fromhex(vector["ct"])
        if result == "valid" and not vector["label"]:
            assert key.decrypt("RSA-OAEP-256", ciphertext) == bytes.fromhex(vector["msg"]), vector["tcId"]
        else:
            with pytest.raises(AzureError) as refused:
                key.decrypt("RSA-OAEP-256", ciphertext)
            refusals.add(str(refused.value))
    assert len(refusals) == 1
