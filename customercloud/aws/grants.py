"""Grants: permissions on one key for one principal, given and taken back without touching a policy.

Source: KMS Developer Guide, "Grants in AWS KMS". A grant only allows; an explicit Deny in any policy beats it. It is
eventually consistent like all else, but whoever shows its token may use it at once. Its constraints speak of the
encryption context and so of cryptographic operations only.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from customercloud.aws.arn import root_arn
from customercloud.aws.authorization import Caller

CRYPTOGRAPHIC: Final = frozenset(
    {
        "Decrypt",
        "Encrypt",
        "GenerateDataKey",
        "GenerateDataKeyWithoutPlaintext",
        "GenerateDataKeyPair",
        "GenerateDataKeyPairWithoutPlaintext",
        "ReEncryptFrom",
        "ReEncryptTo",
    }
)
OPERATIONS: Final = CRYPTOGRAPHIC | {"CreateGrant", "RetireGrant", "DescribeKey"}
"""What a grant on a symmetric key can allow."""


class Constraints(BaseModel):
    """At most one of the first two."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subset: dict[str, str] | None = None
    """These pairs must be in the context; more may be."""
    equals: dict[str, str] | None = None
    source_arn: str | None = None
    """The resource on whose behalf a service calls: no caller here is one, so nobody satisfies it."""

    def allow(self, context: Mapping[str, str]) -> bool:
        """Names are compared without case, values with it (API reference, GrantConstraints)."""
        if self.equals is not None:
            return len(context) == len(self.equals) and _pairs(context) == _pairs(self.equals)
        return self.subset is None or _pairs(self.subset) <= _pairs(context)

    def at_least_as_strict_as(self, other: Constraints) -> bool:
        """Does every context that these allow satisfy `other`, too?"""
        if other.source_arn not in (None, self.source_arn):
            return False
        if other.equals is not None:
            return self.equals is not None and other.allow(self.equals)
        mine = self.equals if self.equals is not None else self.subset or {}
        return other.subset is None or _pairs(other.subset) <= _pairs(mine)


def _pairs(context: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset((name.lower(), value) for name, value in context.items())


class Principal(BaseModel):
    """A grantee or retiring principal, bound to who it was when the grant was made (see `authorization`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arn: str
    """Or the name of a service (`dynamodb.amazonaws.com`), which is nobody who calls here."""
    unique_id: str | None
    """None for an account or a service."""
    is_service: bool = False

    def is_caller(self, caller: Caller) -> bool:
        return self.arn in (caller.arn, caller.issuer_arn) and self.unique_id in (None, caller.unique_id)

    def is_session(self, caller: Caller) -> bool:
        """By the session's own ARN, which no session policy limits."""
        return self.arn == caller.arn != caller.issuer_arn

    def is_account_of(self, caller: Caller) -> bool:
        """Then the account's own identity policies decide."""
        return self.arn == root_arn(caller.account_id)


class Grant(BaseModel):
    """Immutable. Listed from `created_at` until it is ended; in force from `visible_at` until `ends_at`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grant_id: str
    token: str = Field(repr=False)
    key_id: str
    account_id: str
    """Of the key."""
    issuing_account: str
    name: str | None
    grantee: Principal
    retiring: Principal | None
    operations: tuple[str, ...]
    constraints: Constraints = Constraints()
    created_at: dt.datetime
    visible_at: dt.datetime
    ends_at: dt.datetime | None = None

    @property
    def is_listed(self) -> bool:
        return self.ends_at is None

    def in_force(self, now: dt.datetime, tokens: frozenset[str]) -> bool:
        ended = self.ends_at is not None and now >= self.ends_at
        return not ended and (now >= self.visible_at or self.token in tokens)

    def allows(self, operation: str, context: Mapping[str, str]) -> bool:
        """`operation` as grants spell it, without `kms:`."""
        if operation not in self.operations or self.constraints.source_arn is not None:
            return False
        return operation not in CRYPTOGRAPHIC or self.constraints.allow(context)

    def may_pass_on(self, operations: frozenset[str], constraints: Constraints) -> bool:
        """May its grantee make a grant of these? Nobody passes on more than they have."""
        return operations <= set(self.operations) and constraints.at_least_as_strict_as(self.constraints)
