"""Contexts encode injectively; envelopes and objects open only as what they are; parsers raise only what they say."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.crypto.aead import TAG_SIZE_BYTES, AeadKey, counter_nonce
from shared.crypto.context import EncryptionContext
from shared.crypto.envelope import ENVELOPE_SIZE_BYTES, Envelope, unwrap_dek, wrap_dek
from shared.crypto.sealed_object import HEADER_SIZE_BYTES, ObjectLayout, ObjectOpener, open_object, seal_object
from shared.crypto.secret import SecretKey
from shared.crypto.transport import KeyTransport
from shared.errors import CorruptedError, IntegrityError
from shared.ids import KekId

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
VALUES = st.text(st.characters(codec="utf-8"), max_size=12)
PAIRS = st.dictionaries(NAMES, VALUES, max_size=5)
KEK = AeadKey(SecretKey(bytes(range(32))))
KEK_ID = KekId("kek-0123456789abcdef")


@given(PAIRS, PAIRS)
def test_contexts_encode_injectively(one: dict[str, str], other: dict[str, str]) -> None:
    assert (EncryptionContext(one).to_aad() == EncryptionContext(other).to_aad()) == (one == other)


@given(NAMES, VALUES, st.integers(0, 12))
def test_moving_bytes_between_name_and_value_changes_the_encoding(name: str, value: str, shift: int) -> None:
    text = name + value
    cut = min(shift, len(text) - 1) + 1
    assume((text[:cut], text[cut:]) != (name, value))
    assert EncryptionContext({name: value}).to_aad() != EncryptionContext({text[:cut]: text[cut:]}).to_aad()


@given(PAIRS)
def test_order_of_pairs_does_not_matter(pairs: dict[str, str]) -> None:
    turned = dict(reversed(list(pairs.items())))
    assert EncryptionContext(pairs).to_aad() == EncryptionContext(turned).to_aad()


@given(PAIRS, PAIRS)
def test_a_dek_opens_in_its_own_context_only(one: dict[str, str], other: dict[str, str]) -> None:
    dek = SecretKey.generate()
    envelope = Envelope.parse(wrap_dek(KEK, KEK_ID, 1, dek, EncryptionContext(one)).serialize())
    assert unwrap_dek(KEK, envelope, EncryptionContext(one)).matches(dek)
    if one != other:
        try:
            unwrap_dek(KEK, envelope, EncryptionContext(other))
        except IntegrityError:
            return
        raise AssertionError("opened in another context")


@given(st.binary(max_size=ENVELOPE_SIZE_BYTES + 2) | st.binary(min_size=118, max_size=118))
def test_any_bytes_are_an_envelope_that_serializes_to_itself_or_corrupted(data: bytes) -> None:
    try:
        envelope = Envelope.parse(data)
    except IntegrityError:
        return
    assert envelope.serialize() == data


@given(st.integers(0, 3), st.binary(min_size=104, max_size=104), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_both_versions_parse_only_with_a_possible_age(
    version: int, rest: bytes, kek_version: int, made_under: int, clean: bool
) -> None:
    data = b"KLEV" + bytes([version, 1]) + rest[:8] + kek_version.to_bytes(4, "big") + rest[12:]
    data += made_under.to_bytes(4, "big") + (bytes(4) if clean else b"\0\0\0\1")
    possible = made_under == 0 if version == 1 else version == 2 and 0 < made_under < kek_version
    try:
        envelope = Envelope.parse(data)
    except CorruptedError:
        assert not (possible and clean)
        return
    assert possible
    assert clean
    assert envelope.serialize() == data
    assert envelope.dek_version == (made_under or kek_version)


@given(st.binary(min_size=112, max_size=112))
def test_envelopes_with_a_good_header_never_open_by_chance(rest: bytes) -> None:
    data = b"KLEV\x01\x01" + rest[:104] + bytes(8)
    try:
        unwrap_dek(KEK, Envelope.parse(data), EncryptionContext({}))
    except IntegrityError:
        return
    raise AssertionError("random bytes opened")


@st.composite
def objects(draw: st.DrawFn) -> tuple[bytes, int]:
    chunk = draw(st.integers(1, 40))
    return draw(st.binary(max_size=chunk * 5)), chunk


@given(objects())
def test_objects_open_whole_and_in_parts(thing: tuple[bytes, int]) -> None:
    plaintext, chunk = thing
    key, context = AeadKey(SecretKey.generate()), EncryptionContext({"object": "x"})
    sealed = seal_object(key, context, plaintext, chunk)
    assert open_object(key, context, sealed) == plaintext
    layout = ObjectLayout.parse(sealed[:HEADER_SIZE_BYTES], len(sealed))
    assert layout.plaintext_size_bytes == len(plaintext)
    opener = ObjectOpener(key, context, layout)
    for start in range(0, len(plaintext), 7):
        for end in range(start, len(plaintext) + 1, 5):
            chunks = layout.chunk_range(start, end)
            low, high = layout.sealed_range(chunks)
            opened = b"".join(opener.open_chunks(chunks, sealed[low:high]))
            offset = start - chunks.start * chunk
            assert opened[offset : offset + end - start] == plaintext[start:end]


@given(objects(), st.data())
@settings(max_examples=200)
def test_altered_objects_never_open(thing: tuple[bytes, int], data: st.DataObject) -> None:
    plaintext, chunk = thing
    key, context = AeadKey(SecretKey.generate()), EncryptionContext({"object": "x"})
    sealed = seal_object(key, context, plaintext, chunk)
    step = chunk + TAG_SIZE_BYTES
    body = sealed[HEADER_SIZE_BYTES:]
    parts = [body[i : i + step] for i in range(0, len(body), step)]
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "shuffle", "drop", "repeat"]))
    if kind == "flip":
        position, bit = data.draw(st.integers(0, len(sealed) - 1)), data.draw(st.integers(0, 7))
        twin = bytearray(sealed)
        twin[position] ^= 1 << bit
        altered = bytes(twin)
    elif kind == "cut":
        altered = sealed[: data.draw(st.integers(0, len(sealed) - 1))]
    elif kind == "extend":
        altered = sealed + data.draw(st.binary(min_size=1, max_size=2 * step))
    elif kind == "shuffle":
        altered = sealed[:HEADER_SIZE_BYTES] + b"".join(data.draw(st.permutations(parts)))
    elif kind == "drop":
        gone = data.draw(st.integers(0, len(parts) - 1))
        altered = sealed[:HEADER_SIZE_BYTES] + b"".join(p for n, p in enumerate(parts) if n != gone)
    else:
        again = data.draw(st.sampled_from(parts))
        altered = sealed + again
    assume(altered != sealed)
    try:
        open_object(key, context, altered)
    except IntegrityError:
        return
    raise AssertionError(f"opened after {kind}")


@given(st.binary(max_size=64), st.integers(0, 1 << 40))
def test_any_bytes_are_a_layout_or_corrupted(header: bytes, size: int) -> None:
    try:
        layout = ObjectLayout.parse(header, size)
    except IntegrityError:
        return
    assert layout.chunks >= 1
    assert 0 <= layout.plaintext_size_bytes < size


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_counter_nonces_are_distinct(one: int, other: int) -> None:
    assert (counter_nonce(one) == counter_nonce(other)) == (one == other)
    assert len(counter_nonce(one)) == 12


@given(st.binary(max_size=120))
def test_transport_opens_nothing_that_was_not_sealed(data: bytes) -> None:
    client, server = KeyTransport(), KeyTransport()
    client.agree(client.public, server.public)
    try:
        client.open_key(data, b"")
    except IntegrityError:
        return
    raise AssertionError("random bytes opened")
