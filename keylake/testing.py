"""Keylake for tests of other systems: a local cluster, projects and customer's keys, as plain blocking objects.

    with LocalCluster() as keylake:
        shop = keylake.create_project("shop")       # a CMK, a workspace and a database of its own
        connect(shop.dsn)
        shop.key.disable()                          # what the customer does in its KMS
        assert_sealed(shop, within=5)
        shop.key.enable()
        shop.wait_until_active(within=10)

Fixtures for pytest are in `keylake.pytest_plugin`, which is there once Keylake is installed.

Blocking on purpose: whatever a test is written with (threads, asyncio, trio, a framework's test client), it can call
these. The cluster lives on an event loop in a thread of its own; every method may be called from any thread. In a
coroutine, `await asyncio.to_thread(key.disable)` keeps the loop free.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import asyncpg

from customercloud.faults import ErrorKind, Outage
from keylake.client import Connection
from keylake.cluster import Cluster, Customer, Progress, RunningProject
from shared.api.compute import EndpointState
from shared.api.keymanager import KekInfo, KeyState, Revocation
from shared.errors import UnavailableError

__all__ = ["CustomerKey", "LocalCluster", "ProtectedProject", "Sealed", "assert_sealed"]

_POLL_S: Final = 0.05
_KEY_SQLSTATE_CLASS: Final = "KL"
_SEALED_STATES: Final = frozenset({KeyState.SUSPENDED, KeyState.REVOKED, KeyState.SHREDDED})
T = TypeVar("T")


class _LoopThread:
    """An event loop that runs in a thread until `close`. Processes that it starts end with the thread (pdeathsig)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="keylake", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, or what it raises. From any thread but the loop's own."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C, or a test's timeout, while it was waiting
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class CustomerKey:
    """A CMK in the customer's (simulated) AWS KMS, in the customer's own hands.

    Every method returns when the cloud has done it; Keylake notices by its next probe (1 s by default).
    """

    def __init__(self, arn: str, customer: Customer) -> None:
        self.arn = arn
        self._customer = customer

    def __repr__(self) -> str:
        return f"CustomerKey({self.arn})"

    def disable(self) -> None:
        self._customer.aws.disable(self.arn)

    def enable(self) -> None:
        """Also ends what `schedule_deletion` has begun."""
        if self._customer.aws.describe(self.arn)["KeyState"] == "PendingDeletion":
            self._customer.aws.cancel_deletion(self.arn)
        self._customer.aws.enable(self.arn)

    def schedule_deletion(self, window_days: int = 7) -> None:
        """From now on it cannot be used; `enable` takes it back until the window of 7 to 30 days is over."""
        self._customer.aws.schedule_deletion(self.arn, window_days)

    def destroy(self) -> None:
        """The end of the window of `schedule_deletion`, now: nothing brings the key, or data under it, back."""
        self._customer.simulation.complete_deletion(self.arn)

    def rotate(self) -> str:
        """New key material; returns its id. What older material wrapped still opens."""
        return self._customer.aws.rotate(self.arn)

    def deny(self, role_arn: str | None = None) -> None:
        """An explicit Deny in the key's policy: for Keylake's role unless another one is named."""
        self._customer.aws.deny_role(self.arn, role_arn or self._customer.bootstrap.role_arn)

    def allow(self, role_arn: str | None = None) -> None:
        """Undo `deny`."""
        self._customer.aws.allow_role(self.arn, role_arn or self._customer.bootstrap.role_arn)

    @contextlib.contextmanager
    def outage(self, *, hang: bool = False) -> Iterator[None]:
        """Keylake cannot reach the KMS inside of the block; the customer still can.

        A cloud goes down as a whole: this is felt by every key of the cluster. `hang`: requests are never answered,
        instead of refused.
        """
        with self._faulty(outage=Outage.HANG if hang else Outage.REFUSE):
            yield

    @contextlib.contextmanager
    def errors(self, rate: float, kind: ErrorKind = ErrorKind.INTERNAL) -> Iterator[None]:
        """A share of Keylake's requests, 0 to 1, fails with a 5xx inside of the block. Felt by every key."""
        with self._faulty(error_rate=rate, error_kind=kind):
            yield

    @contextlib.contextmanager
    def throttling(self, rate: float) -> Iterator[None]:
        """A share of Keylake's requests, 0 to 1, is throttled inside of the block. Felt by every key."""
        with self._faulty(throttle_rate=rate):
            yield

    @contextlib.contextmanager
    def _faulty(self, **faults: Any) -> Iterator[None]:
        with self._customer.simulation.during(self._customer.trouble_for_keylake(**faults)):
            yield


