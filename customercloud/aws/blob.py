"""Ciphertext blobs: AES-256-GCM under a key derived per message, bound to the encryption context.

As the real service does ("AWS KMS Cryptographic Details", section "Encrypt"), the key material never encrypts data
itself: a message key is derived from it with the SP 800-108 KDF in counter mode (HMAC-SHA-256) over a random 16-byte
nonce, so the limit of 2^32 random IVs per key is never near. The layout is ours; AWS's is not public.

Version 1, big-endian::

    offset | size | field
    -------+------+-----------------------------------------------
    0      | 4    | magic, "KLCB"
    4      | 1    | version, 1
    5      | 16   | key id (the UUID's bytes)
    21     | 32   | key material id
    53     | 16   | KDF nonce
    69     | 12   | GCM IV
    81     | n    | ciphertext (1 … 4096)
    81+n   | 16   | GCM tag

AAD = the 81 bytes of header, then the canonical encryption context: pairs sorted by UTF-8 name, each string behind its
length (4 bytes). No context and an empty context are the same.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from customercloud.aws.errors import AwsError

_HEADER: Final = struct.Struct(">4sB16s32s16s12s")
_MAGIC: Final = b"KLCB"
_VERSION: Final = 1
_TAG_SIZE_BYTES: Final = 16
HEADER_SIZE_BYTES: Final = _HEADER.size


def invalid_ciphertext() -> AwsError:
    """AWS's answer to garbage, a flipped bit and a wrong context alike; the message is empty there too."""
    return AwsError("InvalidCiphertextException")


def canonical_context(context: Mapping[str, str]) -> bytes:
    """Injective: no two contexts share an encoding."""
    parts = []
    for name, value in sorted((n.encode(), v.encode()) for n, v in context.items()):
        parts += [struct.pack(">I", len(name)), name, struct.pack(">I", len(value)), value]
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class CiphertextBlob:
    key_id: str
    material_id: str
    kdf_nonce: bytes
    iv: bytes
    ciphertext: bytes
    """Ciphertext and tag."""

    def header(self) -> bytes:
        return _HEADER.pack(
            _MAGIC, _VERSION, uuid.UUID(self.key_id).bytes, bytes.fromhex(self.material_id), self.kdf_nonce, self.iv
        )

    def serialize(self) -> bytes:
        return self.header() + self.ciphertext

    @classmethod
    def parse(cls, blob: bytes) -> CiphertextBlob:
        """Raises InvalidCiphertextException for anything that `serialize` cannot have made."""
        if len(blob) < HEADER_SIZE_BYTES + 1 + _TAG_SIZE_BYTES:
            raise invalid_ciphertext()
        magic, version, key, material, nonce, iv = _HEADER.unpack_from(blob)
        if magic != _MAGIC or version != _VERSION:
            raise invalid_ciphertext()
        return cls(str(uuid.UUID(bytes=key)), material.hex(), nonce, iv, blob[HEADER_SIZE_BYTES:])


def _message_key(material: bytes, nonce: bytes) -> bytes:
    kdf = KBKDFHMAC(
        algorithm=hashes.SHA256(),
        mode=Mode.CounterMode,
        length=32,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=b"customercloud kms message key v1",
        context=nonce,
        fixed=None,
    )
    return kdf.derive(material)


def seal(key_id: str, material_id: str, material: bytes, plaintext: bytes, context: Mapping[str, str]) -> bytes:
    blob = CiphertextBlob(key_id, material_id, os.urandom(16), os.urandom(12), b"")
    aad = blob.header() + canonical_context(context)
    return blob.header() + AESGCM(_message_key(material, blob.kdf_nonce)).encrypt(blob.iv, plaintext, aad)


def open_blob(blob: CiphertextBlob, material: bytes, context: Mapping[str, str]) -> bytes:
    """Raises InvalidCiphertextException when a byte of the blob or the context is not what was sealed."""
    aad = blob.header() + canonical_context(context)
    try:
        return AESGCM(_message_key(material, blob.kdf_nonce)).decrypt(blob.iv, blob.ciphertext, aad)
    except InvalidTag:
        raise invalid_ciphertext() from None
