"""One answer about a project's encryption out of many: what counts as done, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from keylake.cli import encryption as encryption_page
from keylake.encryption import Encryption, NodeKeys, join
from shared.api.key_upkeep import KeyUpkeepStatus, TimelineKeyUses
from shared.api.keymanager import KekStatus, KeyState, KeyStatus, KeyUse
from shared.ids import KekId, KeyConfigurationId, ProjectId, TimelineId

NOW = datetime(2026, 11, 26, tzinfo=UTC)
PROJECT = ProjectId.new()


def keys(versions: int, dek_floor: int = 0) -> KeyStatus:
    return KeyStatus(
        project_id=PROJECT,
        state=KeyState.ACTIVE,
        key_configuration_id=KeyConfigurationId.new(),
        keks=[
            KekStatus(
                kek_id=KekId.new(),
                kek_version=version,
                cmk_key_version="1",
                wraps=4096,
                created_at=NOW,
                last_unwrap_at=None,
                destroyed_at=None,
            )
            for version in range(1, versions + 1)
        ],
        wraps_limit=1 << 24,
        next_rotation_at=NOW,
        dek_floor=dek_floor,
        holders=[],
    )


Use = tuple[int, int, int]
"""(KEK version, DEK version, bytes), one object each."""


def node(
    *uses: Use,
    kek_version: int = 2,
    dek_floor: int = 0,
    name: str = "pageserver",
    shared: Sequence[Use] = (),
    timeline_id: TimelineId | None = None,
) -> NodeKeys:
    found, others = [
        [KeyUse(kek_version=kek, dek_version=dek, objects=1, size_bytes=size) for kek, dek, size in each]
        for each in (uses, shared)
    ]
    status = KeyUpkeepStatus(
        node_id=name,
        project_id=PROJECT,
        kek_version=kek_version,
        dek_floor=dek_floor,
        timelines=[TimelineKeyUses(timeline_id=timeline_id or TimelineId.new(), uses=found, shared_uses=others)],
        working=False,
    )
    return NodeKeys(node=name, status=status)


SILENT = NodeKeys(node="safekeeper-1", status=None, problem="cannot be reached")
ABSENT = NodeKeys(node="safekeeper-1", status=None)


def test_shares_are_of_bytes_over_all_nodes() -> None:
    found = join(keys(2), [node((1, 1, 300), (2, 1, 100)), node((2, 2, 600), name="safekeeper-1")])
    assert (found.objects, found.size_bytes, found.outdated_objects, found.outdated_bytes) == (3, 1000, 1, 300)
    assert found.current_share == pytest.approx(0.7)
    assert [(kek.kek_version, kek.objects, kek.size_bytes) for kek in found.keks] == [(1, 1, 300), (2, 2, 700)]
    assert join(keys(1), []).current_share == 1.0


def test_offloaded_wal_is_counted_once_and_as_whoever_sees_most_left_to_do() -> None:
    one, other = TimelineId.new(), TimelineId.new()
    found = join(
        keys(2),
        [
            node((2, 2, 10), name="safekeeper-1", shared=[(1, 1, 100), (2, 1, 50)], timeline_id=one),
            node((2, 2, 20), name="safekeeper-2", shared=[(2, 1, 100), (2, 1, 50)], timeline_id=one),
            node(name="safekeeper-3", shared=[(2, 1, 50)], timeline_id=one),  # a listing that lags
            node(name="safekeeper-3", shared=[(2, 1, 7)], timeline_id=other),
        ],
    )
    assert (found.objects, found.size_bytes) == (5, 187)
    assert (found.outdated_objects, found.outdated_bytes) == (1, 100)
    assert not found.rewrapped


@pytest.mark.parametrize(
    ("found", "rewrapped", "rekeyed"),
    [
        (join(keys(2), [node((2, 1, 1))]), True, True),
        (join(keys(2), [node((1, 1, 1), (2, 1, 1))]), False, False),
        (join(keys(2), [node((2, 1, 1)), ABSENT]), True, True),
        (join(keys(2), [node((2, 1, 1)), SILENT]), False, False),
        (join(keys(2), [node(kek_version=1)]), False, False),  # it does not know yet, and may write under version 1
        (join(keys(2, 2), [node((2, 1, 1), dek_floor=2)]), True, False),
        (join(keys(2, 2), [node((2, 2, 1), dek_floor=2)]), True, True),
        (join(keys(2, 2), [node((2, 2, 1), dek_floor=0)]), True, False),  # nor of this
    ],
)
def test_done_means_that_everybody_who_keeps_something_said_so(
    found: Encryption, rewrapped: bool, rekeyed: bool
) -> None:
    assert found.rewrapped is rewrapped
    assert found.rekeyed is rekeyed


def superseded(kek_version: int, dek_version: int, *, held: bool = False) -> NodeKeys:
    """A node with one old version of 50 bytes, beside 100 bytes that are as they should be."""
    found = node((2, 2, 100), dek_floor=2)
    assert found.status is not None
    old = KeyUse(kek_version=kek_version, dek_version=dek_version, objects=1, size_bytes=50, superseded=True)
    [timeline] = found.status.timelines
    timeline = timeline.model_copy(update={"uses": [*timeline.uses, old]})
    status = found.status.model_copy(update={"timelines": [timeline], "held": ["x version 1: AccessDenied"] * held})
    return found.model_copy(update={"status": status})


def test_old_versions_do_not_keep_a_rewrap_from_its_end_but_a_rekey() -> None:
    old = join(keys(2, dek_floor=2), [superseded(1, 1)])
    assert (old.objects, old.size_bytes, old.current_share, old.rewrapped) == (1, 100, 1.0, True)
    assert (old.old_version_objects, old.old_version_bytes, old.old_dek_versions) == (1, 50, 1)
    assert (old.old_dek_objects, old.old_dek_bytes, old.rekeyed, old.waits_for_locks) == (1, 50, False, False)
    assert [kek.objects for kek in old.keks] == [1, 1], "it keeps the KEK"
    new = join(keys(2, dek_floor=2), [superseded(2, 2)])
    assert (new.old_version_objects, new.old_dek_objects, new.rekeyed) == (1, 0, True)


def test_a_lock_is_all_that_a_rekey_waits_for() -> None:
    held = join(keys(2, dek_floor=2), [superseded(1, 1, held=True), superseded(1, 1, held=True)])
    assert (held.rekeyed, held.waits_for_locks, held.held) == (False, True, ["x version 1: AccessDenied"])
    others = join(keys(2, dek_floor=2), [superseded(1, 1, held=True), node((2, 1, 7), dek_floor=2)])
    assert not others.waits_for_locks


def test_people_are_shown_old_versions_and_what_holds_them() -> None:
    assert encryption_page._old_versions(join(keys(2), [node((2, 2, 100))])) == "none"
    shown = encryption_page._old_versions(join(keys(2, dek_floor=2), [superseded(1, 1, held=True)]))
    assert shown == "1 objects, 50 bytes, that a re-key removes; the object store keeps x version 1: AccessDenied"
