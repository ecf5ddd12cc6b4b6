"""What the customer does with its own cloud, and what whoever runs the simulation does to it.

`AwsCustomer` is boto3 with the customer's own credentials: it works against the real AWS just as well. `CloudAdmin`
speaks to `/_keylake/` and exists only here. Both block; asyncio code calls them in a thread.
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import boto3
import httpx
from botocore.config import Config

from customercloud.aws.admin import BootstrapAnswer, BootstrapRequest, Credentials, RoleAnswer, RoleRequest, UserRequest
from customercloud.aws.event_bridge import EventTarget
from customercloud.faults import Faults
from shared.botocore_session import new_session
from shared.errors import UnavailableError
from shared.http import error_from_response

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient
    from mypy_boto3_kms.type_defs import KeyMetadataTypeDef

USE_SID: Final = "KeylakeUse"
DENY_SID: Final = "KeylakeDenied"
VENDOR_ACTIONS: Final = (
    "kms:Encrypt",
    "kms:Decrypt",
    "kms:ReEncrypt*",
    "kms:GenerateDataKey*",
    "kms:DescribeKey",
)
"""What the vendor's role needs on a key, and all that it gets."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where AWS is. All None for the real one."""

    region: str
    url: str | None = None
    ca_bundle: Path | None = None


@dataclass(frozen=True, slots=True)
class AccessKey:
    access_key_id: str
    secret_access_key: str = field(repr=False)

    @classmethod
    def of(cls, credentials: Credentials) -> AccessKey:
        return cls(credentials.access_key_id, credentials.secret_access_key)


