"""The Azure adapter's cores: the blob, the verdicts, and what may be configured."""

from __future__ import annotations

import contextlib
import secrets
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from keymanager.kms.azure_blob import (
    FORMAT_VERSION,
    MAGIC,
    MAX_SIZE_BYTES,
    AzureBlob,
    VersionedKeyId,
    seal_kek,
)
from keymanager.kms.azure_clients import AzureKmsConfig, scope_for
from keymanager.kms.azure_verdicts import UNWRAP_KEY, classify, classify_token
from keymanager.kms.base import Classification, DenialReason, Verdict
from keymanager.providers.azure import AzureSettings
from shared.api.keymanager import AzureKey
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey
from shared.errors import CorruptedError, IntegrityError, InvalidInputError

V, R = Verdict, DenialReason
CONTEXT = EncryptionContext({"keylake:account": "acc-1", "keylake:project": "prj-1"})
KEY_ID = VersionedKeyId("https://myvault.vault.azure.net", "cmk", "0c24b95c67534a3eb85c71854dc8a7bd")
TENANT = "11111111-1111-4111-8111-111111111111"
CLIENT = "22222222-2222-4222-8222-222222222222"

contexts = st.dictionaries(st.text("abc:", min_size=1, max_size=6), st.text("xyz", max_size=6), max_size=4).map(
    EncryptionContext
)
key_ids = st.builds(
    VersionedKeyId,
    st.from_regex(r"https://[a-z][a-z0-9-]{1,20}\.vault\.azure\.net(:[0-9]{1,5})?", fullmatch=True),
    st.from_regex(r"[0-9A-Za-z-]{1,127}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
)
wrapped_keys = st.sampled_from((256, 384, 512)).map(secrets.token_bytes)


def key(data: bytes) -> SecretKey:
    return SecretKey(bytearray(data))


# ── the blob ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(kek=st.binary(min_size=32, max_size=32), key_id=key_ids, wrapped=wrapped_keys, context=contexts)
def test_a_kek_comes_back_from_its_blob(
    kek: bytes, key_id: VersionedKeyId, wrapped: bytes, context: EncryptionContext
) -> None:
    intermediate = secrets.token_bytes(32)
    data = seal_kek(key(kek), key(intermediate), key_id, wrapped, context).serialize()
    assert len(data) <= MAX_SIZE_BYTES
    parsed = AzureBlob.parse(data)
    assert (parsed.key_id, parsed.wrapped, parsed.serialize()) == (key_id, wrapped, data)
    assert parsed.open(key(intermediate), context).matches(key(kek))
    assert kek not in data
    assert intermediate not in data


@given(sealed=contexts, opened=contexts)
def test_it_opens_under_its_own_context_only(sealed: EncryptionContext, opened: EncryptionContext) -> None:
    intermediate = secrets.token_bytes(32)
    blob = seal_kek(SecretKey.generate(), key(intermediate), KEY_ID, bytes(256), sealed)
    if dict(sealed.pairs) == dict(opened.pairs):
        blob.open(key(intermediate), opened)
        return
    with pytest.raises(IntegrityError):
        blob.open(key(intermediate), opened)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_flipped_bit_opens(position: int, bit: int) -> None:
    """Not in the header, the key id, the wrapped key or the sealed KEK."""
    intermediate = secrets.token_bytes(32)
    data = bytearray(seal_kek(SecretKey.generate(), key(intermediate), KEY_ID, bytes(256), CONTEXT).serialize())
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(IntegrityError):
        AzureBlob.parse(bytes(data)).open(key(intermediate), CONTEXT)


def test_another_intermediate_key_does_not_open_it() -> None:
    blob = seal_kek(SecretKey.generate(), SecretKey.generate(), KEY_ID, bytes(256), CONTEXT)
    with pytest.raises(IntegrityError):
        blob.open(SecretKey.generate(), CONTEXT)


def test_the_intermediate_key_is_wiped_and_the_kek_is_not() -> None:
    kek, intermediate = SecretKey.generate(), SecretKey.generate()
    blob = seal_kek(kek, intermediate, KEY_ID, bytes(256), CONTEXT)
    assert intermediate.wiped
    assert not kek.wiped
    again = SecretKey.generate()
    with pytest.raises(IntegrityError):
        blob.open(again, CONTEXT)
    assert again.wiped


GOLDEN: Final = (
    "4b4c415a010100490100"
    + b"https://myvault.vault.azure.net/keys/cmk/0c24b95c67534a3eb85c71854dc8a7bd".hex()
    + "57" * 256
    + "10625155439b5388be916ab30f5586f71f668c0e4b564bf5a4bc72dd41bc8c395e981f73733d3d401b0c71a1e5bf7dd8"
)
"""Format version 1, for ever: the KEK 4b…, sealed under the intermediate key 49…, in CONTEXT."""


def test_the_golden_blob_and_its_tampered_twins() -> None:
    golden = bytes.fromhex(GOLDEN)
    assert seal_kek(key(b"K" * 32), key(b"I" * 32), KEY_ID, b"W" * 256, CONTEXT).serialize() == golden
    assert AzureBlob.parse(golden).open(key(b"I" * 32), CONTEXT).matches(key(b"K" * 32))
    for position in range(len(golden)):
        twin = bytearray(golden)
        twin[position] ^= 0x20  # in the key id: upper case, another address of the same key
        with pytest.raises(IntegrityError):
            AzureBlob.parse(bytes(twin)).open(key(b"I" * 32), CONTEXT)


@given(data=st.one_of(st.binary(max_size=1200), st.binary(max_size=900).map(lambda b: MAGIC + b"\x01\x01" + b)))
def test_garbage_is_refused_with_the_typed_error(data: bytes) -> None:
    with pytest.raises(CorruptedError):
        AzureBlob.parse(data)


def test_truncations_extensions_and_other_versions_are_refused() -> None:
    data = seal_kek(SecretKey.generate(), SecretKey.generate(), KEY_ID, bytes(256), CONTEXT).serialize()
    assert data[:6] == MAGIC + bytes([FORMAT_VERSION, 1])
    spoiled = [data[:n] for n in range(len(data))] + [data + b"\0", data[:4] + b"\x02" + data[5:]]
    for blob in [*spoiled, data[:5] + b"\x02" + data[6:]]:
        with pytest.raises(CorruptedError):
            AzureBlob.parse(blob)
    for size in (0, 128, 255, 257, 513):
        with pytest.raises(CorruptedError):
            seal_kek(SecretKey.generate(), SecretKey.generate(), KEY_ID, bytes(size), CONTEXT)


@given(text=st.text(max_size=100))
def test_key_ids_parse_or_are_refused(text: str) -> None:
    for candidate in (text, f"https://v.vault.azure.net/keys/{text}", f"https://{text}/keys/cmk/{'0' * 32}"):
        with contextlib.suppress(CorruptedError):
            assert str(VersionedKeyId.parse(candidate)) == candidate


def test_a_key_id_needs_its_version_and_compares_without_case() -> None:
    for bad in (
        "https://myvault.vault.azure.net/keys/cmk",
        "http://myvault.vault.azure.net/keys/cmk/0c24b95c67534a3eb85c71854dc8a7bd",
        "https://myvault.vault.azure.net/secrets/cmk/0c24b95c67534a3eb85c71854dc8a7bd",
        "https://myvault.vault.azure.net/keys/cmk/0c24b95c67534a3eb85c71854dc8a7bd/unwrapkey",
        "https://user@myvault.vault.azure.net/keys/cmk/0c24b95c67534a3eb85c71854dc8a7bd",
    ):
        with pytest.raises(CorruptedError):
            VersionedKeyId.parse(bad)
    assert KEY_ID.is_of("https://MyVault.vault.azure.net", "CMK")
    assert not KEY_ID.is_of("https://myvault.vault.azure.net", "cmk2")
    assert not KEY_ID.is_of("https://myvault2.vault.azure.net", "cmk")


# ── verdicts ───────────────────────────────────────────────────────────────────────────────────────────────────────

DECIDED: dict[tuple[int, str, str], tuple[Verdict, DenialReason | None]] = {
    (403, "Forbidden", "KeyDisabled"): (V.DENIED, R.DISABLED),
    (403, "Forbidden", "AccessDenied"): (V.DENIED, R.ACCESS_DENIED),
    (403, "Forbidden", "ForbiddenByRbac"): (V.DENIED, R.ACCESS_DENIED),
    (403, "Forbidden", "ForbiddenByPolicy"): (V.DENIED, R.ACCESS_DENIED),
    (403, "Forbidden", "KeyExpired"): (V.DENIED, R.INVALID_STATE),
    (403, "Forbidden", "KeyNotYetValid"): (V.DENIED, R.INVALID_STATE),
    (403, "Forbidden", "KeyOperationForbidden"): (V.DENIED, R.INVALID_STATE),
    (404, "KeyNotFound", ""): (V.DENIED, R.NOT_FOUND),
    (429, "Throttled", ""): (V.THROTTLED, None),
    (429, "", ""): (V.THROTTLED, None),
    (408, "", ""): (V.UNREACHABLE, None),
    (500, "InternalServerError", ""): (V.UNREACHABLE, None),
    (503, "", ""): (V.UNREACHABLE, None),
    # What is not the customer's no, or may not be.
    (403, "Forbidden", "ForbiddenByFirewall"): (V.AMBIGUOUS, None),
    (403, "Forbidden", "ForbiddenByConnection"): (V.AMBIGUOUS, None),
    (403, "Forbidden", ""): (V.AMBIGUOUS, None),
    (403, "", ""): (V.AMBIGUOUS, None),
    (404, "", ""): (V.AMBIGUOUS, None),
    (404, "VaultNotFound", ""): (V.AMBIGUOUS, None),
    (401, "Unauthorized", ""): (V.AMBIGUOUS, None),
    (409, "Conflict", "ObjectIsBeingDeleted"): (V.AMBIGUOUS, None),
    (302, "", ""): (V.AMBIGUOUS, None),
    # A denial's words under another status are somebody else's.
    (500, "Forbidden", "KeyDisabled"): (V.UNREACHABLE, None),
    (400, "Forbidden", "KeyDisabled"): (V.AMBIGUOUS, None),
    (400, "KeyNotFound", ""): (V.AMBIGUOUS, None),
}


@pytest.mark.parametrize("answer", list(DECIDED))
def test_every_answer(answer: tuple[int, str, str]) -> None:
    for operation in ("WrapKey", UNWRAP_KEY, "GetKey"):
        assert classify(operation, *answer) == Classification(*DECIDED[answer])


def test_bad_parameter_is_the_blobs_fault_only_when_unwrapping() -> None:
    assert classify(UNWRAP_KEY, 400, "BadParameter", "") == Classification(V.CORRUPT)
    assert classify("WrapKey", 400, "BadParameter", "") == Classification(V.AMBIGUOUS)


@given(status=st.integers(100, 599), code=st.text(max_size=12), inner=st.text(max_size=12))
def test_unknown_answers_never_deny(status: int, code: str, inner: str) -> None:
    assert classify(UNWRAP_KEY, status, code, inner).verdict is not V.DENIED
    assert classify_token(status, ()).verdict is not V.DENIED


@pytest.mark.parametrize(
    ("status", "codes", "verdict"),
    [
        (400, (700016,), V.DENIED),
        (401, (7000112,), V.DENIED),
        (401, (7000229,), V.DENIED),
        (401, (7000215,), V.AMBIGUOUS),
        (401, (7000222,), V.AMBIGUOUS),
        (400, (90002,), V.AMBIGUOUS),
        (401, (700213,), V.AMBIGUOUS),
        (400, (), V.AMBIGUOUS),
        (429, (), V.THROTTLED),
        (400, (90055,), V.THROTTLED),
        (400, (90033,), V.UNREACHABLE),
        (503, (700016,), V.UNREACHABLE),
    ],
)
def test_token_answers(status: int, codes: tuple[int, ...], verdict: Verdict) -> None:
    reason = R.PRINCIPAL_DENIED if verdict is V.DENIED else None
    assert classify_token(status, codes) == Classification(verdict, reason)


# ── configuration ──────────────────────────────────────────────────────────────────────────────────────────────────


def azure_key(**changes: str) -> AzureKey:
    values = {"vault_url": "https://myvault.vault.azure.net", "key_name": "cmk", "tenant_id": TENANT}
    return AzureKey.model_validate(values | {"client_id": CLIENT} | changes)


@pytest.mark.parametrize(
    "url",
    [
        "https://myvault.vault.azure.net", "https://a-b-c.vault.azure.cn", "https://v24.vault.usgovcloudapi.net",
        "https://127.0.0.1:8440", "https://localhost:8440", "https://default.vault.localhost:8440", "https://cloud:8440",
    ],
)  # fmt: skip
def test_vault_urls_as_the_vendor_has_them(url: str) -> None:
    assert azure_key(vault_url=url).vault_url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://myvault.vault.azure.net", "https://myvault.vault.azure.net/", "https://myvault.vault.azure.net:443",
        "https://my.vault.vault.azure.net", "https://-a.vault.azure.net", "https://a--b.vault.azure.net",
        "https://ab-.vault.azure.net", "https://1ab.vault.azure.net", "https://ab.vault.azure.net",
        "https://abcdefghijklmnopqrstuvwxy.vault.azure.net", "https://myvault.vault.azure.net.evil.example",
        "https://evil.example", "https://169.254.169.254", "https://evil.example#.vault.azure.net",
        "https://evil.example\\.vault.azure.net", "https://x@myvault.vault.azure.net", "https://127.0.0.1:8440/x", "",
        "https://myvault.vault.azure.net\n",
    ],
)  # fmt: skip
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        azure_key(vault_url=url)


