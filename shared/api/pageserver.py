"""Contract of the pageserver: timelines over HTTP. Pages and basebackups go over `shared.wire.pagestream`."""

from __future__ import annotations

import enum
from typing import Any

from pydantic import AwareDatetime, Field

from shared.api.common import ApiModel, KeyState
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn

ADMIN_ROLE = "keylake_admin"
"""Bootstrap superuser of every project's initdb; nobody outside of the compute agent logs in as it."""


class AncestorInfo(ApiModel):
    """What a branch comes from: everything at or below `lsn` is read there."""

    project_id: ProjectId
    timeline_id: TimelineId
    lsn: Lsn


class LsnKind(enum.StrEnum):
    """Neon's answers."""

    PRESENT = "present"
    """There are commits at or before the time, and later ones."""
    FUTURE = "future"
    """The time is at or after the last commit."""
    PAST = "past"
    """The time is before the first commit that is kept."""
    NODATA = "nodata"
    """Nothing was committed yet."""


class FindLsn(ApiModel):
    timestamp: AwareDatetime


class LsnByTimestamp(ApiModel):
    kind: LsnKind
    lsn: Lsn


class CreateTimeline(ApiModel):
    """Make a timeline: from a fresh initdb, or as a branch of `ancestor`, whose LSN is rounded. Idempotent."""

    ancestor: AncestorInfo | None = None


class Compact(ApiModel):
    """Compact now what is due; with `force`, all that any read would gain from."""

    force: bool = False


class RetentionWindow(ApiModel):
    """How much history is kept: whichever of the two reaches further back."""

    lsn_bytes: int = Field(ge=0, lt=1 << 63)
    """WAL before the newest record."""
    age_s: int = Field(ge=0, le=100 * 365 * 24 * 3600)


class Garbage(ApiModel):
    """What one run of garbage collection did."""

    oldest_lsn: Lsn
    """The GC cutoff: every version from here on can be read."""
    layers: int
    """Removed."""
    size_bytes: int


class LeaseLsn(ApiModel):
    """Keep the version at `read_lsn` readable, for `ttl_s`: at most the pageserver's `lsn_lease_s`, its default.
    Renewed by asking again."""

    read_lsn: Lsn
    ttl_s: float | None = Field(default=None, gt=0, le=24 * 3600)


class LsnLease(ApiModel):
    read_lsn: Lsn
    ttl_s: float
    """From now on; longer if another lease of the same LSN lasts longer."""


class InspectObject(ApiModel):
    """A sealed object of a timeline, by its name behind the timeline's prefix."""

    object_name: str = Field(pattern=r"^(layers|index)/[0-9A-Za-z-]{1,200}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the sealed bytes that are meant: it is refused if others are stored."""


class ObjectContent(ApiModel):
    object_name: str
    content: dict[str, Any]
    """An index: all of it. A layer: counts, and which keys; no values."""


class FindingKind(enum.StrEnum):
    MISSING = "missing"
    """The index, or a safekeeper's control file, lists it, and it is not in the object store."""
    UNREADABLE = "unreadable"
    """It does not open, or is not what the index, or its name, says."""
    WRONG_KEY = "wrong_key"
    """Its envelope contradicts the index."""
    OUTDATED_KEY = "outdated_key"
    """It is under a KEK or DEK older than those in force: ordinary for a while after a rotation."""
    ORPHAN = "orphan"
    """Nothing refers to it: ordinary after a crash, until a later index."""


class Finding(ApiModel):
    kind: FindingKind
    object: str
    """Its key behind `projects/<project>/timelines/<timeline>/`, of WAL behind `wal/<project>/<timeline>/`."""
    detail: str = ""


class Findings(ApiModel):
    """What is wrong in a part of the object store."""

    objects: int
    """That were listed."""
    findings: list[Finding]
    more_findings: int = 0
    """Not in the list any more."""

    @property
    def damaged(self) -> bool:
        """Is anything lost or wrong? Orphans and outdated keys are not."""
        harmless = (FindingKind.ORPHAN, FindingKind.OUTDATED_KEY)
        return self.more_findings > 0 or any(finding.kind not in harmless for finding in self.findings)


class ScrubReport(Findings):
    """The object store against the index: every listed layer and every kept version of the index read and verified."""

    layers: int
    size_bytes: int
    """Of layers that were read."""


class Strays(Findings):
    """Objects of a project's timelines that are not here, one finding for each timeline, with the whole key."""


class TimelineInfo(ApiModel):
    project_id: ProjectId
    timeline_id: TimelineId
    state: KeyState
    system_identifier: int
    initdb_lsn: Lsn
    last_record_lsn: Lsn
    prev_record_lsn: Lsn
    disk_consistent_lsn: Lsn
    remote_consistent_lsn: Lsn
    commit_lsn: Lsn
    oldest_lsn: Lsn
    """Every version from here on can be read: the GC cutoff."""
    retention: RetentionWindow
    layers: int
    l0_layers: int
    """Of them, flushed and not compacted yet."""
    layer_size_bytes: int
    in_memory_size_bytes: int
    ancestor: AncestorInfo | None = None
    branches: dict[TimelineId, Lsn] = Field(default_factory=dict)
    """Timelines branched off this one, and where."""
    fault: str = ""
    """Why ingest, compaction or GC stand still, in one line; empty while they work."""


class PageserverStatus(ApiModel):
    node_id: str
    timelines: list[TimelineInfo]
    redo_workers: list[ProjectId]
    """Projects whose worker runs: one each."""
    pages_served: int = 0
    """Since it started, by GetPage@LSN and in basebackups."""
    fault: str = ""
    """Timelines that lie in the object store and cannot be loaded, and why. Those without keys are not among them."""
