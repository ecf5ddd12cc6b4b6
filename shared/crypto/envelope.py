"""The envelope: a wrapped DEK, as it lies beside the data that it opens (`X` data, `X.key` envelope).

Format versions 1 and 2, big-endian, 118 bytes::

    offset | size | field
    -------+------+---------------------------------------------------------------
    0      | 4    | magic "KLEV"
    4      | 1    | format version: 1, or 2 when the DEK was wrapped again under a newer KEK
    5      | 1    | wrap suite (1 = AES-256-GCM)
    6      | 8    | KEK id (the 64 bits of its KekId)
    14     | 4    | KEK version
    18     | 12   | wrap nonce (random)
    30     | 48   | DEK, wrapped: 32 bytes and the tag
    78     | 32   | key commitment: HKDF-SHA256(DEK, info = label ‖ AAD)
    110    | 4    | version 1: reserved, zero. Version 2: the KEK version under which the DEK was made
    114    | 4    | reserved, zero

The wrap's AAD is the canonical encryption context of the object together with KEK id, KEK version, envelope version
and, in version 2, the KEK version under which the DEK was made, so an envelope that is moved to another object, project
or key version does not open, and the age of a DEK cannot be forged. The commitment pins the
one DEK that may come out (AES-GCM alone does not: RFC 9771 "key commitment"); it is compared in constant time before
anything is opened with the DEK.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from shared.crypto.aead import NONCE_SIZE_BYTES, AeadKey, Suite, check_suite
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey, random_bytes
from shared.errors import CorruptedError, IntegrityError
from shared.ids import KekId

MAGIC: Final = b"KLEV"
FORMAT_VERSION: Final = 1
REWRAPPED_FORMAT_VERSION: Final = 2
_LAYOUT: Final = struct.Struct(">4sBB8sI12s48s32sI4s")
ENVELOPE_SIZE_BYTES: Final = _LAYOUT.size
_COMMITMENT_LABEL: Final = b"keylake/v1/dek-commitment"
_RESERVED: Final = bytes(4)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A parsed envelope. Everything in it may be public."""

    kek_id: KekId
    kek_version: int
    nonce: bytes
    wrapped_dek: bytes
    commitment: bytes
    made_under: int | None = None
    """KEK version under which the DEK was made, if that is another (older) one than `kek_version`."""

    @property
    def dek_version(self) -> int:
        """How old the DEK is: the KEK version in force when it was made. Wrapping it again does not change it."""
        return self.kek_version if self.made_under is None else self.made_under

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Raises CorruptedError when `data` is not an envelope of a version that we know."""
        if len(data) != ENVELOPE_SIZE_BYTES:
            raise CorruptedError(f"an envelope has {ENVELOPE_SIZE_BYTES} bytes, not {len(data)}")
        magic, version, suite, kek, kek_version, nonce, wrapped, commitment, made_under, reserved = _LAYOUT.unpack(data)
        if magic != MAGIC:
            raise CorruptedError("not an envelope: wrong magic")
        if version not in (FORMAT_VERSION, REWRAPPED_FORMAT_VERSION) or reserved != _RESERVED:
            raise CorruptedError(f"envelope format version {version} is not supported")
        if made_under if version == FORMAT_VERSION else not 0 < made_under < kek_version:
            raise CorruptedError("an envelope names an impossible age of its DEK")
        if check_suite(suite) is not Suite.AES_256_GCM:
            raise CorruptedError("a DEK is only ever wrapped with AES-256-GCM")
        return cls(KekId(f"kek-{kek.hex()}"), kek_version, nonce, wrapped, commitment, made_under or None)

    def serialize(self) -> bytes:
        return _LAYOUT.pack(
            MAGIC,
            FORMAT_VERSION if self.made_under is None else REWRAPPED_FORMAT_VERSION,
            Suite.AES_256_GCM,
            bytes.fromhex(str(self.kek_id)[4:]),
            self.kek_version,
            self.nonce,
            self.wrapped_dek,
            self.commitment,
            self.made_under or 0,
            _RESERVED,
        )


def commitment_of(dek: SecretKey, context: EncryptionContext) -> bytes:
    """32 bytes that only this DEK under this context yields. Reveals nothing about the DEK."""
    expand = HKDFExpand(algorithm=SHA256(), length=32, info=_COMMITMENT_LABEL + context.to_aad())
    return expand.derive(dek.reveal())


def check_commitment(envelope: Envelope, dek: SecretKey, context: EncryptionContext) -> None:
    """Raises IntegrityError unless `dek` is the key that the envelope was made for."""
    if not hmac.compare_digest(envelope.commitment, commitment_of(dek, context)):
        raise IntegrityError("key commitment mismatch: this is not the key that sealed the object")


def _wrap_aad(kek_id: KekId, kek_version: int, made_under: int | None, context: EncryptionContext) -> bytes:
    pairs = {
        "keylake:kek": str(kek_id),
        "keylake:kek-version": str(kek_version),
        "keylake:envelope": str(FORMAT_VERSION),
    }
    if made_under is not None:
        pairs |= {"keylake:envelope": str(REWRAPPED_FORMAT_VERSION), "keylake:dek-version": str(made_under)}
    return context.with_pairs(**pairs).to_aad()


def wrap_dek(kek: AeadKey, kek_id: KekId, kek_version: int, dek: SecretKey, context: EncryptionContext) -> Envelope:
    """Wrap `dek` under `kek`. The caller counts wraps per KEK (limits.MAX_WRAPS_PER_KEK)."""
    nonce = random_bytes(NONCE_SIZE_BYTES)
    wrapped = kek.seal(nonce, dek.reveal(), _wrap_aad(kek_id, kek_version, None, context))
    return Envelope(kek_id, kek_version, nonce, wrapped, commitment_of(dek, context))


def rewrap_dek(
    kek: AeadKey, kek_id: KekId, kek_version: int, dek: SecretKey, opened: Envelope, context: EncryptionContext
) -> Envelope:
    """Wrap `dek` under a newer KEK than that of `opened`, out of which `unwrap_dek` has just taken it in this context.

    The commitment stays: it was compared then. Raises ValueError for a KEK that is not newer.
    """
    if kek_version <= opened.kek_version:
        raise ValueError("a DEK is wrapped again under a newer KEK than before")
    nonce, made_under = random_bytes(NONCE_SIZE_BYTES), opened.dek_version
    wrapped = kek.seal(nonce, dek.reveal(), _wrap_aad(kek_id, kek_version, made_under, context))
    return Envelope(kek_id, kek_version, nonce, wrapped, opened.commitment, made_under)


def unwrap_dek(kek: AeadKey, envelope: Envelope, context: EncryptionContext) -> SecretKey:
    """Raises IntegrityError for the wrong KEK, the wrong context, a tampered envelope or a broken commitment."""
    aad = _wrap_aad(envelope.kek_id, envelope.kek_version, envelope.made_under, context)
    dek = kek.open_key(envelope.nonce, envelope.wrapped_dek, aad)
    try:
        check_commitment(envelope, dek, context)
    except IntegrityError:
        dek.wipe()
        raise
    return dek
