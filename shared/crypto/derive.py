"""Keys made of keys: HKDF-Expand with SHA-256 (RFC 5869, section 2.3).

Without the Extract step, which makes a uniform key of something that is none (section 3.3): a `SecretKey` is one.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from shared.crypto.secret import KEY_SIZE_BYTES, SecretKey


def derive_key(key: SecretKey, label: bytes) -> SecretKey:
    """The one key that `key` yields for `label`; nobody can tell `key` from it, nor the key of another label.

    No label may be the beginning of another one that is used with the same key. `key` stays the caller's. Raises
    KeyWipedError.
    """
    # Not `derive`: it returns bytes, and nobody can overwrite those.
    derived = bytearray(KEY_SIZE_BYTES)
    HKDFExpand(algorithm=SHA256(), length=KEY_SIZE_BYTES, info=label).derive_into(key.reveal(), derived)
    return SecretKey(derived)