class AwsCustomer:
    """The customer's key administrator. `key` is a key id or ARN throughout. Raises boto3's exceptions."""

    def __init__(self, endpoint: Endpoint, access_key: AccessKey) -> None:
        session = boto3.session.Session(
            aws_access_key_id=access_key.access_key_id,
            aws_secret_access_key=access_key.secret_access_key,
            region_name=endpoint.region,
            botocore_session=new_session(),
        )
        verify = None if endpoint.ca_bundle is None else str(endpoint.ca_bundle)
        config = Config(connect_timeout=2, read_timeout=10)
        self.kms: KMSClient = session.client("kms", endpoint_url=endpoint.url, verify=verify, config=config)
        # boto3 has no types for CloudTrail without another stub package; one call is made of it.
        self._trail: Any = session.client("cloudtrail", endpoint_url=endpoint.url, verify=verify, config=config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self.kms.close()
        self._trail.close()

    # ── life of a key ──────────────────────────────────────────────────────────────────────────────────────────

    def create_key(self, description: str = "", *, role_arn: str | None = None) -> str:
        """The new key's ARN; `role_arn` may use it from the start."""
        arn = self.kms.create_key(Description=description)["KeyMetadata"]["Arn"]
        if role_arn is not None:
            self.allow_role(arn, role_arn)
        return arn

    def describe(self, key: str) -> KeyMetadataTypeDef:
        return self.kms.describe_key(KeyId=key)["KeyMetadata"]

    def disable(self, key: str) -> None:
        self.kms.disable_key(KeyId=key)

    def enable(self, key: str) -> None:
        self.kms.enable_key(KeyId=key)

    def schedule_deletion(self, key: str, window_days: int = 7) -> datetime:
        """When the key will be gone. Until then the deletion can be cancelled, and the key cannot be used."""
        return self.kms.schedule_key_deletion(KeyId=key, PendingWindowInDays=window_days)["DeletionDate"]

    def cancel_deletion(self, key: str) -> None:
        """The key is disabled afterwards, as AWS leaves it: `enable` brings it back."""
        self.kms.cancel_key_deletion(KeyId=key)

    def rotate(self, key: str) -> str:
        """New key material now; returns its id. What older material encrypted still opens."""
        self.kms.rotate_key_on_demand(KeyId=key)
        return self.describe(key)["CurrentKeyMaterialId"]

    # ── who may use it ─────────────────────────────────────────────────────────────────────────────────────────

    def policy(self, key: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.kms.get_key_policy(KeyId=key)["Policy"])
        return document

    def put_policy(self, key: str, document: dict[str, Any]) -> None:
        self.kms.put_key_policy(KeyId=key, Policy=json.dumps(document))

    def allow_role(self, key: str, role_arn: str, encryption_context: dict[str, str] | None = None) -> None:
        """Let the role use the key, for calls with this encryption context if one is given; lifts `deny_role`."""
        statement: dict[str, Any] = {
            "Sid": USE_SID,
            "Effect": "Allow",
            "Principal": {"AWS": role_arn},
            "Action": list(VENDOR_ACTIONS),
            "Resource": "*",
        }
        if encryption_context:
            statement["Condition"] = {
                "StringEquals": {f"kms:EncryptionContext:{name}": value for name, value in encryption_context.items()}
            }
        self._replace_statements(key, role_arn, {USE_SID, DENY_SID}, statement)

    def deny_role(self, key: str, role_arn: str) -> None:
        """An explicit Deny, which no other policy can overrule."""
        statement = {
            "Sid": DENY_SID,
            "Effect": "Deny",
            "Principal": {"AWS": role_arn},
            "Action": "kms:*",
            "Resource": "*",
        }
        self._replace_statements(key, role_arn, {DENY_SID}, statement)

    def remove_role(self, key: str, role_arn: str) -> None:
        """Take the role out of the key's policy: what is not allowed is denied."""
        self._replace_statements(key, role_arn, {USE_SID, DENY_SID}, None)

    def _replace_statements(self, key: str, role_arn: str, sids: set[str], new: dict[str, Any] | None) -> None:
        document = self.policy(key)
        kept = [
            statement
            for statement in document["Statement"]
            if statement.get("Sid") not in sids or statement["Principal"] != {"AWS": role_arn}
        ]
        self.put_policy(key, document | {"Statement": [*kept, *([] if new is None else [new])]})

    # ── what happened ──────────────────────────────────────────────────────────────────────────────────────────

    def events(
        self, *, start: datetime | None = None, end: datetime | None = None, **attribute: str
    ) -> Iterator[dict[str, Any]]:
        """CloudTrail records of the customer's account, newest first, across all pages.

        `attribute` is at most one of LookupEvents' own filters, e.g. `EventName="Decrypt"`.
        """
        query: dict[str, Any] = {
            "LookupAttributes": [{"AttributeKey": key, "AttributeValue": value} for key, value in attribute.items()]
        }
        query |= {} if start is None else {"StartTime": start}
        query |= {} if end is None else {"EndTime": end}
        for page in self._trail.get_paginator("lookup_events").paginate(**query):
            for event in page["Events"]:
                yield json.loads(event["CloudTrailEvent"])


class CloudAdmin:
    """The simulation's administrator. Raises the simulator's error, or UnavailableError when it cannot be reached."""

    def __init__(self, base_url: str, token: str, *, verify: Path | None = None, timeout_s: float = 10.0) -> None:
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {token}"},
            verify=True if verify is None else ssl.create_default_context(cafile=str(verify)),
            timeout=timeout_s,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def bootstrap_aws(self, external_id: str, **names: str) -> BootstrapAnswer:
        """Customer, vendor and role; `names` are the other fields of BootstrapRequest. May be repeated."""
        request = BootstrapRequest.model_validate({"external_id": external_id} | names)
        return BootstrapAnswer.model_validate_json(self._call("POST", "aws/bootstrap", request.model_dump_json()))

    def put_user(self, account_id: str, name: str, request: UserRequest) -> Credentials:
        path = f"aws/accounts/{account_id}/users/{name}"
        return Credentials.model_validate_json(self._call("PUT", path, request.model_dump_json()))

    def delete_user(self, account_id: str, name: str) -> None:
        self._call("DELETE", f"aws/accounts/{account_id}/users/{name}")

    def put_role(self, account_id: str, name: str, request: RoleRequest) -> RoleAnswer:
        path = f"aws/accounts/{account_id}/roles/{name}"
        return RoleAnswer.model_validate_json(self._call("PUT", path, request.model_dump_json()))

    def delete_role(self, account_id: str, name: str) -> None:
        self._call("DELETE", f"aws/accounts/{account_id}/roles/{name}")

    def put_event_target(self, account_id: str, target: EventTarget) -> None:
        """Have changes to the account's keys posted there, as EventBridge does it; until the cloud is restarted."""
        self._call("PUT", f"aws/accounts/{account_id}/event-target", target.model_dump_json())

    def delete_event_target(self, account_id: str) -> None:
        self._call("DELETE", f"aws/accounts/{account_id}/event-target")

    def complete_deletion(self, key: str) -> None:
        """End the waiting period of a key that is pending deletion: it is destroyed now."""
        self._call("POST", f"aws/keys/{key.rpartition('/')[2]}/complete-deletion")

    def complete_rotation_period(self, key: str) -> None:
        """Let the automatic rotation of a key, which is switched on, be due now."""
        self._call("POST", f"aws/keys/{key.rpartition('/')[2]}/complete-rotation-period")

    def faults(self) -> Faults:
        return Faults.model_validate_json(self._call("GET", "faults"))

    def set_faults(self, faults: Faults) -> None:
        self._call("PUT", "faults", faults.model_dump_json())

    def clear_faults(self) -> None:
        self._call("DELETE", "faults")

    @contextlib.contextmanager
    def during(self, faults: Faults) -> Iterator[None]:
        """These faults while the block runs, none afterwards."""
        self.set_faults(faults)
        try:
            yield
        finally:
            self.clear_faults()

    def azure_audit_log(self) -> list[dict[str, Any]]:
        """Every AuditEvent record of every tenant, oldest first."""
        return [json.loads(line) for line in self._call("GET", "azure/events").splitlines()]

    def google_audit_log(self) -> list[dict[str, Any]]:
        """Every entry of the audit logs of every project, oldest first."""
        return [json.loads(line) for line in self._call("GET", "google/entries").splitlines()]

    def audit_log(self) -> list[dict[str, Any]]:
        """Every CloudTrail record of every account, oldest first."""
        return [json.loads(line) for line in self._call("GET", "aws/events").splitlines()]

    def _call(self, method: str, path: str, body: str | None = None) -> bytes:
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            response = self._http.request(method, f"/_keylake/{path}", content=body, headers=headers)
        except httpx.HTTPError as error:
            raise UnavailableError(f"customercloud cannot be reached: {type(error).__name__}") from None
        if not response.is_success:
            raise error_from_response(response)
        return response.content
