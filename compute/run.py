"""One run of an endpoint: from an election to a compute that is gone.

    agent booting ──────┐  (lease, volume)
                        ├─► Start ─► basebackup, roles, Postgres ─► streams from a majority ─► RUNNING ─► … ─► over
    election, bring-up ─┘

A read-only endpoint has no election and no streams, and adds to no log: it starts at its LSN. For as long as it runs it
holds a lease on that LSN, so that the pageserver collects nothing that it reads. A read replica starts with all that
was acknowledged by then, and follows the log from there (compute/agent/replica.py).

The election and the agent's boot run at the same time. A run owns everything that it starts (tasks, agent,
directories), and nothing of it is left when `execute` returns, however that comes about.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from compute.agent.protocol import (
    NO_TERM,
    SAFEKEEPER_ROLE,
    Boot,
    Follow,
    LoginRoles,
    PostgresOptions,
    Replayed,
    Running,
    Start,
    Tokens,
    ancestor_node_id,
)
from compute.branches import Points
from compute.config import ManagerSettings
from compute.election import Candidacy, Elections
from compute.endpoint import Event, next_state
from compute.follower import Follower, RunInfo
from compute.launcher import AgentProcess, Launcher, make_socket_dir, remove_socket_dir
from compute.lsn_hold import LsnHold
from compute.proposer import Plan, Reservation, majority
from compute.repository import EndpointRow, Repository, TimelineRow
from compute.sizes import MAX_CONNECTIONS, RESERVED_CONNECTIONS, Resources, resources
from compute.storage_clients import PageserverClient, SafekeeperClient
from shared.api.compute import ConnectTarget, EndpointSize, EndpointState, FirstQuery, StageTiming
from shared.api.keymanager import KeyState
from shared.api.safekeeper import ComputeAddress, CreateTimeline, Donor, StopStream, StreamFrom
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.errors import ConflictError, KeyAccessError, KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.ids import EndpointId, InstanceId, ProjectId, TimelineId
from shared.lease import Lease, key_access_error
from shared.lsn import Lsn
from shared.telemetry import get_logger
from shared.tracing import record_stage

_log = get_logger(__name__)

_POLITE_STOP_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class RunServices:
    """What every run uses."""

    settings: ManagerSettings
    repository: Repository
    safekeepers: Sequence[SafekeeperClient]
    elections: Elections
    launcher: Launcher
    issuer: TokenIssuer
    pageserver: PageserverClient
    guard: Path
    """The compiled commit guard."""

    def resources(self, endpoint: EndpointRow) -> Resources:
        """Of the endpoint's own size, or as the installation is set."""
        return self.settings.resources if endpoint.size is None else resources(endpoint.size)

    def suspend_after_s(self, endpoint: EndpointRow) -> float:
        """The endpoint's own, or the installation's."""
        return self.settings.suspend_after_s if endpoint.suspend_after_s is None else endpoint.suspend_after_s


