"""How a timeline goes: in steps, so that whoever dies when, it is there as a whole or does not exist.

    a mark in the next slot of the index  →  everything else  →  its entry in the ancestor's index  →  the mark

The mark stands for "no such timeline". It is put like any version of the index (remote_timeline.py), so a writer that
is still alive is fenced by it; and it is deleted last, so whoever finds it knows what is to be finished. It names the
ancestor, as the index, which is gone by then, did. Both are public, and it is not sealed: timelines are deleted without
keys, too. Whoever writes to the object store can put one; they can delete everything as well. docs/formats/index.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from pageserver.remote_timeline import ENVELOPE_SUFFIX, GONE, VOID, list_slots, slot_name
from shared.errors import CorruptedError
from shared.failpoints import failpoint
from shared.ids import ProjectId, TimelineId
from shared.storage.base import ObjectExistsError, ObjectNotFoundError, ObjectStore


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands in the slot of a timeline that is deleted. `ancestor`: whose index lists it, if it is a branch."""

    ancestor: tuple[ProjectId, TimelineId] | None

    def serialize(self) -> bytes:
        return GONE + "/".join(str(part) for part in self.ancestor or ()).encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises CorruptedError."""
        names = data[len(GONE) :]
        if not data.startswith(GONE):
            raise CorruptedError("not the mark of a deleted timeline")
        if not names:
            return cls(None)
        try:
            project_id, _, timeline_id = names.decode("ascii").partition("/")
            return cls((ProjectId.parse(project_id), TimelineId.parse(timeline_id)))
        except ValueError:
            raise CorruptedError("the mark of a deleted timeline is malformed") from None


class Removal:
    """Of one timeline that nobody in this process has open. What the object store raises, all methods raise; each may
    then be called again."""

    def __init__(self, store: ObjectStore, project_id: ProjectId, timeline_id: TimelineId) -> None:
        self._store = store
        self.prefix: Final = f"projects/{project_id}/timelines/{timeline_id}/"
        self._slot_prefix: Final = f"{self.prefix}index/"

    async def begun(self) -> Mark | None:
        """The mark, if that is the newest version of the index. Raises IntegrityError."""
        found = await self._newest()
        return None if found is None else found[1]

    async def begin(self, mark: Mark) -> None:
        """From here on the timeline does not exist. One that no index lists does not need a mark."""
        while True:
            filled, begun = await self._slots()
            if not filled | begun:
                return
            newest = max(filled | begun)
            slot = newest + 1 if newest in filled else newest
            try:
                await self._store.put_if_absent(self._slot_prefix + slot_name(slot), mark.serialize())
            except ObjectExistsError:
                continue  # another writer was faster, with its last version
            failpoint("removal-marked")
            return

    async def remove_objects(self) -> None:
        """All but the mark. Versions of the index oldest first, as writers delete them."""
        found = await self._newest()
        marked = set() if found is None else {found[0]}
        filled, begun = await self._slots()
        for slot in sorted(filled | begun):
            key = self._slot_prefix + slot_name(slot)
            await self._store.delete_many([key + ENVELOPE_SUFFIX] if slot in marked else [key, key + ENVELOPE_SUFFIX])
        failpoint("removal-index-deleted")
        kept = {self._slot_prefix + slot_name(slot) for slot in marked}
        left = [info.key async for info in self._store.list(self.prefix)]
        await self._store.delete_many(key for key in left if key not in kept)
        failpoint("removal-objects-deleted")

    async def end(self) -> None:
        """Delete the mark."""
        found = await self._newest()
        if found is not None:
            failpoint("removal-before-end")
            await self._store.delete(self._slot_prefix + slot_name(found[0]))

    async def _slots(self) -> tuple[set[int], set[int]]:
        return await list_slots(self._store, self._slot_prefix, strict=False)

    async def _newest(self) -> tuple[int, Mark] | None:
        """The newest version of the index with its slot, if it is a mark."""
        filled, _ = await self._slots()
        for slot in sorted(filled, reverse=True):
            try:
                content = await self._store.get(self._slot_prefix + slot_name(slot))
            except ObjectNotFoundError:
                return None  # somebody else has just finished
            if content != VOID:
                return (slot, Mark.parse(content)) if content.startswith(GONE) else None
        return None
