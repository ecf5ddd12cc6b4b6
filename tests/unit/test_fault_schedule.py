"""What the fault matrix of `make test` covers, and that nothing is left out of the full one."""

from __future__ import annotations

from itertools import product

from tests.cluster_faults.schedule import COVERING, NOT_APPLICABLE, WORKSPACES, Condition, Event, Part, full

APPLICABLE = set(product(Part, Condition)) - NOT_APPLICABLE


def test_the_covering_rounds_cover_every_pair() -> None:
    pairs = {pair for each in COVERING for pair in each.conditions.items()}
    assert pairs == APPLICABLE
    assert {(c, e) for each in COVERING for c in each.conditions.values() for e in each.events} == set(
        product(Condition, Event)
    )
    assert all(set(each.conditions) == set(Part) for each in COVERING)  # so every part with every event, too
    assert {e for each in COVERING for e in each.events} == set(Event)
    assert all(len(each.events) <= WORKSPACES for each in COVERING)


def test_the_full_product_is_complete_and_has_one_fault_at_a_time() -> None:
    played = list(full())
    assert all(len(set(each.conditions.values()) - {Condition.REACHABLE}) <= 1 for each in played)
    triples = {(p, c, e) for each in played for p, c in each.conditions.items() for e in each.events}
    assert {(p, c) for p, c, _ in triples} == APPLICABLE
    assert triples == {(p, c, e) for p, c in APPLICABLE for e in Event}
