"""Deleting everything below a prefix: old versions, what is hidden under delete markers, and what a lock keeps."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from shared.deletion import Deleted, ObjectKind
from shared.storage.base import ObjectInfo, StoreDeniedError
from shared.storage.config import open_store
from shared.storage.local import LocalObjectStore
from shared.storage.purge import KeepsVersions, purge
from shared.storage.s3 import S3ObjectStore

if TYPE_CHECKING:
    from tests.fixtures.s3 import S3Server

pytestmark = pytest.mark.integration


@asynccontextmanager
async def versioned(s3_server: S3Server, **options: Any) -> AsyncIterator[tuple[S3ObjectStore, Any, str]]:
    """A store on a bucket with versioning, and the bucket's owner."""
    assert urlsplit(s3_server.endpoint).hostname == "127.0.0.1"
    with s3_server.versioned_bucket(**options) as (owner, bucket):
        store = await open_store(s3_server.settings(bucket, "keylake"))
        assert isinstance(store, S3ObjectStore)
        try:
            yield store, owner, bucket
        finally:
            await store.close()


def versions(owner: Any, bucket: str) -> list[str]:
    page = owner.list_object_versions(Bucket=bucket)
    return sorted(entry["Key"] for entry in (*page.get("Versions", ()), *page.get("DeleteMarkers", ())))


async def keys(store: S3ObjectStore | LocalObjectStore) -> list[ObjectInfo]:
    return [info async for info in store.list()]


async def test_old_versions_and_what_was_deleted_before_go_too(s3_server: S3Server) -> None:
    async with versioned(s3_server) as (store, owner, bucket):
        for number in range(3):
            await store.put("projects/a/index", bytes(10 + number))
        await store.put("projects/a/layers/gone", bytes(5))
        await store.delete("projects/a/layers/gone")
        await store.put("projects/ab/other", bytes(7))
        assert len(versions(owner, bucket)) == 6, "and one marker"
        done = await purge(store, "projects/a/")
        assert versions(owner, bucket) == ["keylake/projects/ab/other"]
        assert done.deleted == {ObjectKind.OTHER: Deleted(3, 2, 10 + 11 + 12), ObjectKind.LAYER: Deleted(2, 2, 5)}
        assert (done.left_objects, done.remains, done.not_checked) == (0, (), ())
        again = await purge(store, "projects/a/")
        assert (again.deleted, again.left_objects) == ({}, 0)


async def test_what_a_lock_keeps_is_named(s3_server: S3Server) -> None:
    async with versioned(s3_server, ObjectLockEnabledForBucket=True) as (store, owner, bucket):
        await store.put("projects/a/free", b"1")
        owner.put_object(
            Bucket=bucket,
            Key="keylake/projects/a/locked",
            Body=b"2",
            ObjectLockMode="COMPLIANCE",
            ObjectLockRetainUntilDate=dt.datetime.now(dt.UTC) + dt.timedelta(days=1),
        )
        done = await purge(store, "projects/a/")
        assert (done.total.objects, done.left_objects) == (1, 1)
        [named] = done.remains
        assert named.startswith("projects/a/locked version ")
        assert "AccessDenied" in named


class Blind:
    """A store whose owner does not let us list versions."""

    def __init__(self, inner: LocalObjectStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def delete_versions(self, prefix: str) -> Any:
        raise StoreDeniedError(f"object store refused: 403 AccessDenied {prefix}")


async def test_without_the_right_to_see_versions_that_is_said(tmp_path: Path) -> None:
    inner = await LocalObjectStore.open(tmp_path / "objects")
    try:
        await inner.put("projects/a/x", bytes(4))
        await inner.put("projects/b/x", bytes(4))
        assert not isinstance(inner, KeepsVersions)
        blind: Any = Blind(inner)
        done = await purge(blind, "projects/a/")
        assert (done.deleted, done.left_objects) == ({ObjectKind.OTHER: Deleted(1, 0, 4)}, 0)
        assert [text.startswith("old versions") for text in done.not_checked] == [True]
        assert (await purge(inner, "projects/b/")).not_checked == ()
        assert await keys(inner) == []
    finally:
        await inner.close()
