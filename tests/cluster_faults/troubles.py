"""Brings the parts of a cluster into the conditions of a round."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Final

from keylake.cluster import Cluster
from keylake.process import ServiceProcess
from shared.auth import Service
from tests.cluster.processes import ComputeProcesses
from tests.cluster_faults.place import LEASE_TTL_S, Place, Tenant, clone
from tests.cluster_faults.schedule import Condition, Part, Round

RESTART_AFTER_S: Final = 0.5


class Trouble:
    """Brings one part into a condition, step by step with the round."""

    async def prepare(self) -> None:
        """What takes a while. Nobody is in trouble yet."""

    async def before(self) -> None:
        """The customer has not said no yet."""

    async def after_no(self) -> None:
        """It just has."""

    async def in_fan_out(self) -> None:
        """Some project is not active any more."""

    async def end(self) -> None:
        """Everybody hears everybody again; the KMS still says no."""


class ServiceTrouble(Trouble):
    """Of a process that the cluster started."""

    def __init__(self, place: Place, service: ServiceProcess, condition: Condition, tenants: Sequence[Tenant]) -> None:
        self._place = place
        self._service = service
        self._condition = condition
        self._tenants = tenants
        self._clone: ServiceProcess | None = None
        self._readers = AsyncExitStack()
        self._stopped_at = 0.0

    async def prepare(self) -> None:
        if self._condition is Condition.RESTORED:
            name = self._service.name
            self._clone, port = clone(self._place.cluster, name, f"{name}-clone", node_id=name)
            await self._clone.start()
            for tenant in self._tenants:
                reading = tenant.reading_copy(Service(name.partition("-")[0]), port)
                await self._readers.enter_async_context(reading)

    async def before(self) -> None:
        cluster, name = self._place.cluster, self._service.name
        match self._condition:
            case Condition.PARTITIONED if name.startswith("keymanager"):
                await cluster.partition(name)
            case Condition.PARTITIONED:
                for keymanager in cluster.ports.keymanagers:
                    await cluster.partition(name, keymanager)
            case Condition.PAUSED:
                self._service.send_signal(signal.SIGSTOP)
                self._stopped_at = monotonic()

    async def after_no(self) -> None:
        if self._condition is Condition.RESTARTED:
            await self._service.kill()
            await self._service.start()

    async def in_fan_out(self) -> None:
        if self._condition is Condition.KILLED:
            await self._service.kill()
            await asyncio.sleep(RESTART_AFTER_S)
            await self._service.start()

    async def end(self) -> None:
        if self._condition is Condition.PAUSED:
            # Longer than any lease that it may hold.
            await asyncio.sleep(max(0.0, self._stopped_at + LEASE_TTL_S + 0.5 - monotonic()))
            self._service.send_signal(signal.SIGCONT)
        if self._clone is not None:
            await self._readers.aclose()
            await self._clone.kill()
            await self._service.kill()
            await self._service.start()


class ComputeTrouble(Trouble):
    """Of the agents of some workspaces' computes. They end with their keys, so there is nothing to bring back.

    Partitioned: their manager, too, which would hear for them, and kill them."""

    def __init__(self, place: Place, computes: Sequence[ComputeProcesses], condition: Condition) -> None:
        self._place = place
        self._computes = computes
        self._condition = condition
        self._stopped_at = 0.0

    async def before(self) -> None:
        cluster = self._place.cluster
        match self._condition:
            case Condition.PARTITIONED:
                pids = [cluster.service("compute").pid, *(compute.agent.pid for compute in self._computes)]
                for keymanager in cluster.ports.keymanagers:
                    await cluster.partition("compute", keymanager, pids=pids)
            case Condition.PAUSED:
                for compute in self._computes:
                    compute.pause()
                self._stopped_at = monotonic()

    async def after_no(self) -> None:
        if self._condition is Condition.RESTARTED:
            self._kill()  # the next connection starts another one, if it still may

    async def in_fan_out(self) -> None:
        if self._condition is Condition.KILLED:
            self._kill()

    def _kill(self) -> None:
        for compute in self._computes:
            if compute.agent.exists:
                os.kill(compute.agent.pid, signal.SIGKILL)

    async def end(self) -> None:
        if self._condition is Condition.PAUSED:
            await asyncio.sleep(max(0.0, self._stopped_at + LEASE_TTL_S + 0.5 - monotonic()))
            for compute in self._computes:
                compute.resume()
        await asyncio.gather(*(compute.gone() for compute in self._computes))


@asynccontextmanager
async def somebody_unheard(cluster: Cluster, each: Round) -> AsyncIterator[None]:
    """If somebody is to be killed in the middle of the fan-out, then it is not over before: who is cut off or stopped
    acknowledges nothing. Where nobody is, a safekeeper that is in no other trouble is stopped within the block."""
    silent = {Condition.PARTITIONED, Condition.PAUSED}
    others = {condition for part, condition in each.conditions.items() if part is not Part.KEYMANAGER}
    if not each.kills or silent & others:
        yield
        return
    sleeper = cluster.service("safekeeper-3")
    sleeper.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        sleeper.send_signal(signal.SIGCONT)


async def troubles(place: Place, conditions: Mapping[Part, Condition], tenants: Sequence[Tenant]) -> list[Trouble]:
    found: list[Trouble] = []
    for part, condition in conditions.items():
        match part:
            case Part.KEYMANAGER:
                found.append(ServiceTrouble(place, await place.cluster.leader(), condition, tenants))
            case Part.SAFEKEEPER:
                found.append(ServiceTrouble(place, place.cluster.service("safekeeper-1"), condition, tenants))
            case Part.PAGESERVER | Part.PROXY:
                found.append(ServiceTrouble(place, place.cluster.service(part.value), condition, tenants))
            case Part.COMPUTE:
                computes = [await tenant.compute() for tenant in tenants]
                found.append(ComputeTrouble(place, computes, condition))
    return found
