"""Who may call what: short-lived EdDSA tokens (RFC 8037, RFC 7519) that every caller signs with its own key.

There is no token server. Each service and each admin holds an Ed25519 *signing key* with an id (`kid`); every service
holds the same *trust bundle*: the public keys and the scopes that each key may claim. A stolen safekeeper key can
therefore never claim an admin's scope, and a token is good for one audience, for a minute, and, when it names one,
for one project only.

**Tokens for people** live longer, so they can be revoked. They say a role instead of scopes, have an id (`jti`) and
perhaps a workspace or project that they are bound to, and are signed by a key that may issue them. The keymanager
registers each by its id and digest; a service takes one only while the keymanager, asked over the key session, calls it
good (`PeopleRegistry`). They open no connection that would outlive them: `TokenVerifier.verify` refuses them, and only
`TokenVerifier.admit`, which HTTP requests go through one by one, takes them. docs/adr/0008 says why.

    claim              of a service              of a person
    -----------------  ------------------------  ---------------------------------------
    iss, sub           kid, who                  kid, who
    aud                one service               one or several
    iat, exp           at most MAX_TTL_S apart   at most MAX_PERSON_TTL_S apart
    scope              scopes, by blanks         must be absent
    jti, role          must be absent            token id, `shared.roles.PersonRole`
    project            optional                  optional
    workspace          must be absent            optional; both given: both must fit
"""

from __future__ import annotations

import enum
import hashlib
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import jwt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import InvalidInputError, PermissionDeniedError, UnauthenticatedError
from shared.ids import ProjectId, TokenId, WorkspaceId
from shared.roles import PersonRole, Scope

__all__ = [
    "DEFAULT_TTL_S",
    "MAX_PERSON_TTL_S",
    "MAX_TOKEN_SIZE_BYTES",
    "BearerToken",
    "Credentials",
    "PeopleRegistry",
    "PersonRole",
    "PersonToken",
    "Principal",
    "Scope",
    "Service",
    "TokenIssuer",
    "TokenVerifier",
    "TrustBundle",
    "TrustedKey",
]

ALGORITHM: Final = "EdDSA"
DEFAULT_TTL_S: Final = 60
MAX_TTL_S: Final = 60
"""Nothing can revoke a service's token, so it may not live longer."""
MAX_PERSON_TTL_S: Final = 90 * 24 * 3600
_CLOCK_LEEWAY_S: Final = 5
MAX_TOKEN_SIZE_BYTES: Final = 4096
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_SUBJECT: Final = re.compile(r"[ -~]{1,128}")
"""Subjects stand in logs and audit records, and their signer chooses them: printable ASCII and nothing else."""


class Service(enum.StrEnum):
    """Audience of a token, and the name (`<service>.keylake`) in the service's certificate."""

    KEYMANAGER = "keymanager"
    SAFEKEEPER = "safekeeper"
    PAGESERVER = "pageserver"
    COMPUTE = "compute"
    PROXY = "proxy"


@dataclass(frozen=True, slots=True)
class PersonToken:
    """Which token for a person this is. No other token passes as the one that was registered: the digest differs."""

    token_id: TokenId
    role: PersonRole
    digest: bytes = field(repr=False)
    """SHA-256 of the token's text."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A verified caller."""

    kid: str
    subject: str
    scopes: frozenset[Scope]
    project_id: ProjectId | None
    expires_at_s: float = math.inf
    """When the token ends, in seconds since 1970: for connections that outlive the request that opened them."""
    workspace_id: WorkspaceId | None = None
    person: PersonToken | None = None
    """None for a service."""

    @property
    def bound(self) -> bool:
        """It is good for one workspace or project only."""
        return self.project_id is not None or self.workspace_id is not None

    @property
    def actor(self) -> str:
        """Who it is, in logs and audit records."""
        return f"{self.kid}:{self.subject}" + ("" if self.person is None else f":{self.person.token_id}")

    def may_touch(self, project_id: ProjectId | None, workspace_id: WorkspaceId | None) -> bool:
        """Is this project (None: no single one), which is in this workspace (None: in none, or nobody knows), within
        what the token is bound to? Both bounds hold, each by itself."""
        right_project = self.project_id is None or project_id == self.project_id
        return right_project and (self.workspace_id is None or workspace_id == self.workspace_id)

    def require(
        self, scope: Scope, project_id: ProjectId | None = None, workspace_id: WorkspaceId | None = None
    ) -> None:
        """Raises PermissionDeniedError unless the token has `scope` and is good for this project and workspace."""
        if scope not in self.scopes:
            raise PermissionDeniedError(f"this token lacks the scope {scope}")
        if not self.may_touch(project_id, workspace_id):
            raise PermissionDeniedError("this token is for another project or workspace")


