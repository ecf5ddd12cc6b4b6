"""Which object store: settings, and the one place where a backend is chosen.

    file:///var/lib/keylake/objects
    s3://bucket/prefix?region=eu-central-1                         AWS
    s3://bucket?endpoint=https://minio.internal:9000               MinIO and the like
    memory://                                                      tests

Options of an s3 URL: `endpoint`, `region`, `create_bucket` (true or false). Credentials are never part of the URL: URLs
get logged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from shared.errors import InvalidInputError
from shared.storage.base import ObjectStore, check_key
from shared.storage.local import LocalObjectStore
from shared.storage.memory import MemoryObjectStore

_S3_OPTIONS: Final = {"endpoint", "region", "create_bucket"}
_BOOLEANS: Final = {"true": True, "false": False}


class S3Location(BaseModel):
    """The parts of an s3:// URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    prefix: str = ""
    endpoint: str | None = None
    region: str = Field(default="us-east-1", pattern=r"^[a-z0-9-]{1,64}$")
    create_bucket: bool = True


class MemoryLocation(BaseModel):
    """memory://"""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DirectoryLocation(BaseModel):
    """A file:// URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path


Location = S3Location | DirectoryLocation | MemoryLocation


class ObjectStoreSettings(BaseModel):
    """Where sealed objects live."""

    # A rejected URL may hold a password: the error must not repeat it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: str
    """file:///directory, s3://bucket/prefix?endpoint=…&region=…&create_bucket=… or memory://"""
    access_key_id: SecretStr | None = None
    """S3 only. Without it boto3's own chain is asked: environment, profile, instance role."""
    secret_access_key: SecretStr | None = None
    """S3 only."""
    session_token: SecretStr | None = None
    """S3 only, for temporary credentials."""
    ca_bundle: Path | None = None
    """S3 only: PEM file of the CAs that may sign the endpoint's certificate, instead of the system's."""
    connections: int = Field(default=16, ge=1, le=256)
    """Calls in flight at once; each is a thread (and for S3 a connection)."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    """S3 only."""
    read_timeout_s: float = Field(default=30.0, gt=0)
    """S3 only: how long the server may be silent."""
    attempts: int = Field(default=4, ge=1, le=20)
    """S3 only: tries of one call, the first included, when the fault may pass."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        location = parse_location(self.url)
        if (self.access_key_id is None) is not (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key go together")
        if not isinstance(location, S3Location) and (self.access_key_id or self.session_token or self.ca_bundle):
            raise ValueError("credentials and ca_bundle are for s3:// only")
        return self

    @property
    def location(self) -> Location:
        return parse_location(self.url)


def parse_location(url: str) -> Location:
    """Raises ValueError (pydantic's, for bad parts of an s3 URL)."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("no credentials in an object store URL: there are settings for them")
    if parts.fragment:
        raise ValueError("an object store URL has no #fragment")
    options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    if parts.scheme == "s3":
        return _parse_s3(parts.netloc, parts.path, options)
    if options:
        raise ValueError(f"a {parts.scheme}:// URL has no options")
    if parts.scheme == "file":
        path = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or not path.is_absolute() or ".." in path.parts:
            raise ValueError("expected file:///absolute/directory")
        return DirectoryLocation(path=path)
    if parts.scheme == "memory":
        if parts.netloc or parts.path:
            raise ValueError("expected memory://")
        return MemoryLocation()
    raise ValueError("expected an object store URL that starts with file://, s3:// or memory://")


def _parse_s3(bucket: str, path: str, options: dict[str, str]) -> S3Location:
    if unknown := options.keys() - _S3_OPTIONS:
        raise ValueError(f"unknown option in s3:// URL: {', '.join(sorted(unknown))}")
    prefix = path.strip("/")
    if prefix:
        try:
            check_key(prefix)
        except InvalidInputError as error:
            raise ValueError(str(error)) from None
    endpoint = options.get("endpoint")
    if endpoint is not None:
        target = urlsplit(endpoint)
        if target.scheme not in ("http", "https") or not target.hostname or "@" in target.netloc or target.query:
            raise ValueError("endpoint must be http://host:port or https://host:port")
    create_bucket = _BOOLEANS.get(options.get("create_bucket", "true"))
    if create_bucket is None:
        raise ValueError("create_bucket must be true or false")
    return S3Location(
        bucket=bucket,
        prefix=prefix,
        endpoint=endpoint,
        region=options.get("region", "us-east-1"),
        create_bucket=create_bucket,
    )


async def open_store(settings: ObjectStoreSettings) -> ObjectStore:
    """Raises StoreUnavailableError or StoreDeniedError when the store cannot be reached or used."""
    match settings.location:
        case MemoryLocation():
            return MemoryObjectStore()
        case DirectoryLocation(path=path):
            return await LocalObjectStore.open(path, threads=settings.connections)
        case S3Location() as location:
            return await _open_s3(settings, location)


async def _open_s3(settings: ObjectStoreSettings, location: S3Location) -> ObjectStore:
    # Imported late: boto3 costs 0.3 s and 30 MB, which a process with a directory store need not pay.
    from shared.retry import RetryPolicy
    from shared.storage.s3 import S3ObjectStore
    from shared.storage.s3_client import S3Options

    return await S3ObjectStore.open(
        S3Options(
            bucket=location.bucket,
            prefix=location.prefix,
            endpoint=location.endpoint,
            region=location.region,
            access_key_id=settings.access_key_id,
            secret_access_key=settings.secret_access_key,
            session_token=settings.session_token,
            ca_bundle=None if settings.ca_bundle is None else str(settings.ca_bundle),
            create_bucket=location.create_bucket,
            connections=settings.connections,
            connect_timeout_s=settings.connect_timeout_s,
            read_timeout_s=settings.read_timeout_s,
            retry=RetryPolicy(attempts=settings.attempts),
        )
    )
