"""The keymanager's end of a key session. The protocol is described in `shared.api.keymanager`.

Who may do what: a token of scope `keys:session` opens a session and holds leases; generating and unwrapping DEKs also
needs the scope `keys:use` and the role of a storage service. Compute, proxy and manager only need to know when to stop.

What may interleave. One task reads and handles messages about leases in order. Key requests run in tasks of their own,
a bounded number at a time; a bounded number more waits, and what comes on top is refused. So reading never waits for
keys (for a KMS that is slow, perhaps), and a renewal is not stuck behind them. Answers and pushes go through one
bounded outbox in the order in which they were decided. Invariant: deciding a lease and putting its answer into the
outbox happen without an `await` in between, and so do the stop of a project and its Revoke; so no client sees a grant
that was decided before a Revoke arrive after it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from keymanager import shred_store
from keymanager.audit_log import AuditLog
from keymanager.key_users import KeyUsers
from keymanager.keyring import SLICE, Keyring
from keymanager.leadership import Term
from keymanager.lease_table import Holder, LeaseTable
from keymanager.people import People
from keymanager.projects import ProjectEntry, Projects
from keymanager.records import StoredLease
from keymanager.repository import Repository
from keymanager.revocation import Revoker
from keymanager.shredding import Shredder
from shared.api.common import problem
from shared.api.keymanager import (
    CLIENT_MESSAGE,
    CLOSE_PERMISSION_DENIED,
    CLOSE_PROTOCOL,
    CLOSE_REPLACED,
    CLOSE_SLOW,
    CLOSE_UNAUTHENTICATED,
    Acknowledge,
    Authenticate,
    ClientMessage,
    ConfirmToken,
    DeleteData,
    Envelopes,
    Failed,
    Generate,
    Grant,
    Hello,
    KeyItem,
    Keys,
    KeyState,
    Locate,
    Located,
    NoteBranch,
    Recorded,
    Release,
    Renew,
    Renewed,
    ReportDeletion,
    ReportUses,
    Restored,
    Revoke,
    RewrapKeys,
    Role,
    ServerMessage,
    TokenConfirmed,
    TokenRevoked,
    Unwrap,
    Welcome,
)
from shared.audit_chain import AuditEntry
from shared.auth import Principal, Scope, TokenVerifier
from shared.clock import Clock
from shared.crypto.envelope import Envelope
from shared.crypto.secret import SecretKey
from shared.crypto.transport import KeyTransport
from shared.errors import (
    ConflictError,
    CorruptedError,
    KeylakeError,
    LeaseExpiredError,
    NotLeaderError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from shared.ids import InstanceId, ProjectId
from shared.keysession import ReplacedError
from shared.telemetry import get_logger

_log = get_logger(__name__)
_HELLO_TIMEOUT_S: Final = 5.0
_SEND_TIMEOUT_S: Final = 5.0
_CLOSE_GOING_AWAY: Final = 1001
_CLOSE_INTERNAL: Final = 1011
SESSION_SCOPE: Final = Scope.KEYS_SESSION
KEYS_SCOPE: Final = Scope.KEYS_USE
KEY_USERS: Final = frozenset({Role.SAFEKEEPER, Role.PAGESERVER})
"""Roles that store data; the only ones that may have DEKs."""
KEEPERS: Final = KEY_USERS | {Role.MANAGER}
"""Roles that keep something of a project, and delete it when it is shredded: the manager has verifiers of passwords."""
_KeyRequest = Generate | Unwrap | RewrapKeys | ReportUses | NoteBranch | ReportDeletion
_ACTIONS: Final[dict[type[object], str]] = {
    Generate: "dek.generate",
    Unwrap: "dek.unwrap",
    RewrapKeys: "dek.rewrap",
    ReportUses: "dek.report",
    NoteBranch: "project.branch",
    ReportDeletion: "shred.node",
}
"""What the audit log calls them."""


def _count(message: _KeyRequest) -> int:
    match message:
        case Generate():
            return len(message.objects)
        case ReportUses():
            return sum(use.objects for use in message.uses)
        case NoteBranch():
            return 1
        case ReportDeletion():
            return sum(each.objects for each in message.deleted)
        case _:
            return len(message.items)


@dataclass(frozen=True, slots=True)
class SessionLimits:
    lease_ttl_s: float
    outbox_messages: int
    concurrent_key_requests: int
    waiting_key_requests: int
    all_key_requests: int
    """Of all sessions together, at work or waiting."""


@dataclass(frozen=True, slots=True)
class SessionDeps:
    """What sessions work on; one for all of them."""

    repository: Repository
    projects: Projects
    keyring: Keyring
    key_users: KeyUsers
    leases: LeaseTable
    revoker: Revoker
    shredder: Shredder
    audit_log: AuditLog
    people: People
    verifier: TokenVerifier
    clock: Clock
    limits: SessionLimits
    term: Term


class Sessions:
    """The open sessions: at most one per node. Implements `revocation.Pusher`."""

    def __init__(self) -> None:
        self._by_node: dict[str, Session] = {}
        self._by_instance: dict[InstanceId, Session] = {}
        self.key_requests = 0
        """Unanswered, of all sessions."""

    def add(self, session: Session) -> None:
        """Put a session in its node's place, and end the one that was there: the greater generation stays."""
        node_id = session.holder.node_id
        other = self._by_node.get(node_id)
        if other is not None and other.holder.generation > session.holder.generation:
            other, session = session, other
        self._by_node[node_id] = session
        if other is not None:
            self._by_instance.pop(other.holder.instance_id, None)
        self._by_instance[session.holder.instance_id] = session
        if other is not None:
            same = other.holder.instance_id == session.holder.instance_id
            if same:
                other.end(_CLOSE_GOING_AWAY, "this instance has opened another session")
            else:
                other.end(CLOSE_REPLACED, "a newer instance of this node has taken over")

    def remove(self, session: Session) -> None:
        if self._by_node.get(session.holder.node_id) is session:
            del self._by_node[session.holder.node_id]
            del self._by_instance[session.holder.instance_id]

    def push_to(self, instance_ids: Iterable[InstanceId], message: Revoke) -> None:
        text = message.model_dump_json()
        for instance_id in instance_ids:
            if (session := self._by_instance.get(instance_id)) is not None:
                session.push_text(text)

    def delete_data(self, node_id: str, message: DeleteData) -> bool:
        """False when the node has no session now, or one that is not for all of these projects."""
        session = self._by_node.get(node_id)
        if (
            session is None
            or session.holder.role not in KEEPERS
            or not all(map(session.may_touch, message.project_ids))
        ):
            return False
        session.push(message)
        return True

    def keepers(self) -> list[str]:
        """Connected nodes that keep something of projects."""
        return [node_id for node_id, session in self._by_node.items() if session.holder.role in KEEPERS]

    def announce(self, message: Restored) -> None:
        for session in self._by_node.values():
            if session.may_touch(message.project_id):
                session.push(message)

    def revoke_token(self, message: TokenRevoked) -> None:
        """To all of them: nobody keeps account of who has asked about a token."""
        for session in list(self._by_node.values()):
            session.push(message)

    def end_all(self, reason: str) -> None:
        for session in list(self._by_node.values()):
            session.end(_CLOSE_GOING_AWAY, reason)

    def __len__(self) -> int:
        return len(self._by_node)


