"""How S3 is spoken to: boto3's client, what of it is used, and its errors as those of an object store.

Messages hold status and code only: not the server's text, its URL or a key id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.exceptions import ConnectionError as BotocoreConnectionError
from botocore.parsers import ResponseParserError
from pydantic import SecretStr

from shared.botocore_session import new_session
from shared.retry import RetryPolicy
from shared.storage.base import ObjectNotFoundError, StoreDeniedError, StoreLacksError, StoreUnavailableError

_DEFAULT_RETRY: Final = RetryPolicy()

_PASSING_CODES: Final = {
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "InternalError",
    "ServiceUnavailable",
    "ConditionalRequestConflict",
    "OperationAborted",
}

_NO_ANSWER: Final = (
    HTTPClientError,  # timeouts, broken connections
    BotocoreConnectionError,  # refused connections, TLS
    IncompleteReadError,
    ResponseParserError,
    ValueError,  # botocore's parsers, for a header or an element that was cut in the middle
)


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where and how. Without credentials boto3's own chain is asked (environment, profile, instance role)."""

    bucket: str
    prefix: str = ""
    """Prepended to every key, with a slash; a valid key itself, or empty."""
    endpoint: str | None = None
    """None: AWS."""
    region: str = "us-east-1"
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None
    ca_bundle: str | None = None
    """PEM file of the CAs to trust instead of the system's."""
    create_bucket: bool = True
    connections: int = 16
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    """Without a byte from the server."""
    list_page_objects: int = 1000
    retry: RetryPolicy = _DEFAULT_RETRY


class _Body(Protocol):
    def read(self) -> bytes: ...

    def close(self) -> None: ...


class S3Client(Protocol):
    """The part of boto3's S3 client that is used here; its methods are made at run time and have no types."""

    def put_object(self, **arguments: object) -> dict[str, Any]: ...

    def get_object(self, **arguments: object) -> dict[str, Any]: ...

    def head_object(self, **arguments: object) -> dict[str, Any]: ...

    def delete_object(self, **arguments: object) -> dict[str, Any]: ...

    def delete_objects(self, **arguments: object) -> dict[str, Any]: ...

    def list_objects_v2(self, **arguments: object) -> dict[str, Any]: ...

    def list_object_versions(self, **arguments: object) -> dict[str, Any]: ...

    def head_bucket(self, **arguments: object) -> dict[str, Any]: ...

    def create_bucket(self, **arguments: object) -> dict[str, Any]: ...

    def close(self) -> None: ...


def make_client(options: S3Options) -> S3Client:
    config = Config(
        region_name=options.region,
        signature_version="s3v4",
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=options.connections,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path" if options.endpoint else "auto"},
        # The default (a CRC in a trailer of a chunked body) is refused by several S3-compatible servers. Nothing is
        # lost: TLS protects the way, the payload hash is signed without TLS, and every object is sealed.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        client: S3Client = boto3.session.Session(botocore_session=new_session()).client(
            "s3",
            region_name=options.region,
            endpoint_url=options.endpoint,
            aws_access_key_id=_reveal(options.access_key_id),
            aws_secret_access_key=_reveal(options.secret_access_key),
            aws_session_token=_reveal(options.session_token),
            verify=options.ca_bundle,
            config=config,
        )
    except (BotoCoreError, ValueError, OSError) as error:  # profile, endpoint, CA bundle
        raise StoreDeniedError(f"object store is misconfigured ({type(error).__name__})") from error
    return client


def ensure_bucket(client: S3Client, options: S3Options) -> None:
    try:
        client.head_bucket(Bucket=options.bucket)
        return
    except ClientError as error:
        if status_of(error) == 403 and not options.create_bucket:
            return  # a key that is good for one prefix may not ask about the bucket; its first call will tell
        if status_of(error) != 404 or not options.create_bucket:
            raise
    arguments: dict[str, object] = {"Bucket": options.bucket}
    if options.region != "us-east-1":  # which S3 refuses to hear by name
        arguments["CreateBucketConfiguration"] = {"LocationConstraint": options.region}
    try:
        client.create_bucket(**arguments)
    except ClientError as error:
        # Another of our processes was faster. (Somebody else's bucket of that name: BucketAlreadyExists.)
        if code_of(error) != "BucketAlreadyOwnedByYou":
            raise


def field_of(reply: dict[str, Any], name: str) -> Any:
    """What every complete reply holds. Python's HTTP parser takes headers cut short by a broken connection for
    complete ones, so a reply may come through with status 200 and nothing else."""
    try:
        return reply[name]
    except KeyError:
        raise StoreUnavailableError("object store sent an incomplete reply") from None


def body_of(reply: dict[str, Any]) -> bytes:
    body: _Body = reply["Body"]
    try:
        data = body.read()
    finally:
        body.close()
    if len(data) != int(field_of(reply, "ContentLength")):
        raise StoreUnavailableError("object store sent an incomplete reply")
    return data


def _reveal(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def not_found(key: str) -> Iterator[None]:
    """404 NoSuchKey → ObjectNotFoundError; a missing bucket is another matter."""
    try:
        yield
    except ClientError as error:
        if code_of(error) in ("NoSuchKey", "NoSuchVersion"):
            raise ObjectNotFoundError(f"no object {key}") from None
        raise


@contextmanager
def narrowed() -> Iterator[None]:
    """botocore's errors → ours. Messages hold status and code only, not the server's text, URL or key id."""
    try:
        yield
    except ClientError as error:
        raise narrow_code(status_of(error), code_of(error)) from error
    except _NO_ANSWER as error:
        raise StoreUnavailableError(f"object store did not answer ({type(error).__name__})") from error
    except BotoCoreError as error:  # no credentials, bad endpoint, bad parameters
        raise StoreDeniedError(f"object store cannot be used ({type(error).__name__})") from error


def narrow_code(status: int, code: str) -> StoreUnavailableError | StoreDeniedError:
    shown = code if re.fullmatch(r"[A-Za-z0-9]{1,64}", code) else "no code"
    if status == 501 or code == "NotImplemented":
        return StoreLacksError(f"object store lacks this: {status} {shown}")
    if status >= 500 or status == 429 or code in _PASSING_CODES:
        return StoreUnavailableError(f"object store answered {status} {shown}")
    return StoreDeniedError(f"object store refused: {status} {shown}")
