"""Leases as an instance sees them: the right to use a project's keys for the next few seconds.

Theory of operation. A lease is granted by the keymanager for `ttl_s`, counted from the moment *before* the request
was sent, on this machine's own clock (which also runs while the machine sleeps), so the holder always believes in it
for a shorter time than the keymanager does. No clock is compared with another machine's. The rule that makes it worth
something: **check after decrypting, before a byte leaves**. A process that was stopped for an hour wakes up in the
middle of an answer, checks, and does not send it.

    NONE ──grant──► LIVE ──(ttl passes)──► EXPIRED ──grant──► LIVE
                     │ revoke                │ revoke
                     └──────► REVOKED / SUSPENDED / SHREDDED ──grant──► LIVE   (never from SHREDDED)

This file is a core: no I/O and no clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.api.keymanager import Grant, KeyState, KeyUse, ObjectName
from shared.clock import Clock
from shared.crypto.aead import AeadKey
from shared.crypto.context import KeyScope
from shared.crypto.envelope import Envelope
from shared.errors import KeyAccessError, LeaseExpiredError, RevokedError, ShreddedError, SuspendedError
from shared.ids import ProjectId, WorkspaceId

RENEWALS_PER_TTL = 3
"""A lease is renewed at ttl/3, so two renewals may be lost before it runs out."""


def key_access_error(state: KeyState, reason: str, workspace_id: WorkspaceId | None = None) -> KeyAccessError:
    """The error that `state` means to whoever wanted the data."""
    match state:
        case KeyState.SUSPENDED:
            return SuspendedError(f"the project is suspended: {reason}", workspace_id)
        case KeyState.REVOKED:
            return RevokedError(f"the customer's key is revoked: {reason}", workspace_id)
        case KeyState.SHREDDED:
            return ShreddedError(f"the project is shredded: {reason}", workspace_id)
        case KeyState.ERASED:
            return ShreddedError(f"the project is erased: {reason}", workspace_id)
        case KeyState.ACTIVE:
            return LeaseExpiredError("there is no live lease on the project's keys", workspace_id)


class Lease:
    """One project's lease in this instance. Cheap enough for every page: `check()` reads a clock and compares."""

    __slots__ = (
        "_clock",
        "_expires_at_s",
        "_scope",
        "dek_floor",
        "generation",
        "kek_version",
        "project_id",
        "reason",
        "state",
        "workspace_id",
    )

    def __init__(self, project_id: ProjectId, clock: Clock) -> None:
        self.project_id = project_id
        self.state = KeyState.ACTIVE
        self.reason = "not asked for yet"
        self.workspace_id: WorkspaceId | None = None
        """Whose key it is, as soon as the keymanager has said anything about the project."""
        self.generation = 0
        self.kek_version = 0
        """In force when the lease was last renewed; 0 while unknown."""
        self.dek_floor = 0
        """See `Grant.dek_floor`."""
        self._clock = clock
        self._expires_at_s = float("-inf")
        self._scope: KeyScope | None = None

    def granted(self, grant: Grant, asked_at_s: float, generation: int) -> None:
        """Take in the keymanager's answer to a request sent at `asked_at_s` (this clock's monotonic seconds)."""
        self.workspace_id = grant.workspace_id or self.workspace_id
        if grant.state is not KeyState.ACTIVE or grant.account_id is None or grant.workspace_id is None:
            self.revoked(grant.state, grant.reason)
            return
        if self.state.final:
            return  # Invariant: nothing comes back from SHREDDED
        self.state = KeyState.ACTIVE
        self.reason = ""
        self.generation = generation
        self.kek_version = max(self.kek_version, grant.kek_version)
        self.dek_floor = max(self.dek_floor, grant.dek_floor)
        self._scope = KeyScope(grant.account_id, grant.workspace_id, grant.project_id)
        self._expires_at_s = asked_at_s + grant.ttl_s

    def revoked(self, state: KeyState, reason: str) -> None:
        """The keymanager said no: the lease is over at once, whatever its ttl was."""
        if not self.state.final or state is KeyState.ERASED:
            self.state = state
            self.reason = reason
        self._expires_at_s = float("-inf")

    @property
    def live(self) -> bool:
        return self._clock.monotonic_s() < self._expires_at_s

    @property
    def expires_at_s(self) -> float:
        """On this instance's clock; -inf while there is no lease. For a process of ours that shares the clock."""
        return self._expires_at_s

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._expires_at_s - self._clock.monotonic_s())

    def check(self) -> None:
        """Raises the fitting KeyAccessError unless the lease is live now. Call it after decrypting, before
        answering."""
        if self._clock.monotonic_s() >= self._expires_at_s:
            raise self.error()

    def error(self) -> KeyAccessError:
        """Why there is no live lease."""
        return key_access_error(self.state, self.reason, self.workspace_id)

    @property
    def scope(self) -> KeyScope:
        """Who the keys belong to, for contexts. Raises KeyAccessError while no lease was ever granted."""
        if self._scope is None:
            raise self.error()
        return self._scope


