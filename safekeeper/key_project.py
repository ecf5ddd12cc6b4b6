"""Keys of one project on a safekeeper."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from safekeeper.piece_keys import ProjectKeys
from safekeeper.timeline import Timeline
from shared.errors import UnavailableError
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep import Pace, UseCounter
from shared.lease import Lease
from shared.old_versions import OldVersions


class ProjectUpkeep:
    """Implements `UpkeepProject`."""

    def __init__(
        self,
        keys: ProjectKeys,
        timelines: Callable[[], Mapping[TimelineId, Timeline]],
        damaged: Callable[[], Mapping[TimelineId, str]],
        offloaded: OldVersions | None,
    ) -> None:
        """`damaged`: timelines that could not be opened, and why. `offloaded`: WAL of the project in the object store,
        of whatever timeline and node."""
        self._keys = keys
        self._timelines = timelines
        self._damaged = damaged
        self._offloaded = offloaded

    @property
    def project_id(self) -> ProjectId:
        return self._keys.project_id

    @property
    def lease(self) -> Lease | None:
        return self._keys.lease

    async def rewrap(self, kek_version: int, pace: Pace) -> None:
        for timeline in self._timelines().values():
            await timeline.make_ready()
            await timeline.key_upkeep.rewrap(kek_version, pace)

    async def rekey(self, dek_floor: int, pace: Pace) -> None:
        for timeline in self._timelines().values():
            await timeline.make_ready()
            await timeline.key_upkeep.rekey(dek_floor, pace)

    async def remove_old_versions(self, kek_version: int, dek_floor: int) -> list[str]:
        return [] if self._offloaded is None else await self._offloaded.remove(kek_version, dek_floor)

    async def census(self) -> dict[TimelineId, UseCounter]:
        """Raises UnavailableError for a timeline that is damaged: nobody knows what is in it."""
        for timeline_id, reason in self._damaged().items():
            raise UnavailableError(f"{timeline_id} is damaged: {reason}")
        found = {timeline_id: await timeline.key_upkeep.census() for timeline_id, timeline in self._timelines().items()}
        if self._offloaded is not None:
            await self._offloaded.count(found, shared=True)
        return found
