"""The admin API: every route with every kind of wrong caller and wrong input, key configurations, the audit chain."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest

from customercloud.faults import Faults, Outage
from shared.api.keymanager import (
    AuditRecord,
    AwsKey,
    CreateKeyConfiguration,
    CreateProject,
    CreateWorkspace,
    KeyConfiguration,
    KeyState,
    Role,
    Workspace,
)
from shared.auth import Scope, Service, TokenIssuer
from shared.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    RevokedError,
    UnavailableError,
)
from shared.ids import KeyConfigurationId, ProjectId, TokenId, WorkspaceId
from shared.tls import client_context
from tests.fixtures.key_source_contract import Losses, named

if TYPE_CHECKING:
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration

KC, WS, PRJ, TOK = KeyConfigurationId.new(), WorkspaceId.new(), ProjectId.new(), TokenId.new()
ANYBODY = {
    Scope.ACCOUNT_ADMIN,
    Scope.WORKSPACE_ADMIN,
    Scope.SECURITY_ADMIN,
    Scope.DATA_USE,
    Scope.AUDIT_READ,
    Scope.STATUS_READ,
}
IDS = ("{key_configuration_id}", "{workspace_id}", "{project_id}", "{token_id}")
LISTS = {"/v1/key-configurations", "/v1/workspaces", "/v1/projects", "/v1/revocations", "/v1/audit", "/v1/tokens"}
"""Whoever is bound to a project sees their part of these."""
ROUTES: dict[tuple[str, str], set[Scope]] = {
    ("POST", "/v1/key-configurations"): {Scope.ACCOUNT_ADMIN},
    ("GET", "/v1/key-configurations"): {Scope.ACCOUNT_ADMIN, Scope.SECURITY_ADMIN, Scope.STATUS_READ},
    ("GET", f"/v1/key-configurations/{KC}"): {Scope.ACCOUNT_ADMIN, Scope.SECURITY_ADMIN, Scope.STATUS_READ},
    ("PATCH", f"/v1/key-configurations/{KC}"): {Scope.ACCOUNT_ADMIN},
    ("DELETE", f"/v1/key-configurations/{KC}"): {Scope.ACCOUNT_ADMIN},
    ("POST", f"/v1/key-configurations/{KC}:rewrap"): {Scope.SECURITY_ADMIN},
    ("POST", f"/v1/key-configurations/{KC}:replace"): {Scope.ACCOUNT_ADMIN},
    ("GET", f"/v1/key-configurations/{KC}/replacement"): {
        Scope.ACCOUNT_ADMIN,
        Scope.SECURITY_ADMIN,
        Scope.STATUS_READ,
    },
    ("DELETE", f"/v1/key-configurations/{KC}/replacement"): {Scope.ACCOUNT_ADMIN},
    ("POST", "/v1/workspaces"): {Scope.ACCOUNT_ADMIN},
    ("GET", "/v1/workspaces"): ANYBODY,
    ("PATCH", f"/v1/workspaces/{WS}"): {Scope.ACCOUNT_ADMIN},
    ("DELETE", f"/v1/workspaces/{WS}"): {Scope.ACCOUNT_ADMIN},
    ("POST", f"/v1/workspaces/{WS}/projects"): {Scope.WORKSPACE_ADMIN, Scope.ACCOUNT_ADMIN},
    ("GET", f"/v1/workspaces/{WS}/projects"): ANYBODY,
    ("POST", f"/v1/workspaces/{WS}:revalidate"): {Scope.SECURITY_ADMIN},
    ("GET", "/v1/projects"): ANYBODY,
    ("GET", f"/v1/projects/{PRJ}"): ANYBODY,
    ("POST", f"/v1/projects/{PRJ}:revalidate"): {Scope.SECURITY_ADMIN},
    ("POST", f"/v1/projects/{PRJ}:move-key"): {Scope.ACCOUNT_ADMIN},
    ("POST", f"/v1/projects/{PRJ}/keks:rotate"): {Scope.SECURITY_ADMIN},
    ("GET", f"/v1/projects/{PRJ}/keks"): {Scope.ACCOUNT_ADMIN, Scope.SECURITY_ADMIN, Scope.STATUS_READ},
    ("POST", f"/v1/projects/{PRJ}/keks:retire"): {Scope.SECURITY_ADMIN},
    ("POST", f"/v1/projects/{PRJ}:rekey"): {Scope.SECURITY_ADMIN},
    ("POST", f"/v1/projects/{PRJ}:revoke"): {Scope.SECURITY_ADMIN},
    ("POST", f"/v1/projects/{PRJ}:restore"): {Scope.SECURITY_ADMIN},
    ("POST", f"/v1/projects/{PRJ}/shred"): {Scope.SECURITY_ADMIN},
    ("GET", f"/v1/projects/{PRJ}/shred"): {Scope.SECURITY_ADMIN, Scope.AUDIT_READ},
    ("POST", f"/v1/projects/{PRJ}/shred:approve"): {Scope.SECURITY_ADMIN},
    ("DELETE", f"/v1/projects/{PRJ}/shred"): {Scope.SECURITY_ADMIN},
    ("POST", f"/v1/projects/{PRJ}:verify-erasure"): {Scope.SECURITY_ADMIN},
    ("GET", f"/v1/projects/{PRJ}/receipt"): {Scope.SECURITY_ADMIN, Scope.AUDIT_READ},
    ("POST", "/v1/kms-events"): {Scope.KMS_NOTIFY},
    ("GET", "/v1/revocations"): {Scope.SECURITY_ADMIN, Scope.AUDIT_READ},
    ("GET", "/v1/audit"): {Scope.AUDIT_READ},
    ("GET", "/v1/audit:verify"): {Scope.AUDIT_READ},
    ("POST", "/v1/tokens"): {Scope.TOKENS_ISSUE},
    ("GET", "/v1/tokens"): {Scope.TOKENS_ISSUE, Scope.SECURITY_ADMIN, Scope.AUDIT_READ},
    ("POST", f"/v1/tokens/{TOK}:revoke"): {Scope.TOKENS_ISSUE, Scope.SECURITY_ADMIN},
    ("GET", "/v1/status"): {Scope.STATUS_READ, Scope.SECURITY_ADMIN},
    ("GET", "/metrics"): {Scope.STATUS_READ},
}


class Caller:
    """HTTP with whatever token and body a test wants to send."""

    def __init__(self, keymanager: Keymanager) -> None:
        self._keymanager = keymanager
        self._http = httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{keymanager.port}",
            verify=client_context(keymanager.trust.ca_certificate),
            trust_env=False,
            timeout=20,
        )

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    def token(self, scopes: set[Scope] | frozenset[Scope], issuer: TokenIssuer | None = None, **options: Any) -> str:
        issuer = issuer or self._keymanager.trust.admin
        return issuer.issue(options.pop("audience", Service.KEYMANAGER), scopes, **options)

    async def call(self, method: str, path: str, token: str | None, content: bytes | None = b"{}") -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return await self._http.request(
            method,
            path,
            content=content if method in ("POST", "PATCH") else None,
            headers=headers,
            extensions={"sni_hostname": "keymanager.keylake"},
        )


async def test_table_of_routes_is_complete(keymanager: Keymanager) -> None:
    """A route that is added without a row here is not covered by the tests below."""
    async with Caller(keymanager) as caller:
        schema = (await caller.call("GET", "/openapi.json", None)).json()
    served = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    names = {str(each): name for each, name in zip((KC, WS, PRJ, TOK), IDS, strict=True)}
    tested = set()
    for method, path in ROUTES:
        for value, name in names.items():
            path = path.replace(value, name)
        tested.add((method, path))
    assert served == tested


async def test_every_route_refuses_every_wrong_token(keymanager: Keymanager) -> None:
    trust, everything = keymanager.trust, set(keymanager.trust.admin.scopes)
    async with Caller(keymanager) as caller:
        for (method, path), needed in ROUTES.items():
            wrong = {
                "none": (None, 401),
                "expired": (caller.token(everything, ttl_s=-60), 401),
                "foreign audience": (caller.token(everything, audience=Service.COMPUTE), 401),
                "stranger's key": (caller.token(everything, trust.stranger), 401),
                "unsigned": ("eyJhbGciOiJub25lIn0.e30.", 401),
                "every other scope": (caller.token(everything - needed), 403),
                "scope that the key may not claim": (caller.token(needed, trust.issuers[Role.PROXY]), 403),
                "another project": (caller.token(everything, project_id=ProjectId.new()), 403),
            }
            for name, (token, status) in wrong.items():
                response = await caller.call(method, path, token)
                if name == "another project" and method == "GET" and path in LISTS:
                    assert response.json() == [], (path, response.text)
                    continue
                assert response.status_code == status, (method, path, name, response.text)
                assert response.json()["code"] in ("unauthenticated", "permission_denied")
            for scope in needed:
                response = await caller.call(method, path, caller.token({scope}))
                assert response.status_code not in (401, 403), (method, path, scope, response.text)
    denied = await keymanager.audit("admin.denied")
    assert {(record["details"]["method"], record["details"]["needs"]) for record in denied} >= {
        ("POST", "account:admin"),
        ("GET", "audit:read"),
        ("POST", "security:admin"),
    }


async def test_every_route_survives_malformed_input(keymanager: Keymanager) -> None:
    texts = ["", "{", "[]", "null", '"x"', '{"name": 1}', '{"name": ""}', '{"unknown": 1}', "[" * 50_000]
    texts += ['{"name": "a\\u0000b"}', '{"reason": "a\\u0000b"}', '{"reason": "a\\nb"}', '{"name": "\\ud800"}']
    bodies = [b"\xff\xfe", *(text.encode() for text in texts)]
    async with Caller(keymanager) as caller:
        token = caller.token(keymanager.trust.admin.scopes)
        for method, path in ROUTES:
            no_body = (":revalidate", ":restore", ":rewrap", ":rotate", ":retire", ":rekey", f"{TOK}:revoke")
            if method not in ("POST", "PATCH") or path.endswith(no_body):
                continue  # these take no body
            for body in bodies:
                response = await caller.call(method, path, token, body)
                assert response.status_code == 400, (path, body[:20], response.text)
                assert response.json()["code"] == "invalid_input"
        for path in (
            "/v1/projects/prj-xyz",
            f"/v1/projects/{WS}",
            "/v1/projects/" + "a" * 3000,
            "/v1/projects/%00",
            f"/v1/key-configurations/{PRJ}",
            "/v1/workspaces/ws-/projects",
            "/v1/audit?after=-1",
            "/v1/audit?after=99999999999999999999999",
            "/v1/audit?limit=100000",
            "/v1/audit?after=x",
            "/v1/revocations?project_id=drop",
            f"/v1/revocations?project_id={WS}",
            "/v1/revocations?limit=0",
        ):
            response = await caller.call("GET", path, token)
            assert response.status_code == 400, (path, response.text)
        for method, path in ROUTES:
            if any(part in path for part in (str(KC), str(WS), str(PRJ), str(TOK))):
                key = b'{"key": {"provider": "openbao", "address": "https://bao", "key_name": "k", "role_id": "r"}}'
                other = f'{{"key_configuration_id": "{KC}"}}'.encode()
                good = {"revoke": b'{"reason": "x"}', "projects": b'{"name": "x"}', "replace": key, "move-key": other}
                good["shred"] = b'{"project_name": "x", "reason": "x"}'
                good["approve"] = b'{"project_name": "x", "shred_id": "shr-0123456789abcdef"}'
                suffix = path.rpartition(":")[2] if ":" in path else path.rpartition("/")[2]
                response = await caller.call(method, path, token, good.get(suffix, b"{}"))
                assert response.status_code == 404, (path, response.text)


async def test_body_larger_than_the_limit_is_refused(keymanager: Keymanager) -> None:
    async with Caller(keymanager) as caller:
        token = caller.token(keymanager.trust.admin.scopes)
        response = await caller.call("POST", "/v1/workspaces", token, b'{"name": "' + b"x" * 9_000_000 + b'"}')
    assert response.status_code == 413
    assert response.json()["code"] == "invalid_input"


async def test_error_about_a_malformed_body_does_not_repeat_it(keymanager: Keymanager) -> None:
    async with Caller(keymanager) as caller:
        token = caller.token(keymanager.trust.admin.scopes)
        response = await caller.call("POST", "/v1/workspaces", token, b'{"name": ["sesame"], "sesame2": 1}')
    assert 'sesame"' not in response.text


# --- key configurations ---


def configuration(keymanager: Keymanager, key: str, **changes: Any) -> CreateKeyConfiguration:
    names = keymanager.tenant
    values = {"key_arn": key, "role_arn": names.role_arn, "external_id": names.names.external_id}
    return CreateKeyConfiguration(name="kc", key=AwsKey.model_validate(values | changes))


async def test_unusable_keys_are_refused_with_what_is_missing(keymanager: Keymanager, cmk: str) -> None:
    tenant = keymanager.tenant
    not_ours = tenant.customer.create_key()
    disabled = tenant.customer.create_key(role_arn=tenant.role_arn)
    tenant.customer.disable(disabled)
    absent = cmk[:-12] + "0" * 12
    cases = {
        "may not use the key": configuration(keymanager, not_ours),
        "enable it": configuration(keymanager, disabled),
        "trust policy": configuration(keymanager, cmk, external_id="someone-elses"),
        "role cannot be assumed": configuration(keymanager, cmk, role_arn=f"{tenant.role_arn}-absent"),
        "key": configuration(keymanager, absent),
    }
    async with keymanager.client() as client:
        for expected, body in cases.items():
            with pytest.raises(InvalidInputError, match=expected):
                await client.request("POST", "/v1/key-configurations", body=body)
        with tenant.admin.during(Faults(outage=Outage.REFUSE)), pytest.raises(UnavailableError):
            await client.request("POST", "/v1/key-configurations", body=configuration(keymanager, cmk))
        assert (await client.request("GET", "/v1/key-configurations")).json() == []


async def test_names_are_unique_and_bound_configurations_stay(keymanager: Keymanager, cmk: str) -> None:
    kc, workspace = await keymanager.bind(cmk)
    path = f"/v1/key-configurations/{kc.key_configuration_id}"
    async with keymanager.client() as client:
        same_name = CreateKeyConfiguration(name=kc.name, key=kc.key)
        with pytest.raises(ConflictError):
            await client.request("POST", "/v1/key-configurations", body=same_name)
        same = CreateWorkspace(name=workspace.name, key_configuration_id=kc.key_configuration_id)
        with pytest.raises(ConflictError):
            await client.request("POST", "/v1/workspaces", body=same)
        absent = CreateWorkspace(name="other", key_configuration_id=KeyConfigurationId.new())
        with pytest.raises(NotFoundError):
            await client.request("POST", "/v1/workspaces", body=absent)
        with pytest.raises(ConflictError):
            await client.request("DELETE", path)
        spare = await client.call(
            KeyConfiguration, "POST", "/v1/key-configurations", body=configuration(keymanager, cmk)
        )
        await client.request("DELETE", f"/v1/key-configurations/{spare.key_configuration_id}")
        with pytest.raises(NotFoundError):
            await client.request("DELETE", f"/v1/key-configurations/{spare.key_configuration_id}")
        shown = await client.call(KeyConfiguration, "GET", path)
        assert (shown.state, shown.last_verdict) == (KeyState.ACTIVE, "ALLOWED")
        listed = (await client.request("GET", "/v1/workspaces")).json()
        assert [Workspace.model_validate(item) for item in listed] == [workspace]


async def test_project_of_a_revoked_key_is_not_created(keymanager: Keymanager, cmk: str) -> None:
    _, workspace = await keymanager.bind(cmk, probe_interval_s=3600)
    await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
    body = CreateProject(name="late")
    async with keymanager.client() as client:
        for _ in range(2):  # the first finds out, the second knows
            with pytest.raises(RevokedError):
                await client.request("POST", f"/v1/workspaces/{workspace.workspace_id}/projects", body=body)
        assert (await client.request("GET", f"/v1/workspaces/{workspace.workspace_id}/projects")).json() == []


async def test_everything_is_still_there_after_a_restart(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client() as keys:
        await keys.acquire(project.project_id, Losses())
        [(dek, envelope)] = await keys.generate(project.project_id, [thing := named()])
        sealed = dek.seal(bytes(12), b"row", b"")
    assert keymanager.stop() == 0
    await keymanager.start()
    again = await keymanager.project(project.project_id)
    assert again.model_copy(update={"keks": []}) == project.model_copy(update={"keks": []})
    assert (await keymanager.status()).plaintext_keks == []
    async with keymanager.key_client() as keys:
        await keys.acquire(project.project_id, Losses())
        [key] = await keys.unwrap(project.project_id, [(thing, envelope)])
        assert key.open(bytes(12), sealed, b"") == b"row"
    assert (await keymanager.status()).plaintext_keks == [project.project_id]


async def test_settings_with_an_unknown_key_are_refused_without_repeating_values(keymanager: Keymanager) -> None:
    import subprocess
    import sys

    config = keymanager.directory / "bad.json"
    config.write_text(json.dumps(keymanager.settings() | {"metadata_pasword": "sesame"}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "keymanager", "--config", str(config), stderr=subprocess.PIPE
    )
    async with asyncio.timeout(30):
        _, stderr = await process.communicate()
    assert process.returncode == 2
    assert b"metadata_pasword" in stderr
    assert b"sesame" not in stderr


# --- audit ---


async def test_audit_says_who_did_what_and_joins_the_kms_log(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    keymanager.stop()
    await keymanager.start()
    async with keymanager.key_client() as keys:
        await keys.acquire(project.project_id, Losses())
        await keys.generate(project.project_id, [named(), named()])
    [created] = await keymanager.audit("project.create")
    assert created["actor"] == "admin:admin"
    [unwrapped] = await keymanager.audit("kek.unwrap")
    events = {event["requestID"]: event for event in keymanager.tenant.admin.audit_log()}
    assert events[created["details"]["kms_request_id"]]["eventName"] == "GenerateDataKey"
    event = events[unwrapped["details"]["kms_request_id"]]
    assert event["eventName"] == "Decrypt"
    assert event["requestParameters"]["encryptionContext"]["keylake:project"] == str(project.project_id)
    [generated] = await keymanager.audit("dek.generate")
    assert generated["details"]["objects"] == "2"
    assert generated["actor"] == "node/pageserver-1"
    [granted] = await keymanager.audit("lease.grant")
    [released] = await keymanager.audit("lease.release")
    assert granted["sequence"] < generated["sequence"] < released["sequence"]


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("UPDATE audit SET actor = 'nobody' WHERE sequence = 3", "record 3 was altered"),
        ("UPDATE audit SET outcome = 'denied' WHERE sequence = 3", "record 3 was altered"),
        ("UPDATE audit SET at = at + interval '1 second' WHERE sequence = 2", "record 2 was altered"),
        ('UPDATE audit SET details = details || \'{"x": "y"}\' WHERE sequence = 4', "record 4 was altered"),
        ("UPDATE audit SET details = '[1]' WHERE sequence = 4", "record 4 was altered"),
        ("UPDATE audit SET project_id = 'x' WHERE sequence = 4", "record 4 was altered"),
        ("UPDATE audit SET previous_hash = record_hash WHERE sequence = 3", "record 3 does not follow"),
        ("UPDATE audit SET record_hash = sha256('x') WHERE sequence = 3", "record 3 was altered"),
        (
            "UPDATE audit SET sequence = -sequence WHERE sequence IN (2, 3);"
            "UPDATE audit SET sequence = 5 + sequence WHERE sequence < 0",
            "record 2 does not follow",
        ),
        ("DELETE FROM audit WHERE sequence = 3", "record 3 is missing"),
        ("DELETE FROM audit WHERE sequence = (SELECT max(sequence) FROM audit)", "but its head is record"),
        ("DELETE FROM audit", "but its head is record"),
        ("UPDATE audit_head SET sequence = sequence - 1", "but its head is record"),
        ("UPDATE audit_head SET record_hash = sha256('x')", "is not the record that the head names"),
        ("DELETE FROM audit_head", "head is missing"),
    ],
)
async def test_tampering_with_the_audit_chain_is_found_and_located(
    keymanager: Keymanager, cmk: str, statement: str, where: str
) -> None:
    await keymanager.new_project(cmk, probe_interval_s=3600)
    before = await keymanager.verify_audit()
    assert before.intact
    assert before.records >= 4
    async with keymanager.client() as client:
        newest = (await client.request("GET", "/v1/audit", params={"after": before.records - 1})).json()
    assert AuditRecord.model_validate(newest[0]).record_hash == before.head_hash
    connection = await asyncpg.connect(keymanager.dsn, server_settings={"search_path": "keymanager"})
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
    after = await keymanager.verify_audit()
    assert not after.intact
    assert where in (after.problem or "")
    # At its end it records its last calls, which some of these chains do not take.
    keymanager.expected_errors |= {"the last KMS calls could not be recorded"}


async def test_database_and_log_hold_no_key_bytes(keymanager: Keymanager, cmk: str) -> None:
    """Everything that the database stores of a key is what the KMS wrapped."""
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client() as keys:
        await keys.acquire(project.project_id, Losses())
        made = await keys.generate(project.project_id, [named() for _ in range(3)])
        deks = [bytes(dek.key.reveal()) for dek, _ in made]
        connection = await asyncpg.connect(keymanager.dsn, server_settings={"search_path": "keymanager"})
        try:
            tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'keymanager'")
            dump = ""
            for table in tables:
                dump += str(await connection.fetch(f"SELECT * FROM {table['tablename']}"))  # noqa: S608 - our own names
        finally:
            await connection.close()
    for dek in deks:
        for text in (dek.hex(), str(dek), repr(dek)[2:-1]):
            assert text not in dump
            assert text not in keymanager.log
    assert str(project.project_id) in dump  # positive control: the dump is one


async def test_a_wrong_scope_raises_the_same_error_in_the_service_client(keymanager: Keymanager) -> None:
    async with keymanager.client(scopes=frozenset({Scope.STATUS_READ})) as client:
        with pytest.raises(PermissionDeniedError):
            await client.request("GET", "/v1/audit")
