"""Key pairs of every kind that a vault takes: made, imported, loaded."""

from __future__ import annotations

from typing import Final, Protocol, cast

from customercloud.azure import ec, errors, rsa
from customercloud.azure.bodies import Body
from customercloud.azure.keys import KEY_OPERATIONS, RSA_SIZES_BITS, KeySpec, KeyType

_MAX_NUMBER_SIZE_BYTES: Final = 512
_TYPES: Final = ("RSA", "RSA-HSM", "EC", "EC-HSM")
_OPERATIONS_OF_CURVES: Final = ("sign", "verify")


class KeyPair(Protocol):
    """A loaded private key. Its methods raise AzureError for what the algorithm does not take."""

    @property
    def signature_algorithms(self) -> tuple[str, ...]: ...
    @property
    def encryption_algorithms(self) -> tuple[str, ...]: ...
    def public_members(self) -> dict[str, str | bytes]: ...
    def encrypt(self, algorithm: str, plaintext: bytes) -> bytes: ...
    def decrypt(self, algorithm: str, ciphertext: bytes) -> bytes: ...
    def sign(self, algorithm: str, digest: bytes) -> bytes: ...
    def verify(self, algorithm: str, digest: bytes, signature: bytes) -> bool: ...


def load(spec: KeySpec, private_key: bytes) -> KeyPair:
    return rsa.RsaKey(private_key) if spec.curve is None else ec.EcKey(private_key)


def generate(spec: KeySpec) -> bytes:
    """A new private key as PKCS #8, DER. Slow for RSA: not for the event loop."""
    return rsa.generate(spec.size_bits) if spec.curve is None else ec.generate(spec.curve)


def operations_of(spec: KeySpec) -> tuple[str, ...]:
    """What its keys can do at all, which is also what they may do unless the request says otherwise."""
    return KEY_OPERATIONS if spec.curve is None else _OPERATIONS_OF_CURVES


def asked_spec(body: Body) -> KeySpec:
    """Of a create request. Raises AzureError."""
    kty = _type(body.text("kty"))
    if kty.startswith("EC"):
        return _of_curve(kty, body.optional_text("crv") or ec.DEFAULT_CURVE)
    size_bits = body.integer("key_size") or RSA_SIZES_BITS[0]
    if body.integer("public_exponent") not in (None, rsa.PUBLIC_EXPONENT):
        raise errors.invalid_value()
    return _of_size(kty, size_bits)


def imported(jwk: Body, *, hsm: bool) -> tuple[KeySpec, bytes]:
    """The spec and the private key (PKCS #8, DER) of a JSON web key. Raises AzureError."""
    kty = _type(jwk.text("kty"))
    if jwk.has("key_hsm"):
        raise errors.bad_parameter("Keys that were wrapped for a hardware module cannot be imported here.\r\n")
    kty = cast("KeyType", f"{kty.removesuffix('-HSM')}-HSM") if hsm else kty

    def number(name: str) -> bytes:
        return jwk.binary(name, _MAX_NUMBER_SIZE_BYTES)

    if kty.startswith("EC"):
        spec = _of_curve(kty, jwk.text("crv"))
        return spec, ec.imported(spec.curve or "", number("d"), number("x"), number("y"))
    size_bits, private_key = rsa.imported({name: number(name) for name in rsa.PRIVATE_MEMBERS})
    return _of_size(kty, size_bits), private_key


def _type(kty: str) -> KeyType:
    if kty in ("oct", "oct-HSM"):
        # Only a managed HSM has them.
        raise errors.key_type_not_supported(kty)
    if kty not in _TYPES:
        raise errors.invalid_value()
    return cast("KeyType", kty)


def _of_curve(kty: KeyType, curve: str) -> KeySpec:
    if curve not in ec.CURVES:
        raise errors.invalid_value()
    return KeySpec(kty, ec.CURVES[curve].curve.key_size, curve)


def _of_size(kty: KeyType, size_bits: int) -> KeySpec:
    if size_bits not in RSA_SIZES_BITS:
        raise errors.bad_parameter(f"Key size {size_bits} is not supported for key type {kty}.\r\n")
    return KeySpec(kty, size_bits)