class PeopleRegistry(Protocol):
    """Who can say which tokens of people are good, and what is in which workspace: the keymanager."""

    async def confirm(self, person: PersonToken) -> None:
        """Returns when the token is registered and not revoked, by a word of now or a few seconds ago.

        Raises UnauthenticatedError when it is not good, UnavailableError when nobody can say.
        """
        ...

    async def workspaces_of(self, project_ids: Iterable[ProjectId]) -> Mapping[ProjectId, WorkspaceId]:
        """Projects that do not exist are left out. A project never leaves its workspace. Raises UnavailableError."""
        ...


class Credentials(Protocol):
    """Gives the token for a call: a signing key, or a token that a person was given."""

    def issue(self, audience: Service, scopes: Iterable[Scope], *, project_id: ProjectId | None = None) -> str: ...


class BearerToken:
    """A token that a person was given, for all calls. Shown to nobody."""

    __slots__ = ("_token",)

    def __init__(self, token: str) -> None:
        """Raises InvalidInputError when it cannot be a token."""
        if not _TOKEN.fullmatch(token) or len(token) > MAX_TOKEN_SIZE_BYTES:
            raise InvalidInputError("this is not a token: one has three parts with dots in between")
        self._token = token

    def issue(self, audience: Service, scopes: Iterable[Scope], *, project_id: ProjectId | None = None) -> str:
        return self._token

    def __repr__(self) -> str:
        return "BearerToken()"


class _SigningKeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    kid: str
    scopes: frozenset[Scope]
    private_key_pem: str


