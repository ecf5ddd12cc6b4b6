"""Role by operation, as the services' own code has it: docs/roles.md.

    python -m keylake.roles_table > docs/roles.md

Every HTTP route says what it demands (`shared.authorize.Demand`); the ports that are not HTTP name their scopes as
constants. The same list drives tests/cluster_roles, which tries every cell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

import compute.app
import compute.proxy.app
import keymanager.app
import pageserver.app
import safekeeper.app
from keymanager.session import KEYS_SCOPE, SESSION_SCOPE
from pageserver.page_service import PAGES_SCOPE
from safekeeper.wal_sender import FEEDBACK_SCOPE, WAL_SCOPE
from shared.auth import Service, TokenVerifier, TrustBundle
from shared.authorize import Operation, Reach, operations
from shared.roles import PERSON_SCOPES, SERVICE_SCOPES, Scope
from shared.service import Readiness


class _Nothing:
    """Stands for what routes would call, whatever they take of it: here they are only looked at."""

    def __getattr__(self, name: str) -> Any:
        return self


NOTHING: Final = cast("Any", _Nothing())


def apps() -> dict[Service, FastAPI]:
    """Every service's, with its routes and nothing behind them."""

    def app(service: Service, create: Callable[[TokenVerifier, CollectorRegistry, Readiness], FastAPI]) -> FastAPI:
        return create(TokenVerifier(TrustBundle(keys={}), service), CollectorRegistry(), Readiness())

    return {
        Service.KEYMANAGER: app(Service.KEYMANAGER, lambda v, c, r: keymanager.app.create_app(NOTHING, v, c, r)),
        Service.COMPUTE: app(Service.COMPUTE, lambda v, c, r: compute.app.create_app(NOTHING, NOTHING, v, c, r)),
        Service.PAGESERVER: app(
            Service.PAGESERVER, lambda v, c, r: pageserver.app.create_app("", NOTHING, NOTHING, v, r, c)
        ),
        Service.SAFEKEEPER: app(Service.SAFEKEEPER, lambda v, c, r: safekeeper.app.create_app(NOTHING, v, r, c)),
        Service.PROXY: app(Service.PROXY, lambda v, c, r: compute.proxy.app.create_app(NOTHING, "", v, c, r)),
    }


def http_operations() -> dict[Service, list[Operation]]:
    """Every route of every service."""
    return {service: operations(each) for service, each in apps().items()}


@dataclass(frozen=True, slots=True)
class Connection:
    """An operation of a connection that stays. Nobody's personal token opens one, whatever its role."""

    service: Service
    what: str
    all_of: frozenset[Scope]

    def takes(self, scopes: frozenset[Scope]) -> bool:
        return self.all_of <= scopes


CONNECTIONS: Final = (
    Connection(Service.KEYMANAGER, "key session: hold leases", frozenset({SESSION_SCOPE})),
    Connection(
        Service.KEYMANAGER, "key session: generate and unwrap data keys", frozenset({SESSION_SCOPE, KEYS_SCOPE})
    ),
    Connection(Service.PAGESERVER, "pages port: read pages, make a basebackup", frozenset({PAGES_SCOPE})),
    Connection(Service.SAFEKEEPER, "WAL port: read WAL", frozenset({WAL_SCOPE})),
    Connection(
        Service.SAFEKEEPER, "WAL port: say what is committed and in layers", frozenset({WAL_SCOPE, FEEDBACK_SCOPE})
    ),
)

_INTRODUCTION: Final = """\
# Roles: who may do what

Generated from the services' own routes by `make docs-roles`; a test keeps it current, and `tests/cluster_roles` tries
every cell against a running cluster.

People have one of the roles below, in a token that the owner of the installation makes for them:

```sh
keylake token create --role auditor --ttl 8h --for alice    # and perhaps --workspace W, --project P; printed once
KEYLAKE_TOKEN=… keylake audit verify                        # as alice; without the variable, commands are the owner's
keylake token list                                          # who has what, until when
keylake token revoke tok-…                                  # every service refuses it from now on
```

- **account-admin** owns key configurations and workspaces. **security-admin** rotates, revokes, restores, and has no
  way to data: no endpoint, no connection, no password, no page, no WAL. **workspace-admin** runs projects and
  endpoints, and cannot choose their key. **data-user** finds and starts endpoints, and has no way to keys. **auditor**
  only reads. **kms-notifier** is for a customer's cloud: it says that a key may have changed, and nobody believes it.
- A token that is bound to a workspace or a project sees and touches nothing of another. In the table: *its place*, what
  the path names must be in it; *its part*, a list shows what is in it and nothing else; *no*, such a token is refused.
- Who runs projects does not choose their key: creating a project under a key configuration of its own, and moving one
  to another, takes an account admin; without one, creating a project takes a workspace admin.
- Shredding a project takes two people with tokens of their own, one who asks and another who approves; the owner's
  signing key can do neither, and cannot attest anything for an erasure.
- The *owner* is the one signing key that may issue tokens. No role may: one that could would be every role.
- Postgres connections are not made with tokens but with the endpoint's password, which the workspace admin who created
  the endpoint was shown once.

✓ may · blank: 403, and at the keymanager an audit record (`admin.denied`). Without a token everything is 401.
"""


def _table(columns: dict[str, frozenset[Scope]]) -> Iterator[str]:
    yield f"| operation | bound token | {' | '.join(columns)} |"
    yield f"|---|---|{'---|' * len(columns)}"
    for service, found in http_operations().items():
        yield f"| **{service.value}** | |{' |' * len(columns)}"
        for each in found:
            cells = ("✓" if set(each.any_of) & scopes else "" for scopes in columns.values())
            yield _row(f"`{each.method} {each.path}`", each.reach.value, cells)
        for connection in CONNECTIONS:
            if connection.service is service:
                cells = ("✓" if connection.takes(scopes) else "" for scopes in columns.values())
                yield _row(connection.what, Reach.PLACE.value, cells)


def _row(operation: str, reach: str, cells: Iterable[str]) -> str:
    return f"| {operation} | {reach} | {' | '.join(cells)} |"


def document() -> str:
    """The whole of docs/roles.md."""
    people = {role.value: scopes for role, scopes in PERSON_SCOPES.items()}
    services = {("owner" if name == "admin" else name): scopes for name, scopes in SERVICE_SCOPES.items()}
    parts = [_INTRODUCTION, "## People\n", *_table(people), "\n## Signing keys: services, and the owner\n"]
    return "\n".join([*parts, *_table(services)]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
