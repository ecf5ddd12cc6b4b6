"""Everything the simulated AWS knows, in memory and in one sealed file.

Every change makes a new immutable snapshot, writes it durably and only then becomes visible, so that a crash or a full
disk never leaves memory and disk apart. A change costs one small file write: there are few of them (calls that use keys
change nothing).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from customercloud.aws import arn as arns
from customercloud.aws.authorization import Binding
from customercloud.aws.grants import Grant
from customercloud.aws.identity import Role, User
from customercloud.aws.keys import Key
from customercloud.aws.policy import MalformedPolicyError, Policy
from customercloud.durable import SealedFile
from shared.errors import CorruptedError

SEAL_PURPOSE: Final = b"customercloud aws state v1"


class Alias(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    account_id: str
    key_id: str
    created_at: dt.datetime
    updated_at: dt.datetime | None = None
    """When it was pointed at another key; None if never."""


class Snapshot(BaseModel):
    """All of it. Keys of the mappings: users and roles by ARN, keys by key id, aliases by alias ARN, grants by
    grant id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    accounts: frozenset[str] = frozenset()
    users: Mapping[str, User] = Field(default_factory=dict)
    roles: Mapping[str, Role] = Field(default_factory=dict)
    keys: Mapping[str, Key] = Field(default_factory=dict)
    aliases: Mapping[str, Alias] = Field(default_factory=dict)
    grants: Mapping[str, Grant] = Field(default_factory=dict)


class AwsState:
    """Reads are attributes of `snapshot`; changes go through the methods. Not thread-safe: the event loop owns it."""

    def __init__(self, file: SealedFile, region: str) -> None:
        """Raises IntegrityError or CorruptedError when the file is not ours or not whole."""
        self.region = region
        self._file = file
        data = file.read()
        try:
            self.snapshot = Snapshot() if data is None else Snapshot.model_validate_json(data)
        except ValidationError:
            raise CorruptedError("the sealed state is not a snapshot of this version") from None
        self._index()

    def _index(self) -> None:
        self._users_by_access_key = {u.access_key.access_key_id: u for u in self.snapshot.users.values()}

    def _commit(self, **update: object) -> None:
        changed = self.snapshot.model_copy(update=update)
        self._file.write(changed.model_dump_json().encode())
        self.snapshot = changed
        self._index()

    # ── identities ─────────────────────────────────────────────────────────────────────────────────────────────

    def user_by_access_key(self, access_key_id: str) -> User | None:
        return self._users_by_access_key.get(access_key_id)

    def put_user(self, user: User) -> None:
        self._commit(users={**self.snapshot.users, user.arn: user}, accounts=self.snapshot.accounts | {user.account_id})

    def remove_user(self, user: User) -> None:
        self._commit(users={arn: u for arn, u in self.snapshot.users.items() if arn != user.arn})

    def put_role(self, role: Role) -> None:
        self._commit(roles={**self.snapshot.roles, role.arn: role}, accounts=self.snapshot.accounts | {role.account_id})

    def remove_role(self, role: Role) -> None:
        self._commit(roles={arn: r for arn, r in self.snapshot.roles.items() if arn != role.arn})

    def bind_principals(self, policy: Policy) -> Binding:
        """Unique ids of the users and roles that a resource policy names.

        Raises MalformedPolicyError when one does not exist, as AWS does when such a policy is stored.
        """
        binding: dict[str, str] = {}
        for statement in policy.statements:
            for principal in statement.principals.arns if statement.principals else ():
                arn = arns.Arn.parse(principal)
                if arn is None:
                    raise MalformedPolicyError("Policy contains a statement with one or more invalid principals.")
                unique_id = self.unique_id(principal)
                if unique_id is not None:
                    binding[principal] = unique_id
                elif arn.resource != "root" or arn.account_id not in self.snapshot.accounts:
                    raise MalformedPolicyError("Policy contains a statement with one or more invalid principals.")
        return binding

    def unique_id(self, principal: str) -> str | None:
        """Of the user or role that the ARN names, or of the role behind a session; None for an account or nobody."""
        arn = arns.Arn.parse(principal)
        owner = principal
        if arn is not None and arn.service == "sts" and arn.resource.count("/") == 2:
            owner = arns.role_arn(arn.account_id, arn.resource.split("/")[1])
        if user := self.snapshot.users.get(owner):
            return user.user_id
        role = self.snapshot.roles.get(owner)
        return None if role is None else role.role_id

    # ── keys ───────────────────────────────────────────────────────────────────────────────────────────────────

    def put_key(self, key: Key) -> None:
        self._commit(keys={**self.snapshot.keys, key.key_id: key})

    def destroy_key(self, key: Key) -> None:
        """The key, its material, aliases and grants are gone. Blocks of the old file may linger on the disk."""
        self._commit(
            keys={key_id: k for key_id, k in self.snapshot.keys.items() if key_id != key.key_id},
            aliases={arn: a for arn, a in self.snapshot.aliases.items() if a.key_id != key.key_id},
            grants={grant_id: g for grant_id, g in self.snapshot.grants.items() if g.key_id != key.key_id},
        )

    def put_alias(self, alias: Alias) -> None:
        arn = arns.alias_arn(self.region, alias.account_id, alias.name)
        self._commit(aliases={**self.snapshot.aliases, arn: alias})

    def remove_alias(self, alias: Alias) -> None:
        arn = arns.alias_arn(self.region, alias.account_id, alias.name)
        self._commit(aliases={a: value for a, value in self.snapshot.aliases.items() if a != arn})

    def put_grant(self, grant: Grant) -> None:
        self._commit(grants={**self.snapshot.grants, grant.grant_id: grant})

    def remove_grant(self, grant: Grant) -> None:
        self._commit(grants={grant_id: g for grant_id, g in self.snapshot.grants.items() if grant_id != grant.grant_id})
