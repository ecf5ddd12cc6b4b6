"""SCRAM-SHA-256 (RFC 5802, RFC 7677) as PostgreSQL speaks it: both ends, without channel binding, and stored verifiers.

    client-first   n,,n=<user>,r=<client nonce>
    server-first   r=<client nonce><server nonce>,s=<salt>,i=<iterations>
    client-final   c=biws,r=<both nonces>,p=<ClientProof>
    server-final   v=<ServerSignature>

    SaltedPassword  = PBKDF2-HMAC-SHA-256(SASLprep(password), salt, iterations)
    ClientKey       = HMAC(SaltedPassword, "Client Key")         StoredKey       = SHA-256(ClientKey)
    ServerKey       = HMAC(SaltedPassword, "Server Key")         AuthMessage     = the three messages, bare, with commas
    ClientProof     = ClientKey XOR HMAC(StoredKey, AuthMessage) ServerSignature = HMAC(ServerKey, AuthMessage)

Postgres ignores the user name inside SCRAM (the start-up packet names the user) and falls back to the raw password
where SASLprep refuses it (pg_saslprep's callers in scram-common.c and fe-auth-scram.c); so do we.

A server that relays (a proxy) learns the ClientKey from a successful exchange and can use it to log in upstream as
the same user: `ScramClient` takes keys in place of a password (RFC 5802, section 3).

Nonces are passed in: 18 random bytes in base64, fresh for every exchange.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import re
import stringprep
import unicodedata
from dataclasses import dataclass, field
from typing import Final, Self

from shared.crypto.secret import SecretKey
from shared.errors import UnauthenticatedError
from shared.wire.buffer import ProtocolViolationError

MECHANISM: Final = "SCRAM-SHA-256"
DEFAULT_ITERATIONS: Final = 4096
"""SCRAM_SHA_256_DEFAULT_ITERATIONS of common/scram-common.h."""
SALT_LENGTH_BYTES: Final = 16
"""SCRAM_DEFAULT_SALT_LEN."""
KEY_LENGTH_BYTES: Final = 32
NONCE_LENGTH_BYTES: Final = 18
"""SCRAM_RAW_NONCE_LEN."""

_ITERATIONS_MAX: Final = 1_000_000
"""About half a second of CPU: a hostile server must not be able to ask for more."""
_NONCE: Final = re.compile(r"[\x21-\x2b\x2d-\x7e]+", re.ASCII)
_GS2_NO_BINDING: Final = "n,,"
_CHANNEL_BINDINGS: Final = {"n,,": "biws", "y,,": "eSws"}


class ScramAuthenticationError(UnauthenticatedError):
    """The other side does not know the password (or keys), or is not who it claims to be."""

    sqlstate = "28P01"


# Passwords and keys.


def saslprep(text: str) -> str:
    """RFC 4013. Raises ValueError where the profile refuses `text`."""
    # Map: non-ASCII spaces to space, "commonly mapped to nothing" to nothing.
    mapped = "".join(
        " " if stringprep.in_table_c12(character) else character
        for character in text
        if not stringprep.in_table_b1(character)
    )
    prepared = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
    if not prepared:
        raise ValueError("nothing is left of the text")
    if any(
        prohibited(character)
        for character in prepared
        for prohibited in (
            stringprep.in_table_a1,
            stringprep.in_table_c12,
            stringprep.in_table_c21_c22,
            stringprep.in_table_c3,
            stringprep.in_table_c4,
            stringprep.in_table_c5,
            stringprep.in_table_c6,
            stringprep.in_table_c7,
            stringprep.in_table_c8,
            stringprep.in_table_c9,
        )
    ):
        raise ValueError("the text has a prohibited character")
    right_to_left = [stringprep.in_table_d1(character) for character in prepared]
    if any(right_to_left):  # RFC 3454, section 6
        if any(stringprep.in_table_d2(character) for character in prepared):
            raise ValueError("the text mixes directions")
        if not (right_to_left[0] and right_to_left[-1]):
            raise ValueError("right-to-left text must begin and end so")
    return prepared


def _password_bytes(password: str) -> bytes:
    with contextlib.suppress(ValueError):  # as Postgres: else the raw password
        password = saslprep(password)
    return password.encode("utf-8", "surrogateescape")


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _xor(left: bytes | memoryview, right: bytes) -> bytearray:
    return bytearray(a ^ b for a, b in zip(left, right, strict=True))


@dataclass(frozen=True, slots=True)
class ScramKeys:
    """What a client can log in with. As good as the password, for this salt and iteration count. The owner wipes
    `client_key`."""

    client_key: SecretKey
    server_key: bytes = field(repr=False)

    @classmethod
    def derive(cls, password: str, salt: bytes, iterations: int) -> Self:
        salted = hashlib.pbkdf2_hmac("sha256", _password_bytes(password), salt, iterations)
        return cls(SecretKey(_hmac(salted, b"Client Key")), _hmac(salted, b"Server Key"))

    @property
    def stored_key(self) -> bytes:
        return hashlib.sha256(self.client_key.reveal()).digest()


@dataclass(frozen=True, slots=True)
class ScramVerifier:
    """What a server stores: enough to check a client, not enough to log in as one.

    Text form as in pg_authid.rolpassword: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, all base64.
    CREATE ROLE … PASSWORD takes it as it is, so a password need never reach the server.
    """

    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def compute(cls, password: str, salt: bytes, iterations: int = DEFAULT_ITERATIONS) -> Self:
        """`salt`: 16 random bytes, fresh for every password."""
        keys = ScramKeys.derive(password, salt, iterations)
        return cls(iterations, salt, keys.stored_key, keys.server_key)

    @classmethod
    def decoy(cls, user: bytes, secret: bytes) -> Self:
        """For a user that does not exist: no client passes it, and without `secret` nobody sees that it is not real.

        The salt depends on the user only, so that asking twice tells nothing. With the cluster's mock authentication
        nonce as `secret`, it is Postgres's own (scram_mock_salt in auth-scram.c).
        """
        salt = hashlib.sha256(user + secret).digest()[:SALT_LENGTH_BYTES]
        # ClientKey is unknown to everybody: StoredKey is not the hash of anything that we know.
        material = _hmac(secret, user)
        return cls(DEFAULT_ITERATIONS, salt, _hmac(material, b"decoy stored key"), _hmac(material, b"decoy server key"))

    def serialize(self) -> str:
        return (
            f"{MECHANISM}${self.iterations}:{_base64(self.salt)}${_base64(self.stored_key)}:{_base64(self.server_key)}"
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError, without repeating `text`."""
        match = re.fullmatch(
            r"SCRAM-SHA-256\$([0-9]{1,9}):([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+):([A-Za-z0-9+/=]+)", text, re.ASCII
        )
        if match is None:
            raise ValueError("not a SCRAM-SHA-256 verifier")
        iterations = int(match[1])
        salt, stored_key, server_key = (_unbase64(part) for part in match.group(2, 3, 4))
        if iterations < 1 or not salt or not len(stored_key) == len(server_key) == KEY_LENGTH_BYTES:
            raise ValueError("not a SCRAM-SHA-256 verifier")
        return cls(iterations, salt, stored_key, server_key)

    def check_password(self, password: str) -> bool:
        """In constant time, but for the key derivation."""
        keys = ScramKeys.derive(password, self.salt, self.iterations)
        return hmac.compare_digest(keys.stored_key, self.stored_key)


