"""The cores of the simulated Google Cloud: ciphertexts, tokens, names, policies, versions, transcoding."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from google.cloud import kms_v1
from google.iam.v1 import iam_policy_pb2
from hypothesis import given
from hypothesis import strategies as st

from customercloud.delayed import Delayed
from customercloud.google.blob import HEADER_SIZE_BYTES, CiphertextBlob, open_blob, seal
from customercloud.google.errors import Code, GoogleError
from customercloud.google.iam import Binding, grants, is_member, lineage
from customercloud.google.identity import TOKEN_AUDIENCE, AccountKey, ServiceAccount
from customercloud.google.keys import Key, ProtectionLevel, State, Version
from customercloud.google.names import KeyName, ProjectName, RingName, VersionName, check_location, parse_policy_target
from customercloud.google.paging import page_of
from customercloud.google.tokens import AccessTokens, Claims, Problem, TokenError, verify_assertion
from customercloud.google.transcoding import find_route, read_request, write_answer

NOW = datetime(2026, 6, 1, tzinfo=UTC)
NONE = timedelta(0)
KEY = KeyName.parse("projects/p/locations/global/keyRings/r/cryptoKeys/k")
UID, MATERIAL = bytes(range(16)), bytes(32)


# ── ciphertexts ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.binary(max_size=100), st.binary(max_size=40), st.integers(1, 2**31))
def test_blobs_open_with_their_aad_only(plaintext: bytes, aad: bytes, version: int) -> None:
    data = seal(UID, version, MATERIAL, plaintext, aad)
    blob = CiphertextBlob.parse(data)
    assert (blob.key_uid, blob.version, blob.serialize()) == (UID, version, data)
    assert open_blob(blob, MATERIAL, aad) == plaintext
    with pytest.raises(GoogleError):
        open_blob(blob, MATERIAL, aad + b"x")


@given(st.data())
def test_no_altered_blob_opens(data: st.DataObject) -> None:
    sealed = seal(UID, 1, MATERIAL, b"plaintext", b"aad")
    position = data.draw(st.integers(0, len(sealed) - 1))
    altered = bytearray(sealed)
    altered[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(GoogleError) as caught:
        open_blob(CiphertextBlob.parse(bytes(altered)), MATERIAL, b"aad")
    assert caught.value.code is Code.INVALID_ARGUMENT


@given(st.binary(max_size=120) | st.binary(max_size=80).map(lambda tail: b"KLGB\x01" + tail))
def test_any_bytes_are_a_blob_or_refused(data: bytes) -> None:
    try:
        blob = CiphertextBlob.parse(data)
    except GoogleError as error:
        assert error.code is Code.INVALID_ARGUMENT  # noqa: PT017 - the other outcome is fine, too
    else:
        assert blob.serialize() == data
        assert len(data) >= HEADER_SIZE_BYTES + 16


# ── tokens ─────────────────────────────────────────────────────────────────────────────────────────────────────────


TOKENS = AccessTokens(bytes(32))
CLAIMS = Claims(email="a@p.iam.gserviceaccount.com", unique_id="1", expires_at=NOW, scopes=("s",))


def test_a_token_is_opened_by_its_cloud_only() -> None:
    token = TOKENS.issue(CLAIMS)
    assert TOKENS.open(token) == CLAIMS
    with pytest.raises(TokenError):
        AccessTokens(bytes(31) + b"x").open(token)


@given(st.data())
def test_no_altered_token_opens(data: st.DataObject) -> None:
    token = TOKENS.issue(CLAIMS)
    position = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters().filter(lambda c: c != token[position]))
    with pytest.raises(TokenError):
        TOKENS.open(token[:position] + other + token[position + 1 :])


@given(st.text(max_size=60) | st.text(max_size=60).map(lambda tail: f"ya29.{tail}"))
def test_any_text_is_no_token(text: str) -> None:
    with pytest.raises(TokenError):
        TOKENS.open(text)


@pytest.fixture(scope="module")
def account() -> ServiceAccount:
    return ServiceAccount.new("admin-1", "project-1").model_copy(update={"keys": (AccountKey.new(),)})


def _assertion(account: ServiceAccount, **changes: Any) -> str:
    key = account.keys[0]
    times = {"iat": NOW.timestamp(), "exp": (NOW + timedelta(hours=1)).timestamp()}
    claims = {"iss": account.email, "sub": account.email, "aud": TOKEN_AUDIENCE, "scope": "a b"} | times | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    # Not jwt.encode: that refuses to write some of what others might send.
    payload = json.dumps(claims).encode()
    return jwt.PyJWS().encode(payload, key.private_key_pem, "RS256", headers={"kid": key.key_id})


def test_assertions(account: ServiceAccount) -> None:
    accounts = {account.email: account}

    def verify(token: str) -> Problem | tuple[str, ...]:
        try:
            return verify_assertion(token, TOKEN_AUDIENCE, accounts.get, NOW).scopes
        except TokenError as error:
            return error.problem

    assert verify(_assertion(account)) == ("a", "b")
    assert verify(_assertion(account, exp=NOW.timestamp())) is Problem.EXPIRED
    hour = timedelta(hours=1)
    for changes in (
        {"aud": "https://elsewhere/"},
        {"iss": "ghost@p.iam.gserviceaccount.com"},
        {"iss": 7},
        {"sub": "user@customer.example"},
        {"exp": None},
        {"iat": None},
        {"iat": (NOW + hour).timestamp()},
        {"exp": (NOW + 2 * hour).timestamp()},
        {"iat": "now"},
    ):
        assert verify(_assertion(account, **changes)) is Problem.INVALID, changes
    assert verify(_assertion(account, aud=None)) is Problem.INVALID
    scoped = verify_assertion(_assertion(account, aud=None), TOKEN_AUDIENCE, accounts.get, NOW, or_scopes=True)
    assert scoped.scopes == ("a", "b")
    unscoped: tuple[dict[str, Any], ...] = (
        {"aud": None, "scope": None},
        {"aud": None, "scope": ""},
        {"aud": "https://elsewhere/"},
    )
    for claims in unscoped:
        with pytest.raises(TokenError):
            verify_assertion(_assertion(account, **claims), TOKEN_AUDIENCE, accounts.get, NOW, or_scopes=True)
    unsigned = jwt.encode({"iss": account.email, "aud": TOKEN_AUDIENCE}, "", "none", {"kid": account.keys[0].key_id})
    symmetric = jwt.encode({"iss": account.email, "aud": TOKEN_AUDIENCE, "exp": 2**33, "iat": 1}, "k" * 32, "HS256")
    for token in (unsigned, symmetric, "", "eyJ", "a.b.c", "eyJ" * 5000, _assertion(account)[:-4]):
        assert verify(token) is Problem.INVALID


@given(st.text(max_size=80) | st.lists(st.binary(max_size=20), min_size=3, max_size=3).map(
    lambda parts: ".".join(base64.urlsafe_b64encode(p).decode().rstrip("=") for p in parts)))  # fmt: skip
def test_any_text_is_no_assertion(text: str) -> None:
    with pytest.raises(TokenError):
        verify_assertion(text, TOKEN_AUDIENCE, lambda _: None, NOW)


# ── names and policies ─────────────────────────────────────────────────────────────────────────────────────────────


@given(st.text(alphabet="projectslocationskeyRingscryptoKeysVersions/-_1 \n", max_size=120))
def test_any_name_is_parsed_or_refused(text: str) -> None:
    for parse in (KeyName.parse, RingName.parse, VersionName.parse, parse_policy_target):
        try:
            assert str(parse(text)) == text
        except GoogleError as error:
            assert error.code is Code.INVALID_ARGUMENT  # noqa: PT017


def test_names_of_the_wrong_shape() -> None:
    version = f"{KEY}/cryptoKeyVersions/1"
    for wrong in ("", f"{KEY}/", f"{KEY}\n", f"/{KEY}", str(KEY.ring), version, f"{KEY}{'x' * 63}"):
        with pytest.raises(GoogleError, match="does not match pattern"):
            KeyName.parse(wrong)
    assert VersionName(KEY, "01").number is None
    with pytest.raises(GoogleError):
        check_location("europe-west3", "global")


def test_grants_follow_the_hierarchy_and_the_role() -> None:
    assert list(lineage(KEY)) == [KEY, KEY.ring, ProjectName("p")]
    me = "serviceAccount:me@p.iam.gserviceaccount.com"
    decrypt = "cloudkms.cryptoKeyVersions.useToDecrypt"
    bindings = (Binding(role="roles/cloudkms.cryptoKeyDecrypter", members=frozenset({me})),)
    assert grants(bindings, me, decrypt)
    assert not grants(bindings, me, "cloudkms.cryptoKeyVersions.useToEncrypt")
    assert not grants(bindings, f"{me}.x", decrypt)
    assert not grants((Binding(role="roles/of.nobody", members=frozenset({me})),), me, decrypt)
    for text in ("allUsers", me, "user:a@b.c", "domain:b.c"):
        assert is_member(text)
    for text in ("", "me", "user:", "serviceAccount:a b@c", f"{me}\n", "principal://x"):
        assert not is_member(text)


# ── versions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _key(**changes: Any) -> Key:
    values: dict[str, Any] = {
        "level": ProtectionLevel.SOFTWARE,
        "labels": {},
        "with_version": True,
        "destroy_scheduled": timedelta(days=30),
        "rotation_period": None,
        "next_rotation": None,
    }
    return Key.new(KEY, NOW, **(values | changes))


TRANSITIONS = {
    "enable": {State.ENABLED: State.ENABLED, State.DISABLED: State.ENABLED},
    "disable": {State.ENABLED: State.DISABLED, State.DISABLED: State.DISABLED},
    "destroy": {State.ENABLED: State.DESTROY_SCHEDULED, State.DISABLED: State.DESTROY_SCHEDULED},
    "restore": {State.DESTROY_SCHEDULED: State.DISABLED},
}


@pytest.mark.parametrize("operation", sorted(TRANSITIONS))
@pytest.mark.parametrize("state", list(State))
def test_every_transition_from_every_state(operation: str, state: State) -> None:
    name = KEY.version(1)
    version = _key().versions[0]
    match state:
        case State.ENABLED:
            pass
        case State.DISABLED:
            version = version.disable(name, NOW, NONE)
        case State.DESTROY_SCHEDULED | State.DESTROYED:
            version = version.schedule_destruction(name, timedelta(days=1), NOW, NONE)
            version = version.destroyed(NOW) if state is State.DESTROYED else version
    acts: dict[str, Callable[[], Version]] = {
        "enable": lambda: version.enable(name, NOW),
        "disable": lambda: version.disable(name, NOW, NONE),
        "destroy": lambda: version.schedule_destruction(name, timedelta(days=1), NOW, NONE),
        "restore": lambda: version.restore(name, NOW, NONE),
    }
    act = acts[operation]
    if state not in TRANSITIONS[operation]:
        with pytest.raises(GoogleError) as caught:
            act()
        assert caught.value.code is Code.FAILED_PRECONDITION
        return
    after = act()
    assert after.state is TRANSITIONS[operation][state]
    if after.state is State.ENABLED:
        assert len(after.usable_material(name, NOW)) == 32
    else:
        with pytest.raises(GoogleError, match=f"current state is: {after.state}"):
            after.usable_material(name, NOW)


def test_a_late_view_cannot_use_what_is_destroyed() -> None:
    name = KEY.version(1)
    late = timedelta(hours=3)
    version = _key().versions[0].schedule_destruction(name, timedelta(hours=1), NOW, late)
    assert version.usable_material(name, NOW + timedelta(minutes=59))
    assert version.is_due_for_destruction(NOW + timedelta(hours=1))
    with pytest.raises(GoogleError, match="DESTROYED"):
        version.destroyed(NOW + timedelta(hours=1)).usable_material(name, NOW + timedelta(hours=1))


def test_automatic_rotation() -> None:
    day = timedelta(days=1)
    key = _key(rotation_period=30 * day, next_rotation=NOW + 30 * day)
    assert key.automatic_rotation(NOW + 29 * day) is None
    rotated = key.automatic_rotation(NOW + 95 * day)
    assert rotated is not None
    assert (rotated.primary, len(rotated.versions)) == (2, 2), "one rotation, however many were missed"
    assert rotated.next_rotation == NOW + 120 * day
    assert rotated.versions[0].material != rotated.versions[1].material


def test_keys_survive_their_json() -> None:
    key, _ = _key().add_version(NOW)
    destroyed = key.with_version(key.versions[0].destroyed(NOW)).with_primary(2, NOW, timedelta(hours=1))
    assert Key.model_validate_json(destroyed.model_dump_json()) == destroyed
    assert key.versions[0].material is not None
    assert repr(key.versions[0].material) not in repr(key)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 3)), max_size=8), st.integers(0, 200))
def test_a_delayed_value_is_seen_in_order(changes: list[tuple[int, int, int]], later: int) -> None:
    """What is in force is always one of the values set, never one older than what was in force before."""
    now, delayed = NOW, Delayed[int].of(0, NOW)
    for number, (wait, delay, _) in enumerate(changes, 1):
        now += timedelta(seconds=wait)
        seen = delayed.at(now)
        delayed = delayed.then(number, now, timedelta(seconds=delay))
        assert delayed.at(now) >= seen
    assert delayed.at(now + timedelta(seconds=later)) >= delayed.at(now)
    assert delayed.at(now + timedelta(days=1)) == len(changes)


# ── paging and transcoding ─────────────────────────────────────────────────────────────────────────────────────────


@given(st.sets(st.text(min_size=1, max_size=5), max_size=20), st.integers(1, 7), st.booleans())
def test_pages_are_the_list(names: set[str], size: int, descending: bool) -> None:
    seen: list[str] = []
    token = ""
    order = "name desc" if descending else ""
    rings = [kms_v1.KeyRing(name=name) for name in names]
    while True:
        request = kms_v1.ListKeyRingsRequest(page_size=size, page_token=token, order_by=order)
        page = page_of(kms_v1.KeyRing, rings, request)
        seen += [ring.name for ring in page.items]
        token = page.next_token
        if not token:
            break
    assert seen == sorted(names, reverse=descending)


@given(st.text(alphabet='name:=<>!()-"\\ ANDORT.labels1', max_size=30))
def test_any_filter_is_one_or_refused(text: str) -> None:
    try:
        page_of(kms_v1.CryptoKey, [kms_v1.CryptoKey(name="a")], kms_v1.ListCryptoKeysRequest(filter=text))
    except GoogleError as error:
        assert error.code is Code.INVALID_ARGUMENT  # noqa: PT017


@given(st.text(max_size=30))
def test_any_page_token_is_one_or_refused(text: str) -> None:
    try:
        page_of(kms_v1.KeyRing, [], kms_v1.ListKeyRingsRequest(page_token=text))
    except (GoogleError, UnicodeEncodeError) as error:
        assert isinstance(error, UnicodeEncodeError) or error.code is Code.INVALID_ARGUMENT  # noqa: PT017


_json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_members = st.dictionaries(
    st.sampled_from(["plaintext", "plaintextCrc32c", "name", "labels", "rotationPeriod", "policy", "etag", "state"]),
    _json,
    max_size=4,
)
_QUERIES = st.text(alphabet="updateMask=labels,&.$%07cryptoKeyId", max_size=40)


@given(st.binary(max_size=40) | _members.map(lambda m: json.dumps(m).encode()), _QUERIES, st.integers(0, 3))
def test_any_request_is_read_or_refused(body: bytes, query: str, which: int) -> None:
    method, path, empty = (
        ("POST", f"/v1/{KEY}:encrypt", kms_v1.EncryptRequest.pb()()),
        ("PATCH", f"/v1/{KEY}", kms_v1.UpdateCryptoKeyRequest.pb()()),
        ("POST", f"/v1/{KEY}:setIamPolicy", iam_policy_pb2.SetIamPolicyRequest()),
        ("POST", f"/v1/{KEY.ring}/cryptoKeys", kms_v1.CreateCryptoKeyRequest.pb()()),
    )[which]
    match = find_route(method, path)
    assert match is not None
    try:
        write_answer(read_request(match, empty, query, body), enums_as_ints=True)
    except GoogleError as error:
        assert error.code in (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED)  # noqa: PT017


def test_the_path_wins_over_the_body() -> None:
    """A name in the body must not send an authorised request somewhere else."""
    match = find_route("PATCH", f"/v1/{KEY}")
    assert match is not None
    body = json.dumps({"name": f"{KEY}-other", "labels": {"a": "b"}}).encode()
    request = read_request(match, kms_v1.UpdateCryptoKeyRequest.pb()(), "updateMask=labels,nextRotationTime", body)
    assert request.crypto_key.name == str(KEY)
    assert list(request.update_mask.paths) == ["labels", "next_rotation_time"]


@pytest.mark.parametrize("path", ["/v1/projects/p/locations/l/keyRings/r/cryptoKeys/k:encrypt/x", "/v1/", "/v2/x", ""])
def test_paths_that_are_no_route(path: str) -> None:
    assert find_route("POST", path) is None
