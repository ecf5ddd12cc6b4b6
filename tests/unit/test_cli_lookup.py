"""Names and ids: what is meant, or why that cannot be said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylake.cli.lookup import Candidate, endpoint_names, resolve
from shared.errors import InvalidInputError, NotFoundError
from shared.ids import ProjectId

CREATE = "keylake thing create NAME"


def find(text: str | None, *candidates: Candidate[int]) -> int:
    return resolve("thing", text, candidates, create=CREATE)


SHOP = Candidate.of(1, "t-1", {"shop"})
BANK = Candidate.of(2, "t-2", {"bank"})
OTHER_SHOP = Candidate.of(3, "t-3", {"shop"})


def test_by_id_and_by_name() -> None:
    assert find("t-1", SHOP, BANK) == 1
    assert find("bank", SHOP, BANK) == 2


def test_the_only_one_needs_no_name() -> None:
    assert find(None, SHOP) == 1
    with pytest.raises(InvalidInputError, match=r"which thing\? There are bank \(t-2\), shop \(t-1\)"):
        find(None, SHOP, BANK)


def test_none_yet_says_how_to_make_one() -> None:
    with pytest.raises(NotFoundError, match="keylake thing create NAME"):
        find("shop")


def test_a_name_that_two_have_is_refused_and_an_id_still_works() -> None:
    with pytest.raises(InvalidInputError, match=r"ambiguous.*t-1.*t-3"):
        find("shop", SHOP, BANK, OTHER_SHOP)
    assert find("t-3", SHOP, BANK, OTHER_SHOP) == 3


def test_an_id_wins_over_a_name_that_looks_like_it() -> None:
    assert find("t-1", SHOP, Candidate.of(9, "t-9", {"t-1"})) == 1


def test_a_typing_error_gets_a_suggestion() -> None:
    with pytest.raises(NotFoundError, match="did you mean 'shop'"):
        find("shpo", SHOP, BANK)


def test_a_long_list_is_cut() -> None:
    many = [Candidate.of(n, f"t-{n:03}", {f"name{n}"}) for n in range(50)]
    with pytest.raises(InvalidInputError, match="and 42 more"):
        find(None, *many)


def test_endpoints_go_by_project_too() -> None:
    project, other = ProjectId("prj-" + "0" * 16), ProjectId("prj-" + "1" * 16)
    main = Candidate.of(1, "ep-1", *endpoint_names("shop", project, "main"))
    reports = Candidate.of(2, "ep-2", *endpoint_names("shop", project, "reports"))
    foreign = Candidate.of(3, "ep-3", *endpoint_names("bank", other, "main"))
    assert find("shop/reports", main, reports, foreign) == 2
    assert find(f"{project}/main", main, reports, foreign) == 1
    assert find("bank", main, reports, foreign) == 3
    assert find("reports", main, reports, foreign) == 2
    with pytest.raises(InvalidInputError, match="ambiguous"):
        find("main", main, reports, foreign)
    assert find("shop", main, reports, foreign) == 1
    other_reports = Candidate.of(4, "ep-4", *endpoint_names("shop", project, "dev"))
    with pytest.raises(InvalidInputError, match="ambiguous"):
        find("shop", other_reports, reports, foreign)


names = st.text(st.sampled_from("ab/-1"), min_size=1, max_size=3)


@given(st.lists(st.tuples(names, st.lists(st.sets(names, max_size=3), max_size=3)), max_size=6), st.none() | names)
def test_the_answer_is_called_so_and_nobody_else_is_more_so(
    things: list[tuple[str, list[set[str]]]], text: str | None
) -> None:
    candidates = [Candidate.of(n, identifier, *tiers) for n, (identifier, tiers) in enumerate(things)]
    try:
        found = resolve("thing", text, candidates, create=CREATE)
    except InvalidInputError:  # NotFoundError is one
        return
    if text is None:
        assert len(candidates) == 1
        return
    ranks = {
        n: next((rank for rank, tier in enumerate(c.tiers) if text in tier), None) for n, c in enumerate(candidates)
    }
    best = min(rank for rank in ranks.values() if rank is not None)
    assert [n for n, rank in ranks.items() if rank == best] == [found]
