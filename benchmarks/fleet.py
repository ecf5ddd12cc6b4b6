"""Simulated instances on one keymanager: real key sessions (TLS, WebSocket, a name, a lease each) in a process of their
own, which hold a lease, and acknowledge a Revoke as soon as they have read it.

What is not there is what a service drops when it hears of it; that is what the runs with computes measure.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Final

import uvloop

from shared.api.keymanager import Grant, KeyState, Revoke, Role, TokenConfirmed
from shared.auth import TokenIssuer
from shared.clock import SystemClock
from shared.config import Address
from shared.errors import KeylakeError
from shared.ids import InstanceId, ProjectId, TokenId
from shared.keysession import KeySession, SessionIdentity, SessionOpener, dial_over_tls, session_tokens
from shared.tls import client_context

_OPENED_AT_ONCE: Final = 32
_TIMEOUT_S: Final = 120.0
_REOPEN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class FleetSettings:
    size: int
    address: Address
    ca_certificate: Path
    signing_key: Path
    project_id: ProjectId
    renew_every_s: float


class _Instance:
    """SessionEvents of one of them."""

    def __init__(self, fleet: _Fleet, number: int) -> None:
        self._fleet = fleet
        self.number = number
        self.session: KeySession | None = None
        self.live = False

    def on_grants(self, grants: Sequence[Grant], asked_at_s: float, generation: int) -> None:
        self.live = bool(grants) and grants[0].state is KeyState.ACTIVE

    def on_revoke(self, revoke: Revoke) -> None:
        self.live = False
        self._fleet.heard.append(time.time())
        self._fleet.acknowledge(self, revoke)

    def on_restored(self, project_id: ProjectId) -> None:
        self._fleet.spawn(self.renew())

    def on_delete_data(self, project_ids: Sequence[ProjectId]) -> None:
        raise RuntimeError("a project was shredded")

    def on_token_confirmed(self, confirmed: TokenConfirmed, asked_at_s: float) -> None:
        pass

    def on_token_revoked(self, token_id: TokenId) -> None:
        pass

    async def renew(self) -> None:
        if self.session is None:
            return
        asked = time.perf_counter()
        try:
            await self.session.renew([self._fleet.settings.project_id], _TIMEOUT_S)
        except KeylakeError as error:
            self._fleet.failures.append(str(error))
            return
        self._fleet.waits_s.append(time.perf_counter() - asked)


class _Fleet:
    def __init__(self, settings: FleetSettings) -> None:
        self.settings = settings
        self.instances = [_Instance(self, number) for number in range(settings.size)]
        self.heard: list[float] = []
        self.waits_s: list[float] = []
        self.failures: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def acknowledge(self, instance: _Instance, revoke: Revoke) -> None:
        if instance.session is not None:
            self.spawn(instance.session.acknowledge(revoke.revocation_id, revoke.project_id, {}))

    async def open(self) -> None:
        settings, clock = self.settings, SystemClock()
        tokens = session_tokens(TokenIssuer.load(settings.signing_key))
        dial = dial_over_tls(client_context(settings.ca_certificate))
        limit = asyncio.Semaphore(_OPENED_AT_ONCE)

        async def live(instance: _Instance, opened: asyncio.Event) -> None:
            """Session after session, as a service would."""
            identity = SessionIdentity(Role.PAGESERVER, f"fleet-{instance.number}", InstanceId.new())
            opener = SessionOpener([settings.address], dial, identity, tokens, clock)
            while True:
                try:
                    async with limit:
                        instance.session = await opener.open(instance)
                        reading = asyncio.create_task(instance.session.run())
                        await instance.renew()
                    opened.set()
                    await reading
                except KeylakeError as error:
                    instance.session, instance.live = None, False
                    self.failures.append(f"session: {error}")
                    await asyncio.sleep(_REOPEN_S)

        opened = [asyncio.Event() for _ in self.instances]
        for instance, event in zip(self.instances, opened, strict=True):
            self.spawn(live(instance, event))
        await asyncio.gather(*(event.wait() for event in opened))

    async def keep_renewed(self) -> None:
        """One instance after the other, each once in `renew_every_s`, from when it has a session."""
        slice_s, turns = 0.05, max(1, round(self.settings.renew_every_s / 0.05))
        while True:
            for turn in range(turns):
                due = time.perf_counter() + slice_s
                for instance in self.instances[turn::turns]:
                    self.spawn(instance.renew())
                await asyncio.sleep(max(0.0, due - time.perf_counter()))

    def state(self) -> dict[str, Any]:
        state = {
            "live": sum(instance.live for instance in self.instances),
            "open": sum(instance.session is not None for instance in self.instances),
            "heard": self.heard,
            "waits_s": self.waits_s,
            "failures": self.failures,
        }
        self.heard, self.waits_s, self.failures = [], [], []
        return state


async def _serve(pipe: Pipe, settings: FleetSettings) -> None:
    fleet = _Fleet(settings)
    begun = time.perf_counter()
    fleet.spawn(fleet.keep_renewed())
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
