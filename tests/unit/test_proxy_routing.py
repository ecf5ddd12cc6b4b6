"""Routing, farewells and cancel keys of the proxy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.proxy import goodbye
from compute.proxy.cancel import CancelKeys
from compute.proxy.routing import (
    RoutingError,
    endpoint_of_server_name,
    join_options,
    route,
    split_options,
    take_endpoint,
)
from shared.api.safekeeper import ComputeAddress
from shared.errors import (
    KeylakeError,
    LeaseExpiredError,
    PermissionDeniedError,
    RevokedError,
    ShreddedError,
    SuspendedError,
)
from shared.ids import EndpointId, ProjectId, WorkspaceId
from shared.wire.pgproto import BackendKeyData, ErrorField, ErrorResponse
from shared.wire.pgstartup import CancelRequest, StartupMessage

EP = "ep-0123456789abcdef"
OTHER = "ep-fedcba9876543210"


@pytest.mark.parametrize(
    ("options", "rest"),
    [
        (f"endpoint={EP}", ""),
        (f"-c endpoint={EP}", ""),
        (f"-cendpoint={EP}", ""),
        (f"--endpoint={EP}", ""),
        (f"  -c work_mem=1MB endpoint={EP}\t-c a=b ", "-c work_mem=1MB -c a=b"),
        (f"-c search_path=a\\ b endpoint={EP}", "-c search_path=a\\ b"),
        (f"-c application_name=endpoint={OTHER} endpoint={EP}", f"-c application_name=endpoint={OTHER}"),
    ],
)
def test_the_endpoint_is_taken_out_of_the_options(options: str, rest: str) -> None:
    assert take_endpoint(options) == (EP, rest)
    found = route(StartupMessage({"user": "app", "options": options, "x": "y"}), None, "db.keylake")
    assert found.endpoint_id == EndpointId(EP)
    assert found.startup.parameters.get("options", "") == rest
    assert found.startup.parameters["x"] == "y"


@given(st.lists(st.text(st.characters(blacklist_characters="\0", max_codepoint=0x2FF), min_size=1), max_size=5))
def test_options_survive_splitting_and_joining(words: list[str]) -> None:
    assert split_options(join_options(words)) == words


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{EP}.db.keylake", EP),
        (f"{EP.upper()}.DB.KEYLAKE.", EP),
        ("db.keylake", None),
        (f"x.{EP}.db.keylake", None),
        ("localhost", None),
        (None, None),
    ],
)
def test_server_names(name: str | None, expected: str | None) -> None:
    assert endpoint_of_server_name(name, "db.keylake") == expected


bits = st.sampled_from(["endpoint=", EP, OTHER, "-c", "--", " ", "\\", "=", "a", "\u0130", "replication", "on"])
texts = st.lists(bits | st.text(st.characters(codec="utf-8"), max_size=4), max_size=8).map("".join)


@given(
    st.dictionaries(st.sampled_from(["user", "options", "replication", "database"]) | texts, texts),
    st.none() | texts | st.just(f"{EP}.db.keylake"),
)
def test_nonsense_is_refused_or_goes_where_it_says(parameters: dict[str, str], server_name: str | None) -> None:
    """Whatever a client says, in a start-up packet and as a server name: Postgres gets no more than that, and only the
    endpoint that is named does."""
    parameters.setdefault("user", "app")  # without one it is no start-up packet
    try:
        found = route(StartupMessage(parameters), server_name, "db.keylake")
    except KeylakeError:
        return
    said = " ".join([parameters.get("options", ""), (server_name or "").lower()]).replace("\\", "")
    assert str(found.endpoint_id) in said
    assert take_endpoint(found.startup.parameters.get("options", ""))[0] is None
    kept = {name: value for name, value in found.startup.parameters.items() if name != "options"}
    assert kept == {name: value for name, value in parameters.items() if name != "options"}


def test_both_ways_must_agree() -> None:
    startup = StartupMessage({"user": "app", "options": f"endpoint={EP}"})
    assert route(startup, f"{EP}.db.keylake", "db.keylake").endpoint_id == EndpointId(EP)
    with pytest.raises(RoutingError):
        route(startup, f"{OTHER}.db.keylake", "db.keylake")
    with pytest.raises(RoutingError):
        route(StartupMessage({"user": "app", "options": f"endpoint={EP} endpoint={EP}"}), None, "db.keylake")
    with pytest.raises(RoutingError):
        route(StartupMessage({"user": "app"}), "localhost", "db.keylake")


@pytest.mark.parametrize("value", ["true", "TRUE", "database", "on", "1", "t", ""])
def test_replication_is_refused(value: str) -> None:
    with pytest.raises(PermissionDeniedError):
        route(StartupMessage({"user": "app", "options": f"endpoint={EP}", "replication": value}), None, "d")


@pytest.mark.parametrize("user", ["keylake_admin", "keylake_safekeeper"])
def test_our_own_roles_are_refused(user: str) -> None:
    with pytest.raises(PermissionDeniedError):
        route(StartupMessage({"user": user, "options": f"endpoint={EP}"}), None, "d")


@pytest.mark.parametrize(
    ("error", "sqlstate"),
    [
        (RevokedError("x"), "KL003"),
        (SuspendedError("x"), "KL002"),
        (ShreddedError("x"), "KL004"),
        (LeaseExpiredError("x"), "KL001"),
    ],
)
def test_key_errors_say_whose_key_and_what_to_do(error: RevokedError, sqlstate: str) -> None:
    error.workspace_id = workspace = WorkspaceId.new()
    said = ErrorResponse.parse(goodbye.of_error(error)[5:])
    assert (said.severity, said.sqlstate) == ("FATAL", sqlstate)
    assert str(workspace) in (said.get(ErrorField.DETAIL) or "")
    assert said.get(ErrorField.HINT)


def test_cancel_keys() -> None:
    keys = CancelKeys()
    compute = ComputeAddress(host="/x", port=5432)
    backend = BackendKeyData(42, b"real")
    issued = [keys.issue(ProjectId.new(), compute, backend) for _ in range(50)]
    assert len({each.process_id for each in issued}) == 50
    for each in issued:
        target = keys.find(CancelRequest(each.process_id, each.secret_key))
        assert target is not None
        assert (target.request.process_id, target.request.secret_key) == (42, b"real")
        assert keys.find(CancelRequest(each.process_id, bytes(4))) is None
        assert "real" not in repr(target)
        keys.forget(each)
    assert len(keys) == 0
    assert keys.find(CancelRequest(issued[0].process_id, issued[0].secret_key)) is None
    assert keys.find(CancelRequest(1, b"")) is None
