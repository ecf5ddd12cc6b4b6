"""What the customers' clouds say happened to their keys: which keys an event names, and nothing else of it.

An event is a hint. It is never believed: all that it can do is have the KMS asked sooner than it would be anyway. So
what does not look like a name of a key is passed over, and only a body that is no event of any cloud is refused.

Shapes, as the clouds send them and as a relay passes them on:

- **AWS**: an EventBridge event of the source `aws.kms`: `AWS API Call via CloudTrail`, `AWS Service Event via
  CloudTrail`, and KMS's own (`KMS CMK Deletion` …).
- **Azure**: Event Grid's events of `Microsoft.KeyVault`, in its own schema or as CloudEvents 1.0, one or a list; its
  handshake (`Microsoft.EventGrid.SubscriptionValidationEvent`); and Azure Monitor's `{"records": […]}` of the category
  AuditEvent, which is where a disabled key shows: Event Grid has no event for that.
- **Google**: a push of Pub/Sub whose data is an entry of Cloud Audit Logs for Cloud KMS.

**An event about the use of a key names nothing**: our own probe is one, and would be answered with a probe for ever.
Nor does one about a call that failed, which has changed nothing.

This file is a core: no I/O and no clock.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import from_json

from shared.api.keymanager import AwsKey, AzureKey, GoogleKey
from shared.cmk import CmkKey
from shared.errors import InvalidInputError

MAX_EVENT_SIZE_BYTES: Final = 1024 * 1024
"""As much as EventBridge and Event Grid send, batches included. An entry of Google's log has at most a quarter."""
_MAX_KIND_SIZE_CHARACTERS: Final = 100

_AWS_REGION: Final = re.compile(r"[a-z0-9-]{1,32}")
_AWS_ACCOUNT: Final = re.compile(r"[0-9]{12}")
_AWS_KEY_ID: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_AWS_ARN: Final = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]{1,32}):([0-9]{12}):key/([A-Za-z0-9-]{1,64})")
_AZURE_VAULT: Final = re.compile(r"[A-Za-z0-9-]{1,63}")
_AZURE_OBJECT: Final = re.compile(r"[0-9A-Za-z-]{1,127}")
_AZURE_KEY_URL: Final = re.compile(r"https://([A-Za-z0-9-]{1,63})[A-Za-z0-9.:-]*/keys/([0-9A-Za-z-]{1,127})(?:/.*)?")
_AZURE_VALIDATION: Final = "Microsoft.EventGrid.SubscriptionValidationEvent"
_AZURE_VALIDATION_CODE: Final = re.compile(r"[!-~]{1,512}")
_AZURE_POLICY_CHANGED: Final = "Microsoft.KeyVault.VaultAccessPolicyChanged"
_AZURE_KEY_CHANGES: Final = frozenset(
    {"KeyCreate", "KeyDelete", "KeyImport", "KeyPurge", "KeyRecover", "KeyRestore", "KeyRotate", "KeyUpdate"}
)
_AZURE_VAULT_CHANGES: Final = frozenset({"VaultDelete", "VaultPatch", "VaultPut", "VaultRecover", "VaultUpdate"})
_GOOGLE_RING: Final = r"projects/[a-z0-9:.-]{1,64}/locations/[a-z0-9-]{1,63}/keyRings/[a-zA-Z0-9_-]{1,63}"
_GOOGLE_RESOURCE: Final = re.compile(rf"({_GOOGLE_RING})(?:/cryptoKeys/([a-zA-Z0-9_-]{{1,63}})(?:/.*)?)?")
_GOOGLE_USES: Final = "cloudaudit.googleapis.com%2Fdata_access"


@dataclass(frozen=True, slots=True)
class KeyName:
    """A key, or everything in the place where keys are."""

    cloud: str
    place: str
    """AWS: `region:account`. Azure: the vault's name. Google: the key ring's resource name."""
    key: str | None
    """AWS: the key id. Azure and Google: its name. None: every key there."""


@dataclass(frozen=True, slots=True)
class KmsEvent:
    kind: str
    """The cloud and its own name for what happened: at most a line of printable ASCII."""
    names: frozenset[KeyName]
    """Empty: it is about nothing that we would ask a KMS for."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """Event Grid asks, before it sends anything, whether it is welcome."""

    validation_code: str


def names_of(key: CmkKey) -> frozenset[KeyName]:
    """The names under which an event can be about this key."""
    match key:
        case AwsKey():
            _, _, _, region, account, resource = key.key_arn.split(":")
            return _names("aws", f"{region}:{account}", resource.removeprefix("key/"))
        case AzureKey():
            vault = re.split(r"[.:]", key.vault_url.removeprefix("https://"), maxsplit=1)[0]
            return _names("azure", vault.lower(), key.key_name.lower())
        case GoogleKey():
            ring, _, name = key.key_name.partition("/cryptoKeys/")
            return _names("google", ring, name)
        case _:
            return frozenset()  # no other kind of KMS sends such events


def _names(cloud: str, place: str, key: str) -> frozenset[KeyName]:
    return frozenset({KeyName(cloud, place, key), KeyName(cloud, place, None)})


def parse(body: bytes) -> Handshake | list[KmsEvent]:
    """Raises InvalidInputError, which does not repeat the body, for what is no cloud's event, or too large for one."""
    if len(body) > MAX_EVENT_SIZE_BYTES:
        raise InvalidInputError(f"an event has at most {MAX_EVENT_SIZE_BYTES} bytes")
    value = _json(body)
    if isinstance(value, list):
        return _grid(value)
    if isinstance(value, dict):
        if "detail-type" in value:
            return [_aws(value)]
        if "message" in value:
            return [_google(value)]
        if "records" in value:
            return [_azure_record(record) for record in _objects(value["records"])]
        if "eventType" in value or "specversion" in value:
            return _grid([value])
    raise InvalidInputError("this is no event of a cloud that Keylake knows")


