"""No change to a chain of audit records goes unseen."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from hypothesis import assume, given
from hypothesis import strategies as st

from shared.audit_chain import AuditEntry, ChainHead, ChainVerifier, Link, append, encode
from tests.fixtures.audit_chains import ENTRIES, TIMES, chain


def problem(links: list[Link], head: ChainHead) -> str | None:
    verifier = ChainVerifier()
    for link in links:
        if not verifier.feed(link):
            break
    verifier.finish(head)
    return verifier.problem


@given(st.lists(ENTRIES, min_size=1, max_size=6), TIMES)
def test_an_untouched_chain_verifies_however_it_was_grouped(entries: list[AuditEntry], at: datetime) -> None:
    links = chain(entries, at)
    assert problem(links, links[-1].head) is None
    grouped = append(ChainHead(), at, entries)
    assert problem(grouped, grouped[-1].head) is None
    assert [link.sequence for link in grouped] == list(range(1, len(entries) + 1))


@given(st.lists(ENTRIES, min_size=2, max_size=6), TIMES, st.data())
def test_every_alteration_is_found_where_it_is(entries: list[AuditEntry], at: datetime, data: st.DataObject) -> None:
    links = chain(entries, at)
    head = links[-1].head
    index = data.draw(st.integers(0, len(links) - 1))
    victim = links[index]
    kind = data.draw(st.sampled_from(["entry", "time", "previous", "hash", "drop", "swap", "cut"]))
    if kind == "entry":
        links[index] = replace(victim, entry=data.draw(ENTRIES))
    elif kind == "time":
        links[index] = replace(victim, at=victim.at + timedelta(microseconds=data.draw(st.integers(1, 10**6))))
    elif kind == "previous":
        links[index] = replace(victim, previous_hash=data.draw(st.binary(min_size=32, max_size=32)))
    elif kind == "hash":
        links[index] = replace(victim, record_hash=data.draw(st.binary(min_size=32, max_size=32)))
    elif kind == "drop":
        del links[index]
    elif kind == "swap":
        other = data.draw(st.integers(0, len(links) - 1))
        links[index], links[other] = links[other], links[index]
    else:
        del links[index:]
    assume(links != chain(entries, at))
    found = problem(links, head)
    assert found is not None
    if kind in ("entry", "time", "hash"):
        assert f"record {index + 1} " in found


@given(st.lists(ENTRIES, min_size=2, max_size=5), TIMES)
def test_a_rewritten_chain_does_not_end_in_the_head_that_was_kept(entries: list[AuditEntry], at: datetime) -> None:
    head = chain(entries, at)[-1].head
    forged = chain([replace(entries[0], actor=entries[0].actor + "x"), *entries[1:]], at)
    assert problem(forged, head) == f"record {head.sequence} is not the record that the head names"


@given(ENTRIES, ENTRIES, TIMES)
def test_encoding_is_injective(one: AuditEntry, other: AuditEntry, at: datetime) -> None:
    assert (encode(1, at, one, bytes(32)) == encode(1, at, other, bytes(32))) == (one == other)