class Run:
    """Make it, let `execute` run in a task, await `ready`."""

    def __init__(
        self,
        services: RunServices,
        endpoint: EndpointRow,
        timeline: TimelineRow,
        lease: Lease,
        ancestor_projects: Sequence[ProjectId] = (),
        *,
        turns: asyncio.Semaphore,
    ) -> None:
        """`lease`: the manager's, on the endpoint's project. `ancestor_projects`: others that the timeline was branched
        off. `turns`: how many may start at the same time. Who waits for a quorum gives its turn back."""
        self._services = services
        self._lease = lease
        self.project_ids: Final = (endpoint.project_id, *ancestor_projects)
        """Whose keys it needs."""
        self._endpoint = endpoint
        self._timeline = timeline
        self._resources = services.resources(endpoint)
        self.instance_id: Final = InstanceId.new()
        self.state = next_state(EndpointState.STOPPED, Event.START)
        self.reason = "starting"
        self.plan: Plan | None = None
        self.volume = ""
        self.boot_key_made_at: datetime | None = None
        self.stages: list[StageTiming] = []
        self.pages_at_start: int | None = None
        """Fetched one by one until it was up; None: all of them came with the basebackup."""
        self.first_query_seen = False
        """The last stage is known."""
        self._lsn_hold = LsnHold(services.pageserver, endpoint.project_id, timeline.timeline_id)
        self.suspend_after_s = services.suspend_after_s(endpoint)
        """Idle for as long, it is stopped; 0: never."""
        self._named_at = asyncio.get_running_loop().time()
        self._unused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Its agent says that it may be suspended."""
        self.resumed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Of now: done when it was to be suspended, and goes on. Another one after that."""
        self.ready: asyncio.Future[ConnectTarget] = asyncio.get_running_loop().create_future()
        """Where to connect, or why there is nowhere."""
        self.gone = asyncio.Event()
        """No key, no file and no Postgres of its compute is left: its agent says so, or is dead, too. What is over
        after that is the agent's own process, and what the manager has to do."""
        self._stop: asyncio.Future[tuple[str, bool]] = asyncio.get_running_loop().create_future()
        self._elected = asyncio.Event()
        self._followers: list[Follower] = []
        self._agent: AgentProcess | None = None
        self._turns = turns
        self._has_turn = False
        self.crashed = False
        """It ended, and nobody wanted that, and nothing outside explains it."""
        self.running_since_s: float | None = None
        """Of the event loop's clock."""

    @property
    def endpoint_id(self) -> EndpointId:
        return self._endpoint.endpoint_id

    @property
    def project_id(self) -> ProjectId:
        return self._endpoint.project_id

    @property
    def timeline_id(self) -> TimelineId:
        return self._timeline.timeline_id

    @property
    def size(self) -> EndpointSize | None:
        """None: as the installation is set."""
        return self._endpoint.size

    @property
    def read_only(self) -> bool:
        return self._endpoint.read_only

    @property
    def replayed(self) -> Replayed | None:
        """How far a replica is."""
        return None if self._agent is None else self._agent.replayed

    def is_ending(self) -> bool:
        """Or over: who wants the endpoint waits for the next one."""
        return self.state in (EndpointState.STOPPING, EndpointState.STOPPED)

    @property
    def login_roles(self) -> LoginRoles | None:
        """Who may log in to the timeline, when it is over; None: not known for certain."""
        agent = self._agent
        return agent.ended.result().login_roles if agent is not None and agent.ended.done() else None

    def stop(self, reason: str, *, graceful: bool) -> None:
        """Ask for the end. The first wish counts, but a kill overtakes a graceful stop."""
        if self.state in (EndpointState.STARTING, EndpointState.RUNNING):
            self.state = next_state(self.state, Event.STOP)
            self.reason = reason
        if not self._stop.done():
            self._stop.set_result((reason, graceful))
        if not graceful and self._agent is not None:
            self._agent.kill()

    def named(self) -> None:
        """Somebody was told where it is, and will connect."""
        self._named_at = asyncio.get_running_loop().time()

    def first_query(self, seen: FirstQuery) -> None:
        """The first word counts."""
        if not self.first_query_seen:
            self.first_query_seen = True
            for stage, seconds in (("login", seen.login_s), ("first_query", seen.query_s)):
                self.stages.append(StageTiming(stage=stage, seconds=round(seconds, 6)))

    def _idle(self, idle_s: float) -> None:
        """Scale to zero, perhaps."""
        long_enough = 0 < self.suspend_after_s <= min(idle_s, self._unnamed_s())
        if self.state is EndpointState.RUNNING and long_enough and not self._unused.done():
            self._unused.set_result(None)

    def _unnamed_s(self) -> float:
        """Who was just told its address is not seen by the compute yet, so that counts as use."""
        return asyncio.get_running_loop().time() - self._named_at

    async def _suspended(self, agent: AgentProcess, over: set[asyncio.Future[Any]]) -> str:
        """Returns why it was suspended; empty when one of `over` is done first.

        Nobody used it when its agent last said so. From here on whoever asks for it waits, and the agent looks once
        more, right before it shuts Postgres down: a transaction that was begun meanwhile is not aborted.
        """
        while True:
            await asyncio.wait(over | {self._unused}, return_when=asyncio.FIRST_COMPLETED)
            if any(each.done() for each in over):
                return ""
            self._unused = asyncio.get_running_loop().create_future()
            after_s = self.suspend_after_s
            if not 0 < after_s <= self._unnamed_s():
                continue
            self.state = next_state(self.state, Event.STOP)
            self.reason = f"suspended: nobody used it for {after_s:g} s"
            stopping = asyncio.create_task(agent.stop_if_unused(after_s, self._services.settings.stop_timeout_s))
            try:
                await asyncio.wait((over - {agent.ended}) | {stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)
            if agent.ended.done():
                return self.reason if agent.ended.result().asked_for and not self._stop.done() else ""
            if any(each.done() for each in over):
                return ""
            self.state, self.reason = next_state(self.state, Event.RESUMED), "running"
            self.resumed.set_result(None)
            self.resumed = asyncio.get_running_loop().create_future()

    async def read_log(self) -> str:
        """The end of Postgres's log. Raises ConflictError when there is no compute, and as `AgentProcess.read_log`."""
        if self._agent is None:
            raise ConflictError("the endpoint has no compute")
        return await self._agent.read_log()

    def problems(self) -> dict[str, str]:
        """Safekeepers that are not where they should be, and why."""
        if self.replayed is not None and self.replayed.problem:
            return {"no WAL": self.replayed.problem}
        return {each.node_id: each.problem for each in self._followers if each.problem}

    async def execute(self) -> str:
        """Returns why it is over. Never raises KeylakeError: `ready` has it."""
        reason = "over"
        try:
            reason = await self._execute()
        except KeylakeError as error:
            reason = str(error)
            self._fail(error)
        except BaseException as error:
            reason = f"unexpected {type(error).__name__}"
            self._fail(UnavailableError("the endpoint's start failed; the manager's log has the details"))
            raise
        finally:
            self.state, self.reason = EndpointState.STOPPED, reason
            self.gone.set()
            self._fail(UnavailableError(f"the endpoint stopped: {reason}"))
        return reason

    def _fail(self, error: KeylakeError) -> None:
        if isinstance(error, KeyAccessError) and error.workspace_id is None:
            error.workspace_id = self._lease.workspace_id
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # retrieved: nobody may be waiting

    async def _execute(self) -> str:
        if not await self._wait_for_turn():
            return self._stop.result()[0]
        try:
            return await self._execute_in_turn()
        finally:
            self._give_turn()

    async def _execute_in_turn(self) -> str:
        settings = self._services.settings
        socket_dir = make_socket_dir(settings.runtime_dir, str(self.instance_id))
        followers = asyncio.create_task(self._follow(), name="followers")
        try:
            self._agent = await self._services.launcher.take(self._resources.volume_mb << 20)
            self._agent.on_idle, self._agent.on_cleared = self._idle, self.gone.set
            try:
                return await self._supervise(self._agent, socket_dir, followers)
            finally:
                if self.state in (EndpointState.STARTING, EndpointState.RUNNING):
                    self.state = next_state(self.state, Event.STOP)  # whoever comes now waits for the next run
                if not self._stop.done() or not self._stop.result()[1]:
                    self._agent.kill()
                await self._agent.close()
                self.gone.set()
        finally:
            followers.cancel()
            await asyncio.gather(followers, return_exceptions=True)
            await self._lsn_hold.release()
            await self._stop_streams()
            remove_socket_dir(socket_dir)

    async def _wait_for_turn(self) -> bool:
        """False: it is not wanted any more."""
        if self._turns.locked():
            self.reason = "waiting for its turn: others are starting"
        taking = asyncio.create_task(self._turns.acquire())
        try:
            either: set[asyncio.Future[Any]] = {taking, self._stop}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._has_turn = not taking.cancel()
        if self._stop.done():
            self._give_turn()
            return False
        self.reason = "starting"
        return True

    async def _take_turn(self) -> None:
        await self._turns.acquire()
        self._has_turn = True

    def _give_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._turns.release()

    async def _supervise(self, agent: AgentProcess, socket_dir: Path, followers: asyncio.Task[None]) -> str:
        password = secrets.token_urlsafe(32)
        liveness_timeout_s = self._services.settings.liveness_timeout_s
        starting = asyncio.create_task(self._start(agent, socket_dir, password))
        silent: asyncio.Task[None] | None = None
        try:
            over: set[asyncio.Future[Any]] = {agent.ended, self._stop, followers, self._lsn_hold.lost}
            await asyncio.wait(
                over | {starting}, timeout=self._services.settings.start_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if starting.done() and starting.exception() is None and not self._stop.done():
                self.state = next_state(self.state, Event.STARTED)
                self.reason = "running"
                self.running_since_s = asyncio.get_running_loop().time()
                self._give_turn()
                self.named()  # whoever waits for it will connect
                self.ready.set_result(self._target(starting.result()))
                silent = asyncio.create_task(agent.wait_silent(liveness_timeout_s), name="agent silent")
                if suspended := await self._suspended(agent, over | {silent}):
                    return suspended
                if silent.done() and not any(each.done() for each in over):
                    self.crashed = True
                    return f"the compute's agent has not said anything for {liveness_timeout_s:g} s"
            return await self._why(agent, starting, followers)
        finally:
            for task in filter(None, (starting, silent)):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _why(
        self, agent: AgentProcess, starting: asyncio.Task[ComputeAddress], followers: asyncio.Task[None]
    ) -> str:
        """What ended it. Raises the KeylakeError that made it fail."""
        if self._stop.done():
            reason, graceful = self._stop.result()
            if graceful:
                await agent.stop(self._services.settings.stop_timeout_s)
            return reason
        if followers.done():
            followers.result()  # raises
        if self._lsn_hold.lost.done():
            self._lsn_hold.lost.result()  # raises
        if agent.ended.done():
            ended = agent.ended.result()
            self.crashed = ended.crashed
            if ended.key_state is not None:
                error = key_access_error(ended.key_state, ended.reason)
                self._fail(error)
            return ended.reason
        if starting.done():
            starting.result()  # raises
        problem = "" if self.replayed is None else self.replayed.problem
        self.crashed = not problem
        late = f"the endpoint did not start within {self._services.settings.start_timeout_s:g} s"
        raise UnavailableError(f"{late}: no WAL: {problem}" if problem else late)

    def _target(self, compute: ComputeAddress) -> ConnectTarget:
        return ConnectTarget(
            endpoint_id=self.endpoint_id,
            project_id=self._endpoint.project_id,
            instance_id=self.instance_id,
            compute=compute,
            max_sessions=max(1, self._max_connections() - RESERVED_CONNECTIONS),
        )

    def _max_connections(self) -> int:
        """Postgres's."""
        if self.read_only:
            # No fewer than any primary of this timeline may have.
            return max(self._resources.max_connections, self._services.settings.max_connections, MAX_CONNECTIONS)
        return self._resources.max_connections

    # --- start ---

    async def _start(self, agent: AgentProcess, socket_dir: Path, password: str) -> ComputeAddress:
        """Raises KeylakeError."""
        began = time.monotonic()
        await agent.boot(self._boot(socket_dir, password), self._tokens)
        if self.read_only:
            start = Start(term=NO_TERM, start_lsn=await self._read_lsn())
            return (await self._start_agent(agent, start)).compute
        info = await self._win()
        plan = info.plan
        self._lap("election", began)
        began = time.monotonic()
        # Whoever waits for others does nothing that others would have to wait for.
        self._give_turn()
        await self._majority([each.reached for each in self._followers])
        await self._take_turn()
        self._lap("bring_up", began)
        failpoint("majority-reached")
        running = await self._start_agent(agent, Start(term=plan.term, start_lsn=plan.start_lsn))
        failpoint("compute-started")
        self._give_turn()
        began = time.monotonic()
        info.stream = StreamFrom.model_validate(
            {
                "term": plan.term,
                "start_lsn": plan.start_lsn,
                "compute": running.compute,
                "user": SAFEKEEPER_ROLE,
                "password": password,
            }
        )
        for follower in self._followers:
            follower.nudge()
        await self._majority([each.streaming for each in self._followers])
        self._lap("stream", began)
        failpoint("majority-streams")
        return running.compute

    async def _read_lsn(self) -> Lsn:
        """Where a read-only one starts."""
        if self._endpoint.read_only_lsn is not None:
            return self._endpoint.read_only_lsn
        points = Points(self._services.pageserver, self._services.safekeepers)
        return await points.resolve(self._timeline, None)

    async def _start_agent(self, agent: AgentProcess, start: Start) -> Running:
        prepared = await agent.prepared
        self.volume = prepared.volume
        self.boot_key_made_at = prepared.boot_key_made_at
        if prepared.lazy or self._endpoint.read_only_lsn is not None:
            await self._lsn_hold.take(start.start_lsn)
        await agent.start(start)
        running = await agent.running
        self.stages += running.stages
        self.pages_at_start = running.pages_fetched
        return running

    def _lap(self, stage: str, began: float) -> None:
        seconds = time.monotonic() - began
        self.stages.append(StageTiming(stage=stage, seconds=round(seconds, 6)))
        record_stage(stage, seconds)

    async def _majority(self, events: list[asyncio.Event]) -> None:
        """Wait until most of them are set; the others go on in the background."""
        waiting = {asyncio.create_task(event.wait()) for event in events}
        left = majority(len(events))
        try:
            pending = waiting
            while left > 0:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                left -= len(done)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _boot(self, socket_dir: Path, password: str) -> Boot:
        settings, endpoint, sized = self._services.settings, self._endpoint, self._resources
        listen = settings.tunnel_listen_host
        follow = None
        if endpoint.follows:
            assert self._timeline.start_lsn is not None  # noqa: S101 - the manager starts finished timelines only
            follow = Follow(
                safekeepers=[each.wal for each in settings.safekeepers], log_start_lsn=self._timeline.start_lsn
            )
        return Boot(
            instance_id=self.instance_id,
            endpoint_id=endpoint.endpoint_id,
            project_id=endpoint.project_id,
            ancestor_projects=list(self.project_ids[1:]),
            timeline_id=endpoint.timeline_id,
            system_identifier=self._timeline.system_identifier,
            log_level=settings.log_level,
            keymanager=settings.keymanager,
            pages=settings.pages,
            ca_certificate=settings.identity.ca_certificate.absolute(),
            socket_dir=socket_dir.absolute(),
            sealed_log=(settings.log_dir / f"{self.instance_id}.log").absolute(),
            log_size_bytes=settings.log_size_mb << 20,
            owner=endpoint.owner,
            owner_verifier=endpoint.scram_verifier,
            database=endpoint.database,
            safekeeper_password=password,
            postgres=PostgresOptions(
                guard=self._services.guard,
                standby_names=[] if self.read_only else [each.node_id for each in settings.safekeepers],
                read_only=self.read_only,
                shared_buffers_mb=sized.shared_buffers_mb,
                max_connections=self._max_connections(),
                work_mem_mb=sized.work_mem_mb,
                maintenance_work_mem_mb=sized.maintenance_work_mem_mb,
                max_parallel_workers=sized.max_parallel_workers,
                superuser_owner=settings.superuser_owners,
            ),
            follow=follow,
            idle_poll_interval_s=settings.idle_poll_interval_s,
            liveness_timeout_s=settings.liveness_timeout_s,
            tunnel=None if listen is None else Address(host=listen, port=0),
            tunnel_advertised_host=settings.tunnel_advertised_host,
        )

    def _tokens(self) -> Tokens:
        issuer, project_id = self._services.issuer, self._endpoint.project_id
        subject = str(self.endpoint_id)  # the compute's node_id: a token is good for this name only
        return Tokens(
            keymanager=issuer.issue(Service.KEYMANAGER, [Scope.KEYS_SESSION], project_id=project_id, subject=subject),
            pageserver=issuer.issue(Service.PAGESERVER, [Scope.STORAGE_READ], project_id=project_id, subject=subject),
            safekeeper=issuer.issue(Service.SAFEKEEPER, [Scope.WAL_READ], project_id=project_id, subject=subject)
            if self._endpoint.follows
            else "",
            ancestors={
                each: issuer.issue(
                    Service.KEYMANAGER,
                    [Scope.KEYS_SESSION],
                    project_id=each,
                    subject=ancestor_node_id(self.endpoint_id, each),
                )
                for each in self.project_ids[1:]
            },
        )

    # --- safekeepers ---

    async def _win(self) -> RunInfo:
        timeline = self._timeline
        assert timeline.start_lsn is not None  # noqa: S101 - the manager starts finished timelines only
        candidacy = Candidacy(
            timeline.project_id, timeline.timeline_id, timeline.start_lsn, candidate=str(self.instance_id)
        )

        async def reserve(at_least: int) -> Reservation:
            return await self._services.repository.reserve_term(timeline.timeline_id, at_least)

        plan = await self._services.elections.run(candidacy, reserve)
        donor = next(each for each in self._services.safekeepers if each.node_id == plan.donor)
        self.plan = plan
        info = RunInfo(
            project_id=timeline.project_id,
            timeline_id=timeline.timeline_id,
            candidate=str(self.instance_id),
            create=CreateTimeline(system_identifier=timeline.system_identifier, start_lsn=timeline.start_lsn),
            told=timeline.safekeepers,
            plan=plan,
            donors={plan.donor: Donor(node_id=plan.donor, address=donor.address.wal)},
        )
        self._followers = [self._follower(each, info) for each in self._services.safekeepers]
        self._elected.set()
        return info

    def _follower(self, safekeeper: SafekeeperClient, info: RunInfo) -> Follower:
        return Follower(
            safekeeper,
            info,
            poll_interval_s=self._services.settings.poll_interval_s,
            before_create=self._before_create,
            on_deposed=self._deposed,
        )

    async def _before_create(self, node_id: str) -> None:
        await self._services.repository.safekeeper_told(self.timeline_id, node_id)

    def _deposed(self, term: int) -> None:
        self.stop(f"a newer compute was elected (term {term})", graceful=False)

    async def _follow(self) -> None:
        """Run the followers once the election is won."""
        await self._elected.wait()
        async with asyncio.TaskGroup() as group:
            for follower in self._followers:
                group.create_task(follower.run(), name=f"follow {follower.node_id}")

    async def _stop_streams(self) -> None:
        """Polite: the safekeepers notice by themselves, but keep trying to reconnect until they are told. Or until they
        lose the project's keys: then they stop, and hear of it from whom we did."""
        plan = self.plan
        if plan is None or self._lease.state is not KeyState.ACTIVE:
            return

        async def tell(safekeeper: SafekeeperClient) -> None:
            try:
                async with asyncio.timeout(_POLITE_STOP_TIMEOUT_S):
                    await safekeeper.stop_stream(
                        self._timeline.project_id, self.timeline_id, StopStream(term=plan.term)
                    )
            except (KeylakeError, TimeoutError) as error:
                _log.info("a safekeeper was not told of the stop", safekeeper=safekeeper.node_id, error=str(error))

        await asyncio.gather(*(tell(each) for each in self._services.safekeepers))
