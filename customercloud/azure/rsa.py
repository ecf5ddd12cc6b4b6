"""The RSA of Key Vault: key pairs and the algorithms of its encrypt, wrapkey, sign and their inverses.

`cryptography` does the work. RSA1_5 and RSA-OAEP (SHA-1) are weak and there because the service has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, SHA384, SHA512, HashAlgorithm

from customercloud.azure import errors

PUBLIC_EXPONENT: Final = 65537
_OAEP_HASHES: Final[dict[str, HashAlgorithm]] = {
    "RSA-OAEP": SHA1(),  # noqa: S303 - the algorithm is defined with it
    "RSA-OAEP-256": SHA256(),
}
ENCRYPTION_ALGORITHMS: Final = ("RSA-OAEP", "RSA-OAEP-256", "RSA1_5")
_SIGNATURE_HASHES: Final[dict[str, HashAlgorithm]] = {"256": SHA256(), "384": SHA384(), "512": SHA512()}
SIGNATURE_ALGORITHMS: Final = tuple(f"{family}{size}" for family in ("RS", "PS") for size in _SIGNATURE_HASHES)


PRIVATE_MEMBERS: Final = ("n", "e", "d", "p", "q", "dp", "dq", "qi")
"""Of a JSON web key."""


def imported(members: Mapping[str, bytes]) -> tuple[int, bytes]:
    """(size in bits, the private key as `generate` gives it) of `PRIVATE_MEMBERS`. Raises AzureError when they are no
    key."""
    n, e, d, p, q, dp, dq, qi = (int.from_bytes(members[name]) for name in PRIVATE_MEMBERS)
    try:
        private = rsa.RSAPrivateNumbers(p, q, d, dp, dq, qi, rsa.RSAPublicNumbers(e, n)).private_key()
    except ValueError:
        raise errors.invalid_value() from None
    return private.key_size, _der(private)


def generate(size_bits: int) -> bytes:
    """A new private key as PKCS #8, DER. Takes 0.1 s (2048 bits) to several seconds (4096): not for the event loop."""
    private = rsa.generate_private_key(public_exponent=PUBLIC_EXPONENT, key_size=size_bits)
    return _der(private)


def _der(private: rsa.RSAPrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class RsaKey:
    """A loaded private key."""

    def __init__(self, private_key: bytes) -> None:
        # Its primes are not tested again (which takes as long as making a key): it was made or tested here and lay
        # sealed.
        loaded = serialization.load_der_private_key(private_key, password=None, unsafe_skip_rsa_key_validation=True)
        assert isinstance(loaded, rsa.RSAPrivateKey)  # noqa: S101 - the state holds no others
        self._private = loaded
        self._public = loaded.public_key()

    @property
    def signature_algorithms(self) -> tuple[str, ...]:
        return SIGNATURE_ALGORITHMS

    @property
    def encryption_algorithms(self) -> tuple[str, ...]:
        return ENCRYPTION_ALGORITHMS

    def public_members(self) -> dict[str, str | bytes]:
        """Of the JSON web key."""
        numbers = self._public.public_numbers()
        return {name: v.to_bytes((v.bit_length() + 7) // 8) for name, v in (("n", numbers.n), ("e", numbers.e))}

    def encrypt(self, algorithm: str, plaintext: bytes) -> bytes:
        """Raises AzureError for an unknown algorithm, and for more bytes than the padding leaves room for."""
        try:
            return self._public.encrypt(plaintext, _encryption_padding(algorithm))
        except ValueError:
            raise errors.incorrect_parameter() from None

    def decrypt(self, algorithm: str, ciphertext: bytes) -> bytes:
        """Raises AzureError, always the same, when the key did not make it.

        RSA1_5 never does: OpenSSL's implicit rejection answers random bytes instead, and so gives no padding oracle.
        """
        try:
            return self._private.decrypt(ciphertext, _encryption_padding(algorithm))
        except ValueError:
            raise errors.incorrect_parameter() from None

    def sign(self, algorithm: str, digest: bytes) -> bytes:
        scheme, hashed = _signature_scheme(algorithm, digest)
        return self._private.sign(digest, scheme, hashed)

    def verify(self, algorithm: str, digest: bytes, signature: bytes) -> bool:
        scheme, hashed = _signature_scheme(algorithm, digest)
        try:
            self._public.verify(signature, digest, scheme, hashed)
        except InvalidSignature:
            return False
        return True


def _encryption_padding(algorithm: str) -> padding.AsymmetricPadding:
    if algorithm == "RSA1_5":
        return padding.PKCS1v15()
    hashed = _OAEP_HASHES.get(algorithm)
    if hashed is None:
        raise errors.invalid_value()
    return padding.OAEP(padding.MGF1(hashed), hashed, None)


def _signature_scheme(algorithm: str, digest: bytes) -> tuple[padding.AsymmetricPadding, utils.Prehashed]:
    if algorithm not in SIGNATURE_ALGORITHMS:
        raise errors.invalid_value()
    hashed = _SIGNATURE_HASHES[algorithm[2:]]
    if len(digest) != hashed.digest_size:
        raise errors.bad_parameter(f"Invalid length of 'value': {len(digest)} bytes\r\n")
    scheme: padding.AsymmetricPadding = padding.PKCS1v15()
    if algorithm.startswith("PS"):
        scheme = padding.PSS(padding.MGF1(hashed), padding.PSS.DIGEST_LENGTH)
    return scheme, utils.Prehashed(hashed)
