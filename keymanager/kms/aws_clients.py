"""boto3 clients for one AWS key configuration: with our own credentials, or with those of an assumed role.

Blocking: everything here runs in the adapter's threads.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import boto3
from botocore.config import Config

from keymanager.kms.calls import DEFAULT_LIMITS, CallLimits
from shared.botocore_session import new_session
from shared.errors import InvalidInputError

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient
    from mypy_boto3_sts import STSClient
    from mypy_boto3_sts.type_defs import AssumeRoleRequestTypeDef, CredentialsTypeDef

_KEY_ID: Final = re.compile(
    r"arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]{1,128}|mrk-[0-9a-f]{32}|[0-9a-f-]{36}"
)


@dataclass(frozen=True, slots=True)
class AwsKmsConfig:
    """One key configuration. Raises InvalidInputError for an alias: it can be pointed at another key unseen."""

    key_id: str
    """Key ARN (needed across accounts) or bare key id."""
    region: str
    role_arn: str | None = None
    """Role of the customer's account; None uses the base credentials as they are."""
    external_id: str | None = None
    session_name: str = "keylake"
    """Stands in the customer's audit log as the caller's name."""
    session_duration_s: int = 900
    """AWS's minimum. A session outlives the role's trust policy, so this bounds how long a withdrawn trust can go
    unnoticed; a changed key policy or key state is noticed at the next call."""
    access_key_id: str | None = None
    """Base credentials; None for boto3's default chain (environment, instance profile, web identity …)."""
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    kms_endpoint_url: str | None = None
    sts_endpoint_url: str | None = None
    ca_bundle: Path | None = None
    """PEM file of trusted roots; None for botocore's own."""
    limits: CallLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if not _KEY_ID.fullmatch(self.key_id):
            raise InvalidInputError("the key must be given as a key ARN or key id, not by an alias")


@dataclass(frozen=True, slots=True)
class RoleClient:
    """A KMS client with the credentials of one role session."""

    client: KMSClient
    expires_at: datetime
    request_id: str
    """Of the AssumeRole."""


class AwsClients:
    """Thread-safe. Raises what boto3 raises."""

    def __init__(self, config: AwsKmsConfig) -> None:
        # At DEBUG botocore logs whole request and answer bodies, and plaintext keys are in them.
        logging.getLogger("botocore").setLevel(logging.INFO)
        self._config = config
        self._boto = boto3.session.Session(
            botocore_session=new_session(),
            aws_access_key_id=config.access_key_id,
            aws_secret_access_key=config.secret_access_key,
            aws_session_token=config.session_token,
            region_name=config.region,
        )
        self._lock = threading.Lock()  # a boto3 session is not safe for concurrent client creation
        self._sts: STSClient | None = None
        self._verify = None if config.ca_bundle is None else str(config.ca_bundle)
        self._boto_config = Config(
            connect_timeout=config.limits.connect_timeout_s,
            read_timeout=config.limits.read_timeout_s,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=config.limits.max_concurrency,
        )

    def own_kms(self) -> KMSClient:
        """With the base credentials; boto3 renews them if they are of a kind that expires."""
        return self._kms(None)

    def role_kms(self, role_arn: str) -> RoleClient:
        """Assume the role and make a client of the session."""
        request: AssumeRoleRequestTypeDef = {
            "RoleArn": role_arn,
            "RoleSessionName": self._config.session_name,
            "DurationSeconds": self._config.session_duration_s,
        }
        if self._config.external_id is not None:
            request["ExternalId"] = self._config.external_id
        answer = self._sts_client().assume_role(**request)
        credentials = answer["Credentials"]
        request_id = answer["ResponseMetadata"]["RequestId"]
        return RoleClient(self._kms(credentials), credentials["Expiration"], request_id)

    def close(self) -> None:
        """Closes the STS client; KMS clients belong to whoever asked for them."""
        if self._sts is not None:
            self._sts.close()

    def _sts_client(self) -> STSClient:
        with self._lock:
            if self._sts is None:
                self._sts = self._boto.client(
                    "sts",
                    endpoint_url=self._config.sts_endpoint_url,
                    verify=self._verify,
                    config=self._boto_config,
                )
            return self._sts

    def _kms(self, credentials: CredentialsTypeDef | None) -> KMSClient:
        with self._lock:
            return self._boto.client(
                "kms",
                endpoint_url=self._config.kms_endpoint_url,
                verify=self._verify,
                config=self._boto_config,
                aws_access_key_id=credentials and credentials["AccessKeyId"],
                aws_secret_access_key=credentials and credentials["SecretAccessKey"],
                aws_session_token=credentials and credentials["SessionToken"],
            )
