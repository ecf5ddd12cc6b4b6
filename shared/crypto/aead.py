"""Seal and open: the one place where key, nonce and AAD meet.

AES-256-GCM (NIST SP 800-38D), 96-bit nonce, 128-bit tag appended. A nonce here is always a counter that the caller
owns, under a key that is used for one object only (see docs/key-hierarchy.md); wraps under a KEK take random nonces
and count them (limits.py).

The *null* suite copies instead of encrypting. It exists so that the secrecy tests have a positive control and the
benchmarks a peer, and it works only in a process that was started with KEYLAKE_UNSAFE_NULL_CIPHER=1: any other
process refuses such data, so nobody can downgrade what they did not write.
"""

from __future__ import annotations

import enum
import os
from typing import Final, Never

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.crypto.secret import KEY_SIZE_BYTES, KeyWipedError, SecretKey
from shared.errors import IntegrityError

NONCE_SIZE_BYTES: Final = 12
TAG_SIZE_BYTES: Final = 16
NULL_CIPHER_VARIABLE: Final = "KEYLAKE_UNSAFE_NULL_CIPHER"
MAX_NONCE_COUNTER: Final = (1 << 64) - 1

Buffer = bytes | bytearray | memoryview


class Suite(enum.IntEnum):
    """Cipher suite number as it stands in every header."""

    AES_256_GCM = 1
    NULL = 255


def null_cipher_allowed() -> bool:
    return os.environ.get(NULL_CIPHER_VARIABLE) == "1"


def default_suite() -> Suite:
    """What new data is sealed with in this process."""
    return Suite.NULL if null_cipher_allowed() else Suite.AES_256_GCM


def check_suite(number: int) -> Suite:
    """Raises IntegrityError for an unknown suite, and for the null suite outside of the test mode."""
    try:
        suite = Suite(number)
    except ValueError:
        raise IntegrityError(f"unknown cipher suite {number}") from None
    if suite is Suite.NULL and not null_cipher_allowed():
        raise IntegrityError("data sealed with the null suite is refused outside of tests")
    return suite


def counter_nonce(counter: int) -> bytes:
    """96-bit big-endian nonce of a 64-bit counter. Raises OverflowError when the counter is exhausted."""
    return counter.to_bytes(8, "big").rjust(NONCE_SIZE_BYTES, b"\0")


class AeadKey:
    """A cipher under one key. Wipe it when the key may no longer be used; every later call raises KeyWipedError."""

    __slots__ = ("__weakref__", "_aesgcm", "_key", "suite")
    _aesgcm: AESGCM | None

    def __init__(self, key: SecretKey, suite: Suite = Suite.AES_256_GCM) -> None:
        """Takes ownership of `key`: `wipe()` wipes it too."""
        self._key = key
        self.suite = suite
        self._aesgcm = AESGCM(key.reveal())

    def seal(self, nonce: bytes, plaintext: Buffer, aad: bytes) -> bytes:
        """Ciphertext with its tag appended: len(plaintext) + 16 bytes."""
        aesgcm = self._aesgcm  # read once: another thread may wipe the key at any time
        if aesgcm is None:
            raise KeyWipedError("this cipher was wiped")
        if self.suite is Suite.NULL:
            return bytes(plaintext) + bytes(TAG_SIZE_BYTES)
        return aesgcm.encrypt(nonce, plaintext, aad)

    def open(self, nonce: bytes, ciphertext: Buffer, aad: bytes) -> bytes:
        """Plaintext, after its tag verified. Raises IntegrityError otherwise; never returns unverified bytes."""
        aesgcm = self._aesgcm
        if aesgcm is None:
            raise KeyWipedError("this cipher was wiped")
        if self.suite is Suite.NULL:
            return bytes(ciphertext[:-TAG_SIZE_BYTES])
        if len(ciphertext) < TAG_SIZE_BYTES:
            raise IntegrityError("sealed data is shorter than its tag")
        try:
            return aesgcm.decrypt(nonce, ciphertext, aad)
        except InvalidTag:
            raise IntegrityError("sealed data does not open: wrong key, or altered, moved or truncated") from None

    def open_key(self, nonce: bytes, wrapped: Buffer, aad: bytes) -> SecretKey:
        """Open a wrapped 32-byte key straight into locked memory, leaving no other copy behind.

        Raises IntegrityError when it does not verify.
        """
        if self._aesgcm is None:
            raise KeyWipedError("this cipher was wiped")
        if len(wrapped) != KEY_SIZE_BYTES + TAG_SIZE_BYTES:
            raise IntegrityError("a wrapped key has the wrong size")
        plaintext = bytearray(KEY_SIZE_BYTES)
        try:
            self._aesgcm.decrypt_into(nonce, wrapped, aad, plaintext)
        except InvalidTag:
            raise IntegrityError("a wrapped key does not open: wrong key or wrong context") from None
        return SecretKey(plaintext)

    @property
    def key(self) -> SecretKey:
        return self._key

    @property
    def wiped(self) -> bool:
        return self._aesgcm is None

    def wipe(self) -> None:
        self._aesgcm = None
        self._key.wipe()

    def __reduce__(self) -> Never:
        # A copy would keep its own cipher context after this one is wiped.
        raise TypeError("an AeadKey is never copied or pickled")

    def __repr__(self) -> str:
        return f"AeadKey({self.suite.name}, {'wiped' if self._aesgcm is None else '…'})"
