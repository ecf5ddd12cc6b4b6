"""IAM identities and session tokens: users with one access key, roles with a trust policy, sessions of both.

A change of an identity is seen by decisions after the propagation delay that was in force at the change, as IAM is
eventually consistent; a new identity is seen at once.

A session is not stored. As on AWS, everything about it is in its token: here JSON under AES-256-GCM with a key derived
from the host key, so a session outlives a restart and expires by the clock alone. Its role is looked up at every call:
deleting the role (or recreating it, which gives another unique id) ends its sessions.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import json
import os
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from customercloud.aws.arn import federated_arn, role_arn, root_arn, session_arn, user_arn
from customercloud.aws.authorization import Caller
from customercloud.aws.policy import Policy, PolicyKind, parse_policy
from customercloud.delayed import Delayed

_BASE32: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_TOKEN_AAD: Final = b"customercloud aws session token v1"
_NONCE_SIZE_BYTES: Final = 12
MIN_SESSION_S: Final = 900
MAX_SESSION_S: Final = 43_200
MAX_CHAINED_SESSION_S: Final = 3600
"""Of a role that is assumed by a session of a role."""
NAME_PATTERN: Final = r"^[A-Za-z0-9_+=,.@-]{1,64}$"
PATH_PATTERN: Final = r"^/([!-.0-~]+/)*$"
EXTERNAL_ID_PATTERN: Final = r"^[A-Za-z0-9_+=,.@:/-]+$"
MIN_EXTERNAL_ID_SIZE: Final = 2
MAX_EXTERNAL_ID_SIZE: Final = 1224


def unique_id(prefix: str) -> str:
    """`AIDA…`, `AROA…`: a prefix that tells the kind, then 16 random base-32 characters (80 bits)."""
    return prefix + "".join(secrets.choice(_BASE32) for _ in range(16))


def access_key_id(prefix: str, account_id: str) -> str:
    """`AKIA…`, `ASIA…`: 80 bits as above, of which bits 1 to 40 say the account, as AWS's own do."""
    account = int(account_id).to_bytes(5)
    head = (int.from_bytes(account) << 7 | secrets.randbits(7)).to_bytes(6)
    return prefix + base64.b32encode(head + secrets.token_bytes(4)).decode("ascii")


def account_of_access_key(access_key_id: str) -> str | None:
    """None for what cannot be an access key id of this form."""
    try:
        head = int.from_bytes(base64.b32decode(access_key_id[4:20])[:6])
    except (binascii.Error, ValueError):
        return None
    account_id = f"{(head >> 7) & (2**40 - 1):012}"
    return account_id if len(account_id) == 12 else None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccessKey(_Record):
    access_key_id: str
    secret_access_key: str = Field(repr=False)

    @classmethod
    def new(cls, account_id: str, prefix: str = "AKIA") -> AccessKey:
        return cls(access_key_id=access_key_id(prefix, account_id), secret_access_key=secrets.token_urlsafe(30))


class Rights(_Record):
    """What of an identity takes its time to be seen. `trust_policy` and its binding: of roles."""

    policies: Mapping[str, str] = Field(default_factory=dict)
    """Inline identity policies: name → document."""
    tags: Mapping[str, str] = Field(default_factory=dict)
    trust_policy: str = ""
    trust_binding: Mapping[str, str] = Field(default_factory=dict)

    def parsed(self) -> tuple[Policy, ...]:
        return tuple(parse_policy(document, PolicyKind.IDENTITY) for document in self.policies.values())


class _Identity(_Record):
    account_id: str
    name: str
    path: str = "/"
    rights: Delayed[Rights]
    ends_at: dt.datetime | None = None
    """It was deleted; until then it still works."""

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_version(cls, members: Any) -> Any:
        """State that was written before rights were delayed."""
        if not isinstance(members, dict) or "rights" in members:
            return members
        rights = {name: members[name] for name in Rights.model_fields if name in members}
        kept = {name: value for name, value in members.items() if name not in rights}
        return kept | {"rights": {"views": [{"visible_at": dt.datetime.min.replace(tzinfo=dt.UTC), "value": rights}]}}

    def exists(self, now: dt.datetime) -> bool:
        """For who signs requests; whoever changes identities sees a deletion at once."""
        return self.ends_at is None or now < self.ends_at


