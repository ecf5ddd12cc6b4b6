"""The proxy's front: accepts connections and takes each from its greeting to its end."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from compute.proxy import goodbye
from compute.proxy.cancel import CancelKeys
from compute.proxy.config import ProxySettings
from compute.proxy.crowd import Crowd
from compute.proxy.directory import Directory, open_compute
from compute.proxy.first_row import FirstRow
from compute.proxy.greeting import FrontTls, Greeting, Manners, greet, identify
from compute.proxy.login import Proof, ask, log_in, role_name
from compute.proxy.projects import Projects
from compute.proxy.routing import Route, route
from compute.proxy.session import ClientSide, ServerSide, as_stream
from shared.api.compute import ConnectTarget
from shared.errors import KeyAccessError, KeylakeError, OverloadedError, UnavailableError
from shared.ids import EndpointId, InstanceId
from shared.lease import Lease
from shared.telemetry import get_logger
from shared.tracing import Kind, span
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgstartup import CancelRequest, StartupMessage
from shared.wire.scram import ScramVerifier

_log = get_logger(__name__)
_Key = TypeVar("_Key")
_Found = TypeVar("_Found")

_BACKLOG: Final = 4096
"""Connections that the kernel completes and keeps until they are taken; its own limit is net.core.somaxconn."""
_CANCEL_TIMEOUT_S: Final = 5.0
_MAX_CANCELS: Final = 64
_ATTEMPTS: Final = 3
"""Computes tried for one session: the one that we knew may have gone, and its successor may be starting."""
_NOT_YET: Final = b"\0C57P03\0"
"""cannot_connect_now: this Postgres is starting up or shutting down."""


class ProxyServer:
    """Use as an async context manager. Leaving ends every session with a word."""

    def __init__(
        self,
        settings: ProxySettings,
        tls: FrontTls,
        projects: Projects,
        directory: Directory,
        registry: CollectorRegistry,
    ) -> None:
        self._settings = settings
        self._tls = tls
        self._projects = projects
        self._directory = directory
        self._cancel_keys = CancelKeys()
        self._cancels = asyncio.Semaphore(_MAX_CANCELS)
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._clients: dict[ClientSide, EndpointId] = {}
        """All that have said whom they want, also those that wait for it."""
        self._per_endpoint: collections.Counter[EndpointId] = collections.Counter()
        self._per_compute: collections.Counter[InstanceId] = collections.Counter()
        """Those that do not wait for it any more."""
        self._draining = False
        self._all_gone = asyncio.Event()
        self._crowd = Crowd(settings.max_handshakes, settings.address_handshakes, settings.max_waiting_handshakes)
        self._manners = Manners(settings.allow_plaintext_loopback, settings.proxy_protocol_from)
        self._opened = Counter("keylake_proxy_sessions", "Sessions that reached a compute", registry=registry)
        self._refused = Counter("keylake_proxy_refused", "Sessions refused", ["sqlstate"], registry=registry)
        self._in_doubt = Counter("keylake_proxy_commits_in_doubt", "Cancelled waits for the quorum", registry=registry)
        open_sessions = Gauge("keylake_proxy_open_sessions", "Sessions now", registry=registry)
        open_sessions.set_function(self._projects.count)

    async def __aenter__(self) -> ProxyServer:
        """Raises OSError when the address is taken."""
        listen = self._settings.postgres_listen
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        both = listen.host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            (listen.host, listen.port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
        )
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener), name="proxy accept")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await self._projects.end_all(goodbye.proxy_stops())
        for client in list(self._clients):
            client.end(goodbye.proxy_takes_no_more())  # they waited for a compute
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self, timeout_s: float) -> None:
        """Refuse whoever comes, end whoever has nothing under way, and wait for the others' transactions."""
        self._draining = True
        for client in list(self._clients):
            client.drain()
        _log.info("proxy drains", sessions=len(self._clients))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._clients:
                    self._all_gone.clear()
                    await self._all_gone.wait()

    @property
    def port(self) -> int:
        """The port that it really listens on."""
        assert self._listener is not None  # noqa: S101 - entered
        return int(self._listener.getsockname()[1])

    @property
    def sessions(self) -> int:
        return self._projects.count()

    @property
    def handshakes(self) -> int:
        return self._crowd.present

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of file descriptors, for one. The connection stays in the backlog until there are some.
                _log.error("a connection cannot be accepted", error=error.strerror)
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._serve(connection), name="proxy session")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(0)  # it has a place, waits for one or is refused, before there is another one

    async def _serve(self, connection: socket.socket) -> None:
        greeting = await self._greet(connection)
        if greeting is None:
            return
        try:
            match greeting.request:
                case CancelRequest() as request:
                    await self._cancel(request)
                case StartupMessage() as startup:
                    await self._session(greeting, startup)
        finally:
            greeting.client.end(b"")

    async def _greet(self, connection: socket.socket) -> Greeting | None:
        timeout_s = self._settings.startup_timeout_s
        try:
            connection.setblocking(False)
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            async with asyncio.timeout(timeout_s):
                caller = await identify(connection, self._manners)
            async with self._crowd.place_for(caller.peer), asyncio.timeout(timeout_s):
                return await greet(connection, caller, self._tls, self._cancel_keys)
        except (ProtocolViolationError, OverloadedError) as error:
            self._refused.labels(error.sqlstate).inc()
            # A short word into an empty buffer: it fits, or the client is gone.
            with contextlib.suppress(OSError):
                connection.send(goodbye.of_error(error))
            connection.close()
            return None
        except (OSError, TimeoutError):
            connection.close()  # it has not even said hello
            return None

    # --- sessions ---

    async def _session(self, greeting: Greeting, startup: StartupMessage) -> None:
        client = greeting.client
        client.wait_for_compute()
        try:
            wanted = route(startup, greeting.server_name, self._settings.domain)
        except KeylakeError as error:
            self._refuse(client, error.sqlstate, goodbye.of_error(error))
            return
        endpoint_id = wanted.endpoint_id
        if self._draining:
            self._refuse(client, "57P03", goodbye.proxy_takes_no_more())
        elif len(self._clients) >= self._settings.max_connections:
            self._refuse(client, "53300", goodbye.too_many_connections())
        elif self._per_endpoint[endpoint_id] >= self._settings.max_endpoint_connections:
            self._refuse(client, "53300", goodbye.too_many_connections_of_endpoint())
        else:
            self._clients[client] = endpoint_id
            self._per_endpoint[endpoint_id] += 1
            began = asyncio.get_running_loop().time()
            if self._settings.log_connections:
                _log.info("session", client=str(greeting.peer), endpoint_id=str(endpoint_id))
            try:
                await self._serve_route(client, wanted)
            except KeylakeError as error:
                self._refuse(client, error.sqlstate, goodbye.of_error(error))
            finally:
                self._gone(client)
                if self._settings.log_connections:
                    seconds = round(asyncio.get_running_loop().time() - began, 3)
                    _log.info("session over", client=str(greeting.peer), endpoint_id=str(endpoint_id), seconds=seconds)

    def _refuse(self, client: ClientSide, sqlstate: str, farewell: bytes) -> None:
        self._refused.labels(sqlstate).inc()
        client.end(farewell)

    def _gone(self, client: ClientSide) -> None:
        endpoint_id = self._clients.pop(client)
        _take_one(self._per_endpoint, endpoint_id)
        self._all_gone.set()

    async def _serve_route(self, client: ClientSide, wanted: Route) -> None:
        """Raises KeylakeError before the relay begins; after that the session ends itself."""
        serving = asyncio.create_task(self._relay(client, wanted))
        closing = asyncio.create_task(client.wait_closed())
        try:
            # A client that goes away need not wait for its compute.
            await asyncio.wait({serving, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (serving, closing):
                task.cancel()
            results = await asyncio.gather(serving, closing, return_exceptions=True)
        if isinstance(results[0], KeylakeError):
            raise results[0]
        if isinstance(results[0], Exception):
            _log.error("a session failed", endpoint_id=str(wanted.endpoint_id), exc_info=results[0])

    async def _relay(self, client: ClientSide, wanted: Route) -> None:
        proof: Proof | None = None
        try:
            for _ in range(_ATTEMPTS):
                with span("connect", Kind.SERVER, None):
                    found = await self._find(wanted) if proof is None else await self._wake(wanted)
                if isinstance(found, ScramVerifier):
                    proof = await self._ask(client, wanted.startup, found)
                    if proof is None:
                        return
                    found = await self._wake(wanted)
                if found.max_sessions is not None and self._per_compute[found.instance_id] >= found.max_sessions:
                    self._refuse(client, "53300", goodbye.too_many_connections_of_endpoint())
                    return
                self._per_compute[found.instance_id] += 1
                try:
                    if await self._relay_to(client, found, wanted.startup, proof):
                        return
                finally:
                    _take_one(self._per_compute, found.instance_id)
                self._directory.forget(found)
        finally:
            if proof is not None:
                proof.wipe()
        self._refused.labels("57P03").inc()
        client.end(goodbye.unreachable())

    async def _relay_to(
        self, client: ClientSide, target: ConnectTarget, startup: StartupMessage, proof: Proof | None
    ) -> bool:
        """Until the session is over. False: there is nobody."""
        lease = await self._enter(client, target)
        try:
            first_row = self._directory.first_row(target)
            server, first_words = await self._open(client, target, startup, proof)
            if server is None:
                return False
            if proof is not None:
                proof.wipe()
            self._opened.inc()
            await self._until_over(client, server, first_words, target, lease, first_row)
            return True
        finally:
            self._projects.leave(target.project_id, client)

    async def _find(self, wanted: Route) -> ConnectTarget | ScramVerifier:
        return await self._in_time(self._directory.admit(wanted.endpoint_id, role_name(wanted.startup)))

    async def _wake(self, wanted: Route) -> ConnectTarget:
        return await self._in_time(self._directory.find(wanted.endpoint_id))

    async def _in_time(self, asking: Coroutine[Any, Any, _Found]) -> _Found:
        try:
            async with asyncio.timeout(self._settings.wake_timeout_s):
                return await asking
        except TimeoutError:
            raise UnavailableError("starting the compute took too long") from None

    async def _ask(self, client: ClientSide, startup: StartupMessage, verifier: ScramVerifier) -> Proof | None:
        """None: it is gone, or was refused. Raises ScramAuthenticationError, ProtocolViolationError."""
        try:
            async with asyncio.timeout(self._settings.auth_timeout_s):
                return await ask(client, startup, verifier)
        except TimeoutError:
            self._refuse(client, "57P03", goodbye.took_too_long("logging in"))
            return None

    async def _enter(self, client: ClientSide, target: ConnectTarget) -> Lease:
        try:
            return await self._projects.enter(target.project_id, client)
        except KeyAccessError as error:
            self._refused.labels(error.sqlstate).inc()
            client.end(goodbye.of_error(error))
            raise

    async def _open(
        self, client: ClientSide, target: ConnectTarget, startup: StartupMessage, proof: Proof | None
    ) -> tuple[ServerSide | None, bytes]:
        """The compute's end and its first words, with `proof` those behind the log-in; None when there is nobody, or
        somebody who is on the way out. Raises as `log_in`."""
        server = ServerSide(client)
        try:
            await open_compute(target.compute, server)
            server.send(startup.serialize())
            async with asyncio.timeout(self._settings.auth_timeout_s):
                first_words = await server.words()
                if proof is not None:
                    first_words = await log_in(server, first_words, proof)
        except (OSError, TimeoutError):
            server.abort()
            return None, b""
        except (asyncio.CancelledError, KeylakeError):
            server.abort()
            raise
        if not first_words or (first_words.startswith(b"E") and _NOT_YET in first_words):
            server.abort()
            return None, b""
        return server, first_words

    async def _until_over(
        self,
        client: ClientSide,
        server: ServerSide,
        first_words: bytes,
        target: ConnectTarget,
        lease: Lease,
        first_row: FirstRow | None,
    ) -> None:
        if client.broke_protocol:
            server.abort()
            raise ProtocolViolationError("the client went on before it was answered")
        client.begin(server, first_words, target.compute, lease, first_row)
        try:
            async with asyncio.timeout(self._settings.auth_timeout_s):
                await client.wait_logged_in()
        except TimeoutError:
            client.end(goodbye.took_too_long("logging in"))
        else:
            await client.wait_server_gone()
            await self._compute_is_gone(client, target, lease)
        await client.wait_closed()  # rows may wait to be sent: until they are, a loss of the keys has to find it

    async def _compute_is_gone(self, client: ClientSide, target: ConnectTarget, lease: Lease) -> None:
        """It vanished without a word. If that was because of the keys, the client has a right to know."""
        self._directory.forget(target)
        if await self._projects.lost_within(lease, self._settings.stop_grace_s) and not lease.live:
            client.cut(lease.error())
        stopped = goodbye.compute_stopped if client.logged_in.done() else goodbye.compute_stopped_at_login
        client.end(stopped())

    # --- cancel ---

    async def _cancel(self, request: CancelRequest) -> None:
        """Pass it on to whom it means. Never answered; whoever guesses learns nothing."""
        target = self._cancel_keys.find(request)
        if target is None:
            return
        async with self._cancels:
            waiting = _UntilClosed()
            try:
                async with asyncio.timeout(_CANCEL_TIMEOUT_S):
                    await open_compute(target.compute, waiting)
                    waiting.send(target.request.serialize())
                    await waiting.closed
            except (OSError, TimeoutError):
                _log.info("a cancel request was not delivered", project_id=str(target.project_id))
            finally:
                waiting.abort()


def _take_one(counter: collections.Counter[_Key], key: _Key) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


class _UntilClosed(asyncio.Protocol):
    """A connection that says one thing and waits for the other end to close."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = as_stream(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
