"""One project on a pageserver: its lease, its redo worker, its timelines, and what goes with its keys."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from pageserver.attached import AttachedTimeline
from pageserver.key_upkeep import TimelineKeys
from pageserver.project_redo import ProjectRedo
from shared.errors import KeylakeError, UnavailableError
from shared.garbage import GarbageCollection
from shared.ids import ProjectId, TimelineId
from shared.lease import KeyLoss, Lease, key_access_error
from shared.telemetry import get_logger

_log = get_logger(__name__)


class Project:
    """One project: its lease, its redo worker, its timelines."""

    def __init__(
        self,
        project_id: ProjectId,
        redo: ProjectRedo,
        branches_elsewhere: Callable[[], Sequence[Branched]],
        garbage: GarbageCollection,
    ) -> None:
        """`branches_elsewhere`: timelines of other projects that read this one's."""
        self.project_id = project_id
        self._branches_elsewhere = branches_elsewhere
        self._garbage = garbage
        self.redo = redo
        self.lease: Lease | None = None
        self.timelines: dict[TimelineId, AttachedTimeline] = {}
        self.tasks: dict[TimelineId, asyncio.Task[None]] = {}
        """What loads them and keeps them going."""
        self.unloaded: dict[TimelineId, KeylakeError] = {}
        """Why timelines of the object store could not be loaded so far."""
        self.ending: set[TimelineId] = set()
        """Those that do not exist any more, but something of them: their task deletes it."""
        self.ancestors: dict[TimelineId, tuple[ProjectId, TimelineId]] = {}
        """Of branches, as soon as that is known; loaded or not."""
        self.changing = asyncio.Lock()

    def is_loading(self, timeline_id: TimelineId) -> bool:
        return timeline_id in self.tasks and timeline_id not in self.timelines and timeline_id not in self.ending

    def check_loaded(self, timeline_id: TimelineId) -> None:
        """Nothing for one that is not known at all. Raises UnavailableError while it is being loaded, or why it cannot
        be."""
        unloaded = self.unloaded.get(timeline_id)
        if unloaded is not None:
            raise type(unloaded)(str(unloaded))
        if self.is_loading(timeline_id):
            raise UnavailableError("the timeline is being loaded")

    def timeline_keys(self) -> dict[TimelineId, TimelineKeys]:
        return {timeline_id: attached.timeline.keys for timeline_id, attached in self.timelines.items()}

    def cut(self, loss: KeyLoss) -> None:
        """CutHandler of the project: no page of it leaves, and no plaintext is in a cache, when this returns."""
        workspace_id = None if self.lease is None else self.lease.workspace_id
        error = key_access_error(loss.state, loss.reason, workspace_id)
        for attached in self._lost_with_it(self._branches_elsewhere()):
            attached.timeline.cut(error)

    def _lost_with_it(self, elsewhere: Sequence[Branched]) -> list[AttachedTimeline]:
        """Pages of a branch are made of its ancestor's: they go, too."""
        return [*self.timelines.values(), *(each.attached for each in elsewhere)]

    async def on_loss(self, loss: KeyLoss) -> dict[str, float]:
        """KeyLossHandler of the project."""
        started = perf_counter()
        self.cut(loss)
        steps_s = {"connections and plaintext dropped": perf_counter() - started}
        elsewhere = self._branches_elsewhere()
        redos = {self.redo, *(each.redo for each in elsewhere)}  # the workers, too, that made them
        losing = asyncio.gather(*(attached.lose() for attached in self._lost_with_it(elsewhere)))
        await asyncio.gather(*(redo.kill() for redo in redos))  # meanwhile: reads under way may wait for them
        steps_s["redo worker killed"] = perf_counter() - started
        for done in await losing:
            for step, seconds in done.items():
                steps_s[step] = max(seconds, steps_s.get(step, 0.0))
        for redo in redos:
            redo.allow()  # a new worker starts only for a read, and a read needs the lease
        # Cancelled tasks and their tracebacks refer to each other, and to the batch of WAL that they had at hand.
        await self._garbage.collected()
        steps_s["all plaintext gone"] = perf_counter() - started
        _log.info("keys lost", project_id=str(self.project_id), state=loss.state.value, reason=loss.reason)
        return steps_s


@dataclass(frozen=True, slots=True)
class Branched:
    """A timeline, and the worker of its project."""

    attached: AttachedTimeline
    redo: ProjectRedo


@contextlib.asynccontextmanager
async def turn(projects: Sequence[Project]) -> AsyncIterator[None]:
    """Whoever makes a branch and whoever deletes its ancestor take turns. The locks are taken in the order of the
    projects' ids: two projects may each have a branch of the other."""
    async with contextlib.AsyncExitStack() as held:
        for project in sorted(set(projects), key=lambda each: str(each.project_id)):
            await held.enter_async_context(project.changing)
        yield
