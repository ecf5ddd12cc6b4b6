"""Who may do what, as sets of scopes: roles of people, and what each service's own key may claim.

**Separation of duties.** No role of people has a scope with which keys are used, or WAL and pages are read: those are
the services' alone. A security admin manages keys and has no way to data (no endpoint, no connection); a data user
reaches data and has no way to keys; an auditor changes nothing; who owns key configurations (account admin) cannot run
databases, and who runs databases (workspace admin) cannot choose their key. Nobody but the owner's signing key hands
out tokens: a role that could would be every role.

docs/roles.md shows what this comes to, operation by operation; it is generated from the services' own routes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

TOKEN_VARIABLE: Final = "KEYLAKE_TOKEN"  # noqa: S105 - its name
"""Of the environment, in which people's tokens come: a command line is seen by everybody on the machine. What we start
does not inherit it."""
ASKS_VARIABLE: Final = "KEYLAKE_TOKEN_ASKS"
APPROVES_VARIABLE: Final = "KEYLAKE_TOKEN_APPROVES"
"""The same, of the two people whom `keylake drill shred` takes."""
TOKEN_VARIABLES: Final = frozenset({TOKEN_VARIABLE, ASKS_VARIABLE, APPROVES_VARIABLE})


class Scope(enum.StrEnum):
    ACCOUNT_ADMIN = "account:admin"  # key configurations, workspaces
    SECURITY_ADMIN = "security:admin"  # revoke, restore, revalidate, rotate; revoke tokens; no way to data
    WORKSPACE_ADMIN = "workspace:admin"  # projects, timelines, endpoints
    DATA_USE = "data:use"  # find and start endpoints; no way to keys
    AUDIT_READ = "audit:read"
    KMS_NOTIFY = "kms:notify"  # say that something may have happened to a key: it is looked at, and nobody is believed
    TOKENS_ISSUE = "tokens:issue"  # tokens for people: the owner's key, and no role
    KEYS_SESSION = "keys:session"  # hold leases
    KEYS_USE = "keys:use"  # generate and unwrap DEKs: safekeepers and pageservers, nobody else
    STORAGE_ADMIN = "storage:admin"  # create and drop timelines
    STORAGE_HISTORY = "storage:history"  # how much of the past is kept, and when layers are made; no contents
    STORAGE_READ = "storage:read"  # GetPage, basebackup
    STORAGE_INSPECT = "storage:inspect"  # what sealed objects hold: counts, keys, positions; no values
    WAL_ELECT = "wal:elect"  # votes, elections, stream control
    WAL_READ = "wal:read"  # committed WAL and peer recovery
    WAL_FEEDBACK = "wal:feedback"  # say what is committed, ingested and in layers: pageservers, nobody else
    COMPUTE_ADMIN = "compute:admin"  # endpoints: create, start, stop, kill
    COMPUTE_CONNECT = "compute:connect"  # the proxy: look up and wake an endpoint
    STATUS_READ = "status:read"  # /v1/status of every service


class PersonRole(enum.StrEnum):
    """What a person's token says its bearer is."""

    ACCOUNT_ADMIN = "account-admin"
    SECURITY_ADMIN = "security-admin"
    WORKSPACE_ADMIN = "workspace-admin"
    DATA_USER = "data-user"
    AUDITOR = "auditor"
    KMS_NOTIFIER = "kms-notifier"
    """A customer's cloud, or what passes its events on."""

    @property
    def scopes(self) -> frozenset[Scope]:
        return PERSON_SCOPES[self]


PERSON_SCOPES: Final[Mapping[PersonRole, frozenset[Scope]]] = {
    PersonRole.ACCOUNT_ADMIN: frozenset({Scope.ACCOUNT_ADMIN}),
    PersonRole.SECURITY_ADMIN: frozenset({Scope.SECURITY_ADMIN}),
    PersonRole.WORKSPACE_ADMIN: frozenset({Scope.WORKSPACE_ADMIN, Scope.STORAGE_HISTORY}),
    PersonRole.DATA_USER: frozenset({Scope.DATA_USE}),
    PersonRole.AUDITOR: frozenset({Scope.AUDIT_READ, Scope.STATUS_READ, Scope.STORAGE_INSPECT}),
    PersonRole.KMS_NOTIFIER: frozenset({Scope.KMS_NOTIFY}),
}

OWNER_SCOPES: Final = frozenset(
    {Scope.COMPUTE_ADMIN, Scope.TOKENS_ISSUE, *(scope for scopes in PERSON_SCOPES.values() for scope in scopes)}
)
"""Of the signing key of whoever owns the installation: all that people may do, and to say which people."""

SERVICE_SCOPES: Final[Mapping[str, frozenset[Scope]]] = {
    "keymanager": frozenset(),  # calls nobody; its key signs the audit chain's anchors
    "safekeeper": frozenset({Scope.KEYS_SESSION, Scope.KEYS_USE, Scope.WAL_READ}),
    "pageserver": frozenset({Scope.KEYS_SESSION, Scope.KEYS_USE, Scope.WAL_READ, Scope.WAL_FEEDBACK}),
    "compute": frozenset(
        {
            Scope.KEYS_SESSION,
            Scope.STORAGE_ADMIN,
            Scope.STORAGE_READ,
            Scope.WAL_ELECT,
            Scope.WAL_READ,
            Scope.STATUS_READ,
        }
    ),
    "proxy": frozenset({Scope.KEYS_SESSION, Scope.COMPUTE_CONNECT}),
    "admin": OWNER_SCOPES,
}
"""What each signing key may claim: the least that its service needs."""
