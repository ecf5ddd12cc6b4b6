"""Deletes everything below a prefix, as far as the store allows: objects, their old versions, orphans. And says what is
left, and where it could not look.

A store that keeps old versions hides them from `list`, and its `delete` only puts a marker on top of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol, runtime_checkable

from shared.deletion import Deleted, Deletion, ObjectKind, counted
from shared.storage.base import ObjectStore, StoreDeniedError

_BATCH: Final = 1000
_ROUNDS: Final = 3
"""An upload that was given up may still arrive while we delete."""


@runtime_checkable
class KeepsVersions(Protocol):
    """A store that may have old versions of objects."""

    async def delete_versions(self, prefix: str) -> Deletion:
        """Every version of everything below `prefix`, and the markers of what was deleted.

        Raises StoreDeniedError when we may not list versions; what may not be deleted is in the answer.
        """
        ...


async def purge(store: ObjectStore, prefix: str) -> Deletion:
    """Raises StoreUnavailableError, StoreDeniedError; some may be gone then, and calling again is safe."""
    gone = Deletion()
    not_checked: tuple[str, ...] = ()
    for _ in range(_ROUNDS):
        if isinstance(store, KeepsVersions):
            try:
                found = await store.delete_versions(prefix)
            except StoreDeniedError:
                not_checked = ("old versions of objects: the store does not let us list them",)
                found = await _delete_current(store, prefix)
        else:
            found = await _delete_current(store, prefix)
        gone += Deletion(found.deleted)
        if not found.deleted:
            break
    # If it went on arriving to the end, whoever asks again finds out.
    return Deletion(gone.deleted, found.left_objects, found.remains, not_checked)


async def _delete_current(store: ObjectStore, prefix: str) -> Deletion:
    found = [info async for info in store.list(prefix)]
    for batch in _batches([info.key for info in found]):
        await store.delete_many(batch)
    left = {info.key: None async for info in store.list(prefix)}
    gone = counted((ObjectKind.of(info.key), Deleted(1, 0, info.size_bytes)) for info in found if info.key not in left)
    return Deletion(gone, len(left), tuple(f"{key}: it is still listed" for key in list(left)[:4]))


def _batches(keys: list[str]) -> Iterable[list[str]]:
    return (keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH))
