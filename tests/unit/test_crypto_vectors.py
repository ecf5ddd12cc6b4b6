"""Published vectors, and our own formats as they were on the day they were fixed: both must open for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.crypto.aead import TAG_SIZE_BYTES, AeadKey
from shared.crypto.context import EncryptionContext, KeyScope
from shared.crypto.envelope import ENVELOPE_SIZE_BYTES, Envelope, rewrap_dek, unwrap_dek
from shared.crypto.sealed_object import HEADER_SIZE_BYTES, open_object, seal_object
from shared.crypto.secret import KEY_SIZE_BYTES, SecretKey
from shared.errors import CorruptedError, IntegrityError
from shared.ids import AccountId, KekId, ProjectId, TimelineId, WorkspaceId

WRAPPED_KEY_SIZE_BYTES = KEY_SIZE_BYTES + TAG_SIZE_BYTES
VECTORS = Path(__file__).parent.parent / "vectors"
GCM: list[dict[str, str]] = json.loads((VECTORS / "aes_256_gcm.json").read_text())
CAVP: list[dict[str, str | None]] = json.loads((VECTORS / "nist_cavp_gcm_256.json").read_text())
"""Of NIST's Cryptographic Algorithm Validation Program (gcmtestvectors.zip): every combination of lengths with a 96-bit
nonce and a 128-bit tag, three that open and up to two that must not (plaintext null)."""
WYCHEPROOF: dict[str, Any] = json.loads((VECTORS / "wycheproof" / "aes_256_gcm.json").read_text())
"""A key is wrapped with the same AEAD (`Envelope`, our own format): RFC 3394 and 5649 are used nowhere. The vectors of
the customer's own wrap, RSA-OAEP, are in test_customercloud_azure.py."""
GOLDEN: dict[str, Any] = json.loads((VECTORS / "golden_v1.json").read_text())


def golden(name: str) -> bytes:
    return bytes.fromhex(GOLDEN[name])


def key(name: str) -> AeadKey:
    return AeadKey(SecretKey(golden(name)))


def context() -> EncryptionContext:
    scope = KeyScope(
        AccountId(GOLDEN["account_id"]), WorkspaceId(GOLDEN["workspace_id"]), ProjectId(GOLDEN["project_id"])
    )
    return scope.object_context(TimelineId(GOLDEN["timeline_id"]), GOLDEN["object_name"], GOLDEN["kind"])


@pytest.mark.parametrize("vector", GCM, ids=lambda v: v["source"])
def test_aes_256_gcm(vector: dict[str, str]) -> None:
    fields = {name: bytes.fromhex(value) for name, value in vector.items() if name != "source"}
    cipher = AeadKey(SecretKey(fields["key"]))
    sealed = fields["ciphertext"] + fields["tag"]
    assert cipher.seal(fields["nonce"], fields["plaintext"], fields["aad"]) == sealed
    assert cipher.open(fields["nonce"], sealed, fields["aad"]) == fields["plaintext"]
    for position in range(len(sealed)):
        twin = bytearray(sealed)
        twin[position] ^= 1
        with pytest.raises(IntegrityError):
            cipher.open(fields["nonce"], bytes(twin), fields["aad"])


@pytest.mark.parametrize("opens", [True, False])
def test_nist_cavp_vectors(opens: bool) -> None:
    """What is as long as a wrapped key is opened as one, too."""
    keys = 0
    vectors = [vector for vector in CAVP if (vector["plaintext"] is not None) is opens]
    assert len(vectors) >= 40
    for vector in vectors:
        fields = {name: bytes.fromhex(value) for name, value in vector.items() if value is not None and name != "file"}
        cipher = AeadKey(SecretKey(fields["key"]))
        sealed = fields["ciphertext"] + fields["tag"]
        if opens:
            assert cipher.open(fields["nonce"], sealed, fields["aad"]) == fields["plaintext"]
            assert cipher.seal(fields["nonce"], fields["plaintext"], fields["aad"]) == sealed
        else:
            with pytest.raises(IntegrityError):
                cipher.open(fields["nonce"], sealed, fields["aad"])
        if len(sealed) == WRAPPED_KEY_SIZE_BYTES:
            keys += 1
            if opens:
                opened = cipher.open_key(fields["nonce"], sealed, fields["aad"])
                assert opened.matches(SecretKey(fields["plaintext"]))
            else:
                with pytest.raises(IntegrityError):
                    cipher.open_key(fields["nonce"], sealed, fields["aad"])
    assert keys > 0


