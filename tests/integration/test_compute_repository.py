"""Who the members are, in the compute manager's database: read with a term, changed only while no later one is."""

from __future__ import annotations

import pytest

from compute.proposer import Membership
from compute.repository import Repository
from shared.ids import ProjectId
from tests.fixtures.keymanager import metadata_dsn, metadata_server

__all__ = ["metadata_dsn", "metadata_server"]  # fixtures

pytestmark = pytest.mark.integration


async def test_a_seat_changes_only_while_no_later_term_is_reserved(metadata_dsn: str) -> None:
    async with Repository(metadata_dsn, "compute") as repository:
        timeline_id = (await repository.add_timeline(ProjectId.new(), "main")).timeline_id
        await repository.safekeeper_told(timeline_id, "safekeeper-2")
        first = await repository.reserve_term(timeline_id, 1)
        assert (first.term, first.membership) == (1, Membership())
        seats = [await repository.new_seat(timeline_id) for _ in range(2)]
        assert seats == [1, 2]
        rival = await repository.reserve_term(timeline_id, 1)
        assert not await repository.change_seat(timeline_id, "safekeeper-2", 1, first.term)
        assert (await repository.timeline(timeline_id)).membership == Membership()
        assert await repository.change_seat(timeline_id, "safekeeper-2", 2, rival.term)
        changed = Membership(1, {"safekeeper-2": 2})
        assert (changed.seat("safekeeper-2"), changed.seat("safekeeper-1")) == (2, 0)
        # Whoever comes later knows of it.
        assert (await repository.reserve_term(timeline_id, 1)).membership == changed
        [row] = await repository.timelines_on("safekeeper-2")
        assert (row.timeline_id, row.membership) == (timeline_id, changed)
        assert await repository.timelines_on("safekeeper-1") == []
