"""The elliptic curves of Key Vault: they sign and verify, and nothing else.

A signature is r and s, each as long as the curve's order (RFC 7518, 3.4), as the service has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm

from customercloud.azure import errors


@dataclass(frozen=True, slots=True)
class Curve:
    curve: ec.EllipticCurve
    algorithm: str
    hashed: HashAlgorithm

    @property
    def size_bytes(self) -> int:
        return (self.curve.key_size + 7) // 8


CURVES: Final = {
    "P-256": Curve(ec.SECP256R1(), "ES256", SHA256()),
    "P-256K": Curve(ec.SECP256K1(), "ES256K", SHA256()),
    "P-384": Curve(ec.SECP384R1(), "ES384", SHA384()),
    "P-521": Curve(ec.SECP521R1(), "ES512", SHA512()),
}
DEFAULT_CURVE: Final = "P-256"
SIGNATURE_ALGORITHMS: Final = tuple(curve.algorithm for curve in CURVES.values())


def generate(curve: str) -> bytes:
    """A new private key as PKCS #8, DER."""
    return _der(ec.generate_private_key(CURVES[curve].curve))


def imported(curve: str, d: bytes, x: bytes, y: bytes) -> bytes:
    """As `generate`. Raises AzureError when the numbers are no key of this curve."""
    public = ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), CURVES[curve].curve)
    try:
        return _der(ec.EllipticCurvePrivateNumbers(int.from_bytes(d), public).private_key())
    except ValueError:
        raise errors.invalid_value() from None


def _der(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class EcKey:
    """A loaded private key."""

    def __init__(self, private_key: bytes) -> None:
        loaded = serialization.load_der_private_key(private_key, password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)  # noqa: S101 - the state says so
        self._private = loaded
        self._name, self._curve = next((n, c) for n, c in CURVES.items() if c.curve.name == loaded.curve.name)

    @property
    def signature_algorithms(self) -> tuple[str, ...]:
        return (self._curve.algorithm,)

    @property
    def encryption_algorithms(self) -> tuple[str, ...]:
        return ()

    def public_members(self) -> dict[str, str | bytes]:
        """Of the JSON web key."""
        numbers, size = self._private.public_key().public_numbers(), self._curve.size_bytes
        return {"crv": self._name, "x": numbers.x.to_bytes(size), "y": numbers.y.to_bytes(size)}

    def sign(self, algorithm: str, digest: bytes) -> bytes:
        signature = self._private.sign(digest, self._scheme(digest))
        size = self._curve.size_bytes
        return b"".join(number.to_bytes(size) for number in utils.decode_dss_signature(signature))

    def verify(self, algorithm: str, digest: bytes, signature: bytes) -> bool:
        scheme, size = self._scheme(digest), self._curve.size_bytes
        if len(signature) != 2 * size:
            return False
        r, s = int.from_bytes(signature[:size]), int.from_bytes(signature[size:])
        try:
            self._private.public_key().verify(utils.encode_dss_signature(r, s), digest, scheme)
        except InvalidSignature:
            return False
        return True

    def _scheme(self, digest: bytes) -> ec.ECDSA:
        if len(digest) != self._curve.hashed.digest_size:
            raise errors.bad_parameter(f"Invalid length of 'value': {len(digest)} bytes\r\n")
        return ec.ECDSA(utils.Prehashed(self._curve.hashed))

    def encrypt(self, algorithm: str, plaintext: bytes) -> bytes:
        raise errors.invalid_value()

    def decrypt(self, algorithm: str, ciphertext: bytes) -> bytes:
        raise errors.invalid_value()