@pytest.mark.parametrize("result", ["valid", "invalid"])
def test_wycheproof_vectors(result: str) -> None:
    """Altered tags in every way, counters that wrap, long AADs."""
    [group] = WYCHEPROOF["testGroups"]
    vectors = [vector for vector in group["tests"] if vector["result"] == result]
    assert len(vectors) >= 20
    for vector in vectors:
        names = ("key", "iv", "aad", "msg", "ct", "tag")
        secret, nonce, aad, message, ciphertext, tag = (bytes.fromhex(vector[name]) for name in names)
        cipher, sealed = AeadKey(SecretKey(secret)), ciphertext + tag
        if result == "valid":
            assert cipher.open(nonce, sealed, aad) == message, vector["tcId"]
            assert cipher.seal(nonce, message, aad) == sealed, vector["tcId"]
        else:
            with pytest.raises(IntegrityError):
                cipher.open(nonce, sealed, aad)


def test_golden_context() -> None:
    assert context().to_aad() == golden("aad")


def test_golden_envelope_opens_and_serializes_to_itself() -> None:
    envelope = Envelope.parse(golden("envelope"))
    assert envelope.serialize() == golden("envelope")
    assert (str(envelope.kek_id), envelope.kek_version) == (GOLDEN["kek_id"], GOLDEN["kek_version"])
    assert unwrap_dek(key("kek"), envelope, context()).matches(SecretKey(golden("dek")))


def test_golden_envelope_has_the_documented_layout() -> None:
    """The table in envelope.py's docstring."""
    wire = golden("envelope")
    assert len(wire) == ENVELOPE_SIZE_BYTES == 118
    assert wire[0:4] == b"KLEV"
    assert wire[4] == 1
    assert wire[5] == 1
    assert "kek-" + wire[6:14].hex() == GOLDEN["kek_id"]
    assert int.from_bytes(wire[14:18], "big") == GOLDEN["kek_version"]
    envelope = Envelope.parse(wire)
    assert (wire[18:30], wire[30:78], wire[78:110]) == (envelope.nonce, envelope.wrapped_dek, envelope.commitment)
    assert wire[110:118] == bytes(8)


@pytest.mark.parametrize("position", range(118))
def test_golden_envelope_with_any_byte_changed_does_not_open(position: int) -> None:
    twin = bytearray(golden("envelope"))
    twin[position] ^= 1
    with pytest.raises(IntegrityError):
        unwrap_dek(key("kek"), Envelope.parse(bytes(twin)), context())


