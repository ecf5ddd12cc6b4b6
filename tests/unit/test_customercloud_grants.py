"""Grants as values: when they are in force, what they allow, and that nobody passes on more than they have."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customercloud.aws.authorization import Caller
from customercloud.aws.grants import OPERATIONS, Constraints, Grant, Principal

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
ROLE = "arn:aws:iam::111122223333:role/r"
SESSION = "arn:aws:sts::111122223333:assumed-role/r/s"
CONTEXTS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("xy"))
CONSTRAINTS = st.one_of(
    st.just(Constraints()),
    CONTEXTS.map(lambda pairs: Constraints(subset=pairs)),
    CONTEXTS.map(lambda pairs: Constraints(equals=pairs)),
)


def grant(**changes: Any) -> Grant:
    values: dict[str, Any] = {
        "grant_id": "0" * 64,
        "token": "token",
        "key_id": "key",
        "account_id": "111122223333",
        "issuing_account": "111122223333",
        "name": None,
        "grantee": Principal(arn=ROLE, unique_id="AROA1"),
        "retiring": None,
        "operations": ("Decrypt", "DescribeKey"),
        "created_at": NOW,
        "visible_at": NOW + dt.timedelta(seconds=5),
    }
    return Grant(**(values | changes))


def caller(unique_id: str = "AROA1") -> Caller:
    return Caller("111122223333", SESSION, ROLE, unique_id, ())


@pytest.mark.parametrize(
    ("ends_after_s", "after_s", "tokens", "in_force"),
    [
        (None, 0, (), False),
        (None, 0, ("token",), True),
        (None, 0, ("other",), False),
        (None, 5, (), True),
        (10, 9, (), True),
        (10, 10, (), False),
        (10, 10, ("token",), False),
    ],
)
def test_when_it_is_in_force(
    ends_after_s: float | None, after_s: float, tokens: tuple[str, ...], in_force: bool
) -> None:
    ends_at = None if ends_after_s is None else NOW + dt.timedelta(seconds=ends_after_s)
    made = grant(ends_at=ends_at)
    assert made.in_force(NOW + dt.timedelta(seconds=after_s), frozenset(tokens)) is in_force
    assert made.is_listed is (ends_at is None)


def test_constraints_are_for_cryptographic_operations_only() -> None:
    made = grant(constraints=Constraints(subset={"a": "x"}))
    assert made.allows("Decrypt", {"a": "x", "b": "y"})
    assert not made.allows("Decrypt", {"a": "y"})
    assert not made.allows("Decrypt", {})
    assert made.allows("DescribeKey", {})
    assert not made.allows("Encrypt", {"a": "x"})


def test_a_role_made_again_under_the_same_name_is_not_the_grantee() -> None:
    assert grant().grantee.is_caller(caller())
    assert not grant().grantee.is_caller(caller("AROA2"))


@given(CONSTRAINTS, CONSTRAINTS, CONTEXTS)
def test_what_is_at_least_as_strict_allows_nothing_more(
    child: Constraints, parent: Constraints, context: dict[str, str]
) -> None:
    if child.at_least_as_strict_as(parent) and child.allow(context):
        assert parent.allow(context)


@given(st.frozensets(st.sampled_from(sorted(OPERATIONS))), CONSTRAINTS, CONSTRAINTS, CONTEXTS)
def test_nobody_passes_on_more_than_they_have(
    operations: frozenset[str], child: Constraints, parent: Constraints, context: dict[str, str]
) -> None:
    made = grant(constraints=parent)
    if made.may_pass_on(operations, child):
        given_on = grant(operations=tuple(operations), constraints=child)
        for operation in operations:
            assert made.allows(operation, context) or not given_on.allows(operation, context)