# The exchange.


class ScramClient:
    """One login. Call in order: `first`, `final`, `verify`; nothing may be believed before `verify` returned."""

    def __init__(
        self,
        credentials: str | ScramKeys,
        client_nonce: str,
        *,
        user: str = "",
        iterations_min: int = DEFAULT_ITERATIONS,
    ) -> None:
        """`credentials`: the password, or the keys that match the server's salt and iterations.

        `iterations_min`: a server (or somebody in its place) that asks a password for fewer is refused; few iterations
        make it cheap to guess from the proof. Postgres expects an empty `user`.
        """
        if not _NONCE.fullmatch(client_nonce):
            raise ValueError("a nonce is printable ASCII without commas")
        self._credentials = credentials
        self._nonce = client_nonce
        self._iterations_min = iterations_min
        self._first_bare = f"n={user.replace('=', '=3D').replace(',', '=2C')},r={client_nonce}"
        self._server_signature: bytes | None = None

    def first(self) -> bytes:
        return (_GS2_NO_BINDING + self._first_bare).encode()

    def final(self, server_first: bytes) -> bytes:
        """Costs `iterations` rounds of SHA-256 (a few ms), unless keys were given. Raises ProtocolViolationError."""
        text = _text(server_first)
        nonce, salt_text, iterations_text = _attributes(text, "r", "s", "i")
        if not nonce.startswith(self._nonce) or nonce == self._nonce or not _NONCE.fullmatch(nonce):
            raise ProtocolViolationError("SCRAM: the server's nonce does not extend ours")
        salt = _decoded(salt_text)
        if not re.fullmatch(r"[1-9][0-9]{0,8}", iterations_text, re.ASCII):
            raise ProtocolViolationError("SCRAM: invalid iteration count")
        iterations = int(iterations_text)
        match self._credentials:
            case ScramKeys() as keys:
                pass  # as many as the role was made with: nothing is derived here
            case str(password):
                if not salt or not self._iterations_min <= iterations <= _ITERATIONS_MAX:
                    raise ProtocolViolationError("SCRAM: no salt, or an iteration count out of bounds")
                keys = ScramKeys.derive(password, salt, iterations)
        final_bare = f"c={_CHANNEL_BINDINGS[_GS2_NO_BINDING]},r={nonce}"
        auth_message = f"{self._first_bare},{text},{final_bare}".encode()
        self._server_signature = _hmac(keys.server_key, auth_message)
        proof = _xor(keys.client_key.reveal(), _hmac(keys.stored_key, auth_message))
        return f"{final_bare},p={_base64(proof)}".encode()

    def verify(self, server_final: bytes) -> None:
        """Raises ScramAuthenticationError unless the server has proved that it knows the verifier."""
        if self._server_signature is None:
            raise ProtocolViolationError("SCRAM: the server's last message came too early")
        text = _text(server_final)
        if text.startswith("e="):
            raise ScramAuthenticationError("the server refused the SCRAM login")
        (signature,) = _attributes(text, "v")
        if not hmac.compare_digest(_decoded(signature), self._server_signature):
            raise ScramAuthenticationError("the server does not know the password's verifier")