@pytest.mark.parametrize(
    "changes",
    [
        {"keylake:account": "acc-0011223344556678"},
        {"keylake:workspace": "ws-8899aabbccddeefe"},
        {"keylake:project": "prj-0123456789abcdee"},
        {"keylake:timeline": "tl-fedcba9876543211"},
        {"keylake:object": "layers/0002"},
        {"keylake:kind": "layer/2"},
        {"more": "x"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_golden_envelope_and_object_do_not_open_in_another_context(changes: dict[str, str]) -> None:
    moved = EncryptionContext({**context().pairs, **changes})
    with pytest.raises(IntegrityError):
        unwrap_dek(key("kek"), Envelope.parse(golden("envelope")), moved)
    with pytest.raises(IntegrityError):
        open_object(key("dek"), moved, golden("sealed_object"))


def test_golden_envelope_does_not_open_under_another_kek_or_as_another_version() -> None:
    envelope = Envelope.parse(golden("envelope"))
    with pytest.raises(IntegrityError):
        unwrap_dek(AeadKey(SecretKey.generate()), envelope, context())
    for twin in (
        Envelope(KekId("kek-00ff00ff00ff00fe"), 7, envelope.nonce, envelope.wrapped_dek, envelope.commitment),
        Envelope(envelope.kek_id, 8, envelope.nonce, envelope.wrapped_dek, envelope.commitment),
    ):
        with pytest.raises(IntegrityError):
            unwrap_dek(key("kek"), twin, context())


@pytest.mark.parametrize("size", [0, 1, 117, 119, 236])
def test_envelope_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(CorruptedError):
        Envelope.parse((golden("envelope") * 2)[:size])


def test_golden_object_opens_and_seals_to_itself() -> None:
    assert open_object(key("dek"), context(), golden("sealed_object")) == golden("plaintext")
    again = seal_object(key("dek"), context(), golden("plaintext"), GOLDEN["chunk_size_bytes"])
    assert again == golden("sealed_object")


def test_golden_object_with_any_byte_changed_does_not_open() -> None:
    sealed = golden("sealed_object")
    for position in range(len(sealed)):
        twin = bytearray(sealed)
        twin[position] ^= 1
        with pytest.raises(IntegrityError):
            open_object(key("dek"), context(), bytes(twin))


def test_golden_object_truncated_extended_or_reordered_does_not_open() -> None:
    sealed, step = golden("sealed_object"), GOLDEN["chunk_size_bytes"] + TAG_SIZE_BYTES
    header, chunks = sealed[:HEADER_SIZE_BYTES], sealed[HEADER_SIZE_BYTES:]
    parts = [chunks[i : i + step] for i in range(0, len(chunks), step)]
    assert len(parts) == 3
    twins = [header + b"".join(p) for p in ([], parts[:1], parts[:2], parts[1:], parts[::-1], [*parts, parts[2]])]
    twins += [sealed[:size] for size in range(len(sealed))]
    twins += [sealed + b"\0", sealed + parts[2]]
    for twin in twins:
        with pytest.raises(IntegrityError):
            open_object(key("dek"), context(), twin)


def test_an_envelope_wrapped_again_carries_the_age_of_its_dek_and_nobody_can_change_it() -> None:
    """Version 2 of the format."""
    dek = SecretKey(golden("dek"))
    opened = Envelope.parse(golden("envelope"))
    envelope = rewrap_dek(key("kek"), KekId(GOLDEN["kek_id"]), 9, dek, opened, context())
    wire = envelope.serialize()
    assert len(wire) == ENVELOPE_SIZE_BYTES
    assert wire[4] == 2
    assert int.from_bytes(wire[110:114], "big") == GOLDEN["kek_version"] == envelope.dek_version
    assert wire[114:118] == bytes(4)
    assert Envelope.parse(wire) == envelope
    assert unwrap_dek(key("kek"), envelope, context()).matches(dek)
    assert envelope.commitment == Envelope.parse(golden("envelope")).commitment
    for position in range(118):
        twin = bytearray(wire)
        twin[position] ^= 1
        with pytest.raises(IntegrityError):
            unwrap_dek(key("kek"), Envelope.parse(bytes(twin)), context())
    for impossible in (0, 9, 10):
        with pytest.raises(CorruptedError):
            Envelope.parse(wire[:110] + impossible.to_bytes(4, "big") + bytes(4))
    for not_newer in (8, 9):
        with pytest.raises(ValueError, match="newer"):
            rewrap_dek(key("kek"), KekId(GOLDEN["kek_id"]), not_newer, dek, envelope, context())
    again = rewrap_dek(key("kek"), KekId(GOLDEN["kek_id"]), 10, dek, envelope, context())
    assert (again.dek_version, again.commitment) == (GOLDEN["kek_version"], opened.commitment)
    assert unwrap_dek(key("kek"), again, context()).matches(dek)