class User(_Identity):
    user_id: str
    access_key: AccessKey
    is_root: bool = False

    @property
    def arn(self) -> str:
        return root_arn(self.account_id) if self.is_root else user_arn(self.account_id, self.name, self.path)

    def caller(self, now: dt.datetime) -> Caller:
        rights = self.rights.at(now)
        return Caller(
            self.account_id,
            self.arn,
            self.arn,
            self.user_id,
            rights.parsed(),
            is_root=self.is_root,
            tags=rights.tags,
        )

    def federated_caller(self, session: UserSession, now: dt.datetime) -> Caller:
        """A federated user: at most what the user may, cut down to its session policy; without one, nothing."""
        name = session.federated_name or ""
        arn = federated_arn(self.account_id, name)
        rights = self.rights.at(now)
        return Caller(
            self.account_id,
            arn,
            arn,
            f"{self.account_id}:{name}",
            rights.parsed(),
            session_policies=_session_policies(session.policy) or (),
            tags={**rights.tags, **session.tags},
        )


class Role(_Identity):
    role_id: str
    max_session_s: int = Field(default=3600, ge=3600, le=MAX_SESSION_S)

    @property
    def arn(self) -> str:
        return role_arn(self.account_id, self.name, self.path)

    def caller(self, session: Session, now: dt.datetime) -> Caller:
        rights = self.rights.at(now)
        return Caller(
            self.account_id,
            session_arn(self.account_id, self.name, session.session_name),
            self.arn,
            self.role_id,
            rights.parsed(),
            session_policies=_session_policies(session.policy),
            tags={**rights.tags, **session.tags},
        )


def _session_policies(document: str | None) -> tuple[Policy, ...] | None:
    return None if document is None else (parse_policy(document, PolicyKind.IDENTITY),)


class _AnySession(_Record):
    """What a session token says. Times are UTC."""

    access_key: AccessKey
    account_id: str
    issued_at: dt.datetime
    expires_at: dt.datetime
    policy: str | None = None
    """The session policy: what the session was narrowed to."""
    tags: Mapping[str, str] = Field(default_factory=dict)
    source_identity: str | None = None


class Session(_AnySession):
    """Of a role (AssumeRole)."""

    role_name: str
    role_id: str
    session_name: str
    transitive_tag_keys: tuple[str, ...] = ()
    """Names of those tags that the next session in a chain of roles inherits."""


class UserSession(_AnySession):
    """Of a user (GetSessionToken), or of whom a user made by GetFederationToken."""

    user_name: str
    user_id: str
    federated_name: str | None = None


_SESSION: Final[TypeAdapter[Session | UserSession]] = TypeAdapter(Session | UserSession)


class SessionTokens:
    """Makes and opens session tokens."""

    def __init__(self, host_key: bytes) -> None:
        kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_TOKEN_AAD)
        self._aead = AESGCM(kdf.derive(host_key))

    def issue(self, session: Session | UserSession) -> str:
        nonce = os.urandom(_NONCE_SIZE_BYTES)
        sealed = self._aead.encrypt(nonce, session.model_dump_json().encode(), _TOKEN_AAD)
        return base64.b64encode(nonce + sealed).decode()

    def open(self, token: str) -> Session | UserSession | None:
        """None for anything that `issue` did not make. An expired token opens; the caller looks at the clock."""
        try:
            data = base64.b64decode(token, validate=True)
            plain = self._aead.decrypt(data[:_NONCE_SIZE_BYTES], data[_NONCE_SIZE_BYTES:], _TOKEN_AAD)
            return _SESSION.validate_json(plain)
        except (binascii.Error, InvalidTag, ValidationError, ValueError):
            return None


def is_external_id(text: str) -> bool:
    return MIN_EXTERNAL_ID_SIZE <= len(text) <= MAX_EXTERNAL_ID_SIZE and bool(re.fullmatch(EXTERNAL_ID_PATTERN, text))


def trust_policy_document(principal_arns: list[str], external_id: str | None) -> str:
    """The usual cross-account trust policy: these principals may assume the role, with this external id."""
    statement: dict[str, object] = {
        "Effect": "Allow",
        "Principal": {"AWS": principal_arns},
        "Action": "sts:AssumeRole",
    }
    if external_id is not None:
        if not is_external_id(external_id):
            raise ValueError("malformed external id")
        statement["Condition"] = {"StringEquals": {"sts:ExternalId": external_id}}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})
