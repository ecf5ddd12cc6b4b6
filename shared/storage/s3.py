"""An object store in an S3 bucket: AWS S3, MinIO, Ceph RGW, or anything else with conditional writes.

Why boto3 and not the `minio` SDK: creating an object exactly once needs `PUT` with `If-None-Match: *`. The public
`Minio.put_object` of minio 7.2.20 cannot send it: `helpers.normalize_headers` turns every header that it does not
know into user metadata (`x-amz-meta-if-none-match`), so the condition would be lost in silence; and it uploads objects
above 5 MiB in parts, whose completion it cannot make conditional either. It also retries by itself below its API
(urllib3 Retry), where a lost reply cannot be told from a lost request. boto3 has `IfNoneMatch` in its public API, and
its retries can be switched off.

boto3 blocks, so calls run in a thread pool of the size of its connection pool. Retries are ours (shared.retry), for
faults that may pass: timeouts, broken connections, 5xx, throttling, and 409 ConditionalRequestConflict (a rival's
create is in progress).

A lost reply. When a `put_if_absent` times out, it may have succeeded, and the retry is answered 412 because of *our*
object. So each call marks its object with a random id in the user metadata (`keylake-put-id`, the same for all
attempts of one call), and after an uncertain attempt a 412 is followed by HEAD: our id means that we won. Comparing
contents would not do: two rivals that create the same bytes would both think so. If no attempt gets an answer, the
caller gets StoreUnavailableError and the outcome stays unknown.

What must be true of the server: conditional PUT is atomic (the contract suite races it), listings are consistent and
in key order. S3 directory buckets and s3rver do not qualify.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, Protocol, Self, TypeVar

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
from shared.deletion import Deleted, Deletion, ObjectKind, counted
from shared.retry import RetryPolicy, retry
from shared.storage.base import (
    Data,
    InvalidKeyError,
    InvalidRangeError,
    ObjectExistsError,
    ObjectInfo,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreLacksError,
    StoreUnavailableError,
    check_key,
    check_prefix,
    check_range,
    check_size,
)
from shared.storage.threads import BlockingPool
from shared.storage.versions import OldVersion

T = TypeVar("T")

_PUT_ID: Final = "keylake-put-id"
_DEFAULT_RETRY: Final = RetryPolicy()
_NAMED_REFUSALS: Final = 4
_DELETE_BATCH_KEYS: Final = 1000
"""What DeleteObjects takes in one call."""

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


class _S3Client(Protocol):
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


class S3ObjectStore:
    """Made by `open`, which checks that the bucket is there (or creates it)."""

    def __init__(self, options: S3Options, client: _S3Client, pool: BlockingPool) -> None:
        self._bucket = options.bucket
        self._prefix = check_key(options.prefix) + "/" if options.prefix else ""
        self._page_objects = options.list_page_objects
        self._retry = options.retry
        self._client = client
        self._pool = pool

    @classmethod
    async def open(cls, options: S3Options) -> Self:
        pool = BlockingPool(options.connections, "s3-store")
        try:
            client = await pool.run(_make_client, options)
        except BaseException:
            await pool.close()
            raise
        store = cls(options, client, pool)
        try:
            await store._attempts(lambda _: _ensure_bucket(client, options))
        except BaseException:
            await store.close()
            raise
        return store

    async def put(self, key: str, data: Data) -> None:
        where = self._where(key)
        check_size(data)
        body = bytes(data)
        await self._attempts(lambda _: self._client.put_object(**where, Body=body))

    async def put_if_absent(self, key: str, data: Data) -> None:
        where = self._where(key)
        check_size(data)
        body = bytes(data)
        put_id = secrets.token_hex(16)

        def create(attempt: int) -> None:
            try:
                self._client.put_object(**where, Body=body, IfNoneMatch="*", Metadata={_PUT_ID: put_id})
            except ClientError as error:
                if _status(error) != 412:
                    raise
                if attempt > 0 and self._put_id(where) == put_id:
                    return  # an earlier attempt had succeeded and its reply was lost
                raise ObjectExistsError(f"object {key} exists") from None

        await self._attempts(create)

    async def get(self, key: str) -> bytes:
        where = self._where(key)

        def read(_: int) -> bytes:
            with _not_found(key):
                return _body_of(self._client.get_object(**where))

        return await self._attempts(read)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        where = self._where(key)
        check_range(start, end)

        def read(_: int) -> bytes:
            try:
                with _not_found(key):
                    data = _body_of(self._client.get_object(**where, Range=f"bytes={start}-{end - 1}"))
            except ClientError as error:
                if _status(error) != 416:
                    raise
                data = b""
            # S3 shortens a range that reaches past the end, and refuses only one that starts there. A server that
            # ignores Range would answer with everything: the length tells that, too.
            if len(data) != end - start:
                raise InvalidRangeError(f"range [{start}, {end}) reaches past the end of {key}")
            return data

        return await self._attempts(read)

    async def head(self, key: str) -> ObjectInfo:
        where = self._where(key)

        def head(_: int) -> ObjectInfo:
            try:
                return ObjectInfo(key, int(_field(self._client.head_object(**where), "ContentLength")))
            except ClientError as error:
                if _status(error) != 404:
                    raise
            # A HEAD has no body that says what is missing, and a lost bucket must not look like a lost object.
            self._client.head_bucket(Bucket=self._bucket)
            raise ObjectNotFoundError(f"no object {key}")

        return await self._attempts(head)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        arguments: dict[str, object] = {
            "Bucket": self._bucket,
            "Prefix": self._prefix + prefix,
            "MaxKeys": self._page_objects,
        }

        def list_page(_: int) -> dict[str, Any]:
            page = self._client.list_objects_v2(**arguments)
            _field(page, "IsTruncated")  # else an empty reply would pass for an empty listing
            return page

        while True:
            page = await self._attempts(list_page)
            for entry in page.get("Contents", ()):
                try:
                    key = check_key(entry["Key"].removeprefix(self._prefix))
                except InvalidKeyError:
                    continue  # somebody else's, for example a "folder" made by a console
                yield ObjectInfo(key, int(entry["Size"]))
            if not page["IsTruncated"]:
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    async def delete(self, key: str) -> None:
        where = self._where(key)
        await self._attempts(lambda _: self._client.delete_object(**where))

    async def delete_many(self, keys: Iterable[str]) -> None:
        rest = iter([self._prefix + check_key(key) for key in keys])
        while batch := set(islice(rest, _DELETE_BATCH_KEYS)):
            await self._attempts(partial(self._delete_batch, batch))

    async def delete_versions(self, prefix: str) -> Deletion:
        """See `shared.storage.purge.KeepsVersions`. For buckets with versioning on, suspended or never set; objects
        under a lock stay until it ends, and are in the answer."""
        gone = Deletion()
        refused: list[str] = []
        async for page in self._version_pages(prefix):
            found = {
                (str(entry["Key"]), str(entry["VersionId"])): Deleted(
                    1, int("Size" not in entry or not entry.get("IsLatest")), int(entry.get("Size", 0))
                )
                for entry in (*page.get("Versions", ()), *page.get("DeleteMarkers", ()))
            }
            async for batch, deleted, errors in self._delete_by_version(found):
                gone += Deletion(counted((ObjectKind.of(each[0]), found[each]) for each in batch if each in deleted))
                refused += [
                    f"{key.removeprefix(self._prefix)} version {version}: {code}"
                    for (key, version), code in errors.items()
                ]
        return Deletion(gone.deleted, len(refused), tuple(refused[:_NAMED_REFUSALS]))

    async def old_versions(self, prefix: str) -> AsyncIterator[OldVersion]:
        """See `shared.storage.versions.KeepsOldVersions`, as the next two."""
        there: set[str] = set()
        async for page in self._version_pages(prefix):
            versions = page.get("Versions", ())
            there |= {entry["Key"] for entry in versions if entry["IsLatest"]}  # listed before those below it
            for entry in versions:
                if not entry["IsLatest"]:
                    key = str(entry["Key"])
                    name = key.removeprefix(self._prefix)
                    yield OldVersion(name, str(entry["VersionId"]), int(entry["Size"]), key in there)

    async def get_version(self, version: OldVersion) -> bytes:
        where = self._where(version.key) | {"VersionId": version.version_id}

        def read(_: int) -> bytes:
            with _not_found(version.key):
                return _body_of(self._client.get_object(**where))

        return await self._attempts(read)

    async def delete_old_versions(self, versions: Sequence[OldVersion]) -> dict[OldVersion, str]:
        found = {(self._prefix + version.key, version.version_id): version for version in versions}
        refused: dict[OldVersion, str] = {}
        async for _, _, errors in self._delete_by_version(found):
            refused |= {found[each]: code for each, code in errors.items()}
        return refused

    async def _version_pages(self, prefix: str) -> AsyncIterator[dict[str, Any]]:
        """Of ListObjectVersions."""
        check_prefix(prefix)
        arguments: dict[str, object] = {
            "Bucket": self._bucket,
            "Prefix": self._prefix + prefix,
            "MaxKeys": self._page_objects,
        }

        def list_page(_: int) -> dict[str, Any]:
            page = self._client.list_object_versions(**arguments)
            _field(page, "IsTruncated")  # else an empty reply would pass for an empty listing
            return page

        while True:
            page = await self._attempts(list_page)
            yield page
            if not page["IsTruncated"]:
                return
            arguments["KeyMarker"] = page["NextKeyMarker"]
            arguments["VersionIdMarker"] = page["NextVersionIdMarker"]

    async def _delete_by_version(
        self, versions: Iterable[tuple[str, str]]
    ) -> AsyncIterator[tuple[Sequence[tuple[str, str]], set[tuple[str, str]], dict[tuple[str, str], str]]]:
        """(batch, deleted, code by what was refused), each of (key, version)."""
        rest = iter(versions)
        while batch := tuple(islice(rest, _DELETE_BATCH_KEYS)):
            deleted, errors = await self._attempts(partial(self._delete_version_batch, batch))
            yield batch, deleted, errors

    def _delete_version_batch(
        self, batch: Sequence[tuple[str, str]], _: int
    ) -> tuple[set[tuple[str, str]], dict[tuple[str, str], str]]:
        """Returns what the store says it deleted, and its code for each that it would not delete."""
        reply = self._client.delete_objects(
            Bucket=self._bucket, Delete={"Objects": [{"Key": key, "VersionId": version} for key, version in batch]}
        )
        deleted = {(str(each.get("Key", "")), str(each.get("VersionId", ""))) for each in reply.get("Deleted", ())}
        codes = {
            (str(each.get("Key", "")), str(each.get("VersionId", ""))): str(each.get("Code", ""))
            for each in reply.get("Errors", ())
        }
        errors: dict[tuple[str, str], str] = {}
        for key, version in set(batch) - deleted:
            code = codes.get((key, version), codes.get((key, "")))  # there are servers that do not say which version
            if code is None:
                raise StoreUnavailableError("object store sent an incomplete reply")
            if isinstance(narrowed := _narrow_code(200, code), StoreUnavailableError):
                raise narrowed
            errors[key, version] = code
        return deleted, errors

    async def close(self) -> None:
        if await self._pool.close():
            self._client.close()

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _delete_batch(self, keys: set[str], _: int) -> None:
        reply = self._client.delete_objects(
            Bucket=self._bucket, Delete={"Objects": [{"Key": key} for key in sorted(keys)]}
        )
        for error in reply.get("Errors", ()):
            raise _narrow_code(200, str(error.get("Code", "")))
        if {entry["Key"] for entry in reply.get("Deleted", ())} != keys:
            raise StoreUnavailableError("object store sent an incomplete reply")

    def _put_id(self, where: dict[str, str]) -> str | None:
        try:
            reply = self._client.head_object(**where)
        except ClientError as error:
            if _status(error) == 404:
                # Created by somebody and deleted since. It existed, so it was not ours to create.
                return None
            raise
        metadata: dict[str, str] = reply.get("Metadata", {})
        return metadata.get(_PUT_ID)

    async def _attempts(self, call: Callable[[int], T]) -> T:
        """Run `call(attempt number)` in the pool until it answers, under the retry policy."""

        def narrowed(number: int) -> T:
            with _narrowed():
                return call(number)

        return await retry(
            self._retry,
            lambda number: self._pool.run(narrowed, number),
            retryable=lambda error: isinstance(error, StoreUnavailableError),
        )


def _make_client(options: S3Options) -> _S3Client:
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
        client: _S3Client = boto3.session.Session(botocore_session=new_session()).client(
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


def _ensure_bucket(client: _S3Client, options: S3Options) -> None:
    try:
        client.head_bucket(Bucket=options.bucket)
        return
    except ClientError as error:
        if _status(error) == 403 and not options.create_bucket:
            return  # a key that is good for one prefix may not ask about the bucket; its first call will tell
        if _status(error) != 404 or not options.create_bucket:
            raise
    arguments: dict[str, object] = {"Bucket": options.bucket}
    if options.region != "us-east-1":  # which S3 refuses to hear by name
        arguments["CreateBucketConfiguration"] = {"LocationConstraint": options.region}
    try:
        client.create_bucket(**arguments)
    except ClientError as error:
        # Another of our processes was faster. (Somebody else's bucket of that name: BucketAlreadyExists.)
        if _code(error) != "BucketAlreadyOwnedByYou":
            raise


def _field(reply: dict[str, Any], name: str) -> Any:
    """What every complete reply holds. Python's HTTP parser takes headers cut short by a broken connection for
    complete ones, so a reply may come through with status 200 and nothing else."""
    try:
        return reply[name]
    except KeyError:
        raise StoreUnavailableError("object store sent an incomplete reply") from None


def _body_of(reply: dict[str, Any]) -> bytes:
    body: _Body = reply["Body"]
    try:
        data = body.read()
    finally:
        body.close()
    if len(data) != int(_field(reply, "ContentLength")):
        raise StoreUnavailableError("object store sent an incomplete reply")
    return data


def _reveal(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _not_found(key: str) -> Iterator[None]:
    """404 NoSuchKey → ObjectNotFoundError; a missing bucket is another matter."""
    try:
        yield
    except ClientError as error:
        if _code(error) in ("NoSuchKey", "NoSuchVersion"):
            raise ObjectNotFoundError(f"no object {key}") from None
        raise


@contextmanager
def _narrowed() -> Iterator[None]:
    """botocore's errors → ours. Messages hold status and code only, not the server's text, URL or key id."""
    try:
        yield
    except ClientError as error:
        raise _narrow_code(_status(error), _code(error)) from error
    except _NO_ANSWER as error:
        raise StoreUnavailableError(f"object store did not answer ({type(error).__name__})") from error
    except BotoCoreError as error:  # no credentials, bad endpoint, bad parameters
        raise StoreDeniedError(f"object store cannot be used ({type(error).__name__})") from error


def _narrow_code(status: int, code: str) -> StoreUnavailableError | StoreDeniedError:
    shown = code if re.fullmatch(r"[A-Za-z0-9]{1,64}", code) else "no code"
    if status == 501 or code == "NotImplemented":
        return StoreLacksError(f"object store lacks this: {status} {shown}")
    if status >= 500 or status == 429 or code in _PASSING_CODES:
        return StoreUnavailableError(f"object store answered {status} {shown}")
    return StoreDeniedError(f"object store refused: {status} {shown}")
