"""Keys of the transit engine of an OpenBao (or Vault) server that the customer runs, used as an AppRole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints

from keymanager.kms.base import KmsError, KmsProvider
from keymanager.kms.kind import KmsKind, Surroundings
from shared.cmk import CustomerKey
from shared.errors import InvalidInputError
from shared.kms_log import LoggedCall, LogReader, Recorded, items, members, text, time

_PERMISSIONS: Final[Mapping[str, tuple[str, str]]] = {
    "GenerateDataKey": ("update", "datakey/plaintext"),
    "Encrypt": ("update", "encrypt"),
    "Decrypt": ("update", "decrypt"),
    "ReadKey": ("read", "keys"),
}
"""Operation → capability, path below the mount."""
_LOGIN: Final = "Login"
_ACTIONS: Final[Mapping[tuple[str, str], str]] = {
    ("update", "datakey/plaintext"): "GenerateDataKey",
    ("update", "encrypt"): "Encrypt",
    ("update", "decrypt"): "Decrypt",
    ("read", "keys"): "ReadKey",
}
"""The log's operation and path → what the adapter calls it. Every other one keeps the log's words."""
_LOGGED_PATH: Final = re.compile(
    r"(?P<mount>[^\0]{1,255}?)/(?P<action>keys|datakey/[a-z]{1,16}|encrypt|decrypt|rewrap|sign|verify|hmac|export/[a-z-]{1,32}"
    r"|backup|byok-export/[^/]{1,128})/(?P<name>[A-Za-z0-9_.-]{1,128})(?P<rest>/[^\0]{0,255})?"
)
_LOGIN_PATH: Final = re.compile(r"auth/[^\0]{1,255}/login")


class OpenBaoKey(CustomerKey):
    """A transit key of an OpenBao (or Vault) server and the AppRole by which Keylake uses it.

    The secret id that goes with `role_id` is not in here: it is in the keymanager's settings, under this address.
    """

    provider: Literal["openbao"] = "openbao"
    address: str = Field(max_length=255, pattern=r"^https://[A-Za-z0-9.\-\[\]:]+$")
    namespace: str | None = Field(default=None, max_length=255, pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$")
    mount: str = Field(default="transit", max_length=255, pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$")
    key_name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")
    role_id: str = Field(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9_.-]+$")

    @property
    def identifier(self) -> str:
        namespace = "" if self.namespace is None else f"{self.namespace}/"
        return f"{self.address}/v1/{namespace}{self.mount}/keys/{self.key_name}"

    @property
    def principal(self) -> str:
        return self.role_id


class OpenBaoServer(BaseModel):
    """One customer's server, with what it gave us to log in with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca_bundle: Path | None = Field(default=None, description="PEM file of the roots that the server chains to")
    approle_mount: str = "approle"
    secret_ids: dict[str, SecretStr] = Field(description="role id → secret id")


class OpenBaoSettings(BaseModel):
    """OpenBao servers by address. A secret id goes to the server that it is listed under and to no other, and a key
    configuration must name a role id of that list: so none can be talked into using another customer's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    servers: dict[Annotated[str, StringConstraints(pattern=r"^https://")], OpenBaoServer] = Field(default_factory=dict)


def _is_record(value: dict[str, Any]) -> bool:
    return value.get("type") in ("request", "response") and "id" in members(value.get("request"))


def _logged_calls(records: Iterator[dict[str, Any]], recorded: Recorded) -> Iterator[LoggedCall]:
    """An audit device's JSON lines. A request stands there when it comes and with its answer; one that a quota stopped
    stands there once.

    The log knows no address of its own, and its name for an AppRole is not the role id. Both are taken from the calls
    that we recorded, by their ids: a key that we never used is known by its path, and a principal that is not ours by
    the log's own name.
    """
    requests: dict[str, dict[str, Any]] = {}
    for record in records:
        request = members(record.get("request"))
        requests[text(request, "id")] = record
    calls = [call for record in requests.values() if (call := _logged_call(record, recorded)) is not None]
    keys: dict[str, str] = {}
    principals: dict[tuple[str, str], str] = {}
    for call in calls:
        ours = None if call.request_id is None else recorded(call.request_id)
        if ours is not None and call.key is not None:
            keys[call.key] = ours[0]
            principals[call.key, call.principal] = ours[1] or call.principal
    for call in calls:
        if call.key is None:
            yield call
        else:
            principal = principals.get((call.key, call.principal), call.principal)
            yield replace(call, key=keys.get(call.key, call.key), principal=principal)


def _logged_call(record: dict[str, Any], recorded: Recorded) -> LoggedCall | None:
    """None for what concerns no transit key. The key is its path, behind that of its namespace; the id is the server's
    own, or that of the header when it is the one that we recorded: a refusal has no other."""
    request, auth = members(record.get("request")), members(record.get("auth"))
    path, operation = text(request, "path"), text(request, "operation")
    namespace = members(request.get("namespace")).get("path")
    found = _LOGGED_PATH.fullmatch(path)
    is_login = _LOGIN_PATH.fullmatch(path) is not None
    if (found is None and not is_login) or request.get("mount_type") not in ("transit", "approle", None):
        return None
    ids = [text(request, "id"), *items(members(request.get("headers")).get("x-correlation-id"))]
    role = members(auth.get("metadata")).get("role_name")
    action = None if found is None else f"{found['action']}{found['rest'] or ''}"
    error = record.get("error")
    return LoggedCall(
        time(record, "time"),
        _LOGIN if found is None else _ACTIONS.get((operation, action or ""), f"{operation} {action}"),
        None if found is None else f"{namespace or ''}{found['mount']}/keys/{found['name']}",
        str(role or auth.get("display_name") or "unknown"),
        next((each for each in ids if isinstance(each, str) and recorded(each) is not None), ids[0]),
        "ok" if not error else " ".join(str(error).split())[:100],
        found is not None and found["action"] != "keys",
        not is_login,
    )


class OpenBao(KmsKind[OpenBaoKey, OpenBaoSettings]):
    """How long a session lives is not known: the server says it, and whether it ends with the role."""

    key = OpenBaoKey
    settings = OpenBaoSettings
    adapter = "keymanager.kms.openbao"
    log = LogReader("OpenBao's audit device", _is_record, _logged_calls, frozenset({_LOGIN, "LookupSelf"}))

    def connect(self, key: OpenBaoKey, settings: OpenBaoSettings, around: Surroundings) -> KmsProvider:
        from keymanager.kms.openbao import AppRole, OpenBaoConfig, OpenBaoKms

        server = settings.servers.get(key.address)
        secret_id = None if server is None else server.secret_ids.get(key.role_id)
        if server is None or secret_id is None:
            raise InvalidInputError("no credentials are set up for this role at this OpenBao server")
        config = OpenBaoConfig(
            address=key.address,
            key_name=key.key_name,
            auth=AppRole(key.role_id, secret_id.get_secret_value(), server.approle_mount),
            mount=key.mount,
            namespace=key.namespace,
            ca_bundle=server.ca_bundle,
            limits=around.limits,
        )
        return OpenBaoKms(config, observer=around.observer, clock=around.clock)

    def permission(self, error: KmsError, key: OpenBaoKey) -> str:
        capability, path = _PERMISSIONS.get(error.operation, ("update", error.operation))
        return f"{capability} on {key.mount}/{path}/{key.key_name} (in the role's policy)"

    def principal(self, key: OpenBaoKey) -> str:
        return "we cannot log in with the AppRole: it, its secret id or its token was withdrawn"


KIND: Final = OpenBao()
