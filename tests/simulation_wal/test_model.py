"""The elections' cores through the states of a small world, and defects that this must find (docs/consensus.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest

from compute import proposer
from safekeeper import acceptor
from tests.simulation_wal import mutations
from tests.simulation_wal.model import REIGN, WHOLE, Bounds, ModelError, explore

# Breadth first: these are the states that few steps lead to. `make model-consensus` goes further.
LIMIT = 10_000
WORLD = Bounds(crashes=False)

DEFECTS: dict[str, tuple[Sequence[str], Any]] = {
    "a term is voted for twice": ((), lambda: patch.object(acceptor, "vote", mutations._vote_twice)),
    "the old stream survives the vote": (REIGN[:6], lambda: patch.object(acceptor, "vote", mutations._keep_the_stream)),
    "the log is not clipped": (REIGN, lambda: patch.object(acceptor, "elected", mutations._do_not_clip)),
    "any voter is the donor": (REIGN, lambda: patch.object(proposer, "choose_donor", max)),
}


def test_no_state_of_a_small_world_breaks_a_promise() -> None:
    for beginning in ((), REIGN):
        assert explore(WORLD, LIMIT, beginning) >= LIMIT


def test_what_is_small_enough_is_explored_to_its_end() -> None:
    for bounds, states in list(WHOLE.items())[:2]:
        assert explore(bounds) == states


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_with_the_steps_that_lead_to_it(name: str) -> None:
    beginning, make = DEFECTS[name]
    with make(), pytest.raises(ModelError) as found:
        explore(WORLD, LIMIT, beginning)
    assert len(str(found.value).splitlines()) >= len(beginning) + 2
