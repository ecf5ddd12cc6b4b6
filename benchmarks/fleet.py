"""Simulated instances on one keymanager: real key sessions (TLS, WebSocket, a name, a token that is renewed, a lease
each) in a process of their own, which hold a lease, and acknowledge a Revoke as soon as they have read it.

What is not there is what a service drops when it hears of it; that is what the runs with computes measure. The clients
share the machine with the keymanager that is measured, so from the Welcome on they are callbacks (`fleet_socket`), not
the tasks of a service.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import resource
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.fleet_socket import Socket
from shared.api.keymanager import Acknowledge, Authenticate, Grant, KeyState, Renew, Revoke, Role, TokenConfirmed
from shared.auth import TokenIssuer
from shared.clock import SystemClock
from shared.config import Address
from shared.errors import KeylakeError
from shared.ids import InstanceId, ProjectId, TokenId
from shared.keysession import SessionIdentity, SessionOpener, session_tokens
from shared.tls import client_context

_OPENED_AT_ONCE: Final = 32
_REOPEN_S: Final = 1.0
_TOKEN_S: Final = 30.0
"""A session gets a fresh token so often: at half of its life, as a service's session does."""
_SLICE_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class FleetSettings:
    size: int
    address: Address
    ca_certificate: Path
    signing_key: Path
    project_id: ProjectId
    renew_every_s: float


class _Opening:
    """SessionEvents of a session that is not run: nothing comes before it is taken over."""

    def on_grants(self, grants: Sequence[Grant], asked_at_s: float, generation: int) -> None: ...

    def on_revoke(self, revoke: Revoke) -> None: ...

    def on_restored(self, project_id: ProjectId) -> None: ...

    def on_delete_data(self, project_ids: Sequence[ProjectId]) -> None: ...

    def on_token_confirmed(self, confirmed: TokenConfirmed, asked_at_s: float) -> None: ...

    def on_token_revoked(self, token_id: TokenId) -> None: ...


class _Instance:
    def __init__(self, fleet: _Fleet, number: int) -> None:
        self._fleet = fleet
        self.number = number
        self.socket: Socket | None = None
        self.live = False
        self.granted = asyncio.Event()
        """For the first time in this session."""
        self.ended = asyncio.Event()
        self._request_id = 0
        self._asked_s: float | None = None

    def begin(self, socket: Socket) -> None:
        """A session is open."""
        self.socket, self._asked_s = socket, None
        self.granted.clear()
        self.ended.clear()
        socket.listen(self._hear, self._end)
        self.renew()

    def renew(self) -> None:
        """Unless the last time was not answered yet."""
        if self.socket is None or self._asked_s is not None:
            return
        self._request_id += 1
        self._asked_s = time.perf_counter()
        self.socket.write(self._fleet.renew_text % self._request_id)

    def authenticate(self) -> None:
        if self.socket is not None:
            self.socket.write(self._fleet.authenticate_text())

    def _hear(self, text: bytes) -> None:
        heard = json.loads(text)
        match heard["op"]:
            case "renewed":
                self.live = bool(heard["grants"]) and heard["grants"][0]["state"] == KeyState.ACTIVE
                self._answered()
                if self.live:
                    self.granted.set()
            case "failed":
                self._fleet.failures.append(heard["message"])
                self._answered()
            case "revoke":
                self.live = False
                self._fleet.heard.append(time.time())
                if self.socket is not None:
                    self.socket.write(self._fleet.acknowledgement(heard["revocation_id"]))
            case "restored":
                self.renew()
            case other:
                self._fleet.failures.append(f"the keymanager said {other}")

    def _answered(self) -> None:
        if self._asked_s is not None:
            self._fleet.waits_s.append(time.perf_counter() - self._asked_s)
            self._asked_s = None

    def _end(self) -> None:
        self.socket, self.live = None, False
        self.ended.set()