class TokenIssuer:
    """Signs tokens with one key."""

    def __init__(self, kid: str, scopes: Iterable[Scope], private_key: Ed25519PrivateKey) -> None:
        self.kid = kid
        self.scopes = frozenset(scopes)
        self._private_key = private_key

    @classmethod
    def create(cls, kid: str, scopes: Iterable[Scope]) -> TokenIssuer:
        return cls(kid, scopes, Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> TokenIssuer:
        """Raises InvalidInputError when the file is missing or malformed."""
        try:
            stored = _SigningKeyFile.model_validate_json(path.read_bytes())
            key = serialization.load_pem_private_key(stored.private_key_pem.encode(), password=None)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"cannot read the signing key file: {type(error).__name__}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidInputError("the signing key is not an Ed25519 key")
        return cls(stored.kid, stored.scopes, key)

    def save(self, path: Path) -> None:
        """Write the signing key, readable by its owner only."""
        pem = self._private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        stored = _SigningKeyFile(kid=self.kid, scopes=self.scopes, private_key_pem=pem.decode())
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(stored.model_dump_json())

    @property
    def public_key_pem(self) -> str:
        pem = self._private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return pem.decode()

    def issue(
        self,
        audience: Service,
        scopes: Iterable[Scope],
        *,
        project_id: ProjectId | None = None,
        subject: str | None = None,
        ttl_s: int = DEFAULT_TTL_S,
    ) -> str:
        """A token for one audience. Verification refuses scopes that the bundle does not grant to this key."""
        now = int(time.time())
        claims: dict[str, object] = {
            "iss": self.kid,
            "sub": subject or self.kid,
            "aud": audience.value,
            "iat": now,
            "exp": now + ttl_s,
            "scope": " ".join(sorted(scopes)),
        }
        if project_id is not None:
            claims["project"] = str(project_id)
        return self._sign(claims)

    def issue_for_person(
        self,
        role: PersonRole,
        *,
        subject: str,
        ttl_s: int,
        workspace_id: WorkspaceId | None = None,
        project_id: ProjectId | None = None,
        audiences: Iterable[Service] = Service,
    ) -> str:
        """A token for a person, which no service takes before the keymanager has registered it (`POST /v1/tokens`).

        Raises InvalidInputError for a subject that is not 1 to 128 printable ASCII characters.
        """
        if not _SUBJECT.fullmatch(subject):
            raise InvalidInputError("whose token it is, is said with 1 to 128 printable ASCII characters")
        now = int(time.time())
        claims: dict[str, object] = {
            "iss": self.kid,
            "sub": subject,
            "aud": [audience.value for audience in audiences],
            "iat": now,
            "exp": now + ttl_s,
            "jti": str(TokenId.new()),
            "role": role.value,
        }
        if workspace_id is not None:
            claims["workspace"] = str(workspace_id)
        if project_id is not None:
            claims["project"] = str(project_id)
        return self._sign(claims)

    def _sign(self, claims: dict[str, object]) -> str:
        return jwt.encode(claims, self._private_key, algorithm=ALGORITHM, headers={"kid": self.kid})

    def sign(self, label: bytes, message: bytes) -> bytes:
        """Ed25519 over `label` and `message`. A label ends with a zero byte, which no token holds: a signature of the
        one kind is never one of the other."""
        if not label.endswith(b"\0"):
            raise ValueError("a label ends with a zero byte")
        return self._private_key.sign(label + message)

    def __repr__(self) -> str:
        return f"TokenIssuer({self.kid!r})"


class TrustedKey(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    public_key_pem: str
    scopes: frozenset[Scope]


class TrustBundle(BaseModel):
    """kid → public key and the scopes it may claim. Public data; its integrity is what matters."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    keys: Mapping[str, TrustedKey]

    @classmethod
    def of(cls, issuers: Iterable[TokenIssuer]) -> TrustBundle:
        return cls(keys={i.kid: TrustedKey(public_key_pem=i.public_key_pem, scopes=i.scopes) for i in issuers})

    @classmethod
    def load(cls, path: Path) -> TrustBundle:
        """Raises InvalidInputError when the file is missing or malformed."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise InvalidInputError(f"cannot read the trust bundle: {type(error).__name__}") from None


def _public_key(kid: str, trusted: TrustedKey) -> Ed25519PublicKey:
    """Raises InvalidInputError."""
    try:
        key = serialization.load_pem_public_key(trusted.public_key_pem.encode())
    except ValueError:
        raise InvalidInputError(f"trusted key {kid} cannot be read") from None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInputError(f"trusted key {kid} is not an Ed25519 key")
    return key


class SignatureVerifier:
    """Verifies what `TokenIssuer.sign` signed, by keys of a trust bundle that may grant nothing: a key that signs
    statements of the keymanager is good for nothing else."""

    def __init__(self, bundle: TrustBundle) -> None:
        self._keys = {kid: _public_key(kid, trusted) for kid, trusted in bundle.keys.items() if not trusted.scopes}

    def verify(self, kid: str, label: bytes, message: bytes, signature: bytes) -> bool:
        """False for a key that is not in the bundle, too."""
        key = self._keys.get(kid)
        if key is None:
            return False
        try:
            key.verify(signature, label + message)
        except InvalidSignature:
            return False
        return True


class TokenVerifier:
    """Verifies tokens for one audience. Without a registry it takes none of a person."""

    def __init__(self, bundle: TrustBundle, audience: Service, people: PeopleRegistry | None = None) -> None:
        self._audience = audience
        self._people = people
        self._keys = {kid: (_public_key(kid, trusted), trusted.scopes) for kid, trusted in bundle.keys.items()}

    async def admit(self, token: str) -> Principal:
        """Whoever makes one request, a person too. Raises what `read` does, UnauthenticatedError for a token of a
        person that is not registered or was revoked, UnavailableError when nobody can say whether it was."""
        principal = self.read(token)
        if principal.person is not None:
            if self._people is None:
                raise UnauthenticatedError("this service takes no tokens of people")
            await self._people.confirm(principal.person)
        return principal

    def verify(self, token: str) -> Principal:
        """A service, also for a connection that stays. Raises what `read` does, PermissionDeniedError for people."""
        principal = self.read(token)
        if principal.person is not None:
            raise PermissionDeniedError("a person's token opens no connection that stays")
        return principal

    async def workspaces_of(
        self, principal: Principal, project_ids: Iterable[ProjectId]
    ) -> Mapping[ProjectId, WorkspaceId]:
        """As far as it matters to `principal`: empty unless its token is bound to a workspace."""
        if principal.workspace_id is None or self._people is None:
            return {}
        return await self._people.workspaces_of(project_ids)

    def read(self, token: str) -> Principal:
        """What a token says, and that its signer may say so; of a person's nothing about whether it is still good.

        Raises UnauthenticatedError for a malformed, expired, foreign or badly signed token, PermissionDeniedError
        for a good signature that claims more than its key may.
        """
        if len(token) > MAX_TOKEN_SIZE_BYTES:
            raise UnauthenticatedError("the token is too long")
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            if not isinstance(kid, str) or kid not in self._keys:
                raise UnauthenticatedError("the token is signed by a key that is not trusted here")
            key, permitted = self._keys[kid]
            claims = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=self._audience.value,
                issuer=kid,
                leeway=_CLOCK_LEEWAY_S,
                options={"require": ["exp", "iat", "aud", "iss", "sub"]},
            )
            principal = _principal(kid, token, claims)
        except jwt.ExpiredSignatureError:
            raise UnauthenticatedError("the token has expired") from None
        except jwt.InvalidAudienceError:
            raise UnauthenticatedError("the token is for another service") from None
        except (jwt.InvalidTokenError, ValueError, TypeError, KeyError, OverflowError):
            raise UnauthenticatedError("the token is not valid") from None
        if not principal.scopes <= permitted:
            raise PermissionDeniedError("the token claims scopes that its key may not grant")
        if principal.person is not None and Scope.TOKENS_ISSUE not in permitted:
            raise PermissionDeniedError("the token's key may not issue tokens for people")
        return principal


def _principal(kid: str, token: str, claims: Mapping[str, Any]) -> Principal:
    """The claims of a token whose signature, audience and time are good. Raises ValueError, TypeError, KeyError."""
    subject, life_s = str(claims["sub"]), float(claims["exp"]) - float(claims["iat"])
    if not _SUBJECT.fullmatch(subject):
        raise ValueError("the subject is not a name")
    project = ProjectId.parse(claims["project"]) if "project" in claims else None
    ends_at_s = float(claims["exp"]) + _CLOCK_LEEWAY_S
    if "role" in claims:
        role, person_token = PersonRole(claims["role"]), hashlib.sha256(token.encode()).digest()
        if "scope" in claims or life_s > MAX_PERSON_TTL_S:
            raise ValueError("a person's token has a role, no scopes, and an end")
        workspace = WorkspaceId.parse(claims["workspace"]) if "workspace" in claims else None
        person = PersonToken(TokenId.parse(claims["jti"]), role, person_token)
        return Principal(kid, subject, role.scopes, project, ends_at_s, workspace, person)
    if "jti" in claims or "workspace" in claims or life_s > MAX_TTL_S or not isinstance(claims["aud"], str):
        raise ValueError("a service's token is for one service, for a minute")
    scopes = frozenset(Scope(s) for s in str(claims["scope"]).split())
    return Principal(kid, subject, scopes, project, ends_at_s)
