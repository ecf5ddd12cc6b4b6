"""What a bucket with versioning keeps of objects that were replaced or deleted: the versions below the current one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class OldVersion:
    """Bytes of an object that are not current any more. No marker of a deletion: those hold no bytes."""

    key: str
    version_id: str
    size_bytes: int
    replaced: bool
    """Newer bytes are current; else the object was deleted."""

    def __str__(self) -> str:
        return f"{self.key} version {self.version_id}"


@runtime_checkable
class KeepsOldVersions(Protocol):
    """A store that may have some. Methods raise StoreUnavailableError and StoreDeniedError."""

    def old_versions(self, prefix: str) -> AsyncIterator[OldVersion]:
        """Of everything below `prefix`, in key order, the newest of a key first. What is current is never in it."""
        ...

    async def get_version(self, version: OldVersion) -> bytes:
        """Raises ObjectNotFoundError when it was removed meanwhile."""
        ...

    async def delete_old_versions(self, versions: Sequence[OldVersion]) -> dict[OldVersion, str]:
        """Returns the store's code for each that it would not delete, for example because of a lock. One that is gone
        counts as deleted. Markers stay: without one, what a lock keeps below it would be current again."""
        ...
