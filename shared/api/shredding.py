"""Contract of shredding and erasure: part of the keymanager's admin API."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Final, Literal, Protocol

from pydantic import Field

from shared.api.common import PRINTABLE, ApiModel
from shared.api.keymanager import DeletedObjects, KeyState, Revocation
from shared.deletion import ObjectKind
from shared.ids import KeyConfigurationId, ProjectId

SHRED_ID: Final = r"^shr-[0-9a-f]{16}$"
_Text = Annotated[str, Field(min_length=1, max_length=1000, pattern=PRINTABLE)]


class _OfKind(Protocol):
    @property
    def kind(self) -> ObjectKind: ...

    @property
    def objects(self) -> int: ...

    @property
    def old_versions(self) -> int: ...


def deleted_kinds(deleted: Iterable[_OfKind]) -> str:
    """How many of each kind, for people."""
    return ", ".join(
        f"{each.objects} {each.kind.value}" + (f" ({each.old_versions} old versions)" if each.old_versions else "")
        for each in deleted
    )


class AskShred(ApiModel):
    """Irreversible when somebody else approves it."""

    project_name: str = Field(min_length=1, max_length=100, pattern=PRINTABLE)
    """Typed, so that nobody shreds another project than they think."""
    reason: str = Field(min_length=1, max_length=500, pattern=PRINTABLE)


class ApproveShred(ApiModel):
    shred_id: str = Field(pattern=SHRED_ID)
    """What was looked at is what is approved: not something that was asked for meanwhile."""
    project_name: str = Field(min_length=1, max_length=100, pattern=PRINTABLE)


class ShredNode(ApiModel):
    """What a node that stores data said when it last looked."""

    node_id: str
    looked_at: datetime | None
    """None: it has said nothing yet."""
    deleted: list[DeletedObjects] = Field(default_factory=list)
    """Of all looks together; one for each kind of which there was any."""
    left_objects: int = 0
    remains: list[str] = Field(default_factory=list)
    not_checked: list[str] = Field(default_factory=list)
    holds_keys: bool = False

    @property
    def deleted_objects(self) -> int:
        """Old versions included."""
        return sum(each.objects for each in self.deleted)

    @property
    def deleted_kinds(self) -> str:
        """For people; empty when there was nothing."""
        return deleted_kinds(self.deleted)

    @property
    def deleted_size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.deleted)

    @property
    def done(self) -> bool:
        return self.looked_at is not None and self.left_objects == 0 and not self.holds_keys


class Shred(ApiModel):
    """`asked` until somebody decides or the time is over; `deleting` from the approval, with which the KEKs are gone,
    until every instance is sealed and every node has deleted what it stored; then `done`."""

    shred_id: str
    project_id: ProjectId
    project_name: str
    state: Literal["asked", "cancelled", "expired", "deleting", "done"]
    reason: str
    asked_by: str
    asked_at: datetime
    expires_at: datetime
    decided_by: str | None
    decided_at: datetime | None
    keks_destroyed: int
    staged_destroyed: int
    """Wraps of a CMK that was on its way in."""
    revocation: Revocation | None
    """The fan-out by which all leases ended."""
    nodes: list[ShredNode]
    left: list[str]
    """What there still is, in words."""


class Attestation(ApiModel):
    """What no program can look at, stated by a person under their name (NIST SP 800-88)."""

    subject: Literal["backups", "key-copies", "instances", "stopped-projects"]
    text: _Text


class VerifyErasure(ApiModel):
    attestations: list[Attestation] = Field(default_factory=list, max_length=4)


class Precondition(ApiModel):
    """One thing that must hold before the word ERASED is used."""

    name: str
    outcome: Literal["met", "not met", "not checked", "attested"]
    evidence: list[str]

    @property
    def holds(self) -> bool:
        return self.outcome in ("met", "attested")


class DestroyedKey(ApiModel):
    """What the customer's KMS says of a key that ever wrapped the project's KEKs."""

    key_configuration_id: KeyConfigurationId
    provider: str
    identifier: str
    principal: str
    destroyed: bool
    evidence: str
    request_ids: list[str]
    """Of the calls by which we asked, in the customer's own log."""


class ErasureReport(ApiModel):
    project_id: ProjectId
    state: KeyState
    """ERASED only if everything below holds."""
    checked_at: datetime
    checked_by: str
    keys: list[DestroyedKey]
    preconditions: list[Precondition]