def _json(text: bytes) -> Any:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        raise InvalidInputError("this is not JSON") from None


# --- AWS ---


def _aws(event: dict[str, Any]) -> KmsEvent:
    detail = _object(event.get("detail"))
    kind = _kind("aws", _text(detail.get("eventName")) or _text(event.get("detail-type")))
    used = detail.get("readOnly") is True or detail.get("errorCode") is not None
    if used or event.get("source") != "aws.kms":
        return KmsEvent(kind, frozenset())
    # A bare key id is one of the caller's own account.
    place = _aws_place(_text(event.get("region")), _text(event.get("account")))
    return KmsEvent(kind, frozenset(name for said in _aws_said(event, detail) if (name := _aws_name(said, place))))


def _aws_said(event: dict[str, Any], detail: dict[str, Any]) -> Iterator[str]:
    """Every place where KMS or CloudTrail puts a key id or an ARN. An alias is named beside its key's ARN."""
    yield from map(_text, _list(event.get("resources")))
    for resource in _list(detail.get("resources")):
        yield _text(_object(resource).get("ARN"))
    for part in ("requestParameters", "responseElements", "serviceEventDetails"):
        yield _text(_object(detail.get(part)).get("keyId"))
    yield _text(_object(detail.get("requestParameters")).get("targetKeyId"))
    yield _text(detail.get("key-id"))


def _aws_place(region: str, account: str) -> str | None:
    good = _AWS_REGION.fullmatch(region) and _AWS_ACCOUNT.fullmatch(account)
    return f"{region}:{account}" if good else None


def _aws_name(said: str, place: str | None) -> KeyName | None:
    if arn := _AWS_ARN.fullmatch(said):
        return KeyName("aws", f"{arn[1]}:{arn[2]}", arn[3])
    if place is not None and _AWS_KEY_ID.fullmatch(said):
        return KeyName("aws", place, said)
    return None


# --- Azure ---


def _grid(events: list[Any]) -> Handshake | list[KmsEvent]:
    """Event Grid's own schema, or CloudEvents, which has `type` for `eventType`."""
    found = []
    for event in _objects(events):
        kind = _text(event.get("type" if "specversion" in event else "eventType"))
        if not kind:
            raise InvalidInputError("an event of Event Grid has a type")
        data = _object(event.get("data"))
        if kind == _AZURE_VALIDATION:
            code = _text(data.get("validationCode"))
            if not _AZURE_VALIDATION_CODE.fullmatch(code):
                raise InvalidInputError("a handshake of Event Grid has a validation code")
            return Handshake(code)
        found.append(KmsEvent(_kind("azure", kind), _azure_names(kind, data)))
    return found


def _azure_names(kind: str, data: dict[str, Any]) -> frozenset[KeyName]:
    vault, key = _text(data.get("VaultName")), _text(data.get("ObjectName"))
    if not kind.startswith("Microsoft.KeyVault.") or not _AZURE_VAULT.fullmatch(vault):
        return frozenset()
    if kind == _AZURE_POLICY_CHANGED:
        return frozenset({KeyName("azure", vault.lower(), None)})
    if _text(data.get("ObjectType")).lower() != "key" or not _AZURE_OBJECT.fullmatch(key):
        return frozenset()
    return frozenset({KeyName("azure", vault.lower(), key.lower())})


def _azure_record(record: dict[str, Any]) -> KmsEvent:
    operation = _text(record.get("operationName"))
    names: frozenset[KeyName] = frozenset()
    if record.get("category") == "AuditEvent" and operation in _AZURE_KEY_CHANGES:
        if url := _AZURE_KEY_URL.fullmatch(_text(_object(record.get("properties")).get("id"))):
            names = frozenset({KeyName("azure", url[1].lower(), url[2].lower())})
    elif record.get("category") == "AuditEvent" and operation in _AZURE_VAULT_CHANGES:
        vault = _text(record.get("resourceId")).rpartition("/")[2]
        if _AZURE_VAULT.fullmatch(vault):
            names = frozenset({KeyName("azure", vault.lower(), None)})
    return KmsEvent(_kind("azure", operation), names)


# --- Google ---


def _google(push: dict[str, Any]) -> KmsEvent:
    data = _object(push["message"]).get("data")
    try:
        entry = _json(base64.b64decode(_text(data), validate=True))
    except ValueError:
        raise InvalidInputError("the data of a Pub/Sub message is base64") from None
    if not isinstance(entry, dict):
        raise InvalidInputError("the data of a Pub/Sub message is an entry of a log")
    payload = _object(entry.get("protoPayload"))
    kind = _kind("google", _text(payload.get("methodName")))
    used = _text(entry.get("logName")).endswith(_GOOGLE_USES) or _object(payload.get("status")).get("code", 0) != 0
    resource = _GOOGLE_RESOURCE.fullmatch(_text(payload.get("resourceName")))
    if used or payload.get("serviceName") != "cloudkms.googleapis.com" or resource is None:
        return KmsEvent(kind, frozenset())
    return KmsEvent(kind, frozenset({KeyName("google", resource[1], resource[2])}))


# --- of any shape ---


def _objects(values: Any) -> list[dict[str, Any]]:
    """Raises InvalidInputError unless it is a list of objects, and of one at least."""
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise InvalidInputError("events come as a list of objects")
    return values


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _kind(cloud: str, said: str) -> str:
    """Fit for logs and the audit chain: the sender chose the text."""
    return f"{cloud} " + "".join(c if " " <= c <= "~" else "?" for c in said[:_MAX_KIND_SIZE_CHARACTERS])
