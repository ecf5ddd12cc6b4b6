"""Backups of keys: the whole key, sealed by the service, opaque to who keeps it.

As in the real service a backup outlives the key, its purge included, and is restored to any vault of the same owner.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import ValidationError

from customercloud.azure.errors import AzureError, bad_parameter
from customercloud.azure.keys import Key

MAX_BACKUP_SIZE_BYTES: Final = 40 * 1024
_INFO: Final = b"customercloud azure key backup v1"
_NONCE_SIZE_BYTES: Final = 12


class Backups:
    def __init__(self, secret: bytes) -> None:
        """`secret`: of this cloud alone, and kept as long as backups are to be of use."""
        self._aead = AESGCM(HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_INFO).derive(secret))

    def seal(self, tenant_id: str, key: Key) -> bytes:
        """Raises AzureError for a key of too many versions (the real service: 500)."""
        nonce = os.urandom(_NONCE_SIZE_BYTES)
        blob = nonce + self._aead.encrypt(nonce, key.model_dump_json().encode(), _INFO + tenant_id.encode())
        if len(blob) > MAX_BACKUP_SIZE_BYTES:
            raise AzureError(403, "Forbidden", f"Key {key.name} has too many versions to be backed up.")
        return blob

    def open(self, tenant_id: str, blob: bytes) -> Key:
        """Raises AzureError for what `seal` did not make for this tenant."""
        try:
            nonce, sealed = blob[:_NONCE_SIZE_BYTES], blob[_NONCE_SIZE_BYTES:]
            return Key.model_validate_json(self._aead.decrypt(nonce, sealed, _INFO + tenant_id.encode()))
        except (InvalidTag, ValueError, ValidationError):
            raise bad_parameter("Backup blob contains invalid or corrupt version.") from None
