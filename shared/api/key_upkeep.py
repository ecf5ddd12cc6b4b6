"""What services that store data say about the keys that it is under. The same of safekeeper and pageserver."""

from __future__ import annotations

from pydantic import Field

from shared.api.common import ApiModel
from shared.api.keymanager import KeyUse
from shared.ids import ProjectId, TimelineId


class TimelineKeyUses(ApiModel):
    timeline_id: TimelineId
    uses: list[KeyUse]
    """Of what this node keeps, and no other one counts."""
    shared_uses: list[KeyUse] = Field(default_factory=list)
    """Of what lies in the object store for several nodes, each of which counts all of it: offloaded WAL."""


class KeyUpkeepStatus(ApiModel):
    """One project on one node."""

    node_id: str
    project_id: ProjectId
    kek_version: int
    """In force as far as the node knows; 0 when it does not know."""
    dek_floor: int
    """DEKs of older versions are to be replaced."""
    timelines: list[TimelineKeyUses]
    working: bool
    fault: str = ""
    """Why the last pass ended early; empty when it did not, or when the keys were lost."""
    held: list[str] = Field(default_factory=list)
    """Old versions of objects that the store refused to remove in the last pass, and its reason; the first few."""
    held_versions: int = 0
    """How many."""
