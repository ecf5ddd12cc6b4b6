"""Object store URLs and settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from shared.storage.config import (
    DirectoryLocation,
    MemoryLocation,
    ObjectStoreSettings,
    S3Location,
    open_store,
    parse_location,
)
from shared.storage.local import LocalObjectStore
from shared.storage.memory import MemoryObjectStore


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("memory://", MemoryLocation()),
        ("file:///var/lib/objects", DirectoryLocation(path=Path("/var/lib/objects"))),
        ("file://localhost/with%20space/", DirectoryLocation(path=Path("/with space"))),
        ("s3://bucket", S3Location(bucket="bucket")),
        ("s3://bucket/", S3Location(bucket="bucket")),
        ("s3://my.bucket-1/a/b/", S3Location(bucket="my.bucket-1", prefix="a/b")),
        (
            "s3://bucket/p?endpoint=https://minio:9000&region=eu-central-1&create_bucket=false",
            S3Location(
                bucket="bucket",
                prefix="p",
                endpoint="https://minio:9000",
                region="eu-central-1",
                create_bucket=False,
            ),
        ),
        (
            "s3://bucket?endpoint=http%3A%2F%2F%5B%3A%3A1%5D%3A9000",
            S3Location(bucket="bucket", endpoint="http://[::1]:9000"),
        ),
    ],
)
def test_urls(url: str, location: object) -> None:
    assert parse_location(url) == location


@pytest.mark.parametrize(
    "url",
    [
        "",
        "bucket",
        "/var/lib",
        "http://bucket",
        "file://relative/path",
        "file:relative",
        "file:///a/../b",
        "file:///a?x=1",
        "memory://x",
        "memory:///x",
        "s3://",
        "s3://B",
        "s3://ab",
        "s3://UPPER",
        "s3://bucket/../x",
        "s3://bucket/a//b",
        "s3://bucket?acess_key=x",
        "s3://bucket?endpoint=minio:9000",
        "s3://bucket?endpoint=ftp://minio",
        "s3://bucket?endpoint=http://user:hunter2@minio",
        "s3://bucket?create_bucket=yes",
        "s3://bucket?create_bucket",
        "s3://bucket?region=",
        "s3://bucket#x",
        "s3://key:hunter2@bucket",
    ],
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ObjectStoreSettings(url=url)
    assert "hunter2" not in str(caught.value)


def test_credentials_come_in_pairs_and_only_for_s3() -> None:
    with pytest.raises(ValidationError, match="go together"):
        ObjectStoreSettings(url="s3://bucket", access_key_id=SecretStr("id"))
    with pytest.raises(ValidationError, match="only"):
        ObjectStoreSettings(url="memory://", access_key_id=SecretStr("id"), secret_access_key=SecretStr("k"))
    with pytest.raises(ValidationError):
        ObjectStoreSettings.model_validate({"url": "memory://", "surprise": 1})


def test_secrets_are_not_shown() -> None:
    settings = ObjectStoreSettings(
        url="s3://bucket", access_key_id=SecretStr("AKIAHUNTER2"), secret_access_key=SecretStr("hunter2")
    )
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump_json()}".lower()


async def test_open_store_chooses_the_backend(tmp_path: Path) -> None:
    assert isinstance(await open_store(ObjectStoreSettings(url="memory://")), MemoryObjectStore)
    store = await open_store(ObjectStoreSettings(url=f"file://{tmp_path}/objects"))
    assert isinstance(store, LocalObjectStore)
    await store.close()
