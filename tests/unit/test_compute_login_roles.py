"""Whom the proxy asks for a password before a compute is started, and by which verifier."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compute.agent.protocol import LoginRole
from compute.crashes import Crashes
from compute.login_roles import verifier_of
from compute.repository import EndpointRow, ListedRole
from shared.api.compute import LogIn
from shared.ids import EndpointId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.wire.scram import DEFAULT_ITERATIONS, SALT_LENGTH_BYTES, ScramVerifier

NOW = datetime(2026, 11, 28, tzinfo=UTC)
OWNERS = ScramVerifier.compute("of the endpoint", b"0123456789abcdef")
ROLES = ScramVerifier.compute("of the role", b"fedcba9876543210")
NONCE = "5a" * 32


def endpoint(**changes: Any) -> EndpointRow:
    values: dict[str, Any] = {
        "endpoint_id": EndpointId.new(),
        "project_id": ProjectId.new(),
        "timeline_id": TimelineId.new(),
        "name": "main",
        "owner": "app",
        "database": "app",
        "scram_verifier": OWNERS.serialize(),
        "reason": "",
        "term": 7,
        "start_lsn": None,
        "suspend_after_s": None,
        "size": None,
        "read_only_lsn": None,
        "follows": False,
        "created_at": NOW,
        "crashes": Crashes(),
    }
    return EndpointRow(**values | changes)


MAIN = endpoint()


def listed(role: ScramVerifier | None = ROLES, valid_until: datetime | None = None, **changes: Any) -> ListedRole:
    """By MAIN's last compute."""
    found = None if role is None else LoginRole(verifier=role.serialize(), valid_until=valid_until)
    return replace(ListedRole(7, False, 7, str(MAIN.endpoint_id), NONCE, found), **changes)


def is_decoy(verifier: ScramVerifier | None, user: bytes, nonce: bytes = bytes.fromhex(NONCE)) -> bool:
    return verifier == ScramVerifier.decoy(user, nonce)


def test_a_role_that_is_listed_has_its_own_verifier_and_any_other_a_decoy() -> None:
    assert verifier_of(MAIN, listed(), b"anna", NOW) == ROLES
    assert verifier_of(MAIN, listed(), b"app", NOW) == ROLES, "the owner's own, changed or not"
    assert is_decoy(verifier_of(MAIN, listed(role=None), b"anna", NOW), b"anna")
    assert is_decoy(verifier_of(MAIN, listed(role=None), b"app", NOW), b"app"), "it may not log in, or has no password"


@pytest.mark.parametrize(("after_s", "good"), [(-1, True), (0, False), (1, False)])
def test_a_password_that_is_no_longer_valid_is_none(after_s: float, good: bool) -> None:
    found = verifier_of(MAIN, listed(valid_until=NOW), b"anna", NOW + timedelta(seconds=after_s))
    assert found == ROLES if good else is_decoy(found, b"anna")


@pytest.mark.parametrize(
    "changes",
    [
        {"term": 6},  # a later compute was elected, and did not say how it ended
        {"term": 8},
        {"term": None, "endpoint_id": None, "mock_nonce": None},
        {"last_term": 0, "term": None, "is_branch": True},  # it has its ancestor's roles
    ],
)
def test_when_nobody_knows_the_compute_asks(changes: dict[str, Any]) -> None:
    for user in (b"anna", b"app", b"nobody"):
        assert verifier_of(MAIN, listed(**changes), user, NOW) is None


def test_another_endpoint_of_the_timeline_has_an_owners_password_of_its_own() -> None:
    """As its start will set it (agent/roles.py). A replica sets nothing."""
    other, replica = endpoint(), endpoint(follows=True)
    assert verifier_of(other, listed(), b"app", NOW) == OWNERS
    assert verifier_of(other, listed(role=None), b"app", NOW) == OWNERS
    assert verifier_of(other, listed(), b"anna", NOW) == ROLES
    assert verifier_of(replica, listed(), b"app", NOW) == ROLES
    assert is_decoy(verifier_of(replica, listed(role=None), b"app", NOW), b"app")


def test_a_timeline_that_has_never_run_has_an_owner_and_nobody_else() -> None:
    fresh = listed(role=None, last_term=0, term=None, endpoint_id=None, mock_nonce=None)
    assert verifier_of(MAIN, fresh, b"app", NOW) == OWNERS
    decoy = verifier_of(MAIN, fresh, b"nobody", NOW)
    assert decoy is not None
    assert (decoy.iterations, len(decoy.salt)) == (DEFAULT_ITERATIONS, SALT_LENGTH_BYTES)
    assert decoy == verifier_of(MAIN, fresh, b"nobody", NOW) != verifier_of(endpoint(), fresh, b"somebody", NOW)
    assert verifier_of(endpoint(follows=True), fresh, b"app", NOW) is None


def test_an_endpoint_of_the_past_has_the_roles_of_then() -> None:
    for user in (b"app", b"anna"):
        assert verifier_of(endpoint(read_only_lsn=Lsn(8)), listed(), user, NOW) is None


@given(st.binary(min_size=1, max_size=63).filter(lambda name: b"\0" not in name))
def test_every_name_has_a_verifier_and_can_be_asked_for(name: bytes) -> None:
    LogIn(user_hex=name.hex())
    assert is_decoy(verifier_of(MAIN, listed(role=None), name, NOW), name)


@pytest.mark.parametrize("user_hex", ["", "6", "00", "6100", "6g", "61 ", "61\n", "AA", "61" * 64])
def test_other_names_are_refused(user_hex: str) -> None:
    with pytest.raises(ValidationError):
        LogIn(user_hex=user_hex)


@pytest.mark.parametrize("verifier", [OWNERS.serialize() + "=", "md5" + "0" * 32, "SCRAM-SHA-256$0:AAAA$A=:A="])
def test_an_agent_cannot_list_what_is_no_verifier(verifier: str) -> None:
    with pytest.raises(ValidationError):
        LoginRole(verifier=verifier)
