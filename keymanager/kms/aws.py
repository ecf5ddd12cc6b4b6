"""AWS KMS through boto3, as a role of the customer's account.

The vendor's own identity assumes the role with the customer's external id. The session is cached, renewed before it
expires, and renewed once when the KMS says that it is no good any more; only the second refusal is a verdict.

Decrypt always names the key. Without it KMS would use whichever key the ciphertext names: a blob swapped for one of
another key, still alive, would make a destroyed key look alive.

Limits of Python: boto3 hands the plaintext over as immutable bytes (and the JSON and base64 text they came in), which
cannot be wiped; they are dropped at once and only the SecretKey is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

import botocore.exceptions as boto_errors
from botocore.parsers import ResponseParserError

from keymanager.kms.aws_clients import AwsClients, AwsKmsConfig, RoleClient
from keymanager.kms.aws_verdicts import ASSUME_ROLE, CREDENTIALS_ENDED, classify, missing_permission
from keymanager.kms.base import (
    Classification,
    Destruction,
    GeneratedKek,
    Hold,
    KeyDescription,
    KeyState,
    KmsCallObserver,
    KmsError,
    Verdict,
    WrappedKek,
    destruction_by_absence,
)
from keymanager.kms.calls import Answer, KmsCalls, require_read_back
from keymanager.kms.sessions import Sessions
from shared.clock import Clock
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

__all__ = ["AwsKms", "AwsKmsConfig"]

T = TypeVar("T")

UNKNOWN_VERSION: Final = "unknown"
"""Key version of answers that do not name one (KMS names its key material since 2025)."""
_MAX_BLOB_SIZE_BYTES: Final = 6144
_KEY_STATES: Final = {
    "Enabled": KeyState.ENABLED,
    "Disabled": KeyState.DISABLED,
    "PendingDeletion": KeyState.PENDING_DELETION,
}


class AwsKms:
    """KmsProvider for AWS. Belongs to one event loop."""

    def __init__(
        self, config: AwsKmsConfig, *, observer: KmsCallObserver | None = None, clock: Clock | None = None
    ) -> None:
        """Makes no call. `observer` hears of every request, those to STS included."""
        self._config = config
        self._calls = KmsCalls(
            "aws-kms",
            _judge,
            config.limits,
            observer=observer,
            clock=clock,
        )
        self._clients = AwsClients(config)
        self._sessions = Sessions(self._open_session, self._calls.clock)

    # ── what a provider does ───────────────────────────────────────────────────────────────────────────────────

    async def generate_kek(self, context: EncryptionContext) -> GeneratedKek:
        def call(client: KMSClient) -> Answer[GeneratedKek]:
            answer = client.generate_data_key(
                KeyId=self._config.key_id, KeySpec="AES_256", EncryptionContext=dict(context.pairs)
            )
            kek = GeneratedKek(SecretKey(answer["Plaintext"]), answer["CiphertextBlob"], _version(answer))
            return Answer(kek, _request_id(answer), kek.key_version)

        return await self._call("GenerateDataKey", call)

    async def wrap(self, secret: SecretKey, context: EncryptionContext) -> WrappedKek:
        """Two calls: Encrypt does not say which key material it used, Decrypt does; and what does not open again
        must not be stored."""

        def encrypt(client: KMSClient) -> Answer[bytes]:
            # boto3 takes no memoryview: this copy lives until the request is sent.
            answer = client.encrypt(
                KeyId=self._config.key_id, Plaintext=secret.copied(), EncryptionContext=dict(context.pairs)
            )
            return Answer(answer["CiphertextBlob"], _request_id(answer), None)

        wrapped = await self._call("Encrypt", encrypt)
        opened = await self._decrypt(wrapped, context)
        require_read_back("Encrypt", opened.value, secret)
        return WrappedKek(wrapped, opened.key_version or UNKNOWN_VERSION)

    async def unwrap(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        return (await self._decrypt(wrapped, context)).value

    async def rewrap(self, wrapped: bytes, context: EncryptionContext, hold: Hold | None = None) -> WrappedKek:
        """One ReEncrypt: the plaintext does not leave the KMS. Needs kms:ReEncryptFrom and kms:ReEncryptTo."""
        _refuse_impossible_blob("ReEncrypt", wrapped)

        def call(client: KMSClient) -> Answer[WrappedKek]:
            answer = client.re_encrypt(
                CiphertextBlob=wrapped,
                SourceKeyId=self._config.key_id,
                DestinationKeyId=self._config.key_id,
                SourceEncryptionContext=dict(context.pairs),
                DestinationEncryptionContext=dict(context.pairs),
            )
            version = answer.get("DestinationKeyMaterialId", UNKNOWN_VERSION)
            return Answer(WrappedKek(answer["CiphertextBlob"], version), _request_id(answer), version)

        return await self._call("ReEncrypt", call)

    async def describe(self) -> KeyDescription:
        def call(client: KMSClient) -> Answer[KeyDescription]:
            answer = client.describe_key(KeyId=self._config.key_id)
            metadata = answer["KeyMetadata"]
            version = metadata.get("CurrentKeyMaterialId")
            description = KeyDescription(
                key_id=metadata["Arn"],
                state=_KEY_STATES.get(metadata["KeyState"], KeyState.OTHER),
                key_version=version,
                deletion_date=metadata.get("DeletionDate"),
            )
            return Answer(description, _request_id(answer), version)

        return await self._call("DescribeKey", call)

    async def destruction(self) -> Destruction:
        return await destruction_by_absence(self)

    async def aclose(self) -> None:
        await self._calls.aclose()
        if (session := self._sessions.held) is not None:
            session.value.close()
        self._clients.close()

    async def _decrypt(self, wrapped: bytes, context: EncryptionContext) -> Answer[SecretKey]:
        _refuse_impossible_blob("Decrypt", wrapped)

        def call(client: KMSClient) -> Answer[Answer[SecretKey]]:
            answer = client.decrypt(
                KeyId=self._config.key_id, CiphertextBlob=wrapped, EncryptionContext=dict(context.pairs)
            )
            version = _version(answer)
            opened = Answer(SecretKey(answer["Plaintext"]), _request_id(answer), version)
            return Answer(opened, opened.request_id, version)

        return await self._call("Decrypt", call)

    # ── calls ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _call(self, operation: str, call: Callable[[KMSClient], Answer[T]]) -> T:
        """Raises KmsError and nothing else. A session that has ended is replaced once."""

        async def attempt(client: KMSClient) -> T:
            return await self._calls.attempt(operation, lambda: call(client))

        ended = CREDENTIALS_ENDED if self._config.role_arn is not None else ()
        return await self._calls.in_time(operation, lambda: self._sessions.use(attempt, ended))

    async def _open_session(self) -> tuple[KMSClient, datetime | None]:
        """A client with the credentials of a role session, or with our own, whose expiry boto3 looks after."""
        role_arn = self._config.role_arn
        if role_arn is None:
            return await self._calls.attempt("CreateClient", lambda: Answer(self._clients.own_kms(), None, None)), None

        def assume_role() -> Answer[RoleClient]:
            role = self._clients.role_kms(role_arn)
            return Answer(role, role.request_id, None)

        role = await self._calls.attempt(ASSUME_ROLE, assume_role)
        return role.client, role.expires_at


def _judge(operation: str, error: Exception) -> KmsError | None:
    match error:
        case boto_errors.ClientError():
            metadata = error.response.get("ResponseMetadata", {})
            detail = error.response.get("Error", {})
            code, status = detail.get("Code", ""), metadata.get("HTTPStatusCode", 0)
            message = detail.get("Message", "")
            return KmsError(
                classify(operation, code, status, message),
                operation=operation,
                provider_code=code or f"HTTP {status}",
                request_id=metadata.get("RequestId"),
                permission=missing_permission(message),
            )
        case boto_errors.HTTPClientError() | boto_errors.ConnectionError() | ResponseParserError():
            # Timeouts, refused and reset connections, TLS, proxies. The last: an answer not in the service's own
            # format, so from something in between: a gateway's 502 page.
            verdict = Verdict.UNREACHABLE
        case boto_errors.BotoCoreError() | KeyError() | ValueError():
            # Our own configuration or credentials, or an answer that is none. KeyError and ValueError: members of the
            # answer that are missing, or a key of another size.
            verdict = Verdict.AMBIGUOUS
        case _:
            return None
    return KmsError(Classification(verdict), operation=operation, provider_code=type(error).__name__)


def _request_id(answer: Mapping[str, Any]) -> str | None:
    request_id: str | None = answer.get("ResponseMetadata", {}).get("RequestId")
    return request_id


def _version(answer: Mapping[str, Any]) -> str:
    version: str = answer.get("KeyMaterialId", UNKNOWN_VERSION)
    return version


def _refuse_impossible_blob(operation: str, wrapped: bytes) -> None:
    """A blob that KMS's own limits exclude is a damaged one; asking would only earn a validation error."""
    if not 1 <= len(wrapped) <= _MAX_BLOB_SIZE_BYTES:
        raise KmsError(Classification(Verdict.CORRUPT), operation=operation, provider_code="ImpossibleBlobSize")
