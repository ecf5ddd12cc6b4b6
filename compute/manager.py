"""The compute manager's use cases: timelines, endpoints, and who runs.

Invariants: at most one run per endpoint, and at most one running endpoint per timeline (a second one would depose the
first by its election), read-only ones and replicas aside, which have none. A run exists from the first `connect` or
`start` until its compute is gone; everybody who asks meanwhile shares it. Who waits for a start may go away: the start
goes on.

What may interleave: everything is on one event loop; `_runs` and `_tasks` change only between awaits. Who begins a run
looks at its endpoint and timeline first, and awaits more things: if a deletion or a replacement has begun since
(`_interventions`), it looks again. One that begins later finds the run, and ends it. A project's lease is held from its
first start until no endpoint of it runs any more.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from compute.branches import Points
from compute.crashes import PATIENCE_S, Crashes
from compute.election import Candidacy
from compute.login_roles import verifier_of
from compute.proposer import check_members, majority
from compute.replacement import Replacer
from compute.repository import EndpointRow, StoredMembers, TimelineRow
from compute.run import Run, RunServices
from compute.storage_clients import PageserverClient, SafekeeperClient
from shared.api.compute import (
    Admission,
    BranchFrom,
    ChangeEndpoint,
    ConnectTarget,
    CreatedEndpoint,
    Endpoint,
    EndpointSize,
    EndpointState,
    FirstQuery,
    ManagerStatus,
    ReplacedTimeline,
    Timeline,
)
from shared.api.pageserver import AncestorInfo
from shared.api.safekeeper import CreateTimeline, TimelineStatus
from shared.deletion import Deleted, Deletion, ObjectKind
from shared.errors import (
    ConflictError,
    InvalidInputError,
    KeyAccessError,
    KeylakeError,
    NotFoundError,
    UnavailableError,
)
from shared.failpoints import failpoint
from shared.ids import EndpointId, ProjectId, TimelineId
from shared.lease import KeyLoss, KeySource, Lease
from shared.point_in_time import PointInTime
from shared.telemetry import get_logger
from shared.wire.scram import SALT_LENGTH_BYTES, ScramVerifier

_log = get_logger(__name__)

_PATIENCE_S: Final = 1.0
OWNER: Final = "app"
DATABASE: Final = "app"


class Manager:
    """Use as an async context manager: leaving stops every compute."""

    def __init__(self, services: RunServices, pageserver: PageserverClient, keys: KeySource, node_id: str) -> None:
        self._services = services
        self._repository = services.repository
        self._pageserver = pageserver
        self._keys = keys
        self._node_id = node_id
        self._runs: dict[EndpointId, Run] = {}
        self._tasks: dict[EndpointId, asyncio.Task[str]] = {}
        self._holders: Counter[ProjectId] = Counter()
        """Runs and timelines in the making, per project: while there is one, the lease is held."""
        self._points = Points(pageserver, services.safekeepers)
        self._changing = asyncio.Lock()
        """Held while it is decided that a branch is made, or its ancestor deleted."""
        self._replacing_node: str | None = None
        self._replacing: dict[TimelineId, asyncio.Event] = {}
        """Timelines in which a safekeeper is being replaced: no endpoint of them starts before the event."""
        self._interventions = 0
        """Deletions of timelines and endpoints, and replacements of safekeepers, that have begun so far."""
        self._turns = asyncio.Semaphore(services.settings.max_starting)
        self._crashes: dict[EndpointId, Crashes] = {}
        """As our own runs ended. The rows, which say how those of managers before us did, follow."""
        self._closing = False

    async def __aenter__(self) -> Manager:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing = True
        for run in self._runs.values():
            run.stop("the manager stops", graceful=True)
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # --- timelines ---

    async def create_timeline(
        self, project_id: ProjectId, name: str, branch_from: BranchFrom | None = None
    ) -> Timeline:
        """Make it on the pageserver, then on the safekeepers. Again with the same name: goes on where it stopped.

        Raises KeyAccessError, and UnavailableError unless a majority of the safekeepers has it. For a branch also
        NotFoundError, ConflictError when there is a finished one of that name, InvalidInputError for a point at which
        there is nothing to branch off.
        """
        needed = [project_id]
        if branch_from is not None:
            source = branch_from.project_id or project_id
            parent = await self._finished(source, branch_from.timeline_id)
            needed = _distinct([project_id, *await self._projects_of(parent)])
        await self._hold_all(needed)
        try:
            if branch_from is None:
                row = await self._repository.add_timeline(project_id, name)
            else:
                row = await self._add_branch(project_id, name, source, branch_from)
            failpoint("timeline-recorded")
            if row.start_lsn is None:
                info = await self._pageserver.create_timeline(project_id, row.timeline_id, row.ancestor)
                start_lsn = info.initdb_lsn if info.ancestor is None else info.ancestor.lsn
                failpoint("timeline-before-made")
                await self._repository.timeline_made(row.timeline_id, info.system_identifier, start_lsn)
            row = await self._repository.timeline(row.timeline_id)
            await self._make_on_safekeepers(row)
        finally:
            await self._drop_all(needed)
        return _timeline_model(row)

    async def _projects_of(self, row: TimelineRow) -> list[ProjectId]:
        """Of it and of all that it was branched off: whose keys it takes to read it. Its own first."""
        found = [row.project_id]
        while row.ancestor is not None:
            row = await self._repository.timeline(row.ancestor.timeline_id)
            found.append(row.project_id)
        return _distinct(found)

    async def _add_branch(
        self, project_id: ProjectId, name: str, source: ProjectId, branch_from: BranchFrom
    ) -> TimelineRow:
        """Where it begins is decided once, and remembered before the pageserver hears of it."""
        async with self._changing:
            known = await self._repository.find_timeline(project_id, name)
            if known is not None:
                if known.ancestor is not None and not known.deleting and not await self._is_made(known):
                    return known
                raise ConflictError("the project has a branch of that name")
            parent = await self._finished(source, branch_from.timeline_id)
            lsn = await self._points.resolve(parent, branch_from.at)
            info = await self._pageserver.timeline(source, parent.timeline_id)
            oldest = info.initdb_lsn if info.ancestor is None else info.ancestor.lsn
            if lsn < oldest:
                raise InvalidInputError(f"LSN {lsn} is below {oldest}, where the history of this branch begins")
            ancestor = AncestorInfo(project_id=source, timeline_id=parent.timeline_id, lsn=lsn)
            return await self._repository.add_timeline(project_id, name, ancestor)

    async def _finished(self, project_id: ProjectId, timeline_id: TimelineId) -> TimelineRow:
        """A timeline that can be used. Raises NotFoundError, ConflictError."""
        row = await self._repository.timeline(timeline_id)
        if row.project_id != project_id:
            raise NotFoundError("no such timeline")
        if row.deleting:
            raise ConflictError("the timeline is being deleted")
        if row.start_lsn is None:
            raise ConflictError("the timeline is not finished: create it again to finish it")
        return row

    async def delete_timeline(self, project_id: ProjectId, timeline_id: TimelineId) -> None:
        """A branch, its endpoints and everything of it on every node. Again after an error: goes on where it stopped.

        Raises NotFoundError, ConflictError when it has branches or is none, KeyAccessError, UnavailableError.
        """
        row = await self._repository.timeline(timeline_id)
        if row.project_id != project_id:
            raise NotFoundError("no such timeline")
        needed = await self._projects_of(row)
        await self._hold_all(needed)
        try:
            async with self._changing:
                if row.ancestor is None:
                    raise ConflictError("this is no branch: it is there for as long as its project")
                if children := await self._repository.branches(timeline_id):
                    names = ", ".join(each.name for each in children)
                    raise ConflictError(f"other branches were made from it, and read it: delete {names} first")
                self._interventions += 1
                await self._repository.timeline_deleting(timeline_id)
            await self._end_runs(timeline_id, "its branch is deleted", graceful=False)
            await self._pageserver.delete_timeline(project_id, timeline_id)
            safekeepers = self._services.safekeepers
            await asyncio.gather(*(each.delete_timeline(project_id, timeline_id) for each in safekeepers))
            # Invariant: only when no safekeeper has the timeline any more, and none offloads.
            await asyncio.gather(*(each.delete_offloaded(project_id, timeline_id) for each in safekeepers))
            await self._repository.delete_timeline(timeline_id)
        finally:
            await self._drop_all(needed)

    async def _end_runs(self, timeline_id: TimelineId, reason: str, *, graceful: bool) -> None:
        while runs := [endpoint_id for endpoint_id, run in self._runs.items() if run.timeline_id == timeline_id]:
            for endpoint_id in runs:
                self._runs[endpoint_id].stop(reason, graceful=graceful)
            await asyncio.wait({self._tasks[endpoint_id] for endpoint_id in runs})

    async def _make_on_safekeepers(self, row: TimelineRow) -> None:
        assert row.start_lsn is not None  # noqa: S101 - it was made just now
        body = _create_request(row)

        async def make(safekeeper: SafekeeperClient) -> KeylakeError | None:
            try:
                if safekeeper.node_id in row.safekeepers and await safekeeper.status(row.project_id, row.timeline_id):
                    return None
                if safekeeper.node_id in row.safekeepers and await self._was_used(row):
                    return ConflictError("it has lost a timeline that it once had")
                await self._repository.safekeeper_told(row.timeline_id, safekeeper.node_id)
                failpoint("safekeeper-recorded")
                seated = body.model_copy(update={"seat": row.membership.seat(safekeeper.node_id)})
                await safekeeper.create_timeline(row.project_id, row.timeline_id, seated)
            except KeylakeError as error:
                _log.warning("a safekeeper did not make the timeline", safekeeper=safekeeper.node_id, reason=str(error))
                return error
            return None

        failures = [e for e in await asyncio.gather(*map(make, self._services.safekeepers)) if e is not None]
        nodes = len(self._services.safekeepers)
        if nodes - len(failures) >= majority(nodes):
            return  # a run's followers bring the others up
        for failure in failures:
            if isinstance(failure, KeyAccessError):
                raise failure
        raise UnavailableError(f"only {nodes - len(failures)} of {nodes} safekeepers made the timeline: {failures[0]}")

    async def _is_made(self, row: TimelineRow) -> bool:
        """On most safekeepers, too; one that does not answer does not count."""
        if row.start_lsn is None:
            return False
        if await self._was_used(row):
            return True
        asked = (each.status(row.project_id, row.timeline_id) for each in self._services.safekeepers)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return sum(isinstance(each, TimelineStatus) for each in answers) >= majority(len(answers))

    async def _was_used(self, row: TimelineRow) -> bool:
        """Was a term ever asked for? Until then nothing can have been committed, and making it anew is harmless."""
        return await self._repository.highest_term(row.timeline_id) > 0

    # --- safekeepers ---

    async def replace_safekeeper(self, node_id: str) -> list[ReplacedTimeline]:
        """The disk that this safekeeper has now takes the place of the one that it has lost, one timeline after the
        other. Endpoints of these stop, and start again by their next connections. Again after an error: goes on with
        what is left.

        Raises NotFoundError when the settings do not name it, ConflictError while it is being done.
        """
        if node_id not in {each.node_id for each in self._services.safekeepers}:
            raise NotFoundError("the settings name no safekeeper of that name")
        if self._replacing_node is not None:
            raise ConflictError(f"{self._replacing_node} is being replaced just now")
        self._replacing_node = node_id
        try:
            rows = await self._repository.timelines_on(node_id)
            return [await self._replace_in(row, node_id) for row in rows]
        finally:
            self._replacing_node = None

    async def _replace_in(self, row: TimelineRow, node_id: str) -> ReplacedTimeline:
        outcome, problem = "failed", ""
        try:
            outcome = "replaced" if await self._replace(row, node_id) else "kept"
        except KeylakeError as error:
            _log.warning(
                "a safekeeper was not replaced",
                safekeeper=node_id,
                timeline_id=str(row.timeline_id),
                reason=str(error),
            )
            problem = str(error) or error.code
        return ReplacedTimeline(
            project_id=row.project_id, timeline_id=row.timeline_id, outcome=outcome, problem=problem
        )

    async def _replace(self, row: TimelineRow, node_id: str) -> bool:
        """False: it has lost nothing. Raises as `Replacer.replace`."""
        safekeeper = next(each for each in self._services.safekeepers if each.node_id == node_id)
        status = await safekeeper.status(row.project_id, row.timeline_id)
        if status is not None and status.seat == row.membership.seat(node_id):
            return False
        services, repository = self._services, self._repository
        assert row.start_lsn is not None  # noqa: S101 - safekeepers hear of finished ones
        needed = await self._projects_of(row)
        await self._hold_all(needed)
        self._interventions += 1
        over = self._replacing[row.timeline_id] = asyncio.Event()
        try:
            await self._end_runs(row.timeline_id, f"{node_id} is replaced", graceful=True)
            replacer = Replacer(
                services.elections,
                services.safekeepers,
                StoredMembers(repository, row.timeline_id),
                Candidacy(row.project_id, row.timeline_id, row.start_lsn, f"replacement of {node_id}"),
                _create_request(row),
                lambda node: repository.safekeeper_told(row.timeline_id, node),
            )
            return await replacer.replace(node_id, row.membership)
        finally:
            del self._replacing[row.timeline_id]
            over.set()
            await self._drop_all(needed)

    async def timelines(self, project_id: ProjectId) -> list[Timeline]:
        """Those that are made."""
        rows = await self._repository.timelines(project_id)
        return [_timeline_model(row) for row in rows if row.start_lsn is not None and not row.deleting]

    # --- endpoints ---

    async def create_endpoint(
        self,
        project_id: ProjectId,
        timeline_id: TimelineId,
        name: str,
        *,
        read_only_at: PointInTime | None = None,
        follows: bool = False,
        suspend_after_s: float | None = None,
        size: EndpointSize | None = None,
    ) -> CreatedEndpoint:
        """The only time that the owner's password is shown. With `read_only_at` it shows the timeline as it was then;
        one that `follows` has no password of its own.
        `suspend_after_s`, `size`: None for the installation's.

        Raises NotFoundError when the project has no such timeline, ConflictError when it has an endpoint of that name;
        for a read-only one as `Points.resolve`.
        """
        timeline = await self._finished(project_id, timeline_id)
        read_only_lsn = None
        if read_only_at is not None:
            needed = await self._projects_of(timeline)
            await self._hold_all(needed)
            try:
                read_only_lsn = await self._points.resolve(timeline, read_only_at)
            finally:
                await self._drop_all(needed)
        password = secrets.token_urlsafe(24)
        salt = secrets.token_bytes(SALT_LENGTH_BYTES)
        verifier = await asyncio.to_thread(ScramVerifier.compute, password, salt)
        row = await self._repository.add_endpoint(
            timeline,
            name,
            OWNER,
            DATABASE,
            verifier.serialize(),
            read_only_lsn=read_only_lsn,
            follows=follows,
            suspend_after_s=suspend_after_s,
            size=size,
        )
        return CreatedEndpoint(**self._endpoint_model(row).model_dump(), password="" if follows else password)

    async def change_endpoint(self, endpoint_id: EndpointId, change: ChangeEndpoint) -> Endpoint:
        """In effect at once, also for a compute that runs; its size, for the next one. Raises NotFoundError."""
        row = await self._repository.change_endpoint(endpoint_id, change)
        run = self._runs.get(endpoint_id)
        if run is not None:
            run.suspend_after_s = self._services.suspend_after_s(row)
        return self._endpoint_model(row)

    async def delete_endpoint(self, endpoint_id: EndpointId) -> None:
        """For good; what was written stays in its timeline. A compute of it is stopped gracefully, and is gone, with
        its leases, keys and files, when this returns. Raises NotFoundError."""
        await self._repository.delete_endpoint(endpoint_id)
        # From here on no run of it begins: whoever has read its row before reads it again, or is found below.
        self._interventions += 1
        if (run := self._runs.get(endpoint_id)) is not None:
            run.stop("its endpoint is deleted", graceful=True)
            await asyncio.wait({self._tasks[endpoint_id]})
        self._crashes.pop(endpoint_id, None)

    async def endpoint(self, endpoint_id: EndpointId) -> Endpoint:
        """Raises NotFoundError."""
        return self._endpoint_model(await self._repository.endpoint(endpoint_id))

    async def endpoints(self, project_id: ProjectId | None = None) -> list[Endpoint]:
        return [self._endpoint_model(row) for row in await self._repository.endpoints(project_id)]

    def states(self) -> list[EndpointState]:
        """Of all runs; for metrics."""
        return [run.state for run in self._runs.values()]

    async def status(self) -> ManagerStatus:
        return ManagerStatus(node_id=self._node_id, endpoints=await self.endpoints())

    def _endpoint_model(self, row: EndpointRow) -> Endpoint:
        run = self._runs.get(row.endpoint_id)
        plan = None if run is None else run.plan
        reason = row.reason if run is None else run.reason
        crashes = self._crashes_of(row)
        wait_s = crashes.wait_s(time.time()) if run is None else 0.0
        replay_lsn = lag_bytes = None
        if run is not None and run.replayed is not None and run.replayed.replay_lsn is not None:
            replay_lsn = run.replayed.replay_lsn
            lag_bytes = run.replayed.end_lsn - replay_lsn
        if run is not None and (problems := run.problems()):
            reason += "; " + "; ".join(f"{node}: {problem}" for node, problem in problems.items())
        return Endpoint(
            endpoint_id=row.endpoint_id,
            project_id=row.project_id,
            timeline_id=row.timeline_id,
            name=row.name,
            read_only_lsn=row.read_only_lsn,
            follows=row.follows,
            replay_lsn=replay_lsn,
            lag_bytes=lag_bytes,
            state=EndpointState.STOPPED if run is None else run.state,
            reason=reason,
            term=row.term if plan is None else plan.term,
            start_lsn=row.start_lsn if plan is None else plan.start_lsn,
            instance_id=None if run is None else run.instance_id,
            volume="" if run is None else run.volume,
            boot_key_made_at=None if run is None else run.boot_key_made_at,
            stages=[] if run is None else list(run.stages),
            pages_at_start=None if run is None else run.pages_at_start,
            crashes=crashes.count,
            next_start_at=datetime.now(UTC) + timedelta(seconds=wait_s) if wait_s else None,
            user=row.owner,
            database=row.database,
            suspend_after_s=self._services.suspend_after_s(row),
            size=row.size,
            running_size=None if run is None else run.size,
            created_at=row.created_at,
        )

    # --- start and stop ---

    async def connect(self, endpoint_id: EndpointId) -> ConnectTarget:
        """Where the endpoint's Postgres is; starts it when it is stopped, and waits for a start or stop under way.

        Raises NotFoundError, KeyAccessError, ConflictError, UnavailableError.
        """
        while (target := await self._running(endpoint_id)) is None:
            await self._begin(endpoint_id)
        return target

    async def log_in(self, endpoint_id: EndpointId, user: bytes) -> Admission:
        """As `connect` for an endpoint that runs. One that does not is not started yet if it is known who may log in
        to it; the proxy calls `connect` for who has proved his password.

        Raises as `connect`.
        """
        while (target := await self._running(endpoint_id)) is None:
            if (verifier := await self._verifier(endpoint_id, user)) is not None:
                return Admission(verifier=verifier.serialize())
            await self._begin(endpoint_id)
        return Admission(target=target)

    async def _verifier(self, endpoint_id: EndpointId, user: bytes) -> ScramVerifier | None:
        """None: nobody knows who may log in."""
        row = await self._repository.endpoint(endpoint_id)
        listed = await self._repository.listed_role(row.timeline_id, user)
        return verifier_of(row, listed, user, datetime.now(UTC))

    async def _running(self, endpoint_id: EndpointId) -> ConnectTarget | None:
        """Where it is, when a start or stop under way is over. None: it does not run. Raises what its start raised."""
        while (run := self._runs.get(endpoint_id)) is not None:
            if run.is_ending():
                either: set[asyncio.Future[Any]] = {self._tasks[endpoint_id], run.resumed}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                continue
            target = await asyncio.shield(run.ready)
            if run.is_ending():
                continue  # suspended in this very moment
            run.named()
            # A manager that was paused past its lease would name a compute that has killed itself meanwhile.
            await self._hold_all(run.project_ids)
            await self._drop_all(run.project_ids)
            return target.model_copy(update={"wants_first_query": not run.first_query_seen})
        return None

    async def first_query(self, endpoint_id: EndpointId, seen: FirstQuery) -> None:
        """Somebody got the first row of a compute, if it still runs. Raises NotFoundError."""
        await self._repository.endpoint(endpoint_id)
        run = self._runs.get(endpoint_id)
        if run is not None and run.instance_id == seen.instance_id:
            run.first_query(seen)

    async def start(self, endpoint_id: EndpointId) -> Endpoint:
        """As `connect`, for who wants no connection; also when it crashed so often that those are refused."""
        crashes = self._crashes_of(await self._repository.endpoint(endpoint_id))
        if crashes.next_start_s:
            self._crashes[endpoint_id] = replace(crashes, next_start_s=0.0)
        await self.connect(endpoint_id)
        return await self.endpoint(endpoint_id)

    async def _begin(self, endpoint_id: EndpointId) -> Run:
        """A new run, or the one that somebody else began while we looked."""
        row = await self._repository.endpoint(endpoint_id)
        crashes = self._crashes_of(row)
        wait_s = crashes.wait_s(time.time())
        if wait_s > PATIENCE_S:
            raise UnavailableError(
                f"the compute crashed {crashes.count} times in a row ({crashes.reason}); it is not started for another "
                f"{wait_s:.0f} s"
            )
        await asyncio.sleep(wait_s)
        while True:
            while (replacing := self._replacing.get(row.timeline_id)) is not None:
                await replacing.wait()  # an election of ours would make it begin again
            interventions = self._interventions
            row = await self._repository.endpoint(endpoint_id)
            timeline = await self._repository.timeline(row.timeline_id)
            if timeline.start_lsn is None:
                raise ConflictError("the endpoint's timeline is not finished: create it again to finish it")
            if timeline.deleting:
                raise ConflictError("the endpoint's timeline is being deleted")
            check_members(timeline.safekeepers, [each.node_id for each in self._services.safekeepers])
            needed = await self._projects_of(timeline)
            leases = await self._hold_all(needed)
            if interventions == self._interventions:
                break  # and no await from here to the registration
            await self._drop_all(needed)
        run = self._runs.get(endpoint_id)
        is_taken = not row.read_only and self._is_written(timeline.timeline_id)
        if run is None and not self._closing and not is_taken:
            run = self._runs[endpoint_id] = Run(self._services, row, timeline, leases[0], needed[1:], turns=self._turns)
            self._tasks[endpoint_id] = asyncio.create_task(self._run(run, row), name=f"run {endpoint_id}")
            return run
        await self._drop_all(needed)
        if run is not None:
            return run
        if self._closing:
            raise UnavailableError("the manager stops")
        raise ConflictError("another endpoint runs on the same timeline: stop it first")

    def _is_written(self, timeline_id: TimelineId) -> bool:
        return any(run.timeline_id == timeline_id and not run.read_only for run in self._runs.values())

    async def _run(self, run: Run, row: EndpointRow) -> str:
        began = time.monotonic()
        reason = "over"
        try:
            reason = await run.execute()
            failpoint("run-ended")
            await self._keep_login_roles(run)  # before anybody can ask for the next one
        finally:
            del self._runs[row.endpoint_id]
            del self._tasks[row.endpoint_id]
            self._count_crash(run, row, reason)
            _log.info(
                "run is over",
                endpoint_id=str(row.endpoint_id),
                project_id=str(row.project_id),
                reason=reason,
                seconds=round(time.monotonic() - began, 3),
            )
            await self._drop_all(run.project_ids)
            plan = run.plan
            failpoint("run-before-record")
            try:
                await self._repository.run_over(
                    row.endpoint_id,
                    reason,
                    0 if plan is None else plan.term,
                    None if plan is None else plan.start_lsn,
                    self._crashes_of(row),
                )
                failpoint("run-recorded")
            except UnavailableError as error:
                _log.warning("the end of a run was not recorded", endpoint_id=str(row.endpoint_id), reason=str(error))
        return reason

    async def _keep_login_roles(self, run: Run) -> None:
        if run.plan is None or run.login_roles is None:
            return
        try:
            await self._repository.keep_login_roles(run.timeline_id, run.plan.term, run.endpoint_id, run.login_roles)
        except UnavailableError as error:
            _log.warning("who may log in was not recorded", endpoint_id=str(run.endpoint_id), reason=str(error))

    def _crashes_of(self, row: EndpointRow) -> Crashes:
        return self._crashes.get(row.endpoint_id, row.crashes)

    def _count_crash(self, run: Run, row: EndpointRow, reason: str) -> None:
        since_s = run.running_since_s
        if run.crashed:
            ran_s = 0.0 if since_s is None else asyncio.get_running_loop().time() - since_s
            crashes = self._crashes_of(row).and_another(time.time(), ran_s, reason)
            self._crashes[run.endpoint_id] = crashes
            _log.warning(
                "a compute crashed",
                endpoint_id=str(run.endpoint_id),
                project_id=str(run.project_id),
                reason=reason,
                crashes=crashes.count,
                next_start_in_s=round(crashes.wait_s(time.time()), 1),
            )
        elif since_s is not None:
            self._crashes[run.endpoint_id] = Crashes()

    async def stop(self, endpoint_id: EndpointId, *, graceful: bool) -> Endpoint:
        """Returns when the compute is gone. Does nothing to a stopped endpoint. Raises NotFoundError."""
        await self._repository.endpoint(endpoint_id)
        run, task = self._runs.get(endpoint_id), self._tasks.get(endpoint_id)
        if run is not None and task is not None:
            run.stop("stopped on request" if graceful else "killed on request", graceful=graceful)
            await asyncio.wait({task})
        return await self.endpoint(endpoint_id)

    # --- keys ---

    async def delete_project(self, project_id: ProjectId) -> Deletion:
        """Password verifiers, of a shredded project: see `shared.deletion.DeleteProject`. Raises UnavailableError."""
        # They are ending, as no lease is left, and store the list of roles last.
        ending = {self._tasks[each] for each, run in self._runs.items() if run.project_id == project_id}
        if ending:
            await asyncio.wait(ending)
        verifiers = await self._repository.delete_verifiers(project_id)
        return Deletion({ObjectKind.VERIFIER: Deleted(objects=verifiers)} if verifiers else {})

    async def _hold_all(self, project_ids: Sequence[ProjectId]) -> list[Lease]:
        """All or none. Raises as `_hold`."""
        leases: list[Lease] = []
        try:
            for project_id in project_ids:
                leases.append(await self._hold(project_id))
        except BaseException:
            await self._drop_all(project_ids[: len(leases)])
            raise
        return leases

    async def _drop_all(self, project_ids: Sequence[ProjectId]) -> None:
        for project_id in project_ids:
            await self._drop(project_id)

    async def _hold(self, project_id: ProjectId) -> Lease:
        """Hold the project's lease until the matching `_drop`. Raises KeyAccessError unless its keys may be used."""
        self._holders[project_id] += 1
        try:
            lease = await self._keys.acquire(project_id, self._on_loss)
            lease.check()
        except BaseException:
            await self._drop(project_id)
            raise
        return lease

    async def _drop(self, project_id: ProjectId) -> None:
        self._holders[project_id] -= 1
        if not self._holders[project_id]:
            del self._holders[project_id]
            await self._keys.release(project_id)

    async def _on_loss(self, loss: KeyLoss) -> dict[str, float]:
        """Belt and braces: the computes hold leases of their own, and kill themselves. They get a moment for that,
        because only they can acknowledge what they did; then they are killed. What their runs do after that (records,
        streams) has nothing of the project, and is not waited for."""
        began = time.monotonic()
        runs = [run for run in self._runs.values() if loss.project_id in run.project_ids]
        gone = asyncio.gather(*(run.gone.wait() for run in runs))
        _, late = await asyncio.wait([gone], timeout=_PATIENCE_S)
        if late:
            for run in runs:
                if not run.gone.is_set():
                    run.stop(f"stopped when the keys were lost ({loss.state.value}): {loss.reason}", graceful=False)
        await gone
        return {"computes_gone": round(time.monotonic() - began, 6)}


def _create_request(row: TimelineRow) -> CreateTimeline:
    assert row.start_lsn is not None  # noqa: S101 - the caller looked
    return CreateTimeline(system_identifier=row.system_identifier, start_lsn=row.start_lsn)


def _distinct(project_ids: Sequence[ProjectId]) -> list[ProjectId]:
    return list(dict.fromkeys(project_ids))


def _timeline_model(row: TimelineRow) -> Timeline:
    assert row.start_lsn is not None  # noqa: S101 - the caller looked
    return Timeline(
        timeline_id=row.timeline_id,
        project_id=row.project_id,
        name=row.name,
        system_identifier=row.system_identifier,
        start_lsn=row.start_lsn,
        ancestor_project_id=None if row.ancestor is None else row.ancestor.project_id,
        ancestor_timeline_id=None if row.ancestor is None else row.ancestor.timeline_id,
        created_at=row.created_at,
    )
