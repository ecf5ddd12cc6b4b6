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

import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final, Self, TypeVar

from botocore.exceptions import ClientError

from shared.deletion import Deleted, Deletion, ObjectKind, counted
from shared.retry import retry
from shared.storage.base import (
    Data,
    InvalidKeyError,
    InvalidRangeError,
    ObjectExistsError,
    ObjectInfo,
    ObjectNotFoundError,
    StoreUnavailableError,
    check_key,
    check_prefix,
    check_range,
    check_size,
)
from shared.storage.s3_client import (
    S3Client,
    S3Options,
    body_of,
    ensure_bucket,
    field_of,
    make_client,
    narrow_code,
    narrowed,
    not_found,
    status_of,
)
from shared.storage.threads import BlockingPool
from shared.storage.versions import OldVersion

T = TypeVar("T")

_PUT_ID: Final = "keylake-put-id"
_NAMED_REFUSALS: Final = 4
_DELETE_BATCH_KEYS: Final = 1000
"""What DeleteObjects takes in one call."""


class S3ObjectStore:
    """Made by `open`, which checks that the bucket is there (or creates it)."""

    def __init__(self, options: S3Options, client: S3Client, pool: BlockingPool) -> None:
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
            client = await pool.run(make_client, options)
        except BaseException:
            await pool.close()
            raise
        store = cls(options, client, pool)
        try:
            await store._attempts(lambda _: ensure_bucket(client, options))
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
                if status_of(error) != 412:
                    raise
                if attempt > 0 and self._put_id(where) == put_id:
                    return  # an earlier attempt had succeeded and its reply was lost
                raise ObjectExistsError(f"object {key} exists") from None

        await self._attempts(create)

    async def get(self, key: str) -> bytes:
        where = self._where(key)

        def read(_: int) -> bytes:
            with not_found(key):
                return body_of(self._client.get_object(**where))

        return await self._attempts(read)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        where = self._where(key)
        check_range(start, end)

        def read(_: int) -> bytes:
            try:
                with not_found(key):
                    data = body_of(self._client.get_object(**where, Range=f"bytes={start}-{end - 1}"))
            except ClientError as error:
                if status_of(error) != 416:
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
                return ObjectInfo(key, int(field_of(self._client.head_object(**where), "ContentLength")))
            except ClientError as error:
                if status_of(error) != 404:
                    raise
            # A HEAD has no body that says what is missing, and a lost bucket must not look like a lost object.
            self._client.head_bucket(Bucket=self._bucket)
            raise ObjectNotFoundError(f"no object {key}")

        return await self._attempts(head)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        async for page in self._pages(
            self._client.list_objects_v2, prefix, {"NextContinuationToken": "ContinuationToken"}
        ):
            for entry in page.get("Contents", ()):
                try:
                    key = check_key(entry["Key"].removeprefix(self._prefix))
                except InvalidKeyError:
                    continue  # somebody else's, for example a "folder" made by a console
                yield ObjectInfo(key, int(entry["Size"]))

    async def _pages(
        self, call: Callable[..., dict[str, Any]], prefix: str, goes_on: Mapping[str, str]
    ) -> AsyncIterator[dict[str, Any]]:
        """Of a listing. `goes_on`: fields of a page that say where the next one begins, and how to ask for it."""
        check_prefix(prefix)
        arguments: dict[str, object] = {
            "Bucket": self._bucket,
            "Prefix": self._prefix + prefix,
            "MaxKeys": self._page_objects,
        }

        def list_page(_: int) -> dict[str, Any]:
            page = call(**arguments)
            field_of(page, "IsTruncated")  # else an empty reply would pass for an empty listing
            return page

        while True:
            page = await self._attempts(list_page)
            yield page
            if not page["IsTruncated"]:
                return
            arguments |= {asked: page[told] for told, asked in goes_on.items()}

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
                if entry["IsLatest"]:
                    continue
                try:
                    key = check_key(entry["Key"].removeprefix(self._prefix))
                except InvalidKeyError:
                    continue  # somebody else's, as in `list`
                yield OldVersion(key, str(entry["VersionId"]), int(entry["Size"]), entry["Key"] in there)

    async def get_version(self, version: OldVersion) -> bytes:
        where = self._where(version.key) | {"VersionId": version.version_id}

        def read(_: int) -> bytes:
            with not_found(version.key):
                return body_of(self._client.get_object(**where))

        return await self._attempts(read)

    async def delete_old_versions(self, versions: Sequence[OldVersion]) -> dict[OldVersion, str]:
        found = {(self._prefix + version.key, version.version_id): version for version in versions}
        refused: dict[OldVersion, str] = {}
        async for _, _, errors in self._delete_by_version(found):
            refused |= {found[each]: code for each, code in errors.items()}
        return refused

    async def _version_pages(self, prefix: str) -> AsyncIterator[dict[str, Any]]:
        """Of ListObjectVersions."""
        goes_on = {"NextKeyMarker": "KeyMarker", "NextVersionIdMarker": "VersionIdMarker"}
        async for page in self._pages(self._client.list_object_versions, prefix, goes_on):
            yield page

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
            if isinstance(refusal := narrow_code(200, code), StoreUnavailableError):
                raise refusal
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
            raise narrow_code(200, str(error.get("Code", "")))
        if {entry["Key"] for entry in reply.get("Deleted", ())} != keys:
            raise StoreUnavailableError("object store sent an incomplete reply")

    def _put_id(self, where: dict[str, str]) -> str | None:
        try:
            reply = self._client.head_object(**where)
        except ClientError as error:
            if status_of(error) == 404:
                # Created by somebody and deleted since. It existed, so it was not ours to create.
                return None
            raise
        metadata: dict[str, str] = reply.get("Metadata", {})
        return metadata.get(_PUT_ID)

    async def _attempts(self, call: Callable[[int], T]) -> T:
        """Run `call(attempt number)` in the pool until it answers, under the retry policy."""

        def attempt(number: int) -> T:
            with narrowed():
                return call(number)

        return await retry(
            self._retry,
            lambda number: self._pool.run(attempt, number),
            retryable=lambda error: isinstance(error, StoreUnavailableError),
        )
