"""All timelines of one safekeeper: found at the start, made, looked up, deleted; and what a lost lease means for them.

    <data_dir>/lock                               held while the process lives
    <data_dir>/timelines/<project>/<timeline>/    control, pieces and their envelopes

A timeline whose control file is missing or damaged stays refused until somebody looks: made anew, it would vote as if
it had never promised anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Self

from safekeeper.control_file import FILE_NAME, ControlState
from safekeeper.files import fsync_directory
from safekeeper.key_project import ProjectUpkeep
from safekeeper.piece_keys import ProjectKeys
from safekeeper.remote_wal import project_prefix, timeline_prefix
from safekeeper.timeline import DELETED_SUFFIX, Timeline, TimelineEnvironment, remove_directory
from safekeeper.wal_sender import Log
from shared.api.safekeeper import CreateTimeline, SafekeeperStatus
from shared.deletion import Deleted, Deletion, ObjectKind, counted
from shared.errors import (
    ConflictError,
    CorruptedError,
    IntegrityError,
    KeylakeError,
    NotFoundError,
    UnavailableError,
)
from shared.garbage import GarbageCollection
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep import KeyUpkeep
from shared.lease import KeyLoss, KeySource
from shared.old_versions import OldVersions
from shared.storage.base import StoreDeniedError
from shared.storage.purge import purge
from shared.telemetry import get_logger

_log = get_logger(__name__)
_HOUSEKEEPING_PERIOD_S: Final = 1.0


class _Key(NamedTuple):
    project_id: ProjectId
    timeline_id: TimelineId


class SafekeeperNode:
    """Use as an async context manager. Leaving stops all streams and closes all timelines."""

    def __init__(
        self,
        data_dir: Path,
        environment: TimelineEnvironment,
        key_source: KeySource,
        is_fenced: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_fenced`: has a newer instance of this node taken over?"""
        self.node_id = environment.node_id
        self._data_dir = data_dir
        self._environment = environment
        self._key_source = key_source
        self._is_fenced = is_fenced
        self._garbage = GarbageCollection()
        self._projects: dict[ProjectId, ProjectKeys] = {}
        self._timelines: dict[_Key, Timeline] = {}
        self._damaged: dict[_Key, str] = {}
        self._changing = asyncio.Lock()
        self._lock_file: int | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self.key_upkeep = KeyUpkeep(key_source, environment.key_upkeep, self.projects)
        self._keys_housekeeping: asyncio.Task[None] | None = None
        self._offloading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises ConflictError when another process works in the same directory."""
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            raise ConflictError("another safekeeper works in this data directory") from None
        for directory in sorted(self._data_dir.glob("timelines/*/*")):
            await self._open(directory)
        self._housekeeping = asyncio.create_task(self._keep_house(), name="safekeeper-housekeeping")
        if self._environment.objects is not None:
            self._offloading = asyncio.create_task(self._offload(), name="safekeeper-offload")
        self._keys_housekeeping = asyncio.create_task(self.key_upkeep.run(), name="safekeeper-key-upkeep")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in (self._housekeeping, self._keys_housekeeping, self._offloading):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        for timeline in self._timelines.values():
            try:
                await timeline.aclose()
            except IntegrityError as error:
                _log.error("a timeline could not be closed", timeline_id=str(timeline.timeline_id), reason=str(error))
        for keys in self._projects.values():
            await keys.release()
        if self._lock_file is not None:
            os.close(self._lock_file)

    async def _open(self, directory: Path) -> None:
        try:
            key = _Key(ProjectId.parse(directory.parent.name), TimelineId.parse(directory.name))
        except ValueError:
            if directory.name.endswith(DELETED_SUFFIX):
                shutil.rmtree(directory)
            return
        try:
            state = self._read_control(directory, key)
        except OSError as error:  # one timeline's trouble is not the others'
            self._damaged[key] = f"its control file cannot be read: {error.strerror}"
            _log.error("a timeline cannot be opened", timeline_id=str(key.timeline_id), reason=error.strerror)
            return
        except CorruptedError as error:
            self._damaged[key] = str(error)
            _log.error("a timeline cannot be opened", timeline_id=str(key.timeline_id), reason=str(error))
            return
        if state is None:
            return
        keys = self._keys_of(key.project_id)
        timeline = Timeline(directory, state, keys, self._environment)
        self._timelines[key] = timeline
        # Logged; it stays at fault, or not ready, which its status says.
        with contextlib.suppress(IntegrityError, UnavailableError):
            await timeline.check_files()

    def _read_control(self, directory: Path, key: _Key) -> ControlState | None:
        """None for a directory in which nothing was ever stored."""
        try:
            data = (directory / FILE_NAME).read_bytes()
        except FileNotFoundError:
            if any(path.name != FILE_NAME + ".new" for path in directory.iterdir()):
                raise CorruptedError("there is WAL but no control file") from None
            return None
        state = ControlState.parse(data)
        if (state.node_id, state.project_id, state.timeline_id) != (self.node_id, *key):
            raise CorruptedError("the control file belongs to another safekeeper or timeline")
        return state

    async def _keep_house(self) -> None:
        """Verify what could not be verified yet, and bring commit_lsn to disk now and then. Ends with the node only:
        what goes wrong with one timeline, even by a defect, ends nothing for the others."""
        while True:
            await asyncio.gather(*(self._tend(timeline) for timeline in self._timelines.values()))
            await asyncio.sleep(_HOUSEKEEPING_PERIOD_S)

    async def _tend(self, timeline: Timeline) -> None:
        try:
            if not timeline.loaded:
                await timeline.make_ready()
            await timeline.persist_commit_lsn()
        except KeylakeError as error:
            if not error.retryable and not timeline.fault:
                _log.error("housekeeping failed", timeline_id=str(timeline.timeline_id), reason=str(error))
        except Exception as error:
            _log.error("housekeeping failed", timeline_id=str(timeline.timeline_id), exc_info=error)

    async def _offload(self) -> None:
        """One timeline after the other, at times that differ from node to node: mostly one of them puts a piece. Ends
        with the node only, as `_keep_house`."""
        interval_s = self._environment.offload.interval_s
        faults: dict[_Key, str] = {}
        while True:
            await asyncio.sleep(interval_s * random.uniform(0.5, 1.5))  # noqa: S311 - it spreads work
            for key, timeline in list(self._timelines.items()):
                try:
                    await timeline.offload()
                    faults.pop(key, None)
                except KeylakeError as error:
                    if faults.get(key) != error.code:
                        _log.warning("WAL is not offloaded", timeline_id=str(key.timeline_id), reason=str(error))
                    faults[key] = error.code
                except Exception as error:
                    _log.error("offloading failed", timeline_id=str(key.timeline_id), exc_info=error)

    # --- timelines ---

    def timeline(self, project_id: ProjectId, timeline_id: TimelineId) -> Timeline:
        """Raises NotFoundError, IntegrityError when it is damaged beyond being opened."""
        key = _Key(project_id, timeline_id)
        if key in self._damaged:
            raise IntegrityError(f"this timeline is damaged: {self._damaged[key]}")
        found = self._timelines.get(key)
        if found is None:
            raise NotFoundError("there is no such timeline on this safekeeper")
        return found

    async def log(self, project_id: ProjectId, timeline_id: TimelineId) -> Log:
        """For a subscription. Raises also UnavailableError while its end is not known."""
        found = self.timeline(project_id, timeline_id)
        await found.make_ready()
        return found

    async def create(self, project_id: ProjectId, timeline_id: TimelineId, request: CreateTimeline) -> Timeline:
        """Idempotent. Raises ConflictError when it exists with other values, KeyAccessError for a project without keys,
        UnavailableError."""
        key = _Key(project_id, timeline_id)
        async with self._changing:
            if key in self._damaged or key in self._timelines:
                found = self.timeline(*key)
                if not found.same_as(request):
                    raise ConflictError("this timeline exists already, with other values")
                return found
            keys = self._keys_of(project_id)
            await keys.acquire()
            try:
                made = await Timeline.create(self._directory(key), *key, request, keys, self._environment)
            except IntegrityError as error:  # a failed fsync: to make it once more would look as if it had worked
                self._damaged[key] = str(error)
                raise
            self._timelines[key] = made
            return made

    async def delete(self, project_id: ProjectId, timeline_id: TimelineId) -> None:
        """What this node has of it on its disk. Idempotent. Gives the project's lease back with its last timeline.

        Raises UnavailableError; then it is to be called again.
        """
        key = _Key(project_id, timeline_id)
        async with self._changing:
            self._damaged.pop(key, None)
            timeline = self._timelines.pop(key, None)
            try:
                if timeline is not None:
                    await timeline.delete()
                elif (directory := self._directory(key)).exists():
                    await asyncio.to_thread(remove_directory, directory)
            except OSError as error:
                raise UnavailableError(f"the timeline could not be deleted: {error.strerror}") from None
            if not any(other.project_id == project_id for other in self._timelines):
                keys = self._projects.pop(project_id, None)
                if keys is not None:
                    await keys.release()

    async def delete_offloaded(self, project_id: ProjectId, timeline_id: TimelineId) -> None:
        """The timeline's WAL in the object store, whoever put it. Idempotent. Only when no safekeeper has the timeline
        any more: until then these may be the only copies of WAL that a peer, or the pageserver, still needs.

        Raises ConflictError while this one has it, StoreUnavailableError, StoreDeniedError.
        """
        async with self._changing:
            if _Key(project_id, timeline_id) in self._timelines.keys() | self._damaged.keys():
                raise ConflictError("this safekeeper has the timeline: delete it on every safekeeper first")
            if self._environment.objects is not None:
                await purge(self._environment.objects, timeline_prefix(project_id, timeline_id))

    async def delete_project(self, project_id: ProjectId) -> Deletion:
        """Everything of a shredded project: see `shared.deletion.DeleteProject`. Raises UnavailableError."""
        directory = self._data_dir / "timelines" / str(project_id)
        found = await asyncio.to_thread(_sizes, directory)
        known = {key.timeline_id for key in (*self._timelines, *self._damaged) if key.project_id == project_id}
        try:
            for timeline_id in known:
                await self.delete(project_id, timeline_id)
            async with self._changing:
                await asyncio.to_thread(_remove_tree, directory)
        except OSError as error:
            raise UnavailableError(f"a shredded project could not be deleted: {error.strerror}") from None
        left = await asyncio.to_thread(_sizes, directory)
        gone = counted((ObjectKind.of(path), Deleted(1, 0, found[path])) for path in found.keys() - left.keys())
        here = Deletion(gone, len(left))
        return here if self._environment.objects is None else here + await self._delete_offloaded(project_id)

    async def _delete_offloaded(self, project_id: ProjectId) -> Deletion:
        """Whatever any node has put into the object store. A node that is not through may still put something; it does
        the same in its turn, and the last one finds nothing that comes after it."""
        assert self._environment.objects is not None  # noqa: S101 - the caller looked
        prefix = project_prefix(project_id)
        try:
            return await purge(self._environment.objects, prefix)
        except StoreDeniedError as error:  # to be said, and not only to be tried again
            return Deletion(left_objects=1, remains=(f"whatever is below {prefix}: {error}",))

    def _directory(self, key: _Key) -> Path:
        return self._data_dir / "timelines" / str(key.project_id) / str(key.timeline_id)

    def _keys_of(self, project_id: ProjectId) -> ProjectKeys:
        keys = self._projects.get(project_id)
        if keys is None:
            keys = self._projects[project_id] = ProjectKeys(self._key_source, project_id, self._on_key_loss, self._cut)
        return keys

    def projects(self) -> list[ProjectUpkeep]:
        """For the upkeep of keys."""
        return [self._upkeep_of(keys) for keys in self._projects.values()]

    def project_keys(self, project_id: ProjectId) -> ProjectUpkeep:
        """Raises NotFoundError."""
        keys = self._projects.get(project_id)
        if keys is None:
            raise NotFoundError("there is no such project on this safekeeper")
        return self._upkeep_of(keys)

    def _upkeep_of(self, keys: ProjectKeys) -> ProjectUpkeep:
        project_id, objects = keys.project_id, self._environment.objects
        return ProjectUpkeep(
            keys,
            lambda: {key.timeline_id: found for key, found in self._timelines.items() if key.project_id == project_id},
            lambda: {key.timeline_id: why for key, why in self._damaged.items() if key.project_id == project_id},
            None if objects is None else OldVersions(objects, project_prefix(project_id)),
        )

    def timelines(self) -> list[Timeline]:
        return list(self._timelines.values())

    def status(self) -> SafekeeperStatus:
        faults = [
            f"{timeline.timeline_id}: {timeline.fault}" for timeline in self._timelines.values() if timeline.fault
        ]
        faults += [f"{key.timeline_id}: {reason}" for key, reason in self._damaged.items()]
        return SafekeeperStatus(
            node_id=self.node_id,
            timelines=[timeline.status() for timeline in self._timelines.values()],
            state="fenced" if self._is_fenced() else "running",
            fault="; ".join(faults),
        )

    # --- keys ---

    def _cut(self, loss: KeyLoss) -> None:
        """CutHandler of every project."""
        for key, timeline in self._timelines.items():
            if key.project_id == loss.project_id:
                timeline.cut(loss)

    async def _on_key_loss(self, loss: KeyLoss) -> dict[str, float]:
        """KeyLossHandler of every project: all its timelines at once; the slowest counts."""
        started_s = time.monotonic()
        affected = [t for key, t in self._timelines.items() if key.project_id == loss.project_id]
        done = await asyncio.gather(*(timeline.drop_plaintext(loss) for timeline in affected))
        # Ended tasks and their tracebacks refer to each other, and to the WAL that they were sending.
        await self._garbage.collected()
        steps_s: dict[str, float] = {}
        for one in done:
            for step, seconds in one.items():
                steps_s[step] = max(seconds, steps_s.get(step, 0.0))
        _log.warning(
            "dropped keys and plaintext of a project",
            project_id=str(loss.project_id),
            state=loss.state.value,
            reason=loss.reason,
            timelines=len(affected),
            seconds=round(time.monotonic() - started_s, 6),
        )
        return steps_s


def _sizes(directory: Path) -> dict[str, int]:
    """Of all files below, in bytes."""
    return {str(path): path.stat().st_size for path in directory.rglob("*") if path.is_file()}


def _remove_tree(directory: Path) -> None:
    """Durably: its name is gone after a power cut, too."""
    if directory.exists():
        shutil.rmtree(directory)
        fsync_directory(directory.parent)
