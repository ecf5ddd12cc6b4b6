"""IAM identities and session tokens: users with one access key, roles with a trust policy, role sessions.

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
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from customercloud.aws.arn import role_arn, session_arn, user_arn
from customercloud.aws.authorization import Caller
from customercloud.aws.policy import PolicyKind, parse_policy

_BASE32: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_TOKEN_AAD: Final = b"customercloud aws session token v1"
_NONCE_SIZE_BYTES: Final = 12
MIN_SESSION_S: Final = 900
MAX_SESSION_S: Final = 43_200
NAME_PATTERN: Final = r"^[A-Za-z0-9_+=,.@-]{1,64}$"
EXTERNAL_ID_PATTERN: Final = r"^[A-Za-z0-9_+=,.@:/-]+$"
MIN_EXTERNAL_ID_SIZE: Final = 2
MAX_EXTERNAL_ID_SIZE: Final = 1224


def unique_id(prefix: str) -> str:
    """`AIDA…`, `AROA…`, `AKIA…`, `ASIA…`: a prefix that tells the kind, then 16 random base-32 characters (80 bits)."""
    return prefix + "".join(secrets.choice(_BASE32) for _ in range(16))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccessKey(_Record):
    access_key_id: str
    secret_access_key: str = Field(repr=False)

    @classmethod
    def new(cls, prefix: str = "AKIA") -> AccessKey:
        return cls(access_key_id=unique_id(prefix), secret_access_key=secrets.token_urlsafe(30))


class User(_Record):
    account_id: str
    name: str
    user_id: str
    access_key: AccessKey
    policies: Mapping[str, str] = Field(default_factory=dict)
    """Inline identity policies: name → document."""
    is_root: bool = False

    @property
    def arn(self) -> str:
        return f"arn:aws:iam::{self.account_id}:root" if self.is_root else user_arn(self.account_id, self.name)

    def caller(self) -> Caller:
        policies = tuple(parse_policy(document, PolicyKind.IDENTITY) for document in self.policies.values())
        return Caller(self.account_id, self.arn, self.arn, self.user_id, policies, is_root=self.is_root)


class Role(_Record):
    account_id: str
    name: str
    role_id: str
    trust_policy: str
    trust_binding: Mapping[str, str] = Field(default_factory=dict)
    policies: Mapping[str, str] = Field(default_factory=dict)
    max_session_s: int = Field(default=3600, ge=3600, le=MAX_SESSION_S)

    @property
    def arn(self) -> str:
        return role_arn(self.account_id, self.name)

    def caller(self, session_name: str) -> Caller:
        policies = tuple(parse_policy(document, PolicyKind.IDENTITY) for document in self.policies.values())
        arn = session_arn(self.account_id, self.name, session_name)
        return Caller(self.account_id, arn, self.arn, self.role_id, policies)


class Session(_Record):
    """What a session token says. Times are UTC."""

    access_key: AccessKey
    account_id: str
    role_name: str
    role_id: str
    session_name: str
    issued_at: dt.datetime
    expires_at: dt.datetime


class SessionTokens:
    """Makes and opens session tokens."""

    def __init__(self, host_key: bytes) -> None:
        kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_TOKEN_AAD)
        self._aead = AESGCM(kdf.derive(host_key))

    def issue(self, session: Session) -> str:
        nonce = os.urandom(_NONCE_SIZE_BYTES)
        sealed = self._aead.encrypt(nonce, session.model_dump_json().encode(), _TOKEN_AAD)
        return base64.b64encode(nonce + sealed).decode()

    def open(self, token: str) -> Session | None:
        """None for anything that `issue` did not make. An expired token opens; the caller looks at the clock."""
        try:
            data = base64.b64decode(token, validate=True)
            plain = self._aead.decrypt(data[:_NONCE_SIZE_BYTES], data[_NONCE_SIZE_BYTES:], _TOKEN_AAD)
            return Session.model_validate_json(plain)
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
