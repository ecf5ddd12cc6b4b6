"""One key session: the WebSocket between an instance and the keymanager, from Hello to its end.

`KeyClient` opens one after the other and holds what outlives them (leases, keys). A session is over at the first thing
that goes wrong with it; nothing here reconnects.

What may interleave: `KeySession.run` reads. It hands leases and pushes to `SessionEvents` from inside the read loop,
synchronously, so they are applied in the order in which the keymanager sent them: a `Renewed` that was overtaken by its
reader's scheduling can never bring a lease back that a later `Revoke` has ended.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, assert_never

import jwt
from pydantic import ValidationError
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from shared.addresses import through_addresses
from shared.api.common import ErrorBody
from shared.api.keymanager import (
    CLOSE_PERMISSION_DENIED,
    CLOSE_REPLACED,
    CLOSE_UNAUTHENTICATED,
    MAX_MESSAGE_SIZE_BYTES,
    SERVER_MESSAGE,
    Acknowledge,
    Authenticate,
    ClientMessage,
    ConfirmToken,
    DeleteData,
    DeletedObjects,
    Envelopes,
    Failed,
    Generate,
    Grant,
    Hello,
    Keys,
    KeyUse,
    Locate,
    Located,
    NoteBranch,
    ObjectName,
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
    WrappedObject,
)
from shared.auth import PersonToken, Scope, Service, TokenIssuer
from shared.clock import Clock
from shared.config import Address
from shared.crypto.transport import KeyTransport
from shared.deletion import Deletion, plain_text
from shared.errors import (
    ERRORS_BY_CODE,
    ConflictError,
    CorruptedError,
    KeylakeError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from shared.ids import InstanceId, ProjectId, TokenId, WorkspaceId
from shared.tls import service_host_name

_HANDSHAKE_TIMEOUT_S: Final = 5.0
_IMPATIENT_TIMEOUT_S: Final = 1.0
"""Of a handshake while there are others to ask: one that hangs must not cost a lease."""
_STAGGER_S: Final = 0.25
"""After so long without an answer the next one is asked, too (as RFC 8305 does with addresses)."""
_MIN_TOKEN_LIFE_S: Final = 1.0

TokenSource = Callable[[], str]
"""Gives a fresh token at every call."""


class Transport(Protocol):
    def abort(self) -> None: ...


class Connection(Protocol):
    """What a session needs of its WebSocket. Raises `ConnectionClosed`, as websockets does."""

    @property
    def transport(self) -> Transport: ...

    async def send(self, message: str, /) -> None: ...

    async def recv(self) -> str | bytes: ...

    def __aiter__(self) -> AsyncIterator[str | bytes]: ...

    async def close(self) -> None: ...


Dial = Callable[[Address, str, float], Awaitable[Connection]]
"""Connects to the keymanager at this address with this token, within so many seconds. Raises OSError, TimeoutError,
InvalidHandshake, KeylakeError."""


def dial_over_tls(tls: ssl.SSLContext) -> Dial:
    """A WebSocket over TLS; the keymanager is verified by name."""
    host_name = service_host_name(Service.KEYMANAGER.value)

    async def dial(address: Address, token: str, timeout_s: float) -> Connection:
        async def to(ip_address: str) -> Connection:
            return await connect(
                f"wss://{host_name}/v1/session",
                host=ip_address,
                port=address.port,
                ssl=tls,
                server_hostname=host_name,
                additional_headers={"Authorization": f"Bearer {token}"},
                compression=None,  # what is worth compressing here is ciphertext
                max_size=MAX_MESSAGE_SIZE_BYTES,
                ping_interval=None,  # renewals are the heartbeat
                open_timeout=None,
                close_timeout=1.0,
                proxy=None,
            )

        async with asyncio.timeout(timeout_s):
            return await through_addresses(address.host, address.port, to)

    return dial


Answer = Renewed | Keys | Envelopes | Recorded | TokenConfirmed | Located


class ReplacedError(ConflictError):
    """A newer instance of this node has taken over. This one is fenced for good."""


class SessionEndedError(UnavailableError):
    """The connection is gone. What was asked may or may not have been done."""


def session_tokens(issuer: TokenIssuer, project_id: ProjectId | None = None) -> TokenSource:
    """Tokens for key sessions: all key scopes that this signing key has, and no other."""
    scopes = issuer.scopes & {Scope.KEYS_SESSION, Scope.KEYS_USE}
    return lambda: issuer.issue(Service.KEYMANAGER, scopes, project_id=project_id)


@dataclass(frozen=True, slots=True)
class SessionIdentity:
    """Who holds the leases. `node_id` is the stable name, `instance_id` this one process."""

    role: Role
    node_id: str
    instance_id: InstanceId


class SessionEvents(Protocol):
    """What a session tells its owner, in the keymanager's order. Must not block and must not raise."""

    def on_grants(self, grants: Sequence[Grant], asked_at_s: float, generation: int) -> None: ...

    def on_revoke(self, revoke: Revoke) -> None: ...

    def on_restored(self, project_id: ProjectId) -> None: ...

    def on_delete_data(self, project_ids: Sequence[ProjectId]) -> None: ...

    def on_token_confirmed(self, confirmed: TokenConfirmed, asked_at_s: float) -> None: ...

    def on_token_revoked(self, token_id: TokenId) -> None: ...


