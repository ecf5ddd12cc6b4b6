"""Tokens for people: which were issued, which are good, which were revoked.

Issuing is registering: whoever may issue tokens signs one and shows it here; it is written down, with an audit record,
before anybody takes it. What is kept is what it says and its SHA-256, never the token.

What may interleave: `_live` changes only after the database has, and together with the push to all key sessions,
without an await in between: what a session says about a token and the push that it was revoked go out in the order in
which they were decided.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Final

from keymanager.projects import Projects
from keymanager.records import StoredToken
from keymanager.repository import Repository
from shared.api.keymanager import IssuedToken, TokenRevoked
from shared.audit_chain import AuditEntry
from shared.auth import PersonToken, Principal, TokenVerifier
from shared.clock import Clock
from shared.errors import InvalidInputError, KeylakeError, UnauthenticatedError
from shared.ids import ProjectId, TokenId, WorkspaceId

_NOT_GOOD: Final = "the token is not registered, or was revoked"


class People:
    """Implements `shared.auth.PeopleRegistry` for the keymanager itself."""

    def __init__(
        self, repository: Repository, projects: Projects, clock: Clock, push: Callable[[TokenRevoked], None]
    ) -> None:
        self._repository = repository
        self._projects = projects
        self._clock = clock
        self._push = push
        self._live: dict[TokenId, StoredToken] = {}
        """Registered and not revoked. Expired ones stay until the next registration: whoever looks at one looks at the
        time, too."""
        self._changing = asyncio.Lock()

    async def load(self) -> None:
        for stored in await self._repository.tokens():
            if stored.revoked_at is None and stored.expires_at > self._clock.now():
                self._live[stored.token_id] = stored

    # --- use cases ---

    async def register(self, token: str, verifier: TokenVerifier, caller: Principal) -> IssuedToken:
        """Raises InvalidInputError for what is not a token of a person that the caller has signed, or is bound to a
        workspace or project that does not exist or to a project of another workspace; ConflictError for a token id that
        was used before."""
        try:
            bearer = verifier.read(token)
        except KeylakeError as error:
            raise InvalidInputError(f"this token cannot be registered: {error}") from None
        person = bearer.person
        if person is None or bearer.kid != caller.kid:
            raise InvalidInputError("only a token for a person can be registered, and only by the key that signed it")
        workspace_id = bearer.workspace_id
        if bearer.project_id is not None:
            entry = self._projects.find(bearer.project_id)
            if entry is None or workspace_id not in (None, entry.scope.workspace_id):
                raise InvalidInputError("the token is for a project that does not exist, or is in another workspace")
        elif workspace_id is not None and workspace_id not in self._projects.workspaces:
            raise InvalidInputError("the token is for a workspace that does not exist")
        stored = StoredToken(
            person.token_id,
            person.digest,
            person.role,
            bearer.subject,
            workspace_id,
            bearer.project_id,
            bearer.kid,
            self._clock.now(),
            datetime.fromtimestamp(bearer.expires_at_s, UTC),
            None,
        )
        details = {"subject": stored.subject, "expires_at": stored.expires_at.isoformat(), **_details(stored)}
        async with self._changing:
            async with self._repository.transaction() as transaction:
                await transaction.insert_token(stored)
                await transaction.audit([AuditEntry(caller.actor, "token.issue", "ok", stored.project_id, details)])
            now = self._clock.now()
            self._live = {each: token for each, token in self._live.items() if token.expires_at > now}
            self._live[stored.token_id] = stored
        return _model(stored)

    async def revoke(self, token_id: TokenId, caller: Principal) -> IssuedToken:
        """In force when it returns here, and everywhere else as soon as the pushes have arrived, or after a lease's
        ttl. Again: changes nothing. Raises NotFoundError."""
        async with self._changing:
            stored = await self._repository.token(token_id)
            if stored.revoked_at is not None:
                return _model(stored)
            revoked_at = self._clock.now()
            async with self._repository.transaction() as transaction:
                await transaction.revoke_token(token_id, revoked_at)
                entry = AuditEntry(caller.actor, "token.revoke", "ok", stored.project_id, _details(stored))
                await transaction.audit([entry])
            self._live.pop(token_id, None)
            self._push(TokenRevoked(token_id=token_id))
        return _model(await self._repository.token(token_id))

    async def issued(self, caller: Principal) -> list[IssuedToken]:
        """Newest first; of a bound caller's place only."""
        found = await self._repository.tokens()
        return [_model(stored) for stored in found if caller.may_touch(*self._place(stored))]

    async def place(self, token_id: TokenId) -> tuple[ProjectId | None, WorkspaceId | None]:
        """What the token is bound to. Raises NotFoundError."""
        return self._place(await self._repository.token(token_id))

    def _place(self, stored: StoredToken) -> tuple[ProjectId | None, WorkspaceId | None]:
        entry = None if stored.project_id is None else self._projects.find(stored.project_id)
        return stored.project_id, stored.workspace_id if entry is None else entry.scope.workspace_id

    # --- PeopleRegistry, and the same for key sessions ---

    def good_for_s(self, token_id: TokenId, digest: bytes) -> float:
        """Seconds until it expires. Raises UnauthenticatedError when it is not good."""
        stored = self._live.get(token_id)
        if stored is None or not hmac.compare_digest(stored.digest, digest):
            raise UnauthenticatedError(_NOT_GOOD)
        left_s = (stored.expires_at - self._clock.now()).total_seconds()
        if left_s <= 0:
            raise UnauthenticatedError("the token has expired")
        return left_s

    async def confirm(self, person: PersonToken) -> None:
        self.good_for_s(person.token_id, person.digest)

    async def workspaces_of(self, project_ids: Iterable[ProjectId]) -> Mapping[ProjectId, WorkspaceId]:
        entries = (self._projects.find(each) for each in project_ids)
        return {entry.project_id: entry.scope.workspace_id for entry in entries if entry is not None}


def _details(stored: StoredToken) -> dict[str, str]:
    return {
        "token_id": str(stored.token_id),
        "role": stored.role.value,
        **({} if stored.workspace_id is None else {"workspace_id": str(stored.workspace_id)}),
    }


def _model(stored: StoredToken) -> IssuedToken:
    return IssuedToken(
        token_id=stored.token_id,
        role=stored.role,
        subject=stored.subject,
        workspace_id=stored.workspace_id,
        project_id=stored.project_id,
        issued_by=stored.issued_by,
        issued_at=stored.issued_at,
        expires_at=stored.expires_at,
        revoked_at=stored.revoked_at,
    )
