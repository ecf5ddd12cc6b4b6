"""Keys on their way from the keymanager to a service: sealed once more, inside TLS.

TLS libraries and JSON parsers leave copies of what they carry in memory that nobody can wipe. So a DEK travels under
a session key that only the two ends hold in locked memory: X25519 (RFC 7748) with ephemeral keys on both sides,
HKDF-SHA256 over the shared secret and both public keys, then AES-256-GCM under a counter. TLS authenticates the
exchange; this layer only keeps keys out of buffers.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.crypto.aead import NONCE_SIZE_BYTES, AeadKey, counter_nonce
from shared.crypto.secret import SecretKey
from shared.errors import CorruptedError

_LABEL: Final = b"keylake/v1/key-transport"


class KeyTransport:
    """One end of a session. The keymanager seals, the service opens; the nonce stands before each sealed key."""

    def __init__(self) -> None:
        self._private: X25519PrivateKey | None = X25519PrivateKey.generate()
        self.public: Final = self._private.public_key().public_bytes_raw()
        self._cipher: AeadKey | None = None
        self._sealed = 0

    def agree(self, client_public: bytes, server_public: bytes) -> None:
        """Finish the exchange; `self.public` must be one of the two. Raises CorruptedError for a bad peer key."""
        if self._private is None:
            raise RuntimeError("key transport was agreed already")
        peer = server_public if self.public == client_public else client_public
        try:
            shared_secret = self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise CorruptedError("the peer's transport key is not usable") from None
        kdf = HKDF(algorithm=SHA256(), length=32, salt=None, info=_LABEL + client_public + server_public)
        self._cipher = AeadKey(SecretKey(bytearray(kdf.derive(shared_secret))))
        self._private = None

    def seal_key(self, key: SecretKey, aad: bytes) -> bytes:
        """60 bytes: nonce, wrapped key, tag."""
        if self._cipher is None:
            raise RuntimeError("key transport is not agreed yet")
        nonce = counter_nonce(self._sealed)
        self._sealed += 1
        return nonce + self._cipher.seal(nonce, key.reveal(), aad)

    def open_key(self, sealed: bytes, aad: bytes) -> SecretKey:
        """Raises IntegrityError when it was not sealed for this session and this AAD."""
        if self._cipher is None:
            raise RuntimeError("key transport is not agreed yet")
        return self._cipher.open_key(sealed[:NONCE_SIZE_BYTES], sealed[NONCE_SIZE_BYTES:], aad)

    def wipe(self) -> None:
        self._private = None
        if self._cipher is not None:
            self._cipher.wipe()
