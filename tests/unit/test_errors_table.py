"""docs/errors.md is what the code says, and the code says one thing for each state."""

from __future__ import annotations

from pathlib import Path

import httpx

from compute.proxy import goodbye
from keylake.errors_table import document, key_errors, other_endings
from shared.api.common import ErrorBody
from shared.api.keymanager import KeyState
from shared.errors import ERRORS_BY_CODE, KeyAccessError, RevokedError
from shared.http import error_from_response
from shared.service import error_response
from shared.wire.pgproto import ErrorField, ErrorResponse

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == document(), "make docs-errors"


def test_every_state_has_codes_of_its_own_and_says_whose_key_and_what_to_do() -> None:
    errors = dict(key_errors())
    assert set(errors) == set(KeyState)
    for attribute in ("sqlstate", "code", "hint"):
        # Shredded and erased are one to a client: neither comes back.
        assert len({getattr(error, attribute) for error in errors.values()}) == len(errors) - 1
    assert len({error.sqlstate for error in ERRORS_BY_CODE.values() if issubclass(error, KeyAccessError)}) == 5
    for error in errors.values():
        told = ErrorResponse.parse(goodbye.of_error(error)[5:])
        assert (told.severity, told.sqlstate, told.message) == ("FATAL", error.sqlstate, str(error))
        assert str(error.workspace_id) in (told.get(ErrorField.DETAIL) or "")
        assert told.get(ErrorField.HINT) == error.hint != ""


def test_a_session_that_was_not_idle_hears_that_the_outcome_is_not_known() -> None:
    not_known = ErrorResponse.parse(goodbye.compute_stopped()[5:]).get(ErrorField.DETAIL) or ""
    assert "COMMIT" in not_known
    for error in dict(key_errors()).values():
        idle = ErrorResponse.parse(goodbye.of_error(error)[5:])
        at_work = ErrorResponse.parse(goodbye.of_error(error, under_way=True)[5:])
        assert not_known not in (idle.get(ErrorField.DETAIL) or "")
        assert at_work.get(ErrorField.DETAIL) == f"{idle.get(ErrorField.DETAIL)} {not_known}"
    assert not_known in " ".join(document().split())


def test_every_other_ending_is_of_postgres() -> None:
    assert len(other_endings()) >= 7
    assert not [each.sqlstate for each in other_endings() if each.sqlstate.startswith("KL")]


def test_http_says_the_same_and_a_client_of_ours_gets_it_all() -> None:
    for error in dict(key_errors()).values():
        answer = error_response(error)
        body = ErrorBody.model_validate_json(bytes(answer.body))
        assert (answer.status_code, body.code) == (error.http_status, error.code)
        assert (body.message, body.workspace_id, body.hint) == (str(error), error.workspace_id, error.hint)
        again = error_from_response(httpx.Response(answer.status_code, content=bytes(answer.body)))
        assert (type(again), str(again)) == (type(error), str(error))
        assert isinstance(again, KeyAccessError)
        assert again.workspace_id == error.workspace_id


def test_what_is_not_known_is_left_out() -> None:
    told = ErrorResponse.parse(goodbye.of_error(RevokedError("x"))[5:])
    assert told.get(ErrorField.DETAIL) == "SQLSTATE KL003."
    assert b"workspace_id" not in error_response(RevokedError("x")).body
