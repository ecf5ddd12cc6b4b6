"""A KEK wrapped under a key of Azure Key Vault, as Keylake stores it, bound to its encryption context.

Key Vault wraps with RSA-OAEP, which has no place for an encryption context. So the vault wraps a fresh *intermediate
key*, and the KEK is sealed under that with AES-256-GCM, whose AAD is everything before it in the blob and the canonical
context. Format version 1, big-endian::

    offset     | size | field
    -----------+------+--------------------------------------------------------------
    0          | 4    | magic "KLAZ"
    4          | 1    | format version, 1
    5          | 1    | wrap algorithm (1 = RSA-OAEP-256)
    6          | 2    | k, length of the key id
    8          | 2    | r, length of the wrapped intermediate key
    10         | k    | key id with its version, https://<vault>/keys/<name>/<version>, ASCII
    10 + k     | r    | intermediate key (32 bytes), wrapped by the vault
    10 + k + r | 48   | KEK, sealed under the intermediate key: 32 bytes and the tag

Why this is sound:

* Every unwrap needs the KMS. The intermediate key is random, wiped once the blob is made, and stands nowhere but under
  the vault's RSA key; without it the KEK is AES-256-GCM ciphertext. Whoever revokes the vault's key revokes the KEK.
* A blob opens under its own context only. Each intermediate key seals once, so the fixed nonce 0 is unique under it;
  GCM then authenticates the AAD. The lengths make header ‖ key id ‖ wrapped key self-delimiting, and the context's
  encoding is injective: no two (blob, context) share an AAD. Who has the intermediate key of an honest blob (that is,
  who can use the vault's key) could of course open it under any context; that holds for every KMS without AAD.
* The key id is authenticated, and it names the version: after a rotation an id without one would unwrap with the wrong
  key (the vault then answers BadParameter).

What it does not give: origin. RSA wraps with the public key, so whoever can write our database can make a blob with a
KEK of its own choosing; a symmetric KMS would not allow that. Key commitments (`envelope.py`) keep such a KEK from
opening data that was there before. Blobs of another vault or key are refused before the vault is asked (`azure.py`).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from shared.crypto.aead import TAG_SIZE_BYTES, AeadKey, counter_nonce
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import KEY_SIZE_BYTES, SecretKey
from shared.errors import CorruptedError

MAGIC: Final = b"KLAZ"
FORMAT_VERSION: Final = 1
RSA_OAEP_256: Final = 1
_HEADER: Final = struct.Struct(">4sBBHH")
_SEALED_SIZE_BYTES: Final = KEY_SIZE_BYTES + TAG_SIZE_BYTES
_MAX_KEY_ID_SIZE_BYTES: Final = 512
WRAPPED_SIZES_BYTES: Final = (256, 384, 512)
"""RSA of 2048, 3072 and 4096 bits: what the service has."""
MAX_SIZE_BYTES: Final = _HEADER.size + _MAX_KEY_ID_SIZE_BYTES + max(WRAPPED_SIZES_BYTES) + _SEALED_SIZE_BYTES
_KEY_ID: Final = re.compile(
    r"(?P<vault>https://[A-Za-z0-9.\[\]:-]{1,255})/keys/(?P<name>[0-9A-Za-z-]{1,127})/(?P<version>[0-9a-f]{32})"
)


@dataclass(frozen=True, slots=True)
class VersionedKeyId:
    vault_url: str
    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> VersionedKeyId:
        """Raises CorruptedError when it is not the id of one version of a key."""
        match = _KEY_ID.fullmatch(text)
        if match is None or len(text) > _MAX_KEY_ID_SIZE_BYTES:
            raise CorruptedError("not the id of a key version in Azure Key Vault")
        return cls(match["vault"], match["name"], match["version"])

    def __str__(self) -> str:
        return f"{self.vault_url}/keys/{self.name}/{self.version}"

    def is_of(self, vault_url: str, name: str) -> bool:
        """Is it a version of this key? Azure compares both names without regard to case."""
        return (self.vault_url.lower(), self.name.lower()) == (vault_url.lower(), name.lower())


@dataclass(frozen=True, slots=True)
class AzureBlob:
    """A parsed blob. Everything in it may be public."""

    key_id: VersionedKeyId
    wrapped: bytes
    """The intermediate key, wrapped by the vault."""
    sealed: bytes

    @classmethod
    def parse(cls, data: bytes) -> AzureBlob:
        """Raises CorruptedError when `data` is not a blob of a version that we know."""
        if not _HEADER.size <= len(data) <= MAX_SIZE_BYTES:
            raise CorruptedError(f"a KEK wrapped by Azure does not have {len(data)} bytes")
        magic, version, algorithm, key_id_size, wrapped_size = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise CorruptedError("not a KEK wrapped by Azure: wrong magic")
        if (version, algorithm) != (FORMAT_VERSION, RSA_OAEP_256):
            raise CorruptedError(f"format version {version} with algorithm {algorithm} is not supported")
        end_of_id = _HEADER.size + key_id_size
        end_of_wrapped = end_of_id + wrapped_size
        if wrapped_size not in WRAPPED_SIZES_BYTES or len(data) != end_of_wrapped + _SEALED_SIZE_BYTES:
            raise CorruptedError("the lengths in a KEK wrapped by Azure do not fit")
        try:
            key_id = data[_HEADER.size : end_of_id].decode("ascii")
        except UnicodeDecodeError:
            raise CorruptedError("the key id of a KEK wrapped by Azure is not ASCII") from None
        return cls(VersionedKeyId.parse(key_id), data[end_of_id:end_of_wrapped], data[end_of_wrapped:])

    def serialize(self) -> bytes:
        return _prefix(self.key_id, self.wrapped) + self.sealed

    def open(self, intermediate: SecretKey, context: EncryptionContext) -> SecretKey:
        """The KEK. Takes ownership of `intermediate`. Raises IntegrityError for another key, context or blob."""
        cipher = AeadKey(intermediate)
        try:
            return cipher.open_key(counter_nonce(0), self.sealed, _prefix(self.key_id, self.wrapped) + context.to_aad())
        finally:
            cipher.wipe()


def seal_kek(
    kek: SecretKey, intermediate: SecretKey, key_id: VersionedKeyId, wrapped: bytes, context: EncryptionContext
) -> AzureBlob:
    """Takes ownership of `intermediate`, which must be fresh: it seals once. The caller keeps `kek`.

    `wrapped` is the intermediate key as the version `key_id` wrapped it. Raises CorruptedError when that has a size
    that no RSA key of the service gives.
    """
    if len(wrapped) not in WRAPPED_SIZES_BYTES:
        raise CorruptedError(f"an RSA key of Azure Key Vault does not wrap to {len(wrapped)} bytes")
    cipher = AeadKey(intermediate)
    try:
        sealed = cipher.seal(counter_nonce(0), kek.reveal(), _prefix(key_id, wrapped) + context.to_aad())
    finally:
        cipher.wipe()
    return AzureBlob(key_id, wrapped, sealed)


def _prefix(key_id: VersionedKeyId, wrapped: bytes) -> bytes:
    """Everything before the sealed KEK, which is the first part of its AAD."""
    encoded = str(key_id).encode("ascii")
    return _HEADER.pack(MAGIC, FORMAT_VERSION, RSA_OAEP_256, len(encoded), len(wrapped)) + encoded + wrapped