class ProtectedProject:
    """A database under a customer's key of its own. Its compute starts with the first connection."""

    def __init__(self, keylake: LocalCluster, running: RunningProject, key: CustomerKey) -> None:
        self._keylake = keylake
        self._running = running
        self.key = key

    def __repr__(self) -> str:
        return f"ProtectedProject({self.name!r}, {self.project_id})"

    @property
    def name(self) -> str:
        return self._running.project.name

    @property
    def project_id(self) -> str:
        return str(self._running.project.project_id)

    @property
    def connection(self) -> Connection:
        """Host, port, user, password, database, CA certificate."""
        return self._running.connection

    @property
    def dsn(self) -> str:
        """For libpq, psycopg and what is built on them. asyncpg takes `**project.connection.asyncpg_arguments()`."""
        return self._running.connection.dsn

    @property
    def state(self) -> KeyState:
        """As the keymanager has it at this moment."""
        return self._keylake.run(self._keylake.cluster.client.project(self._running.project.project_id)).state

    def start(self) -> None:
        """Start the compute now, so that the first connection does not wait for it."""
        self._keylake.run(self._keylake.cluster.client.start_endpoint(self._running.endpoint.endpoint_id))

    def kill_compute(self) -> None:
        """SIGKILL, as a crash; the next connection starts another one, with everything that was committed."""
        self._keylake.run(self._keylake.cluster.client.kill_endpoint(self._running.endpoint.endpoint_id))

    def revalidate(self) -> None:
        """Have Keylake ask the KMS now, instead of at its next probe."""
        self._keylake.run(self._keylake.cluster.client.revalidate(self._running.project.project_id))

    @property
    def keks(self) -> list[KekInfo]:
        """Its KEKs, oldest first: the version of each, and the version of the CMK that wraps it."""
        return self._keylake.run(self._keylake.cluster.client.project(self._running.project.project_id)).keks

    def rewrap(self) -> None:
        """Have its KEKs wrapped under the CMK's current version now; after a rotation Keylake does so within a minute.

        Returns when it is done. Felt by everything under the same key configuration.
        """
        self._keylake.run(self._keylake.cluster.client.rewrap(self._running.project.key_configuration_id))

    def rotate_kek(self) -> None:
        """A new KEK for all that is written from now on, as `keylake project rotate-key`."""
        self._keylake.run(self._keylake.cluster.client.rotate_kek(self._running.project.project_id))

    def wait_until_active(self, within: float) -> None:
        """Return when its keys are to be had again and a client gets in. AssertionError after `within` seconds."""
        self._keylake.run(_wait_active(self._keylake.cluster, self._running, within))

    def receipt(self) -> bytes:
        """The signed receipt of the newest revocation: see docs/formats/receipt.md. Raises NotFoundError."""
        return self._keylake.run(self._keylake.cluster.client.receipt(self._running.project.project_id))

    def sealed(self, within: float) -> Sealed:
        """See `assert_sealed`."""
        return self._keylake.run(_wait_sealed(self._keylake.cluster, self._running, within))


class LocalCluster:
    """Every service of Keylake as a process on this machine, and a customer's cloud. A context manager.

    About five seconds to start, half a gigabyte of memory. Ends with the process that started it, however that ends.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        keymanagers: int = 1,
        home: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`settings`: service → fields that differ from the defaults, e.g. {"keymanager": {"lease_ttl_s": 2}}.

        `home`: a directory that keeps it for the next time; a temporary one without.
        """
        self._arguments: dict[str, Any] = {
            "settings": settings, "keymanagers": keymanagers, "home": home, "progress": progress,
        }  # fmt: skip
        self._exit = contextlib.ExitStack()
        self._numbers = itertools.count(1)
        self._loop: _LoopThread
        self.cluster: Cluster
        """The asynchronous API; what is not offered here goes through `run`."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._loop = _LoopThread()
            stack.callback(self._loop.close)
            self.cluster = self._loop.run(self._start())
            stack.callback(lambda: self._loop.run(self.cluster.__aexit__(None, None, None)))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._exit.close()

    async def _start(self) -> Cluster:
        return await Cluster(**self._arguments).__aenter__()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """`keylake.run(keylake.cluster.client.projects())`: wait for a call of the asynchronous API."""
        return self._loop.run(work)

    def create_key(self, description: str = "Keylake CMK") -> CustomerKey:
        return CustomerKey(self.run(self.cluster.customer.create_key(description)), self.cluster.customer)

    def create_project(
        self,
        name: str | None = None,
        *,
        key: CustomerKey | None = None,
        outage_grace_s: float = 0.0,
        probe_interval_s: float = 1.0,
    ) -> ProtectedProject:
        """A database in a workspace of its own, under `key` or else a CMK of its own.

        `outage_grace_s`: how long it works on while the KMS cannot be reached.
        """
        name = name or f"project-{next(self._numbers)}"
        key = key or self.create_key(f"CMK of {name}")
        timing = {"outage_grace_s": outage_grace_s, "probe_interval_s": probe_interval_s}
        return ProtectedProject(self, self.run(self._create_project(name, key.arn, timing)), key)

    async def _create_project(self, name: str, key_arn: str, timing: dict[str, float]) -> RunningProject:
        workspace = await self.cluster.create_workspace(key_arn, name, **timing)
        return await self.cluster.create_project(name, workspace.workspace_id)

    def kill(self, service: str) -> None:
        """SIGKILL one: `keymanager`, `safekeeper-1` …, `pageserver`, `compute`, `proxy`. `start` brings it back."""
        self.run(self.cluster.service(service).kill())

    def start(self, service: str) -> None:
        self.run(self.cluster.service(service).start())


@dataclass(frozen=True, slots=True)
class Sealed:
    """What `assert_sealed` has seen."""

    state: KeyState
    reason: str
    sqlstate: str
    """What a client got that tried to connect: KL002 (suspended), KL003 (revoked), KL004 (shredded)."""
    sealed_after_s: float
    """From the denial that Keylake noticed to the last instance's acknowledgement, or the end of its lease."""