def test_names_and_ids_as_the_vendor_has_them() -> None:
    azure_key(key_name="A-1" * 42)
    for changes in (
        {"key_name": ""}, {"key_name": "a_b"}, {"key_name": "a/b"}, {"key_name": "x" * 128}, {"tenant_id": "contoso"},
        {"client_id": CLIENT.replace("2", "g")}, {"client_secret": "no secret goes in here"},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            azure_key(**changes)


def test_the_adapter_checks_its_configuration_too() -> None:
    good: dict[str, Any] = {
        "vault_url": "https://v.vault.azure.net",
        "key_name": "cmk",
        "tenant_id": TENANT,
        "client_id": CLIENT,
    }
    AzureKmsConfig(**good)
    for changes in (
        {"vault_url": "http://v.vault.azure.net"}, {"vault_url": "https://v.vault.azure.net/keys"},
        {"vault_url": "https://u@v.vault.azure.net"}, {"vault_url": "https://["}, {"key_name": "a b"},
        {"tenant_id": "common"}, {"client_id": ""},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            AzureKmsConfig(**(good | changes))


def test_the_scope_is_what_the_sdk_would_accept_from_that_host() -> None:
    assert scope_for("https://myvault.vault.azure.net") == "https://vault.azure.net/.default"
    assert scope_for("https://myvault.vault.azure.cn") == "https://vault.azure.cn/.default"
    assert scope_for("https://v.vault.localhost:8440") == "https://vault.localhost:8440/.default"
    assert scope_for("https://127.0.0.1:8440") == "https://vault.azure.net/.default"
    assert scope_for("https://localhost:8440") == "https://vault.azure.net/.default"
    # A host that is not Azure's gets no token for Azure's.
    assert scope_for("https://evil.example") == "https://example/.default"


def test_settings_keep_their_secrets() -> None:
    settings = AzureSettings.model_validate({"client_secrets": {CLIENT: "very secret"}})
    assert "very secret" not in f"{settings!r} {settings.model_dump_json()}"
    with pytest.raises(ValidationError):
        AzureSettings(authority="http://login.example")
