"""Settings, request parameters and the fault injector."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from customercloud.aws.errors import AwsError
from customercloud.aws.lookup_events import _position, _token
from customercloud.aws.params import Params
from customercloud.aws.query import parse_form
from customercloud.config import load_settings
from customercloud.faults import FaultInjector, Faults, Injected, Outage, Service
from shared.errors import InvalidInputError

# ── settings ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"state_dir": str(tmp_path), "port": 1, "host": "127.0.0.2", "region": "us-west-2"}))
    monkeypatch.setenv("KEYLAKE_CUSTOMERCLOUD_PORT", "2")
    monkeypatch.setenv("KEYLAKE_CUSTOMERCLOUD_HOST", "127.0.0.3")
    settings = load_settings(file, {"port": "3"})
    assert (settings.port, settings.host, settings.region) == (3, "127.0.0.3", "us-west-2")


def test_unknown_and_wrong_settings_are_refused_without_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"state_dir": str(tmp_path)}
    for wrong in ({"prot": 1}, {"port": 70_000}, {"tls_cert_path": "/x"}, {"region": "nowhere"}):
        with pytest.raises(InvalidInputError):
            load_settings(None, {**base, **wrong})
    with pytest.raises(InvalidInputError) as caught:
        load_settings(None, {**base, "admin_token": "too-short-secret"})
    assert "admin_token" in str(caught.value)
    assert "too-short-secret" not in str(caught.value)
    monkeypatch.setenv("KEYLAKE_CUSTOMERCLOUD_PROT", "1")
    with pytest.raises(InvalidInputError, match="KEYLAKE_CUSTOMERCLOUD_PROT"):
        load_settings(None, base)


def test_the_admin_token_stays_out_of_reprs(tmp_path: Path) -> None:
    settings = load_settings(None, {"state_dir": str(tmp_path), "admin_token": "a" * 40})
    assert "a" * 40 not in repr(settings)


# ── parameters ─────────────────────────────────────────────────────────────────────────────────────────────────────

_READS: dict[str, Callable[[Params], Any]] = {
    "string": lambda p: p.string("x"),
    "choice": lambda p: p.choice("x", ("A", "B")),
    "integer": lambda p: p.integer("x", 1, 10),
    "boolean": lambda p: p.boolean("x"),
    "timestamp": lambda p: p.timestamp("x"),
    "objects": lambda p: p.objects("x"),
    "blob": lambda p: p.blob("x", 10),
    "context": lambda p: p.encryption_context("x"),
}
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(_json, st.sampled_from(sorted(_READS)))
def test_any_member_is_read_or_refused(value: Any, read: str) -> None:
    params = Params.from_body(json.dumps({"x": value}).encode())
    try:
        _READS[read](params)
    except AwsError as error:
        assert error.code in ("ValidationException", "SerializationException")  # noqa: PT017 - either is right


@given(st.binary(max_size=100))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        Params.from_body(body)
    except AwsError as error:
        assert error.code == "SerializationException"  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"x": "\\ud800"}', b"[]", b'"x"', b"{", b"\xff"])
def test_bodies_that_are_no_objects(body: bytes) -> None:
    with pytest.raises(AwsError, match="SerializationException"):
        Params.from_body(body)


def test_a_blob_never_stands_in_an_error_message() -> None:
    params = Params({"x": "c2VjcmV0IHBsYWludGV4dA=="})
    with pytest.raises(AwsError) as caught:
        params.blob("x", 3)
    assert "secret" not in caught.value.message
    assert "c2VjcmV0" not in caught.value.message


def test_context_names_that_differ_only_in_case_are_two() -> None:
    context = {"tenant": "t1", "Tenant": "t2"}
    assert Params({"EncryptionContext": context}).encryption_context() == context


@given(st.binary(max_size=100))
def test_any_form_is_read_or_refused(body: bytes) -> None:
    try:
        parse_form(body)
    except AwsError as error:
        assert error.code == "MalformedQueryString"  # noqa: PT017 - either outcome is right


@given(st.text(max_size=60))
def test_any_next_token_is_ours_or_refused(token: str) -> None:
    with pytest.raises(AwsError, match="InvalidNextTokenException"):
        _position(token, "111122223333", None, None, None)


def test_a_next_token_fits_only_its_query() -> None:
    token = _token(7, "111122223333", ("EventName", "Decrypt"), None, None)
    assert _position(token, "111122223333", ("EventName", "Decrypt"), None, None) == 7
    for account, attribute in (("444455556666", ("EventName", "Decrypt")), ("111122223333", ("EventName", "Encrypt"))):
        with pytest.raises(AwsError, match="InvalidNextTokenException"):
            _position(token, account, attribute, None, None)


# ── faults ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _never() -> None:
    await asyncio.Event().wait()


async def test_no_faults_by_default() -> None:
    injector = FaultInjector()
    assert await injector.before(Service.KMS, "AKIA", _never) is Injected.NOTHING
    assert not injector.throttles(Service.KMS, "AKIA")
    assert injector.fails(Service.KMS, "AKIA") is None


async def test_faults_hit_chosen_services_and_spare_chosen_callers() -> None:
    injector = FaultInjector()
    injector.set(
        Faults(
            outage=Outage.REFUSE,
            throttle_rate=1,
            error_rate=1,
            services=frozenset({Service.KMS}),
            spared_access_key_ids=frozenset({"AKIACUSTOMER"}),
        )
    )
    for service, key, hit in (
        (Service.KMS, "AKIAVENDOR", True),
        (Service.KMS, "AKIACUSTOMER", False),
        (Service.STS, "AKIAVENDOR", False),
    ):
        assert (await injector.before(service, key, _never) is Injected.UNAVAILABLE) is hit
        assert injector.throttles(service, key) is hit
        assert (injector.fails(service, key) is not None) is hit


async def test_a_hanging_request_is_let_go_unanswered_when_the_outage_ends() -> None:
    injector = FaultInjector()
    injector.set(Faults(outage=Outage.HANG))
    hanging = asyncio.create_task(injector.before(Service.KMS, "AKIA", _never))
    injector.set(Faults(outage=Outage.HANG, latency_s=1))
    done, _ = await asyncio.wait({hanging}, timeout=0.05)
    assert not done
    injector.set(Faults())
    assert await asyncio.wait_for(hanging, 5) is Injected.UNAVAILABLE


async def test_a_hanging_request_ends_when_its_client_hangs_up() -> None:
    injector = FaultInjector()
    injector.set(Faults(outage=Outage.HANG))
    hung_up = asyncio.Event()

    async def disconnected() -> None:
        await hung_up.wait()

    hanging = asyncio.create_task(injector.before(Service.KMS, "AKIA", disconnected))
    hung_up.set()
    assert await asyncio.wait_for(hanging, 5) is Injected.GONE


@pytest.mark.parametrize("wrong", [{"throttle_rate": 1.5}, {"latency_s": -1}, {"outage": "maybe"}, {"unknown": 1}])
def test_faults_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Faults.model_validate(wrong)