def _token_life_s(token: str, now_s: float) -> float:
    """Seconds until `token`, which we have made ourselves, expires."""
    claims = jwt.decode(token, options={"verify_signature": False})
    return float(claims["exp"]) - now_s


def _error_of(answer: Failed) -> KeylakeError:
    return ERRORS_BY_CODE.get(answer.code, KeylakeError)(answer.message)


def _error_of_close(closed: ConnectionClosed) -> KeylakeError:
    code = closed.rcvd.code if closed.rcvd is not None else None
    reason = closed.rcvd.reason if closed.rcvd is not None else ""
    if code == CLOSE_REPLACED:
        return ReplacedError("a newer instance of this node has taken over its leases")
    if code == CLOSE_UNAUTHENTICATED:
        return UnauthenticatedError(f"the keymanager ended the session: {reason}")
    if code == CLOSE_PERMISSION_DENIED:
        return PermissionDeniedError(f"the keymanager ended the session: {reason}")
    return SessionEndedError("the connection to the keymanager was lost")


class KeySession:
    """A session after its Welcome. Made by `open_session`; `run` it, then use it, until `run` raises."""

    def __init__(
        self,
        connection: Connection,
        welcome: Welcome,
        transport: KeyTransport,
        tokens: TokenSource,
        token_expires_in_s: float,
        events: SessionEvents,
        clock: Clock,
    ) -> None:
        self.generation: Final = welcome.generation
        self.lease_ttl_s: Final = welcome.lease_ttl_s
        self.transport: Final = transport
        self.ended = False
        """Nothing can be sent any more; `run` has raised, or is about to."""
        self._connection = connection
        self._tokens = tokens
        self._token_expires_in_s = token_expires_in_s
        self._events = events
        self._clock = clock
        self._last_request_id = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._asked_at_s: dict[int, float] = {}

    async def run(self) -> None:
        """Read until the session ends, and keep its token fresh.

        Raises ReplacedError, UnauthenticatedError, PermissionDeniedError, CorruptedError or SessionEndedError: always
        one of them. Requests that wait for an answer get SessionEndedError.
        """
        reader = asyncio.create_task(self._read())
        authenticator = asyncio.create_task(self._authenticate())
        tasks = (reader, authenticator)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            raise SessionEndedError("the connection to the keymanager was lost")
        except ConnectionClosed as closed:
            raise _error_of_close(closed) from None
        finally:
            self.ended = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._fail_all()
            self.transport.wipe()

    def _fail_all(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SessionEndedError("the connection to the keymanager was lost"))
                future.exception()  # retrieved: whoever waited may be gone
        self._waiting.clear()
        self._asked_at_s.clear()

    async def renew(self, project_ids: Sequence[ProjectId], timeout_s: float) -> None:
        """Ask for these leases; grants arrive at `SessionEvents.on_grants`. Raises UnavailableError, KeylakeError."""
        request_id = self._new_request()
        message = Renew(request_id=request_id, project_ids=list(project_ids))
        self._asked_at_s[request_id] = self._clock.monotonic_s()
        await self._request(request_id, message, timeout_s)

    async def generate(self, project_id: ProjectId, objects: Sequence[ObjectName], timeout_s: float) -> Keys:
        """Raises UnavailableError, KeyAccessError, PermissionDeniedError."""
        request_id = self._new_request()
        message = Generate(request_id=request_id, project_id=project_id, objects=list(objects))
        return self._keys(await self._request(request_id, message, timeout_s), len(objects))

    async def unwrap(self, project_id: ProjectId, items: Sequence[WrappedObject], timeout_s: float) -> Keys:
        """Raises UnavailableError, KeyAccessError, IntegrityError, PermissionDeniedError."""
        request_id = self._new_request()
        message = Unwrap(request_id=request_id, project_id=project_id, items=list(items))
        return self._keys(await self._request(request_id, message, timeout_s), len(items))

    async def confirm_token(self, person: PersonToken, timeout_s: float) -> None:
        """Ask whether a token is good; if it is, `SessionEvents.on_token_confirmed` hears of it.

        Raises UnauthenticatedError when it is not, UnavailableError.
        """
        request_id = self._new_request()
        message = ConfirmToken(request_id=request_id, token_id=person.token_id, digest=person.digest)
        self._asked_at_s[request_id] = self._clock.monotonic_s()
        await self._request(request_id, message, timeout_s)

    async def locate(self, project_ids: Sequence[ProjectId], timeout_s: float) -> Mapping[ProjectId, WorkspaceId]:
        """Raises UnavailableError."""
        request_id = self._new_request()
        answer = await self._request(
            request_id, Locate(request_id=request_id, project_ids=list(project_ids)), timeout_s
        )
        if not isinstance(answer, Located):
            raise CorruptedError("the keymanager answered another question")
        return answer.workspaces

    async def rewrap(self, project_id: ProjectId, items: Sequence[WrappedObject], timeout_s: float) -> Sequence[bytes]:
        """Envelopes. Raises UnavailableError, KeyAccessError, ConflictError, IntegrityError, PermissionDeniedError."""
        request_id = self._new_request()
        message = RewrapKeys(request_id=request_id, project_id=project_id, items=list(items))
        answer = await self._request(request_id, message, timeout_s)
        if not isinstance(answer, Envelopes) or len(answer.items) != len(items):
            raise CorruptedError("the keymanager answered another question")
        return answer.items

    async def report(self, project_id: ProjectId, kek_version: int, uses: Sequence[KeyUse], timeout_s: float) -> None:
        """Returns when it is recorded. Raises UnavailableError, KeyAccessError, PermissionDeniedError."""
        request_id = self._new_request()
        message = ReportUses(request_id=request_id, project_id=project_id, kek_version=kek_version, uses=list(uses))
        if not isinstance(await self._request(request_id, message, timeout_s), Recorded):
            raise CorruptedError("the keymanager answered another question")

    async def note_branch(self, project_id: ProjectId, ancestor_project_id: ProjectId, timeout_s: float) -> None:
        """Returns when it is recorded. Raises UnavailableError, KeyAccessError, PermissionDeniedError."""
        request_id = self._new_request()
        message = NoteBranch(request_id=request_id, project_id=project_id, ancestor_project_id=ancestor_project_id)
        if not isinstance(await self._request(request_id, message, timeout_s), Recorded):
            raise CorruptedError("the keymanager answered another question")

    async def report_deletion(
        self, project_id: ProjectId, deletion: Deletion, timeout_s: float, *, holds_keys: bool
    ) -> None:
        """Returns when it is recorded. Raises UnavailableError, ConflictError, PermissionDeniedError."""
        request_id = self._new_request()
        message = ReportDeletion(
            request_id=request_id,
            project_id=project_id,
            deleted=[
                DeletedObjects(
                    kind=kind, objects=each.objects, old_versions=each.old_versions, size_bytes=each.size_bytes
                )
                for kind, each in sorted(deletion.deleted.items())
            ],
            left_objects=deletion.left_objects,
            remains=[plain_text(text) for text in deletion.remains[:16]],
            not_checked=[plain_text(text) for text in deletion.not_checked[:16]],
            holds_keys=holds_keys,
        )
        if not isinstance(await self._request(request_id, message, timeout_s), Recorded):
            raise CorruptedError("the keymanager answered another question")

    async def release(self, project_ids: Sequence[ProjectId]) -> None:
        """Raises SessionEndedError."""
        await self._send(Release(project_ids=list(project_ids)))

    async def acknowledge(self, revocation_id: str, project_id: ProjectId, steps_s: dict[str, float]) -> None:
        """Raises SessionEndedError."""
        await self._send(Acknowledge(revocation_id=revocation_id, project_id=project_id, steps_s=steps_s))

    async def close(self) -> None:
        """The polite end: what was sent is delivered."""
        await self._connection.close()

    def abort(self) -> None:
        """The end of a connection that may be dead: waits for nobody. Does nothing to a closed one."""
        self.ended = True
        self._connection.transport.abort()

    @staticmethod
    def _keys(answer: Answer, expected: int) -> Keys:
        if not isinstance(answer, Keys) or len(answer.items) != expected:
            raise CorruptedError("the keymanager answered another question")
        return answer

    def _new_request(self) -> int:
        self._last_request_id += 1
        return self._last_request_id

    async def _request(self, request_id: int, message: ClientMessage, timeout_s: float) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(message)
                return await future
        except TimeoutError:
            raise UnavailableError("the keymanager did not answer in time") from None
        finally:
            self._waiting.pop(request_id, None)
            self._asked_at_s.pop(request_id, None)

    async def _send(self, message: ClientMessage) -> None:
        try:
            await self._connection.send(message.model_dump_json())
        except ConnectionClosed:
            self.ended = True
            raise SessionEndedError("the connection to the keymanager was lost") from None

    async def _read(self) -> None:
        async for text in self._connection:
            self._dispatch(_parse(text))
        raise SessionEndedError("the keymanager closed the session")

    def _dispatch(self, message: ServerMessage) -> None:
        match message:
            case Renewed():
                asked_at_s = self._asked_at_s.pop(message.request_id, None)
                if asked_at_s is not None:
                    self._events.on_grants(message.grants, asked_at_s, self.generation)
                self._answer(message.request_id, message)
            case TokenConfirmed():
                asked_at_s = self._asked_at_s.pop(message.request_id, None)
                if asked_at_s is not None:
                    self._events.on_token_confirmed(message, asked_at_s)
                self._answer(message.request_id, message)
            case Keys() | Envelopes() | Recorded() | Located():
                self._answer(message.request_id, message)
            case TokenRevoked():
                self._events.on_token_revoked(message.token_id)
            case Failed():
                future = self._waiting.pop(message.request_id, None)
                if future is not None and not future.done():
                    future.set_exception(_error_of(message))
            case Revoke():
                self._events.on_revoke(message)
            case Restored():
                self._events.on_restored(message.project_id)
            case DeleteData():
                self._events.on_delete_data(message.project_ids)
            case Welcome():
                raise CorruptedError("the keymanager said Welcome twice")
            case _:
                assert_never(message)

    def _answer(self, request_id: int, answer: Answer) -> None:
        future = self._waiting.pop(request_id, None)
        if future is not None and not future.done():
            future.set_result(answer)

    async def _authenticate(self) -> None:
        """Send a fresh token whenever half of the last one's life is over."""
        while True:
            await asyncio.sleep(max(self._token_expires_in_s, _MIN_TOKEN_LIFE_S) / 2)
            token = self._tokens()
            self._token_expires_in_s = _token_life_s(token, self._clock.now().timestamp())
            await self._send(Authenticate(token=token))