class ScramServer:
    """One login, the server's end. Call in order: `first`, `final`."""

    def __init__(self, verifier: ScramVerifier, server_nonce: str) -> None:
        if not _NONCE.fullmatch(server_nonce):
            raise ValueError("a nonce is printable ASCII without commas")
        self._verifier = verifier
        self._server_nonce = server_nonce
        self._first: tuple[str, str, str] | None = None  # channel binding expected, both nonces, start of AuthMessage

    def first(self, client_first: bytes) -> bytes:
        """Raises ProtocolViolationError, also for a client that insists on channel binding."""
        text = _text(client_first)
        header = text[:3]
        if header not in _CHANNEL_BINDINGS:
            raise ProtocolViolationError("SCRAM: channel binding and authorization identities are not supported")
        bare = text[3:]
        user, nonce = _attributes(bare, "n", "r")
        if not _NONCE.fullmatch(nonce) or re.search(r"=(?!2C|3D)", user):
            raise ProtocolViolationError("SCRAM: malformed user name or nonce")
        both = nonce + self._server_nonce
        reply = f"r={both},s={_base64(self._verifier.salt)},i={self._verifier.iterations}"
        self._first = (_CHANNEL_BINDINGS[header], both, f"{bare},{reply}")
        return reply.encode()

    def final(self, client_final: bytes) -> tuple[bytes, ScramKeys]:
        """The last message to the client, and the keys that it has proved to know.

        Raises ScramAuthenticationError for a wrong proof, ProtocolViolationError for anything malformed.
        """
        if self._first is None:
            raise ProtocolViolationError("SCRAM: the client's last message came too early")
        expected_binding, both, auth_start = self._first
        self._first = None  # one attempt per exchange
        text = _text(client_final)
        binding, nonce, proof_text = _attributes(text, "c", "r", "p")
        if binding != expected_binding or nonce != both:
            raise ProtocolViolationError("SCRAM: channel binding or nonce differ from the first message")
        proof = _decoded(proof_text)
        if len(proof) != KEY_LENGTH_BYTES:
            raise ProtocolViolationError("SCRAM: malformed proof")
        auth_message = f"{auth_start},{text.rpartition(',p=')[0]}".encode()
        client_key = _xor(proof, _hmac(self._verifier.stored_key, auth_message))
        keys = ScramKeys(SecretKey(client_key), self._verifier.server_key)
        if not hmac.compare_digest(keys.stored_key, self._verifier.stored_key):
            keys.client_key.wipe()
            raise ScramAuthenticationError("password authentication failed")
        return f"v={_base64(_hmac(self._verifier.server_key, auth_message))}".encode(), keys


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolViolationError("SCRAM: message is not UTF-8") from None


def _attributes(text: str, *names: str) -> tuple[str, ...]:
    """Values of exactly these attributes, in this order. Extensions are refused: mandatory ones must be, and neither
    Postgres nor libpq sends optional ones."""
    parts = text.split(",")
    if [part[:2] for part in parts] != [f"{name}=" for name in names]:
        raise ProtocolViolationError("SCRAM: unexpected attributes")
    return tuple(part[2:] for part in parts)


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _unbase64(text: str) -> bytes:
    """Raises ValueError."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("malformed base64") from None


def _decoded(text: str) -> bytes:
    try:
        return _unbase64(text)
    except ValueError:
        raise ProtocolViolationError("SCRAM: malformed base64") from None
