"""What a project is encrypted under: the keymanager's answer joined with what every storage node has on its disks.

A core: `join` makes one answer out of many; `KeylakeClient` asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from shared.api.common import ApiModel
from shared.api.key_upkeep import KeyUpkeepStatus, TimelineKeyUses
from shared.api.keymanager import KekStatus, KeyState, KeyStatus, KeyUse
from shared.ids import KeyConfigurationId, ProjectId, TimelineId


class NodeKeys(ApiModel):
    """One storage node."""

    node: str
    status: KeyUpkeepStatus | None
    """None when it keeps nothing of the project, or did not answer."""
    problem: str = ""
    """Why it did not answer."""

    @property
    def answered(self) -> bool:
        return not self.problem


class KekShare(KekStatus):
    """A KEK version with what is under it, over all nodes that answered, old versions of objects included."""

    objects: int
    size_bytes: int


class Encryption(ApiModel):
    """The encryption of one project."""

    project_id: ProjectId
    state: KeyState
    key_configuration_id: KeyConfigurationId
    keks: list[KekShare]
    wraps_limit: int
    next_rotation_at: datetime
    dek_floor: int
    """DEKs made under an older KEK version are to be replaced; 0 if that was never asked for."""
    objects: int
    size_bytes: int
    outdated_objects: int
    """Under an older KEK version than the current one."""
    outdated_bytes: int
    old_dek_objects: int
    """Under DEKs that are to be replaced; old versions that a re-key removes included."""
    old_dek_bytes: int
    old_version_objects: int
    """Of objects that were replaced or deleted, which a bucket with versioning keeps; in none of the numbers before but
    those of DEKs that are to be replaced. A re-key removes them all."""
    old_version_bytes: int
    old_dek_versions: int
    """Of `old_dek_objects`, the old versions."""
    held: list[str]
    """Of these, what the store refused to remove, and its reason; the first few of each node."""
    nodes: list[NodeKeys]

    @property
    def current_share(self) -> float:
        """Of the bytes, that is under the current KEK version: 0 … 1."""
        return 1 - self.outdated_bytes / self.size_bytes if self.size_bytes else 1.0

    @property
    def complete(self) -> bool:
        """Did every node answer?"""
        return all(node.answered for node in self.nodes)

    @property
    def rewrapped(self) -> bool:
        """Every node answered, knows of the current KEK version, and has nothing under an older one."""
        current = self.keks[-1].kek_version
        return self.complete and not self.outdated_objects and all(_knows(node, current, 0) for node in self.nodes)

    @property
    def rekeyed(self) -> bool:
        """As `rewrapped`, and nothing is under a DEK that is to be replaced, old versions of objects included."""
        current = self.keks[-1].kek_version
        known = all(_knows(node, current, self.dek_floor) for node in self.nodes)
        return self.rewrapped and not self.old_dek_objects and known

    @property
    def waits_for_locks(self) -> bool:
        """All that a re-key may do is done: what is left under DEKs of before, the object store does not let go."""
        return self.rewrapped and bool(self.held) and self.old_dek_objects == self.old_dek_versions > 0


def _knows(node: NodeKeys, kek_version: int, dek_floor: int) -> bool:
    status = node.status
    return status is None or (status.kek_version >= kek_version and status.dek_floor >= dek_floor)


def join(keys: KeyStatus, nodes: Sequence[NodeKeys]) -> Encryption:
    """One answer."""
    timelines = [timeline for status in _statuses(nodes) for timeline in status.timelines]
    current = max(kek.kek_version for kek in keys.keks)
    everything = [use for timeline in timelines for use in timeline.uses]
    everything += _shared(timelines, current, keys.dek_floor)
    uses = [use for use in everything if not use.superseded]
    old_versions = [use for use in everything if use.superseded]
    outdated = [use for use in uses if use.kek_version < current]
    old_deks = [use for use in everything if use.dek_version < keys.dek_floor]
    return Encryption(
        project_id=keys.project_id,
        state=keys.state,
        key_configuration_id=keys.key_configuration_id,
        keks=[
            KekShare(
                **dict(kek),
                objects=sum(use.objects for use in everything if use.kek_version == kek.kek_version),
                size_bytes=sum(use.size_bytes for use in everything if use.kek_version == kek.kek_version),
            )
            for kek in keys.keks
        ],
        wraps_limit=keys.wraps_limit,
        next_rotation_at=keys.next_rotation_at,
        dek_floor=keys.dek_floor,
        objects=sum(use.objects for use in uses),
        size_bytes=sum(use.size_bytes for use in uses),
        outdated_objects=sum(use.objects for use in outdated),
        outdated_bytes=sum(use.size_bytes for use in outdated),
        old_dek_objects=sum(use.objects for use in old_deks),
        old_dek_bytes=sum(use.size_bytes for use in old_deks),
        old_version_objects=sum(use.objects for use in old_versions),
        old_version_bytes=sum(use.size_bytes for use in old_versions),
        old_dek_versions=sum(use.objects for use in old_deks if use.superseded),
        held=sorted({line for status in _statuses(nodes) for line in status.held}),
        nodes=list(nodes),
    )


def _shared(timelines: Iterable[TimelineKeyUses], current: int, dek_floor: int) -> list[KeyUse]:
    """What several nodes count is counted once per timeline: as the one says that has most left to do. They look one
    after the other, while some of it is wrapped again or sealed anew."""

    def left(uses: Sequence[KeyUse]) -> tuple[int, int, int]:
        outdated = sum(use.objects for use in uses if use.kek_version < current)
        old_deks = sum(use.objects for use in uses if use.dek_version < dek_floor)
        return outdated, old_deks, sum(use.objects for use in uses)

    chosen: dict[TimelineId, list[KeyUse]] = {}
    for timeline in timelines:
        before = chosen.get(timeline.timeline_id, [])
        chosen[timeline.timeline_id] = max(before, timeline.shared_uses, key=left)
    return [use for uses in chosen.values() for use in uses]


def _statuses(nodes: Iterable[NodeKeys]) -> list[KeyUpkeepStatus]:
    return [node.status for node in nodes if node.status is not None]