def _parse(text: str | bytes) -> ServerMessage:
    try:
        return SERVER_MESSAGE.validate_json(text)
    except ValidationError:
        raise CorruptedError("the keymanager sent something that is not a session message") from None


class SessionOpener:
    """Everything needed to open a session, again and again, with whichever keymanager leads."""

    def __init__(
        self,
        addresses: Sequence[Address],
        dial: Dial,
        identity: SessionIdentity,
        tokens: TokenSource,
        clock: Clock,
    ) -> None:
        self._addresses = deque(addresses)
        self._timeout_s = _HANDSHAKE_TIMEOUT_S if len(addresses) == 1 else _IMPATIENT_TIMEOUT_S
        self._dial = dial
        self._identity = identity
        self._tokens = tokens
        self._clock = clock

    async def open(self, events: SessionEvents) -> KeySession:
        """Connect, say Hello, agree on the key transport. Each keymanager is asked once; one that is silent does not
        keep the next from being asked. Only the one that leads says Welcome.

        Raises UnavailableError (nobody there, TLS, nobody leads), UnauthenticatedError, PermissionDeniedError,
        ReplacedError, CorruptedError.
        """
        failures: list[UnavailableError] = []
        asked: dict[asyncio.Task[KeySession], Address] = {}
        waiting: set[asyncio.Task[KeySession]] = set()
        unasked = deque(self._addresses)
        try:
            while unasked or waiting:
                if unasked:
                    address = unasked.popleft()
                    task = asyncio.create_task(self._open_at(address, events))
                    asked[task] = address
                    waiting.add(task)
                done, waiting = await asyncio.wait(
                    waiting, timeout=_STAGGER_S if unasked else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    try:
                        session = task.result()
                    except UnavailableError as error:
                        failures.append(error)
                        continue
                    # When this session is over, its keymanager may be the one that is gone: it is asked last then.
                    self._addresses.remove(asked[task])
                    self._addresses.append(asked[task])
                    del asked[task]
                    return session
            raise failures[-1]
        finally:
            await _give_up(asked)

    async def _open_at(self, address: Address, events: SessionEvents) -> KeySession:
        token = self._tokens()
        try:
            connection = await self._dial(address, token, self._timeout_s)
        except InvalidStatus as error:
            raise _error_of_status(error) from None
        except (OSError, TimeoutError, InvalidHandshake) as error:
            raise UnavailableError(f"the keymanager cannot be reached: {type(error).__name__}") from None
        try:
            welcome, transport = await self._hello(connection)
        except BaseException:
            connection.transport.abort()  # not politely: it may be one that answers nothing
            raise
        life_s = _token_life_s(token, self._clock.now().timestamp())
        return KeySession(connection, welcome, transport, self._tokens, life_s, events, self._clock)

    async def _hello(self, connection: Connection) -> tuple[Welcome, KeyTransport]:
        transport = KeyTransport()
        hello = Hello(
            role=self._identity.role,
            node_id=self._identity.node_id,
            instance_id=self._identity.instance_id,
            transport_public=transport.public,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.send(hello.model_dump_json())
                welcome = _parse(await connection.recv())
        except TimeoutError:
            raise UnavailableError("the keymanager did not answer the Hello in time") from None
        except ConnectionClosed as closed:
            raise _error_of_close(closed) from None
        if not isinstance(welcome, Welcome):
            raise CorruptedError("the keymanager's first message is not a Welcome")
        transport.agree(transport.public, welcome.transport_public)
        return welcome, transport


async def _give_up(asked: Iterable[asyncio.Task[KeySession]]) -> None:
    """Nobody wants these sessions any more, whatever became of them."""
    for task in asked:
        task.cancel()
    for ended in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(ended, KeySession):
            ended.abort()


def _error_of_status(error: InvalidStatus) -> KeylakeError:
    """What the keymanager answered instead of upgrading the connection."""
    try:
        body = ErrorBody.model_validate_json(error.response.body or b"")
    except ValidationError:
        return UnavailableError(f"the keymanager refused the session with HTTP {error.response.status_code}")
    return ERRORS_BY_CODE.get(body.code, UnavailableError)(body.message)