def assert_sealed(project: ProtectedProject, *, within: float) -> Sealed:
    """Nobody can read the project: AssertionError unless all of this is true within `within` seconds from now.

    - the keymanager gives out none of its keys (`REVOKED`, `SUSPENDED` or `SHREDDED`);
    - every instance that held a lease has said that keys and plaintext are gone, or its lease has run out;
    - no compute runs;
    - a client that connects is refused with an SQLSTATE of class KL.
    """
    __tracebackhide__ = True  # pytest: the test's line is what is wanted
    return project.sealed(within)


async def _wait_sealed(cluster: Cluster, running: RunningProject, within_s: float) -> Sealed:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while True:
        missing = await _seal_or_missing(cluster, running)
        if isinstance(missing, Sealed):
            return missing
        if loop.time() >= deadline:
            raise AssertionError(f"{running.project.name} is not sealed after {within_s:g} s: {missing}")
        await asyncio.sleep(_POLL_S)


async def _seal_or_missing(cluster: Cluster, running: RunningProject) -> Sealed | str:
    """Or, in words, what is not so yet."""
    client = cluster.client
    try:
        project = await client.project(running.project.project_id)
        if project.state not in _SEALED_STATES:
            return f"its state is {project.state}"
        revocation = await _newest_revocation(cluster, running)
        if revocation is None or revocation.sealed_after_s is None:
            return f"it is {project.state}, but not every instance has acknowledged"
        endpoint = await client.endpoint(running.endpoint.endpoint_id)
    except UnavailableError as error:
        return f"Keylake does not answer: {error}"
    if endpoint.state is not EndpointState.STOPPED:
        return f"it is {project.state}, but its compute is {endpoint.state}"
    sqlstate = await _refusal(running.connection)
    if not sqlstate.startswith(_KEY_SQLSTATE_CLASS):
        return f"it is {project.state}, but a client that connected got {sqlstate or 'in'}"
    return Sealed(project.state, project.state_reason, sqlstate, revocation.sealed_after_s)


async def _newest_revocation(cluster: Cluster, running: RunningProject) -> Revocation | None:
    revocations = await cluster.client.revocations(running.project.project_id)
    return max(revocations, key=lambda revocation: revocation.detected_at, default=None)


async def _refusal(connection: Connection) -> str:
    """The SQLSTATE that a client gets, the name of another error, or nothing when it gets in."""
    try:
        client = await asyncpg.connect(**connection.asyncpg_arguments())
    except asyncpg.PostgresError as error:
        return error.sqlstate or "no SQLSTATE"
    except (OSError, asyncpg.InterfaceError) as error:
        return type(error).__name__
    await client.close()
    return ""


async def _wait_active(cluster: Cluster, running: RunningProject, within_s: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while missing := await _inactive(cluster, running):
        if loop.time() >= deadline:
            raise AssertionError(f"{running.project.name} is not active after {within_s:g} s: {missing}")
        await asyncio.sleep(_POLL_S)


async def _inactive(cluster: Cluster, running: RunningProject) -> str:
    """What it lacks, in words; nothing when it is active."""
    try:
        state = (await cluster.client.project(running.project.project_id)).state
    except UnavailableError as error:
        return f"Keylake does not answer: {error}"
    if state is not KeyState.ACTIVE:
        return f"its state is {state}"
    # The other services hear of it a moment later, when their leases are granted again.
    refusal = await _refusal(running.connection)
    return refusal and f"a client that connected got {refusal}"
