"""What was deleted of a shredded project, by kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safekeeper.remote_wal import RemotePiece
from safekeeper.wal_segment import PieceId
from shared.deletion import Deleted, Deletion, ObjectKind, counted

PIECE = PieceId(3, 2, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("projects/p/timelines/t/layers/delta-0-1", ObjectKind.LAYER),
        ("projects/p/timelines/t/layers/delta-0-1.key", ObjectKind.ENVELOPE),
        ("projects/p/timelines/t/index/0000000000000001", ObjectKind.INDEX),
        ("projects/p/timelines/t/index/0000000000000001.key", ObjectKind.ENVELOPE),
        (f"/disk/timelines/p/t/{PIECE.file_name}", ObjectKind.WAL),
        (f"/disk/timelines/p/t/{PIECE.file_name}.key", ObjectKind.ENVELOPE),
        (f"wal/p/t/{RemotePiece(PIECE, 8, 16, 'safekeeper-1').name}", ObjectKind.WAL),
        ("/disk/timelines/p/t/control", ObjectKind.OTHER),
        ("", ObjectKind.OTHER),
    ],
)
def test_a_kind_is_told_by_the_name(name: str, kind: ObjectKind) -> None:
    assert ObjectKind.of(name) is kind


@given(st.text())
def test_every_name_has_a_kind(name: str) -> None:
    assert ObjectKind.of(name) in ObjectKind


def test_two_places_are_added_kind_by_kind() -> None:
    one = Deletion({ObjectKind.WAL: Deleted(2, 1, 20)}, 1, ("a",))
    other = Deletion(counted([(ObjectKind.WAL, Deleted(1, 0, 5)), (ObjectKind.OTHER, Deleted(1, 1, 0))]), 2, (), ("b",))
    both = one + other
    assert both.deleted == {ObjectKind.WAL: Deleted(3, 1, 25), ObjectKind.OTHER: Deleted(1, 1, 0)}
    assert both.total == Deleted(4, 2, 25)
    assert (both.left_objects, both.remains, both.not_checked) == (3, ("a",), ("b",))