@dataclass(frozen=True, slots=True)
class KeyLoss:
    """Why the keys of a project are gone: a revocation that wants an acknowledgement, or a lease that ran out."""

    project_id: ProjectId
    state: KeyState
    reason: str
    revocation_id: str | None


class KeyLossHandler(Protocol):
    async def __call__(self, loss: KeyLoss) -> dict[str, float]:
        """Get rid of every plaintext of the project, and return what was done (step → seconds).

        DEKs of the lease are wiped already. The acknowledgement is sent when it returns, so it must not return before
        it is true, however long that takes. If it raises, it is called again, until it does not; before that no lease
        is granted anew. Must be idempotent.
        """
        ...


CutHandler = Callable[[KeyLoss], None]
"""Ends the connections by which plaintext of the project leaves: nothing of it does when it returns. Called in the very
step in which the lease ends, before the KeyLossHandler, which makes up for it if it raises. Idempotent."""


def nothing_to_cut(loss: KeyLoss) -> None:
    """A CutHandler for those who let no plaintext out."""


class KeySource(Protocol):
    """Where a service gets leases and DEKs from: the keymanager's session, or an in-memory one in unit tests.

    DEKs that it returns are cached under the lease and wiped with it: using one later raises KeyWipedError.
    """

    async def acquire(self, project_id: ProjectId, on_loss: KeyLossHandler, cut: CutHandler = nothing_to_cut) -> Lease:
        """Hold a lease from now on, renewed in the background, until `release`. Returns when first granted.

        Raises KeyAccessError when it is refused, UnavailableError when the keymanager cannot be reached in time.
        The same Lease object stays valid over loss and re-grant. A second call returns the same lease.
        """
        ...

    async def release(self, project_id: ProjectId) -> None:
        """Give the lease back and wipe its DEKs."""
        ...

    async def generate(self, project_id: ProjectId, objects: Sequence[ObjectName]) -> list[tuple[AeadKey, Envelope]]:
        """One new DEK per object, with the envelope to store beside it. Raises KeyAccessError, UnavailableError."""
        ...

    async def unwrap(self, project_id: ProjectId, items: Sequence[tuple[ObjectName, Envelope]]) -> list[AeadKey]:
        """The DEKs of these envelopes, commitments checked; cached. Raises KeyAccessError, IntegrityError,
        UnavailableError."""
        ...

    async def rewrap(self, project_id: ProjectId, items: Sequence[tuple[ObjectName, Envelope]]) -> list[Envelope]:
        """The same DEKs, under the KEK version in force; an envelope that is under it already comes back as it is.

        Raises KeyAccessError, UnavailableError, ConflictError (the KEK is used up), IntegrityError (one of them is not
        what it claims to be; none is answered).
        """
        ...

    async def report(self, project_id: ProjectId, kek_version: int, uses: Sequence[KeyUse]) -> None:
        """Tell the keymanager what this node keeps (`ReportUses`). Raises KeyAccessError, UnavailableError."""
        ...

    async def note_branch(self, project_id: ProjectId, ancestor_project_id: ProjectId) -> None:
        """Tell the keymanager that the project has a branch of another one, before it has (`NoteBranch`). Idempotent.
        Raises KeyAccessError, NotFoundError, UnavailableError."""
        ...
