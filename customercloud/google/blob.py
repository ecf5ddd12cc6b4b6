"""Ciphertexts: AES-256-GCM with a random 96-bit IV under the version's key, as Cloud KMS documents for software keys.

The layout is ours; Google's is not public. Version 1, big-endian::

    offset | size | field
    -------+------+-----------------------------------------------
    0      | 4    | magic, "KLGB"
    4      | 1    | version, 1
    5      | 16   | unique id of the crypto key
    21     | 4    | number of the crypto key version
    25     | 12   | GCM IV
    37     | n    | ciphertext (0 … 65536)
    37+n   | 16   | GCM tag

AAD = the 37 bytes of header, then the caller's additional authenticated data (none and empty are the same).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from customercloud.google.errors import GoogleError, invalid_argument

_HEADER: Final = struct.Struct(">4sB16sI12s")
_MAGIC: Final = b"KLGB"
_FORMAT: Final = 1
_TAG_SIZE_BYTES: Final = 16
HEADER_SIZE_BYTES: Final = _HEADER.size


def wrong_key() -> GoogleError:
    """To another key's ciphertext, and to an empty one: it names no key."""
    return invalid_argument("Decryption failed: verify that 'name' refers to the correct CryptoKey.")


def invalid_ciphertext() -> GoogleError:
    """To what is no ciphertext, and [assumed] to a flipped bit and wrong AAD: no public report tells these apart."""
    return invalid_argument("Decryption failed: the ciphertext is invalid.")


@dataclass(frozen=True, slots=True)
class CiphertextBlob:
    key_uid: bytes
    version: int
    iv: bytes
    ciphertext: bytes
    """Ciphertext and tag."""

    def header(self) -> bytes:
        return _HEADER.pack(_MAGIC, _FORMAT, self.key_uid, self.version, self.iv)

    def serialize(self) -> bytes:
        return self.header() + self.ciphertext

    @classmethod
    def parse(cls, data: bytes) -> CiphertextBlob:
        """Raises INVALID_ARGUMENT for anything that `serialize` cannot have made."""
        if not data:
            raise wrong_key()
        if len(data) < HEADER_SIZE_BYTES + _TAG_SIZE_BYTES:
            raise invalid_ciphertext()
        magic, version, uid, number, iv = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _FORMAT:
            raise invalid_ciphertext()
        return cls(uid, number, iv, data[HEADER_SIZE_BYTES:])


def seal(key_uid: bytes, version: int, material: bytes, plaintext: bytes, aad: bytes) -> bytes:
    header = CiphertextBlob(key_uid, version, os.urandom(12), b"")
    sealed = AESGCM(material).encrypt(header.iv, plaintext, header.header() + aad)
    return header.header() + sealed


def open_blob(blob: CiphertextBlob, material: bytes, aad: bytes) -> bytes:
    """Raises INVALID_ARGUMENT when a byte of the blob or the AAD is not what was sealed."""
    try:
        return AESGCM(material).decrypt(blob.iv, blob.ciphertext, blob.header() + aad)
    except InvalidTag:
        raise invalid_ciphertext() from None
