"""The timeline's index: which layers there are, and up to where they go. docs/formats/index.md.

What is not listed does not exist: the index is the authority when a timeline is loaded (Neon: `index_part.json`). The
plaintext is JSON, so that a human with the key can read it; it is sealed as one object.

A core.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from pageserver.layer.layer_map import LayerMap
from pageserver.layer.name import LayerDescriptor, LayerKind
from pageserver.retention import DEFAULT_RETENTION, MAX_RETENTION_AGE_S, HistoryPoint, Retention
from shared.api.common import ApiModel
from shared.crypto.envelope import Envelope
from shared.errors import CorruptedError
from shared.ids import ProjectId, TimelineId
from shared.keyspace import KEY_SIZE_BYTES, KeyRange
from shared.lsn import Lsn

FORMAT_VERSION: Final = 2
"""Version 1 had neither levels, nor a generation, nor a retention window. Nothing that was stored with it is read."""
PG_VERSION: Final = 16
MAX_BRANCHES: Final = 10_000

_HexKey = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * KEY_SIZE_BYTES}}}$")]


class _Layer(ApiModel):
    name: str = Field(max_length=200)
    kind: LayerKind
    key_start: _HexKey
    key_end: _HexKey
    lsn_start: Lsn
    lsn_end: Lsn
    size_bytes: int = Field(gt=0, lt=1 << 63)
    level: int = Field(ge=0, le=1)
    envelope: str = Field(max_length=256)
    """Base64. A copy: the object `<layer>.key` is what key rotation replaces."""


class _Retention(ApiModel):
    lsn_bytes: int = Field(ge=0, lt=1 << 63)
    age_s: int = Field(ge=0, le=MAX_RETENTION_AGE_S)


class _HistoryPoint(ApiModel):
    time_s: int = Field(ge=0, lt=1 << 40)
    lsn: Lsn


class _Ancestor(ApiModel):
    project_id: ProjectId
    timeline_id: TimelineId
    lsn: Lsn


class _Branch(ApiModel):
    timeline_id: TimelineId
    lsn: Lsn


class _Index(ApiModel):
    format_version: Literal[2]
    project_id: ProjectId
    timeline_id: TimelineId
    pg_version: int = Field(ge=16, le=16)
    system_identifier: int = Field(ge=0, lt=1 << 64)
    initdb_lsn: Lsn
    disk_consistent_lsn: Lsn
    prev_record_lsn: Lsn
    generation: int = Field(ge=0, lt=1 << 64)
    latest_gc_cutoff_lsn: Lsn
    retention: _Retention
    history: list[_HistoryPoint] = Field(max_length=10_000)
    layers: list[_Layer] = Field(max_length=1_000_000)
    # Absent from the index of a timeline that is no branch and has none. A reader that does not know them refuses them.
    ancestor: _Ancestor | None = None
    branches: list[_Branch] | None = Field(default=None, min_length=1, max_length=MAX_BRANCHES)


@dataclass(frozen=True, slots=True)
class Ancestor:
    """Where a branch comes from: everything at or below `lsn` is read there."""

    project_id: ProjectId
    timeline_id: TimelineId
    lsn: int


@dataclass(frozen=True, slots=True)
class IndexPart:
    """One version of the index. LSNs are plain integers."""

    project_id: ProjectId
    timeline_id: TimelineId
    system_identifier: int
    initdb_lsn: int
    disk_consistent_lsn: int
    """End of the last record that the layers hold: every value at or below it is in them, and none above it. It is the
    last_record_lsn of whoever loads this."""
    prev_record_lsn: int
    """Start of that record."""
    layers: tuple[tuple[LayerDescriptor, Envelope], ...]
    ancestor: Ancestor | None = None
    branches: Mapping[TimelineId, int] = field(default_factory=dict)
    """Timelines that were branched off this one, and the LSNs at which: what they read must stay. Listed here before a
    branch's own index exists, and until its last object is gone."""
    generation: int = 0
    """Of the writer that published it (remote_timeline.py), which sets it."""
    latest_gc_cutoff_lsn: int = 0
    """Versions below it may be gone. Never goes back."""
    retention: Retention = DEFAULT_RETENTION
    history: tuple[HistoryPoint, ...] = ()
    """When history was where; ascending (retention.py)."""

    @property
    def oldest_lsn(self) -> int:
        """Every version from here on can be read."""
        branched_lsn = 0 if self.ancestor is None else self.ancestor.lsn
        return max(self.initdb_lsn, self.latest_gc_cutoff_lsn, branched_lsn)

    def serialize(self) -> bytes:
        ancestor = self.ancestor
        index = _Index(
            format_version=FORMAT_VERSION,
            project_id=self.project_id,
            timeline_id=self.timeline_id,
            pg_version=PG_VERSION,
            system_identifier=self.system_identifier,
            initdb_lsn=Lsn(self.initdb_lsn),
            disk_consistent_lsn=Lsn(self.disk_consistent_lsn),
            prev_record_lsn=Lsn(self.prev_record_lsn),
            generation=self.generation,
            latest_gc_cutoff_lsn=Lsn(self.latest_gc_cutoff_lsn),
            retention=_Retention(lsn_bytes=self.retention.lsn_bytes, age_s=self.retention.age_s),
            history=[_HistoryPoint(time_s=point.time_s, lsn=Lsn(point.lsn)) for point in self.history],
            layers=[
                _Layer(
                    name=layer.name,
                    kind=layer.kind,
                    key_start=layer.key_range.start.hex(),
                    key_end=layer.key_range.end.hex(),
                    lsn_start=Lsn(layer.lsn_start),
                    lsn_end=Lsn(layer.lsn_end),
                    size_bytes=layer.size_bytes,
                    level=layer.level,
                    envelope=base64.b64encode(envelope.serialize()).decode("ascii"),
                )
                for layer, envelope in self.layers
            ],
            ancestor=None
            if ancestor is None
            else _Ancestor(project_id=ancestor.project_id, timeline_id=ancestor.timeline_id, lsn=Lsn(ancestor.lsn)),
            branches=[_Branch(timeline_id=branch, lsn=Lsn(lsn)) for branch, lsn in self.branches.items()] or None,
        )
        return index.model_dump_json(exclude_none=True).encode()

    @classmethod
    def parse(cls, data: bytes) -> IndexPart:
        """Raises CorruptedError for anything that `serialize` does not write."""
        try:
            index = _Index.model_validate_json(data)
            layers = tuple(_parse_layer(layer) for layer in index.layers)
        except (ValidationError, ValueError) as error:
            # Not `from error`: its text repeats the input.
            raise CorruptedError(f"the timeline's index does not parse ({type(error).__name__})") from None
        if any(layer.lsn_end > index.disk_consistent_lsn.value + 1 for layer, _ in layers):
            raise CorruptedError("the timeline's index lists a layer from the future")
        ancestor = index.ancestor
        if ancestor is not None and (
            ancestor.lsn > index.disk_consistent_lsn
            or ancestor.timeline_id == index.timeline_id
            or any(layer.lsn_start < ancestor.lsn.value for layer, _ in layers)
        ):
            raise CorruptedError("the timeline's index contradicts where it branched off")
        branches = {branch.timeline_id: branch.lsn.value for branch in index.branches or ()}
        if len(branches) != len(index.branches or ()):
            raise CorruptedError("the timeline's index lists a branch twice")
        if any(layer.generation > index.generation for layer, _ in layers):
            raise CorruptedError("the timeline's index lists a layer of a later generation")
        history = tuple(HistoryPoint(point.time_s, point.lsn.value) for point in index.history)
        if any(older.time_s > newer.time_s or older.lsn > newer.lsn for older, newer in pairwise(history)):
            raise CorruptedError("the timeline's index has a history that goes back")
        if index.latest_gc_cutoff_lsn > index.disk_consistent_lsn:
            raise CorruptedError("the timeline's index has a GC cutoff from the future")
        LayerMap(layer for layer, _ in layers)  # raises when layers contradict each other
        return cls(
            index.project_id,
            index.timeline_id,
            index.system_identifier,
            index.initdb_lsn.value,
            index.disk_consistent_lsn.value,
            index.prev_record_lsn.value,
            layers,
            None if ancestor is None else Ancestor(ancestor.project_id, ancestor.timeline_id, ancestor.lsn.value),
            branches,
            index.generation,
            index.latest_gc_cutoff_lsn.value,
            Retention(index.retention.lsn_bytes, index.retention.age_s),
            history,
        )


def _parse_layer(layer: _Layer) -> tuple[LayerDescriptor, Envelope]:
    try:
        envelope = base64.b64decode(layer.envelope, validate=True)
    except binascii.Error:
        raise CorruptedError("the timeline's index has a malformed envelope") from None
    descriptor = LayerDescriptor(
        layer.name,
        layer.kind,
        KeyRange(bytes.fromhex(layer.key_start), bytes.fromhex(layer.key_end)),
        layer.lsn_start.value,
        layer.lsn_end.value,
        layer.size_bytes,
        layer.level,
    )
    return descriptor, Envelope.parse(envelope)
