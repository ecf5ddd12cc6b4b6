"""All projects and timelines of one pageserver: attached at the start, created, looked up; and what a lost lease means
for them. The life of one timeline: attached.py; of a project: project.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, Self

from pageserver.announced import announced_lsn
from pageserver.attached import FAULT_PAUSE_S, AttachedTimeline, Environment
from pageserver.initdb_import import read_position, read_values
from pageserver.key_project import ProjectKeys
from pageserver.project import Branched, Project, turn
from pageserver.project_redo import ProjectRedo
from pageserver.removal import Mark, Removal
from pageserver.scrub import MAX_FINDINGS
from pageserver.timeline import (
    AncestorNotLoadedError,
    InitdbPosition,
    NoSuchTimelineError,
    Timeline,
    TimelineExistsError,
    TimelineServices,
)
from shared.api.pageserver import (
    ADMIN_ROLE,
    AncestorInfo,
    Finding,
    FindingKind,
    Strays,
    TimelineInfo,
)
from shared.deletion import Deletion
from shared.errors import (
    ConflictError,
    IntegrityError,
    KeyAccessError,
    KeylakeError,
    NotFoundError,
    ShreddedError,
    UnavailableError,
)
from shared.failpoints import failpoint
from shared.garbage import GarbageCollection
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep import KeyUpkeep
from shared.lease import Lease
from shared.lsn import Lsn
from shared.postgres import initdb
from shared.sandbox import SHARED_MEMORY_DIR
from shared.storage.base import StoreDeniedError
from shared.storage.purge import purge
from shared.telemetry import get_logger
from shared.wal.page import boundary_of

PROJECTS_PREFIX: Final = "projects/"
_WAL_PREFIX: Final = "wal/"
"""Of what safekeepers offload: wal/<project>/<timeline>/…"""
_ANCESTOR_POLL_S: Final = 0.1
BRANCH_WAIT_S: Final = 30.0
"""How long making a branch waits for its LSN to be ingested."""
_log = get_logger(__name__)


class Tenants:
    """Use as an async context manager; entering attaches what the object store holds."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._projects: dict[ProjectId, Project] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._shredded: set[ProjectId] = set()
        self._stopping = False
        self._garbage = GarbageCollection()
        self._news = asyncio.Event()
        """Set, and replaced, when a timeline was loaded or could not be."""
        self.upkeep = KeyUpkeep(environment.keys, environment.upkeep, self.projects)

    async def __aenter__(self) -> Self:
        for project_id, timeline_id in await self._stored():
            project = self._project(project_id)
            project.tasks[timeline_id] = self._spawn(self._attach(project_id, timeline_id))
        self._spawn(self.upkeep.run())
        return self

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Tasks end only at shutdown, with their timeline, when their project is shredded, or with a bug, which is
        logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a timeline's task failed", exc_info=error)

    async def __aexit__(self, *exc_info: object) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for project in self._projects.values():
            await project.redo.close()

    async def _stored(self) -> set[tuple[ProjectId, TimelineId]]:
        """Timelines that have an index in the object store."""
        found: set[tuple[ProjectId, TimelineId]] = set()
        async for item in self._environment.store.list(PROJECTS_PREFIX):
            match item.key.split("/"):
                case ["projects", project, "timelines", timeline, "index", _]:
                    with contextlib.suppress(ValueError):
                        found.add((ProjectId.parse(project), TimelineId.parse(timeline)))
        return found

    async def _attach(self, project_id: ProjectId, timeline_id: TimelineId) -> None:
        """Open a stored timeline as soon as its keys can be had, and keep it going."""
        project = self._project(project_id)
        while True:
            try:
                timeline = await self._find(project, timeline_id)
                break
            except KeylakeError as error:
                if timeline_id not in project.ending:
                    self._not_attached(project, timeline_id, error)
                waits = isinstance(error, AncestorNotLoadedError)
                await asyncio.sleep(_ANCESTOR_POLL_S if waits else FAULT_PAUSE_S)
        project.unloaded.pop(timeline_id, None)
        if timeline is not None:
            await self._keep(project, timeline)
        elif project.tasks.get(timeline_id) is asyncio.current_task():
            del project.tasks[timeline_id]
            self._tell_news()

    def _not_attached(self, project: Project, timeline_id: TimelineId, error: KeylakeError) -> None:
        known = project.unloaded.get(timeline_id)
        if known is None or known.code != error.code:
            log = _log.error if isinstance(error, IntegrityError) else _log.info
            log("timeline is not attached", timeline_id=str(timeline_id), code=error.code, error=str(error))
        project.unloaded[timeline_id] = error
        self._tell_news()

    async def _find(self, project: Project, timeline_id: TimelineId) -> Timeline | None:
        """None when there is no such timeline: a process has died before it had created it, or while it deleted it,
        which is finished here."""
        lease = await self._lease(project)
        try:
            return await self._open(project, timeline_id, lease)
        except NoSuchTimelineError:
            removal = self._removal(project.project_id, timeline_id)
            mark = await removal.begun()
            if mark is not None:
                project.ending.add(timeline_id)
                project.unloaded.pop(timeline_id, None)
                await self._finish(removal, mark, timeline_id)
            project.ending.discard(timeline_id)
            return None

    async def _open(self, project: Project, timeline_id: TimelineId, lease: Lease) -> Timeline:
        environment, services = self._environment, self._services(project)
        project_id, config = project.project_id, environment.config
        announced = await announced_lsn(
            project_id, timeline_id, environment.peers, environment.issuer, environment.peer_context
        )

        def find(of_project: ProjectId, ancestor_id: TimelineId) -> Timeline:
            project.ancestors[timeline_id] = of_project, ancestor_id
            return self.timeline(of_project, ancestor_id)

        timeline = await Timeline.open(
            project_id, timeline_id, services, lease, config, at_least_lsn=announced, find=find
        )
        if timeline.ancestor is not None:  # once more: the metadata database may be an older one than the store
            await self._note(project_id, timeline.ancestor.project_id)
        return timeline

    async def _note(self, project_id: ProjectId, ancestor_project_id: ProjectId) -> None:
        if ancestor_project_id != project_id:
            await self._environment.keys.note_branch(project_id, ancestor_project_id)

    async def _keep(self, project: Project, timeline: Timeline) -> None:
        attached = AttachedTimeline(timeline, self._environment)
        project.timelines[timeline.timeline_id] = attached
        self._tell_news()
        await attached.run()

    def _tell_news(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _project(self, project_id: ProjectId) -> Project:
        project = self._projects.get(project_id)
        if project is None:
            project = Project(
                project_id,
                ProjectRedo(self._environment.redo_binaries),
                lambda: self._branches_elsewhere(project_id),
                self._garbage,
            )
            self._projects[project_id] = project
        return project

    def _branches_elsewhere(self, project_id: ProjectId) -> list[Branched]:
        return [
            Branched(attached, project.redo)
            for project in self._projects.values()
            if project.project_id != project_id
            for attached in project.timelines.values()
            if attached.timeline.reads(project_id)
        ]

    async def _lease(self, project: Project) -> Lease:
        self._check_there(project.project_id)
        if project.lease is None:
            project.lease = await self._environment.keys.acquire(project.project_id, project.on_loss, project.cut)
        project.lease.check()
        return project.lease

    def _services(self, project: Project) -> TimelineServices:
        environment = self._environment
        return TimelineServices(
            environment.store,
            environment.files,
            environment.keys,
            project.redo,
            environment.pool,
            compactions=environment.compactions,
            memory=environment.memory,
        )

    # --- what the API does ---

    async def create(
        self, project_id: ProjectId, timeline_id: TimelineId, ancestor: AncestorInfo | None = None
    ) -> TimelineInfo:
        """A timeline from a fresh initdb, or a branch of `ancestor`. Idempotent.

        Raises KeyAccessError, UnavailableError; for a branch as `Timeline.branch`, NotFoundError without the ancestor,
        ConflictError when the timeline exists and is another one.
        """
        project = self._project(project_id)
        changing = [project]
        if ancestor is not None and timeline_id not in project.timelines:
            parent = self.timeline(ancestor.project_id, ancestor.timeline_id)
            # As it stands: the log may end before the multiple of 8 that it is rounded to, never by a record.
            await parent.wait_lsn(ancestor.lsn.value, BRANCH_WAIT_S)
            changing.append(self._project(ancestor.project_id))
        async with turn(changing):
            project.check_loaded(timeline_id)  # or there would be two of it
            if timeline_id in project.ending:
                raise UnavailableError("a timeline of this name is being deleted")
            if timeline_id not in project.timelines:
                lease = await self._lease(project)
                if ancestor is None:
                    timeline = await self._create(project, timeline_id, lease)
                else:
                    timeline = await self._branch(project, timeline_id, lease, ancestor)
                if self._stopping:
                    raise UnavailableError("the pageserver is stopping")
                project.tasks[timeline_id] = self._spawn(self._keep(project, timeline))
                await asyncio.sleep(0)  # lets the task register the timeline
        info = self.attached(project_id, timeline_id).info()
        if (None if ancestor is None else _rounded(ancestor)) != info.ancestor:
            raise ConflictError("the timeline exists already, with another ancestor")
        return info

    async def _branch(
        self, project: Project, timeline_id: TimelineId, lease: Lease, ancestor: AncestorInfo
    ) -> Timeline:
        await self._note(project.project_id, ancestor.project_id)
        try:
            return await Timeline.branch(
                project.project_id,
                timeline_id,
                self._services(project),
                lease,
                self._environment.config,
                self.timeline(ancestor.project_id, ancestor.timeline_id),
                ancestor.lsn.value,
                self.timeline,
            )
        except TimelineExistsError:
            return await self._open(project, timeline_id, lease)

    async def delete(self, project_id: ProjectId, timeline_id: TimelineId) -> None:
        """Everything of one timeline. Idempotent; what a crash or an error leaves is deleted by whoever comes next.

        Once there is a mark in its index (removal.py) the timeline does not exist. Then its objects go, its entry in
        the ancestor's index, and the mark. One that is damaged can be deleted, too. Raises ConflictError when it has
        branches, UnavailableError when that is not known yet or the ancestor is not loaded, KeyAccessError.
        """
        project = self._projects.get(project_id)
        removal = self._removal(project_id, timeline_id)
        async with contextlib.nullcontext() if project is None else project.changing:
            mark = await removal.begun()
            if mark is None:
                mark = Mark(await self._end(project, timeline_id))
                try:
                    await removal.begin(mark)
                except KeylakeError:
                    self._go_on(project, timeline_id)  # with one or the other: nobody knows
                    raise
            if project is not None:
                project.ending.add(timeline_id)
        try:
            await self._finish(removal, mark, timeline_id)
        except KeylakeError:
            self._go_on(project, timeline_id)
            raise
        if project is not None:
            project.ending.discard(timeline_id)

    async def _end(self, project: Project | None, timeline_id: TimelineId) -> tuple[ProjectId, TimelineId] | None:
        """When this returns nobody here has the timeline open. Returns its ancestor. Raises as `delete`, or why it is
        not loaded, if that may pass."""
        listed_by = self._listed_by(timeline_id)
        if project is None:
            return listed_by
        attached = project.timelines.get(timeline_id)
        if attached is not None:
            if attached.timeline.branches:
                raise _has_branches()
            if (ancestor := attached.timeline.ancestor) is not None:
                listed_by = ancestor.project_id, ancestor.timeline_id
            await self._detach(project, timeline_id, attached)
        elif isinstance(project.unloaded.get(timeline_id), IntegrityError | AncestorNotLoadedError):
            self._check_no_branches(timeline_id)
            task = project.tasks.pop(timeline_id)
            task.cancel()
            await asyncio.wait([task])
            project.unloaded.pop(timeline_id, None)
        else:
            project.check_loaded(timeline_id)
        return project.ancestors.pop(timeline_id, None) or listed_by

    def _listed_by(self, timeline_id: TimelineId) -> tuple[ProjectId, TimelineId] | None:
        """Whose index says that this is a branch of it, of those that are loaded."""
        for project in self._projects.values():
            for other, attached in project.timelines.items():
                if timeline_id in attached.timeline.branches:
                    return project.project_id, other
        return None

    def _check_no_branches(self, timeline_id: TimelineId) -> None:
        """Of a timeline whose own index cannot be asked: the others are. Those that are damaged do not count."""
        for project in self._projects.values():
            for other in project.tasks:
                if other == timeline_id or not project.is_loading(other):
                    continue
                ancestor = project.ancestors.get(other)
                if ancestor is not None and ancestor[1] == timeline_id:
                    raise _has_branches()
                if ancestor is None and not isinstance(project.unloaded.get(other), IntegrityError):
                    raise UnavailableError("it is not known yet whether the timeline has branches")

    async def _detach(self, project: Project, timeline_id: TimelineId, attached: AttachedTimeline) -> None:
        task = project.tasks.pop(timeline_id)
        await attached.timeline.close()
        task.cancel()  # it would load the timeline again
        await asyncio.wait([task])
        del project.timelines[timeline_id]

    def _removal(self, project_id: ProjectId, timeline_id: TimelineId) -> Removal:
        return Removal(self._environment.store, project_id, timeline_id)

    async def _finish(self, removal: Removal, mark: Mark, timeline_id: TimelineId) -> None:
        """All that follows the mark. Raises AncestorNotLoadedError, and what the store and publishing raise."""
        await removal.remove_objects()
        await self._environment.files.retain(f"{removal.prefix}layers/", ())
        if mark.ancestor is not None:
            project_id, ancestor_id = mark.ancestor
            holder = self._projects.get(project_id)
            if holder is not None and holder.is_loading(ancestor_id):
                raise AncestorNotLoadedError("the branch is gone, but its ancestor, which lists it, is not loaded yet")
            if holder is not None and (ancestor := holder.timelines.get(ancestor_id)) is not None:
                async with holder.changing:
                    await ancestor.timeline.remove_branch(timeline_id)
                    failpoint("branch-removed")
        await removal.end()

    def _go_on(self, project: Project | None, timeline_id: TimelineId) -> None:
        """After an error: load it, or delete the rest of it, as soon as that is possible, whoever asks for it."""
        if project is not None and timeline_id not in project.tasks and not self._stopping:
            project.tasks[timeline_id] = self._spawn(self._attach(project.project_id, timeline_id))

    async def _create(self, project: Project, timeline_id: TimelineId, lease: Lease) -> Timeline:
        parent = self._environment.redo_binaries.sandboxes or (
            SHARED_MEMORY_DIR if SHARED_MEMORY_DIR.is_dir() else None
        )
        directory = Path(tempfile.mkdtemp(prefix="keylake-initdb-", dir=parent))
        try:
            pgdata = directory / "pgdata"
            await initdb(pgdata, superuser=ADMIN_ROLE)
            position = await asyncio.to_thread(read_position, pgdata)
            values = await asyncio.to_thread(lambda: list(read_values(pgdata)))
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        services, config = self._services(project), self._environment.config
        start = InitdbPosition(position.system_identifier, position.initdb_lsn, position.last_record_lsn)
        try:
            return await Timeline.create(project.project_id, timeline_id, services, lease, config, start, values)
        except TimelineExistsError:
            return await self._open(project, timeline_id, lease)

    def attached(self, project_id: ProjectId, timeline_id: TimelineId) -> AttachedTimeline:
        """Raises NotFoundError; or why it could not be loaded: IntegrityError, KeyAccessError, …."""
        self._check_there(project_id)
        project = self._projects.get(project_id)
        found = None if project is None else project.timelines.get(timeline_id)
        if project is None or found is None:
            if project is not None and timeline_id in project.unloaded:
                project.check_loaded(timeline_id)
            raise NotFoundError("there is no such timeline on this pageserver, or it is not loaded yet")
        return found

    def _check_there(self, project_id: ProjectId) -> None:
        """Raises ShreddedError."""
        if project_id in self._shredded:
            raise ShreddedError("the project is shredded: nothing of it is stored any more")

    async def delete_project(self, project_id: ProjectId) -> Deletion:
        """Everything of a shredded project, of all its timelines: see `shared.deletion.DeleteProject`.

        Whatever is in the object store below its name, listed by an index or not, and what is cached here. What the
        store refuses is in the answer. Raises UnavailableError.
        """
        self._shredded.add(project_id)  # from here on nothing of it is begun
        project = self._project(project_id)
        async with project.changing:
            for task in project.tasks.values():
                task.cancel()
            await asyncio.gather(*project.tasks.values(), return_exceptions=True)
            await project.redo.close()
            folder = f"{PROJECTS_PREFIX}{project_id}"
            try:
                done = await purge(self._environment.store, f"{folder}/")
            except StoreDeniedError as error:  # to be said, and not only to be tried again
                done = Deletion(left_objects=1, remains=(f"whatever is below {folder}: {error}",))
            try:
                failpoint("project-purged")
                await self._environment.files.forget(folder)
            except OSError as error:
                raise UnavailableError(f"local copies of layers cannot be deleted: {error.strerror}") from None
            self._projects.pop(project_id, None)
        return done

    async def strays(self, project_id: ProjectId) -> Strays:
        """What the object store holds of the project's timelines that are not here: made half, or deleted half. By
        names alone. Raises NotFoundError when there is nothing of such a project, ShreddedError, UnavailableError,
        StoreDeniedError."""
        self._check_there(project_id)
        project = self._projects.get(project_id)
        found: dict[str, list[int]] = {}
        objects = 0
        async with contextlib.nullcontext() if project is None else project.changing:  # nobody is just making one
            known = set() if project is None else {str(each) for each in (*project.timelines, *project.tasks)}
            for prefix in (f"{PROJECTS_PREFIX}{project_id}/timelines/", f"{_WAL_PREFIX}{project_id}/"):
                async for info in self._environment.store.list(prefix):
                    objects += 1
                    timeline = info.key[len(prefix) :].partition("/")[0]
                    if timeline not in known:
                        found.setdefault(f"{prefix}{timeline}/", []).append(info.size_bytes)
        if project is None and not objects:
            raise NotFoundError("there is nothing of such a project on this pageserver")
        findings = [
            Finding(
                kind=FindingKind.ORPHAN,
                object=name,
                detail=f"{len(sizes)} objects, {sum(sizes)} bytes, of a timeline that is not here",
            )
            for name, sizes in sorted(found.items())
        ]
        more = max(0, len(findings) - MAX_FINDINGS)
        return Strays(objects=objects, findings=findings[:MAX_FINDINGS], more_findings=more)

    def timeline(self, project_id: ProjectId, timeline_id: TimelineId) -> Timeline:
        """For reads. Raises as `attached`."""
        return self.attached(project_id, timeline_id).timeline

    async def loaded(self, project_id: ProjectId, timeline_id: TimelineId, timeout_s: float) -> Timeline:
        """As `timeline`, but one that is being loaded, as all are when a pageserver starts, is waited for.

        Raises UnavailableError after `timeout_s`.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._may_load(project_id, timeline_id):
                    await self._news.wait()
        if self._may_load(project_id, timeline_id):
            raise UnavailableError("the timeline is being loaded")
        return self.timeline(project_id, timeline_id)

    def _may_load(self, project_id: ProjectId, timeline_id: TimelineId) -> bool:
        project = self._projects.get(project_id)
        if project is None or not project.is_loading(timeline_id):
            return False
        return isinstance(project.unloaded.get(timeline_id), AncestorNotLoadedError | None)

    def infos(self) -> list[TimelineInfo]:
        return [a.info() for p in self._projects.values() for a in p.timelines.values()]

    def projects(self) -> list[ProjectKeys]:
        """For the upkeep of keys."""
        return [ProjectKeys(project, self._environment.store) for project in self._projects.values()]

    def project_keys(self, project_id: ProjectId) -> ProjectKeys:
        """Raises NotFoundError."""
        project = self._projects.get(project_id)
        if project is None:
            raise NotFoundError("there is no such project on this pageserver")
        return ProjectKeys(project, self._environment.store)

    @property
    def fault(self) -> str:
        """Which timelines cannot be loaded, and why, in one line; empty when there are none. Lost keys are no fault,
        nor is waiting for an ancestor, whose own fault is told."""
        return "; ".join(
            f"{timeline_id}: {error.code}: {error}"
            for project in self._projects.values()
            for timeline_id, error in project.unloaded.items()
            if not isinstance(error, KeyAccessError | AncestorNotLoadedError)
        )

    @property
    def redo_workers(self) -> list[ProjectId]:
        """Projects whose worker runs."""
        return [project_id for project_id, project in self._projects.items() if project.redo.running]


def _has_branches() -> ConflictError:
    return ConflictError("the timeline has branches, which read it: delete them first")


def _rounded(ancestor: AncestorInfo) -> AncestorInfo:
    return ancestor.model_copy(update={"lsn": Lsn(boundary_of(ancestor.lsn.value))})
