"""What a service that stores data does when keys rotate: the part that safekeeper and pageserver have in common.

    lease says: a newer KEK version  →  every envelope is wrapped again          `UpkeepProject.rewrap`
    lease says: a higher DEK floor   →  data under older DEKs is sealed anew      `UpkeepProject.rekey`
    what a bucket with versions keeps of before is removed, if it may be          `UpkeepProject.remove_old_versions`
    what is kept under which is counted, and reported to the keymanager           `UpkeepProject.census`

It happens by itself, in the background and at a bounded pace. Nothing is remembered of it: what is left to do stands in
the envelopes, so after a crash the next pass just goes on, and a pass that finds nothing changes nothing.

What may interleave: everything. A pass that fails is tried again; a report is made of a census that began after the
lease named the version that it speaks of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from shared.api.key_upkeep import KeyUpkeepStatus, TimelineKeyUses
from shared.api.keymanager import KeyUse
from shared.crypto.envelope import Envelope
from shared.errors import KeyAccessError, KeylakeError
from shared.ids import ProjectId, TimelineId
from shared.lease import KeySource, Lease
from shared.telemetry import get_logger

_NAMED_HELD: Final = 4
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class UpkeepTuning:
    """How fast, so that those who read and write do not notice."""

    interval_s: float = 1.0
    """Between two looks at the leases."""
    rewraps_per_s: float = 2000.0
    rekeyed_bytes_per_s: float = 32 * 1024 * 1024


class UseCounter:
    """Counts sealed objects by the versions of their keys."""

    def __init__(self) -> None:
        self._own: _Counts = {}
        self._shared: _Counts = {}

    def add(self, envelope: Envelope, size_bytes: int, *, shared: bool = False, superseded: bool = False) -> None:
        """`shared`: other nodes count it, too. `superseded`: see `KeyUse`."""
        counts = self._shared if shared else self._own
        key = (envelope.kek_version, envelope.dek_version, superseded)
        objects, total = counts.get(key, (0, 0))
        counts[key] = (objects + 1, total + size_bytes)

    def uses(self) -> list[KeyUse]:
        """Of everything."""
        return merged([*_uses(self._own), *_uses(self._shared)])

    def own(self) -> list[KeyUse]:
        """Of what nobody else counts."""
        return _uses(self._own)

    def shared(self) -> list[KeyUse]:
        """Of what other nodes count, too."""
        return _uses(self._shared)


_Counts = dict[tuple[int, int, bool], tuple[int, int]]
"""(KEK version, DEK version, superseded) → objects, bytes."""


def _uses(counts: _Counts) -> list[KeyUse]:
    return [
        KeyUse(kek_version=kek, dek_version=dek, objects=objects, size_bytes=size_bytes, superseded=superseded)
        for (kek, dek, superseded), (objects, size_bytes) in sorted(counts.items())
    ]


def merged(uses: Iterable[KeyUse]) -> list[KeyUse]:
    """One entry per pair of versions, and of what is superseded."""
    totals: dict[tuple[int, int, bool], KeyUse] = {}
    for use in uses:
        key = (use.kek_version, use.dek_version, use.superseded)
        before = totals.get(key)
        totals[key] = (
            use
            if before is None
            else before.model_copy(
                update={"objects": before.objects + use.objects, "size_bytes": before.size_bytes + use.size_bytes}
            )
        )
    return [totals[key] for key in sorted(totals)]


class Pace:
    """Spends time as work is done."""

    def __init__(self, tuning: UpkeepTuning) -> None:
        self._tuning = tuning

    async def rewrapped(self, envelopes: int) -> None:
        await asyncio.sleep(envelopes / self._tuning.rewraps_per_s)

    async def rekeyed(self, size_bytes: int) -> None:
        await asyncio.sleep(size_bytes / self._tuning.rekeyed_bytes_per_s)


class UpkeepProject(Protocol):
    """One project of a service. All methods may raise any KeylakeError, and are called again then."""

    @property
    def project_id(self) -> ProjectId: ...

    @property
    def lease(self) -> Lease | None: ...

    async def rewrap(self, kek_version: int, pace: Pace) -> None:
        """Bring every envelope to `kek_version`, or a newer one. A new envelope is used only when it is durable."""
        ...

    async def rekey(self, dek_floor: int, pace: Pace) -> None:
        """Seal what is under DEKs of older versions than `dek_floor` anew."""
        ...

    async def remove_old_versions(self, kek_version: int, dek_floor: int) -> list[str]:
        """After the other two: of what a bucket keeps of replaced and deleted objects, remove what would keep keys of
        before in use. Returns what the store holds on to, in words."""
        ...

    async def census(self) -> dict[TimelineId, UseCounter]:
        """Everything that is stored of the project, whether or not anything refers to it.

        Keys that were asked for before the call are in it: either what they seal is stored, or they are given up.
        """
        ...


@dataclass(slots=True)
class _State:
    reached: tuple[int, int] | None = None
    """The versions in force, up to which all is done and reported."""
    wanted: bool = True
    fault: str = ""
    working: bool = False
    held: list[str] = field(default_factory=list)


class KeyUpkeep:
    """One per process. `run` it; `status` and `wake` are for the API."""

    def __init__(
        self,
        keys: KeySource,
        tuning: UpkeepTuning,
        projects: Callable[[], Iterable[UpkeepProject]],
    ) -> None:
        self._keys = keys
        self._tuning = tuning
        self._projects = projects
        self._states: dict[ProjectId, _State] = {}
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for project in self._projects():
                    state = self._states.setdefault(project.project_id, _State())
                    if not state.working and self._due(project, state):
                        state.working = True
                        tasks.create_task(self._tend(project, state))
                try:
                    async with asyncio.timeout(self._tuning.interval_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()

    def wake(self, project_id: ProjectId) -> None:
        """Do a whole pass, and report, now, whether or not there seems to be a reason."""
        state = self._states.setdefault(project_id, _State())
        state.wanted, state.reached = True, None
        self._wake.set()

    async def status(self, node_id: str, project: UpkeepProject) -> KeyUpkeepStatus:
        """What is kept under which key, by a look that begins now. Raises KeyAccessError, UnavailableError."""
        state = self._states.setdefault(project.project_id, _State())
        lease = project.lease
        found = await project.census()
        return KeyUpkeepStatus(
            node_id=node_id,
            project_id=project.project_id,
            kek_version=0 if lease is None else lease.kek_version,
            dek_floor=0 if lease is None else lease.dek_floor,
            timelines=[
                TimelineKeyUses(timeline_id=timeline_id, uses=counter.own(), shared_uses=counter.shared())
                for timeline_id, counter in sorted(found.items(), key=lambda item: str(item[0]))
            ],
            working=state.working,
            fault=state.fault,
            held=state.held[:_NAMED_HELD],
            held_versions=len(state.held),
        )

    @staticmethod
    def _due(project: UpkeepProject, state: _State) -> bool:
        lease = project.lease
        if lease is None or not lease.live or lease.kek_version == 0:
            return False
        return state.wanted or state.reached != (lease.kek_version, lease.dek_floor)

    async def _tend(self, project: UpkeepProject, state: _State) -> None:
        try:
            await self._pass(project, state)
            state.fault = ""
        except KeylakeError as error:
            fault = "" if isinstance(error, KeyAccessError) else f"{error.code}: {error}"
            if fault and fault != state.fault:
                log = _log.info if error.retryable else _log.warning
                log("key upkeep waits", project_id=str(project.project_id), code=error.code, error=str(error))
            state.fault = fault
        except Exception as error:
            # A defect of one pass is no reason to stop all others; nothing of it is reported.
            state.fault = "internal error; the service's log has the details"
            _log.error("key upkeep failed", project_id=str(project.project_id), exc_info=error)
        finally:
            state.working = False

    async def _pass(self, project: UpkeepProject, state: _State) -> None:
        lease = project.lease
        if lease is None:
            return
        pace, goal = Pace(self._tuning), (lease.kek_version, lease.dek_floor)
        if state.reached != goal:
            await project.rekey(lease.dek_floor, pace)
            await project.rewrap(lease.kek_version, pace)
            state.held = await project.remove_old_versions(*goal)
        as_of = lease.kek_version
        found = await project.census()
        uses = merged(use for counter in found.values() for use in counter.uses())
        await self._keys.report(project.project_id, as_of, uses)
        state.wanted = False
        if all(_is_done(use, goal, held=bool(state.held)) for use in uses):
            state.reached = goal


def _is_done(use: KeyUse, goal: tuple[int, int], *, held: bool) -> bool:
    """What the store holds on to is tried again when somebody asks, and what was deleted stays until a re-key."""
    if use.superseded:
        return held or use.dek_version >= goal[1]
    return use.kek_version >= goal[0] and use.dek_version >= goal[1]