class _Fleet:
    def __init__(self, settings: FleetSettings) -> None:
        self.settings = settings
        self.instances = [_Instance(self, number) for number in range(settings.size)]
        self.heard: list[float] = []
        self.waits_s: list[float] = []
        self.failures: list[str] = []
        renew = Renew(request_id=0, project_ids=[settings.project_id]).model_dump_json()
        self.renew_text: Final = renew.replace('"request_id":0', '"request_id":%d')
        self._tokens = session_tokens(TokenIssuer.load(settings.signing_key))
        self._token: tuple[float, str] = (0.0, "")
        self._acknowledgement: tuple[str, str] = ("", "")
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def authenticate_text(self) -> str:
        """Signed once a second for all of them: what it costs to make one is not what is measured."""
        now_s = time.monotonic()
        if now_s - self._token[0] > 1:
            self._token = now_s, Authenticate(token=self._tokens()).model_dump_json()
        return self._token[1]

    def acknowledgement(self, revocation_id: str) -> str:
        if self._acknowledgement[0] != revocation_id:
            message = Acknowledge(revocation_id=revocation_id, project_id=self.settings.project_id, steps_s={})
            self._acknowledgement = revocation_id, message.model_dump_json()
        return self._acknowledgement[1]

    async def open(self) -> None:
        settings, clock = self.settings, SystemClock()
        context = client_context(settings.ca_certificate)
        limit = asyncio.Semaphore(_OPENED_AT_ONCE)

        async def live(instance: _Instance) -> None:
            """Session after session, as a service would."""
            made: list[Socket] = []

            async def dial(address: Address, token: str, timeout_s: float) -> Socket:
                made[:] = [await Socket.dial(context, address, token, timeout_s)]
                return made[0]

            identity = SessionIdentity(Role.PAGESERVER, f"fleet-{instance.number}", InstanceId.new())
            opener = SessionOpener([settings.address], dial, identity, self._tokens, clock)
            while True:
                try:
                    async with limit:
                        await opener.open(_Opening())
                        instance.begin(made[0])
                        over = asyncio.create_task(instance.ended.wait())
                        granted = asyncio.create_task(instance.granted.wait())
                        await asyncio.wait({over, granted}, return_when=asyncio.FIRST_COMPLETED)
                        granted.cancel()
                    await over
                    self.failures.append("a session has ended")
                except KeylakeError as error:
                    self.failures.append(f"session: {error}")
                await asyncio.sleep(_REOPEN_S)

        for instance in self.instances:
            self.spawn(live(instance))
        while not all(instance.live for instance in self.instances):
            await asyncio.sleep(_SLICE_S)

    async def keep(self, every_s: float, what: Callable[[_Instance], None]) -> None:
        """Done by one instance after the other, by each once in `every_s`."""
        turns = max(1, round(every_s / _SLICE_S))
        while True:
            for turn in range(turns):
                due = time.perf_counter() + _SLICE_S
                for instance in self.instances[turn::turns]:
                    what(instance)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))

    def state(self) -> dict[str, Any]:
        state = {
            "live": sum(instance.live for instance in self.instances),
            "open": sum(instance.socket is not None for instance in self.instances),
            "heard": self.heard,
            "waits_s": self.waits_s,
            "failures": self.failures,
        }
        self.heard, self.waits_s, self.failures = [], [], []
        return state


async def _serve(pipe: Pipe, settings: FleetSettings) -> None:
    fleet = _Fleet(settings)
    begun = time.perf_counter()
    fleet.spawn(fleet.keep(settings.renew_every_s, _Instance.renew))
    fleet.spawn(fleet.keep(_TOKEN_S, _Instance.authenticate))
    await fleet.open()
    pipe.send(time.perf_counter() - begun)
    while True:
        await asyncio.to_thread(pipe.recv)
        pipe.send(fleet.state())


def _main(pipe: Pipe, settings: FleetSettings) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(_serve(pipe, settings))


class Fleet:
    """Made by `fleet`; its end of the pipe."""

    def __init__(self, pipe: Pipe, opened_s: float) -> None:
        self._pipe = pipe
        self.opened_s = opened_s

    async def state(self) -> dict[str, Any]:
        """How many hold a lease now (`live`), have a session (`open`); and since the last call: when each Revoke was
        heard (`heard`, seconds since 1970), how long renewals took (`waits_s`), what failed (`failures`)."""
        self._pipe.send("state")
        state: dict[str, Any] = await asyncio.to_thread(self._pipe.recv)
        return state


@asynccontextmanager
async def fleet(settings: FleetSettings) -> AsyncIterator[Fleet]:
    """Returns when all sessions are open, and all leases granted."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs, settings), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Fleet(pipe, await asyncio.to_thread(pipe.recv))
    finally:
        process.kill()
        await asyncio.to_thread(process.join)
