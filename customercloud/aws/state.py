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
from customercloud.aws.patterns import MalformedPolicyError
from customercloud.aws.policy import Policy
from customercloud.delayed import Delayed
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
    targets: Delayed[str | None] | None = None
    """Key ids that requests which name the alias are led to, None for none; without any, it is `key_id`."""
    is_listed: bool = True
    """False once it is deleted, until that is seen everywhere."""

    def target(self, now: dt.datetime) -> str | None:
        return self.key_id if self.targets is None else self.targets.at(now)

    @classmethod
    def new(cls, name: str, account_id: str, key_id: str, now: dt.datetime, delay: dt.timedelta) -> Alias:
        targets = Delayed[str | None].of(None, now).then(key_id, now, delay)
        return cls(name=name, account_id=account_id, key_id=key_id, created_at=now, targets=targets)

    def pointed_at(self, key_id: str, now: dt.datetime, delay: dt.timedelta) -> Alias:
        return self._changed(key_id, now, delay, key_id=key_id, updated_at=now)

    def ended(self, now: dt.datetime, delay: dt.timedelta) -> Alias:
        return self._changed(None, now, delay, is_listed=False)

    def again(self, new: Alias, now: dt.datetime, delay: dt.timedelta) -> Alias:
        """`new`, under the name of this one, which was deleted."""
        return new.model_copy(update={"targets": self._targets(now).then(new.key_id, now, delay)})

    def _changed(self, target: str | None, now: dt.datetime, delay: dt.timedelta, **update: object) -> Alias:
        return self.model_copy(update={**update, "targets": self._targets(now).then(target, now, delay)})

    def _targets(self, now: dt.datetime) -> Delayed[str | None]:
        return self.targets or Delayed[str | None].of(self.key_id, now)


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

    def user(self, account_id: str, name: str) -> User | None:
        """That was not deleted. Names are unique in an account, whatever the path."""
        users = self.snapshot.users.values()
        return next((u for u in users if (u.account_id, u.name, u.ends_at) == (account_id, name, None)), None)

    def role(self, account_id: str, name: str) -> Role | None:
        """That was not deleted."""
        roles = self.snapshot.roles.values()
        return next((r for r in roles if (r.account_id, r.name, r.ends_at) == (account_id, name, None)), None)

    def user_by_id(self, user_id: str) -> User | None:
        return next((user for user in self.snapshot.users.values() if user.user_id == user_id), None)

    def role_by_id(self, role_id: str) -> Role | None:
        return next((role for role in self.snapshot.roles.values() if role.role_id == role_id), None)

    def put_user(self, user: User) -> None:
        self._commit(users={**self.snapshot.users, user.arn: user}, accounts=self.snapshot.accounts | {user.account_id})

    def remove_user(self, user: User) -> None:
        self._commit(users={arn: u for arn, u in self.snapshot.users.items() if arn != user.arn})

    def put_role(self, role: Role) -> None:
        self._commit(roles={**self.snapshot.roles, role.arn: role}, accounts=self.snapshot.accounts | {role.account_id})

    def remove_role(self, role: Role) -> None:
        self._commit(roles={arn: r for arn, r in self.snapshot.roles.items() if arn != role.arn})

    def bind_principals(self, policy: Policy) -> Binding:
        """Unique ids of the users and roles that a resource policy names, in Principal or NotPrincipal.

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
                elif not self._is_account(arn) and not self._is_federated(arn):
                    raise MalformedPolicyError("Policy contains a statement with one or more invalid principals.")
        return binding

    def unique_id(self, principal: str) -> str | None:
        """Of the user or role that the ARN names, or of the role behind a session; None for an account or nobody."""
        arn = arns.Arn.parse(principal)
        role = self.snapshot.roles.get(principal)
        if arn is not None and arn.service == "sts" and arn.resource.startswith("assumed-role/"):
            role = self.role(arn.account_id, arn.resource.split("/")[1])
        user = self.snapshot.users.get(principal)
        if user is not None and user.ends_at is None:
            return user.user_id
        return None if role is None or role.ends_at is not None else role.role_id

    def _is_account(self, arn: arns.Arn) -> bool:
        return arn.resource == "root" and arn.account_id in self.snapshot.accounts

    def _is_federated(self, arn: arns.Arn) -> bool:
        return arn.resource.startswith("federated-user/") and arn.account_id in self.snapshot.accounts

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
