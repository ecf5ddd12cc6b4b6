"""The object store protocol, its key grammar and its errors. Backends: memory, local, s3; one contract suite for all.

Keys are made of ids, LSNs and fixed words, never of user text. An object is immutable once written unless a caller
overwrites it with `put`. Everything stored is sealed before it gets here: the store is not trusted with plaintext.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from shared.errors import (
    ConflictError,
    InvalidInputError,
    KeylakeError,
    NotFoundError,
    UnavailableError,
)

KEY_LENGTH_MAX_BYTES: Final = 512
SEGMENT_LENGTH_MAX_BYTES: Final = 200
"""A key's part between slashes is a file name in the local backend (NAME_MAX is 255)."""

OBJECT_SIZE_MAX_BYTES: Final = 1 << 30
"""Far below the 5 GiB that S3 takes in one PUT: no multipart uploads, so that every create can be conditional."""

Data = bytes | bytearray | memoryview

_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_PREFIX_CHARACTERS: Final = re.compile(r"[A-Za-z0-9._/-]*", re.ASCII)


class ObjectNotFoundError(NotFoundError):
    """No object under that key."""


class ObjectExistsError(ConflictError):
    """`put_if_absent` lost: somebody else's object is there."""


class StoreUnavailableError(UnavailableError):
    """The store did not answer, or said "later". After a write: it may or may not have taken effect."""


class StoreDeniedError(KeylakeError):
    """The store refuses us: credentials, permissions, a missing bucket, a read-only disk. Retrying does not help."""

    http_status = 502
    code = "store_denied"


class StoreLacksError(StoreDeniedError):
    """The server has no such operation (501 NotImplemented)."""


class StoreFailedError(StoreDeniedError):
    """The disk did not make durable what the store had written. Nobody knows what is on it: from then on this store
    writes nothing, until it is opened anew."""

    code = "store_failed"


class InvalidKeyError(InvalidInputError):
    """The key or prefix is outside the grammar; nothing was sent."""


class InvalidRangeError(InvalidInputError):
    """The range is empty, reversed, negative or reaches past the end of the object."""


class ObjectTooLargeError(InvalidInputError):
    """Larger than OBJECT_SIZE_MAX_BYTES; nothing was sent."""


@dataclass(frozen=True, slots=True, order=True)
class ObjectInfo:
    key: str
    size_bytes: int


class ObjectStore(Protocol):
    """All methods may raise StoreUnavailableError (retry later) and StoreDeniedError (do not).

    A cancelled write may still take effect, like one that ended in StoreUnavailableError.
    A write that returned is durable and visible to every later read and list, from any process: what S3 (since
    December 2020) and MinIO promise. A store that lists late is not supported: timelines and layers that are not listed
    are taken for absent. Where a late listing would let one writer delete what another relies on, single objects are
    looked at besides (pageserver/remote_timeline.py).
    """

    async def put(self, key: str, data: Data) -> None:
        """Create or replace. Readers see the old object or the new one, never a mixture.

        `data` must not change until the call returns. On a store with retries a delayed duplicate of this write
        may land later than a newer `put` of the same key: state that must not go back belongs in
        `put_if_absent` under a new key.
        """
        ...

    async def put_if_absent(self, key: str, data: Data) -> None:
        """Create. Of any number of concurrent callers exactly one returns.

        Raises ObjectExistsError when the key is taken (the object is untouched, and durable).
        After StoreUnavailableError the caller may call again with the same data only if it can tell its own
        object from a rival's.
        """
        ...

    async def get(self, key: str) -> bytes:
        """Raises ObjectNotFoundError."""
        ...

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end), with 0 <= start < end <= size.

        Never fewer: a range past the end of the object raises InvalidRangeError. Raises ObjectNotFoundError.
        """
        ...

    async def head(self, key: str) -> ObjectInfo:
        """Raises ObjectNotFoundError."""
        ...

    def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, in key order (byte order).

        `prefix` is any beginning of a key, not only a folder. Objects created or deleted while the listing runs
        may or may not appear; all others appear exactly once.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove; nothing happens when there is no such object."""
        ...

    async def delete_many(self, keys: Iterable[str]) -> None:
        """Remove all of them. After an error some may be gone; calling again is safe."""
        ...

    async def close(self) -> None:
        """Wait for running calls and release threads and connections. Idempotent. The store is dead afterwards:
        every method raises RuntimeError."""
        ...


def check_key(key: str) -> str:
    """Return `key` if it is `segment(/segment)*`, with segments of [A-Za-z0-9._-] other than "." and "..".

    Raises InvalidKeyError, without repeating the key.
    """
    if len(key) > KEY_LENGTH_MAX_BYTES:
        raise InvalidKeyError(f"object key longer than {KEY_LENGTH_MAX_BYTES} bytes")
    for segment in key.split("/"):
        if not _SEGMENT.fullmatch(segment):
            raise InvalidKeyError("object key has an empty part or a character outside A-Z a-z 0-9 . _ - /")
        if segment in (".", "..") or len(segment) > SEGMENT_LENGTH_MAX_BYTES:
            raise InvalidKeyError(f"object key has a part that is '.', '..' or over {SEGMENT_LENGTH_MAX_BYTES} bytes")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if some valid key can start with it. Raises InvalidKeyError."""
    if len(prefix) > KEY_LENGTH_MAX_BYTES or not _PREFIX_CHARACTERS.fullmatch(prefix):
        raise InvalidKeyError("object key prefix is too long or has a character outside A-Z a-z 0-9 . _ - /")
    # Every finished part must be good; the last one may go on, so "." and ".." are good beginnings there.
    *finished, last = prefix.split("/")
    if finished:
        check_key("/".join(finished))
    if len(last) > SEGMENT_LENGTH_MAX_BYTES:
        raise InvalidKeyError(f"object key prefix has a part over {SEGMENT_LENGTH_MAX_BYTES} bytes")
    return prefix


def check_range(start: int, end: int) -> None:
    """Raises InvalidRangeError unless 0 <= start < end."""
    if not 0 <= start < end:
        raise InvalidRangeError(f"not a byte range: [{start}, {end})")


def check_size(data: Data) -> None:
    """Raises ObjectTooLargeError."""
    size_bytes = data.nbytes if isinstance(data, memoryview) else len(data)
    if size_bytes > OBJECT_SIZE_MAX_BYTES:
        raise ObjectTooLargeError(f"object of {size_bytes} bytes is over the limit of {OBJECT_SIZE_MAX_BYTES}")
