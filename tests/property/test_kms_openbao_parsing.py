"""What OpenBao answers, and what somebody stored, is bytes from outside: parsed or refused, never anything else."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keymanager.kms.base import DenialReason, Verdict
from keymanager.kms.openbao import LOGIN, WrappedBlob, classify, parse_errors

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
SEALED = st.binary(min_size=60, max_size=60)
VERSIONS = st.integers(1, 0xFFFF_FFFF)


@given(VERSIONS, SEALED)
def test_a_blob_survives_both_of_its_forms(version: int, sealed: bytes) -> None:
    blob = WrappedBlob(version, sealed)
    assert WrappedBlob.parse(blob.serialize()) == blob
    assert WrappedBlob.of_ciphertext(blob.ciphertext()) == blob


@given(st.binary(max_size=200) | st.binary(min_size=65, max_size=65))
def test_any_bytes_are_a_blob_in_one_way_or_none(data: bytes) -> None:
    blob = WrappedBlob.parse(data)
    assert blob is None or blob.serialize() == data


@given(VERSIONS, SEALED, st.integers(0, 64), st.integers(1, 255))
def test_no_two_byte_strings_are_one_blob(version: int, sealed: bytes, position: int, flip: int) -> None:
    data = bytearray(WrappedBlob(version, sealed).serialize())
    data[position] ^= flip
    assert WrappedBlob.parse(bytes(data)) != WrappedBlob(version, sealed)


@given(st.text() | VERSIONS.map(lambda n: f"vault:v{n}:") | st.from_regex(r"vault:v[0-9]{1,12}:[A-Za-z0-9+/=]{78,84}"))
def test_any_text_is_a_ciphertext_or_a_value_error(text: str) -> None:
    try:
        blob = WrappedBlob.of_ciphertext(text)
    except ValueError:
        return
    assert blob.ciphertext() == text


@pytest.mark.parametrize("version", ["0", "01", "-1", "4294967296", "\uff11"])
def test_versions_that_are_none(version: str) -> None:
    with pytest.raises(ValueError, match="ciphertext of a key"):
        WrappedBlob.of_ciphertext(f"vault:v{version}:{base64.b64encode(bytes(60)).decode()}")


@given(st.binary() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_a_list_of_texts_or_not_the_services_own(body: bytes) -> None:
    errors = parse_errors(body)
    assert errors is None or all(isinstance(text, str) for text in errors)


def test_a_body_that_nests_too_deep_is_not_the_services_own() -> None:
    assert parse_errors(b"[" * 60_000) is None


@given(
    st.sampled_from([LOGIN, "Decrypt", "ReadKey"]), st.integers(100, 599), st.none() | st.lists(st.text()).map(tuple)
)
def test_a_denial_needs_a_refusal_in_the_services_own_words(
    operation: str, status: int, errors: tuple[str, ...] | None
) -> None:
    name, meaning = classify(operation, status, errors)
    assert name.isprintable()
    if errors is None or not 400 <= status < 500:
        assert meaning.verdict in (Verdict.UNREACHABLE, Verdict.THROTTLED)
    if meaning.verdict is Verdict.DENIED:
        assert status in (400, 403, 404)


@pytest.mark.parametrize(
    ("operation", "status", "text", "verdict", "reason"),
    [
        ("Decrypt", 400, "refusing to use soft-deleted key", Verdict.DENIED, DenialReason.DISABLED),
        ("Decrypt", 400, "encryption key not found", Verdict.DENIED, DenialReason.NOT_FOUND),
        ("Decrypt", 400, "cipher: message authentication failed", Verdict.CORRUPT, None),
        ("Decrypt", 400, "invalid ciphertext: version is too new", Verdict.CORRUPT, None),
        ("Decrypt", 400, "something new", Verdict.AMBIGUOUS, None),
        ("Decrypt", 403, "1 error occurred:\n\t* permission denied\n\n", Verdict.DENIED, DenialReason.ACCESS_DENIED),
        ("Decrypt", 403, None, Verdict.UNREACHABLE, None),
        ("Decrypt", 503, "Vault is sealed", Verdict.UNREACHABLE, None),
        ("Decrypt", 500, "refusing to use soft-deleted key", Verdict.UNREACHABLE, None),
        ("Decrypt", 307, None, Verdict.UNREACHABLE, None),
        ("Decrypt", 412, "required index state not present", Verdict.UNREACHABLE, None),
        ("Decrypt", 429, "rate limit quota exceeded", Verdict.THROTTLED, None),
        (LOGIN, 400, "invalid role or secret ID", Verdict.DENIED, DenialReason.PRINCIPAL_DENIED),
        (LOGIN, 403, "permission denied", Verdict.DENIED, DenialReason.PRINCIPAL_DENIED),
        (LOGIN, 400, "missing role_id", Verdict.AMBIGUOUS, None),
    ],
)
def test_verdicts(operation: str, status: int, text: str | None, verdict: Verdict, reason: DenialReason | None) -> None:
    _, meaning = classify(operation, status, None if text is None else (text,))
    assert (meaning.verdict, meaning.reason) == (verdict, reason)