class _EndSessionError(Exception):
    """Ends a session with a close code and a reason for its client."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Session:
    """One session after its Hello."""

    def __init__(
        self,
        socket: WebSocket,
        principal: Principal,
        holder: Holder,
        transport: KeyTransport,
        deps: SessionDeps,
        sessions: Sessions,
    ) -> None:
        self.holder: Final = holder
        self._socket = socket
        self._principal = principal
        self._transport = transport
        self._deps = deps
        self._sessions = sessions
        self._outbox: asyncio.Queue[str] = asyncio.Queue(deps.limits.outbox_messages)
        self._ended: asyncio.Future[_EndSessionError] = asyncio.get_running_loop().create_future()
        self._turn = asyncio.Semaphore(deps.limits.concurrent_key_requests)
        self._unanswered = 0  # key requests
        self._authenticated = asyncio.Event()

    # --- from outside; no awaits ---

    def push(self, message: ServerMessage) -> None:
        """Queue a message. A client whose queue is full is dropped: its leases run out."""
        self.push_text(message.model_dump_json())

    def push_text(self, text: str) -> None:
        """A message as it goes over the wire."""
        try:
            self._outbox.put_nowait(text)
        except asyncio.QueueFull:
            self.end(CLOSE_SLOW, "this client does not read its messages")

    def end(self, code: int, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(_EndSessionError(code, reason))

    def may_touch(self, project_id: ProjectId) -> bool:
        return self._principal.project_id is None or self._principal.project_id == project_id

    # --- life ---

    async def run(self) -> None:
        """Until the client leaves or something ends the session."""
        code, reason = _CLOSE_GOING_AWAY, ""
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self._read(tasks), self._write(), self._watch_token(), self._watch_end()):
                    tasks.create_task(work)
        except* _EndSessionError as group:
            first = next(error for error in _leaves(group) if isinstance(error, _EndSessionError))
            code, reason = first.code, first.reason
        except* WebSocketDisconnect:
            pass
        except* NotLeaderError as group:
            reason = str(_leaves(group)[0])
        finally:
            self._transport.wipe()
        with contextlib.suppress(RuntimeError, OSError, WebSocketDisconnect, TimeoutError):  # it may be gone already
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._socket.close(code, reason[:120])

    async def _watch_end(self) -> None:
        raise await self._ended

    async def _watch_token(self) -> None:
        while True:
            left_s = self._principal.expires_at_s - self._deps.clock.now().timestamp()
            if left_s <= 0:
                raise _EndSessionError(CLOSE_UNAUTHENTICATED, "the session's token has expired")
            self._authenticated.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._authenticated.wait()
            except TimeoutError:
                continue

    async def _write(self) -> None:
        while True:
            text = await self._outbox.get()
            # Invariant: no message leaves, whatever it says, unless we lead at this moment.
            if not self._deps.term.valid:
                raise _EndSessionError(_CLOSE_GOING_AWAY, "this keymanager does not lead any more")
            try:
                async with asyncio.timeout(_SEND_TIMEOUT_S):
                    await self._socket.send_text(text)
            except TimeoutError:
                raise _EndSessionError(CLOSE_SLOW, "this client does not read its messages") from None
            except RuntimeError as error:  # Starlette: the socket was closed
                raise WebSocketDisconnect(_CLOSE_GOING_AWAY) from error

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            message = await receive_message(self._socket)
            match message:
                case Generate() | Unwrap() | RewrapKeys() | ReportUses() | NoteBranch() | ReportDeletion():
                    self._take_on(message, tasks)
                    await asyncio.sleep(0)  # a message that is here already is read without a pause
                case Renew():
                    await self._renew(message)
                case Release():
                    await self._release(message.project_ids)
                case Acknowledge():
                    self._acknowledge(message)
                case ConfirmToken():
                    self._confirm_token(message)
                case Locate():
                    self._locate(message)
                case Authenticate():
                    self._authenticate(message.token)
                case Hello():
                    raise _EndSessionError(CLOSE_PROTOCOL, "a session has one Hello")
                case _:
                    assert_never(message)

    def _authenticate(self, token: str) -> None:
        try:
            principal = self._deps.verifier.verify(token)
            if (principal.kid, principal.project_id) != (self._principal.kid, self._principal.project_id):
                raise PermissionDeniedError("the new token is for somebody else, or another project")
            if SESSION_SCOPE not in principal.scopes:
                raise PermissionDeniedError(f"this token lacks the scope {SESSION_SCOPE}")
        except UnauthenticatedError as error:
            raise _EndSessionError(CLOSE_UNAUTHENTICATED, str(error)) from None
        except PermissionDeniedError as error:
            raise _EndSessionError(CLOSE_PERMISSION_DENIED, str(error)) from None
        self._principal = principal
        self._authenticated.set()

    # --- leases ---

    async def _renew(self, message: Renew) -> None:
        """Projects that do not exist, or that the token is not for, are left out of the answer; and so are those of
        which nothing can be said yet: their leases run on."""
        deps, instance_id = self._deps, self.holder.instance_id
        known = [
            entry
            for project_id in dict.fromkeys(message.project_ids)
            if self.may_touch(project_id) and (entry := deps.projects.find(project_id)) is not None
        ]
        entries = [entry for entry in known if not entry.unconfirmed]
        if known and not entries:
            self._fail(message.request_id, UnavailableError("the customer's KMS has not said yes yet"))
            return
        ttl_s = deps.limits.lease_ttl_s
        while True:
            now_s = deps.clock.monotonic_s()
            new = [e for e in entries if e.issuing and not deps.leases.holds(e.project_id, instance_id, now_s)]
            if not new:
                break
            try:
                await self._store_leases(new)
            except UnavailableError as error:
                self._fail(message.request_id, error)
                return
        grants = [self._grant(entry, ttl_s, now_s) for entry in entries]
        self.push(Renewed(request_id=message.request_id, grants=grants))

    def _grant(self, entry: ProjectEntry, ttl_s: float, now_s: float) -> Grant:
        if not entry.issuing:
            # With whose key it is: whoever is refused wants to know whom to ask.
            return Grant(
                project_id=entry.project_id,
                state=entry.state,
                workspace_id=entry.scope.workspace_id,
                reason=entry.reason,
            )
        self._deps.leases.grant(entry.project_id, self.holder, ttl_s, now_s)
        return Grant(
            project_id=entry.project_id,
            state=KeyState.ACTIVE,
            ttl_s=ttl_s,
            account_id=entry.scope.account_id,
            workspace_id=entry.scope.workspace_id,
            kek_version=entry.current_kek.kek_version,
            dek_floor=self._deps.key_users.dek_floor(entry.project_id),
        )

    async def _store_leases(self, entries: Sequence[ProjectEntry]) -> None:
        """Write new leases down before they are answered: a revocation, or a restart, must know of every holder."""
        deps, now_s = self._deps, self._deps.clock.monotonic_s()
        for entry in entries:
            deps.leases.grant(entry.project_id, self.holder, deps.limits.lease_ttl_s, now_s)
        # Together with others': after an outage everybody asks at once.
        details = self._details()
        await deps.audit_log.record(
            *(AuditEntry(self._actor, "lease.grant", "ok", entry.project_id, details) for entry in entries),
            leases=[StoredLease(entry.project_id, self.holder, deps.limits.lease_ttl_s) for entry in entries],
        )

    async def _release(self, project_ids: Iterable[ProjectId]) -> None:
        deps, instance_id = self._deps, self.holder.instance_id
        now_s = deps.clock.monotonic_s()
        over = [held for p in project_ids if (held := deps.leases.give_back(p, instance_id, now_s)) is not None]
        if not over:
            return
        details = self._details()
        try:
            await deps.audit_log.record(
                *(AuditEntry(self._actor, "lease.release", "ok", held.project_id, details) for held in over),
                ended=[(held.project_id, instance_id) for held in over],
            )
        except NotLeaderError:
            raise
        except UnavailableError as error:
            # Its row goes with those of leases that ran out.
            _log.error("a released lease could not be stored", node_id=self.holder.node_id, reason=str(error))
        else:
            deps.leases.forget(over)

    def _acknowledge(self, message: Acknowledge) -> None:
        self._deps.revoker.acknowledge(
            self.holder.instance_id, message.project_id, message.revocation_id, message.steps_s
        )

    # --- people ---

    def _confirm_token(self, message: ConfirmToken) -> None:
        """Without an await, as leases: no client sees a confirmation after a TokenRevoked that was decided later."""
        try:
            if self._principal.project_id is not None:
                raise PermissionDeniedError("a compute has nothing to do with people's tokens")
            left_s = self._deps.people.good_for_s(message.token_id, message.digest)
        except KeylakeError as error:
            self._fail(message.request_id, error)
            return
        ttl_s = min(left_s, self._deps.limits.lease_ttl_s)
        self.push(
            TokenConfirmed(request_id=message.request_id, token_id=message.token_id, digest=message.digest, ttl_s=ttl_s)
        )

    def _locate(self, message: Locate) -> None:
        entries = (self._deps.projects.find(each) for each in message.project_ids if self.may_touch(each))
        found = {entry.project_id: entry.scope.workspace_id for entry in entries if entry is not None}
        self.push(Located(request_id=message.request_id, workspaces=found))

    # --- DEKs ---

    def _take_on(self, message: _KeyRequest, tasks: asyncio.TaskGroup) -> None:
        limits = self._deps.limits
        if self._unanswered >= limits.concurrent_key_requests + limits.waiting_key_requests:
            self._fail(message.request_id, OverloadedError("too many key requests at once on this session"))
            return
        if self._sessions.key_requests >= limits.all_key_requests:
            self._fail(message.request_id, OverloadedError("too many key requests at once: come back later"))
            return
        self._unanswered += 1
        self._sessions.key_requests += 1
        tasks.create_task(self._serve_in_turn(message)).add_done_callback(self._answered)

    def _answered(self, _: asyncio.Task[None]) -> None:
        self._unanswered -= 1
        self._sessions.key_requests -= 1

    async def _serve_in_turn(self, message: _KeyRequest) -> None:
        async with self._turn:
            await self._serve(message)

    async def _serve(self, message: _KeyRequest) -> None:
        """Answer, record, and refuse in the same way, whatever was asked."""
        try:
            if isinstance(message, ReportDeletion):
                self._require_keeper(message.project_id)
                await self._deps.shredder.reported(self.holder.node_id, message)
                self.push(Recorded(request_id=message.request_id))
                return
            entry = self._permitted(message.project_id)
            await self._deps.key_users.enter(message.project_id, self.holder.node_id)
            entry.check()
            match message:
                case Generate() | Unwrap():
                    await self._serve_keys(entry, message)
                case RewrapKeys():
                    await self._serve_rewrap(entry, message)
                case ReportUses():
                    # Nobody can have let go of a version that does not exist yet.
                    known = min(message.kek_version, entry.current_kek.kek_version)
                    await self._deps.key_users.report(message.project_id, self.holder.node_id, known, message.uses)
                    self.push(Recorded(request_id=message.request_id))
                case NoteBranch():
                    ancestor = self._permitted(message.ancestor_project_id).project_id
                    repository, now = self._deps.repository, self._deps.clock.now()
                    await shred_store.note_branch(repository, self.holder.node_id, entry.project_id, ancestor, now)
                    self.push(Recorded(request_id=message.request_id))
                case _:
                    assert_never(message)
        except KeylakeError as error:
            self._fail(message.request_id, error)
            if not isinstance(error, UnavailableError):
                with contextlib.suppress(UnavailableError):  # nothing left the house
                    await self._record(_ACTIONS[type(message)], error.code, message.project_id, _count(message), [])

    async def _serve_keys(self, entry: ProjectEntry, message: Generate | Unwrap) -> None:
        epoch, keyring = entry.epoch, self._deps.keyring
        with keyring.working(entry.project_id) as held:
            if isinstance(message, Generate):
                keys = await keyring.generate(entry, message.objects, held)
            else:
                keys = await keyring.unwrap(entry, message.items, held)
            envelopes = [envelope for _, envelope in keys]
            await self._record(_ACTIONS[type(message)], "ok", message.project_id, len(keys), envelopes)
            items = await self._sealed(entry, epoch, keys)
            async with keyring.turn:
                entry.check(epoch)
                self.push(Keys(request_id=message.request_id, items=items))

    async def _serve_rewrap(self, entry: ProjectEntry, message: RewrapKeys) -> None:
        epoch = entry.epoch
        envelopes = await self._deps.keyring.rewrap(entry, message.items)
        await self._record(_ACTIONS[RewrapKeys], "ok", message.project_id, len(envelopes), envelopes)
        entry.check(epoch)
        self.push(Envelopes(request_id=message.request_id, items=[envelope.serialize() for envelope in envelopes]))

    def _require_keeper(self, project_id: ProjectId) -> None:
        if self.holder.role not in KEEPERS:
            raise PermissionDeniedError(f"the role {self.holder.role} keeps nothing of projects")
        if self.holder.role in KEY_USERS:
            self._require_store(project_id)
        elif not self.may_touch(project_id):
            raise PermissionDeniedError("this token is for another project")

    def _require_store(self, project_id: ProjectId) -> None:
        if KEYS_SCOPE not in self._principal.scopes:
            raise PermissionDeniedError(f"this token lacks the scope {KEYS_SCOPE}")
        if self.holder.role not in KEY_USERS:
            raise PermissionDeniedError(f"the role {self.holder.role} has no use for data keys")
        if not self.may_touch(project_id):
            raise PermissionDeniedError("this token is for another project")

    def _permitted(self, project_id: ProjectId) -> ProjectEntry:
        self._require_store(project_id)
        entry = self._deps.projects.get(project_id)
        entry.check()
        if not self._deps.leases.holds(project_id, self.holder.instance_id, self._deps.clock.monotonic_s()):
            raise LeaseExpiredError("this instance holds no lease on the project")
        return entry

    async def _sealed(
        self, entry: ProjectEntry, epoch: int, keys: Sequence[tuple[SecretKey, Envelope]]
    ) -> list[KeyItem]:
        items = []
        for start in range(0, len(keys), SLICE):
            async with self._deps.keyring.turn:  # renewals of others do not wait for a large batch
                entry.check(epoch)
                for dek, envelope in keys[start : start + SLICE]:
                    wire = envelope.serialize()
                    items.append(KeyItem(envelope=wire, sealed_dek=self._transport.seal_key(dek, wire)))
        return items

    async def _record(
        self,
        action: str,
        outcome: str,
        project_id: ProjectId,
        count: int,
        envelopes: Sequence[Envelope],
    ) -> None:
        versions = ",".join(str(version) for version in sorted({envelope.kek_version for envelope in envelopes}))
        details = {**self._details(), "objects": str(count), "kek_versions": versions}
        await self._deps.audit_log.record(AuditEntry(self._actor, action, outcome, project_id, details))

    def _fail(self, request_id: int, error: KeylakeError) -> None:
        self.push(Failed(request_id=request_id, code=error.code, message=str(error)))

    @property
    def _actor(self) -> str:
        return f"node/{self.holder.node_id}"

    def _details(self) -> dict[str, str]:
        return {
            "kid": self._principal.kid,
            "role": self.holder.role.value,
            "instance_id": str(self.holder.instance_id),
            "generation": str(self.holder.generation),
        }


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def receive_message(socket: WebSocket) -> ClientMessage:
    """The next message. Raises WebSocketDisconnect, or what ends the session when it is malformed."""
    event = await socket.receive()
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(event.get("code", _CLOSE_GOING_AWAY))
    text = event.get("text")
    if text is None:
        raise _EndSessionError(CLOSE_PROTOCOL, "messages are JSON text")
    try:
        return CLIENT_MESSAGE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise _EndSessionError(CLOSE_PROTOCOL, f"malformed message: {problem(first)}") from None


async def serve_session(socket: WebSocket, principal: Principal, deps: SessionDeps, sessions: Sessions) -> None:
    """A key session from its accepted WebSocket to its end. `principal` has the scope `keys:session`."""
    transport = KeyTransport()
    try:
        session = await _open(socket, principal, transport, deps, sessions)
    except WebSocketDisconnect:
        return
    except _EndSessionError as error:
        with contextlib.suppress(RuntimeError, OSError, WebSocketDisconnect):
            await socket.close(error.code, error.reason[:120])
        return
    sessions.add(session)
    try:
        for message in deps.revoker.unanswered(session.holder.instance_id):
            session.push(message)
        if to_delete := deps.shredder.due(session.holder.node_id, session.holder.role):
            session.push(DeleteData(project_ids=to_delete))
        await session.run()
    finally:
        sessions.remove(session)


async def _open(
    socket: WebSocket, principal: Principal, transport: KeyTransport, deps: SessionDeps, sessions: Sessions
) -> Session:
    """Hello and Welcome."""
    try:
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            hello = await receive_message(socket)
    except TimeoutError:
        raise _EndSessionError(CLOSE_SLOW, "no Hello came in time") from None
    if not isinstance(hello, Hello):
        raise _EndSessionError(CLOSE_PROTOCOL, "the first message is a Hello")
    try:
        transport.agree(hello.transport_public, transport.public)
        async with deps.repository.transaction() as transaction:
            generation = await transaction.register_instance(
                hello.node_id, hello.instance_id, hello.role, principal.kid
            )
        # Not in that transaction, which would then be alone with the chain until it is durable: after an outage
        # everybody comes at once, and these are recorded together. Nobody is welcome before that.
        details = {
            "kid": principal.kid,
            "role": hello.role.value,
            "instance_id": str(hello.instance_id),
            "generation": str(generation),
        }
        await deps.audit_log.record(AuditEntry(f"node/{hello.node_id}", "session.open", "ok", None, details))
    except ReplacedError as error:
        raise _EndSessionError(CLOSE_REPLACED, str(error)) from None
    except (PermissionDeniedError, ConflictError) as error:
        denied = AuditEntry(f"node/{hello.node_id}", "session.open", error.code, None, {"kid": principal.kid})
        with contextlib.suppress(UnavailableError):  # refused, recorded or not
            await deps.audit_log.record(denied)
        raise _EndSessionError(CLOSE_PERMISSION_DENIED, str(error)) from None
    except CorruptedError as error:
        raise _EndSessionError(CLOSE_PROTOCOL, str(error)) from None
    except UnavailableError as error:
        raise _EndSessionError(_CLOSE_INTERNAL, str(error)) from None
    holder = Holder(hello.instance_id, hello.node_id, hello.role, generation)
    session = Session(socket, principal, holder, transport, deps, sessions)
    session.push(Welcome(generation=generation, lease_ttl_s=deps.limits.lease_ttl_s, transport_public=transport.public))
    return session
