"""Ciphertext blobs: what is sealed opens, nothing else does, and no bytes crash the parser."""

from __future__ import annotations

import os
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customercloud.aws.blob import HEADER_SIZE_BYTES, CiphertextBlob, canonical_context, open_blob, seal
from customercloud.aws.errors import AwsError

KEY_ID = str(uuid.uuid4())
MATERIAL_ID = os.urandom(32).hex()
MATERIAL = os.urandom(32)

_contexts = st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=4)
_plaintexts = st.binary(min_size=1, max_size=200)


def opened(data: bytes, context: dict[str, str], material: bytes = MATERIAL) -> bytes:
    return open_blob(CiphertextBlob.parse(data), material, context)


@given(_plaintexts, _contexts)
def test_what_is_sealed_opens(plaintext: bytes, context: dict[str, str]) -> None:
    data = seal(KEY_ID, MATERIAL_ID, MATERIAL, plaintext, context)
    assert len(data) == HEADER_SIZE_BYTES + len(plaintext) + 16
    blob = CiphertextBlob.parse(data)
    assert (blob.key_id, blob.material_id) == (KEY_ID, MATERIAL_ID)
    assert blob.serialize() == data
    assert opened(data, dict(reversed(context.items()))) == plaintext


@given(_plaintexts, _contexts, _contexts)
def test_only_the_same_context_opens(plaintext: bytes, context: dict[str, str], other: dict[str, str]) -> None:
    data = seal(KEY_ID, MATERIAL_ID, MATERIAL, plaintext, context)
    if context == other:
        assert opened(data, other) == plaintext
    else:
        with pytest.raises(AwsError, match="InvalidCiphertextException"):
            opened(data, other)


@given(_plaintexts, st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_opens(plaintext: bytes, position: int, change: int) -> None:
    data = bytearray(seal(KEY_ID, MATERIAL_ID, MATERIAL, plaintext, {"a": "b"}))
    data[position % len(data)] ^= change
    with pytest.raises(AwsError, match="InvalidCiphertextException"):
        opened(bytes(data), {"a": "b"})


@given(_plaintexts, st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_no_cut_or_longer_blob_opens(plaintext: bytes, length: int, tail: bytes) -> None:
    data = seal(KEY_ID, MATERIAL_ID, MATERIAL, plaintext, {})
    for changed in (data[: length % len(data)], data + tail):
        with pytest.raises(AwsError, match="InvalidCiphertextException"):
            opened(changed, {})


def test_other_material_does_not_open() -> None:
    data = seal(KEY_ID, MATERIAL_ID, MATERIAL, b"x", {})
    with pytest.raises(AwsError, match="InvalidCiphertextException"):
        opened(data, {}, os.urandom(32))


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"KLCB\x01" + tail))
def test_any_bytes_are_a_blob_or_invalid(data: bytes) -> None:
    try:
        blob = CiphertextBlob.parse(data)
    except AwsError as error:
        assert error.code == "InvalidCiphertextException"  # noqa: PT017 - either outcome is right
    else:
        assert blob.serialize() == data


@given(_contexts, _contexts)
def test_the_canonical_context_is_injective(one: dict[str, str], other: dict[str, str]) -> None:
    assert (canonical_context(one) == canonical_context(other)) == (one == other)


def test_every_seal_is_another_blob() -> None:
    blobs = {seal(KEY_ID, MATERIAL_ID, MATERIAL, b"x", {}) for _ in range(50)}
    assert len({blob[53:81] for blob in blobs}) == 50
