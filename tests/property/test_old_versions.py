"""Any history of a bucket with versioning, against what the bucket holds: what is counted, what goes, what stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from hypothesis import example, given
from hypothesis import strategies as st

from shared.crypto.envelope import Envelope
from shared.ids import KekId, TimelineId
from shared.key_upkeep import UseCounter
from shared.old_versions import OldVersions
from shared.storage.base import Data, ObjectNotFoundError
from shared.storage.memory import MemoryObjectStore
from shared.storage.versions import OldVersion

TIMELINE = TimelineId.new()
PREFIX = "projects/p/timelines/"
KEK = KekId.new()


def envelope(kek_version: int, dek_version: int) -> bytes:
    made_under = None if dek_version == kek_version else dek_version
    return Envelope(KEK, kek_version, bytes(12), bytes(48), bytes(32), made_under).serialize()


class Bucket(MemoryObjectStore):
    """A history of (version id, bytes; None for a marker) for each key, the newest last; and what is locked."""

    def __init__(self) -> None:
        super().__init__()
        self.histories: dict[str, list[tuple[str, bytes | None]]] = {}
        self.locked: set[str] = set()
        self._made = 0

    async def put(self, key: str, data: Data) -> None:
        self._add(key, bytes(data))

    async def delete(self, key: str) -> None:
        self._add(key, None)

    def _add(self, key: str, data: bytes | None) -> None:
        self._made += 1
        self.histories.setdefault(key, []).append((f"v{self._made}", data))

    async def old_versions(self, prefix: str) -> AsyncIterator[OldVersion]:
        for key, history in sorted(self.histories.items()):
            for version_id, data in reversed(history[:-1]):
                if key.startswith(prefix) and data is not None:
                    yield OldVersion(key, version_id, len(data), history[-1][1] is not None)

    async def get_version(self, version: OldVersion) -> bytes:
        for version_id, data in self.histories[version.key]:
            if version_id == version.version_id and data is not None:
                return data
        raise ObjectNotFoundError(version.key)

    async def delete_old_versions(self, versions: Sequence[OldVersion]) -> dict[OldVersion, str]:
        for version in versions:
            history = self.histories[version.key]
            assert history[-1][0] != version.version_id, "what is current is never deleted by its version"
            if version.version_id not in self.locked:
                history[:] = [each for each in history if each[0] != version.version_id]
        return {version: "AccessDenied" for version in versions if version.version_id in self.locked}

    def old(self) -> set[tuple[str, str]]:
        """(key, version id) of all bytes that are not current."""
        return {(key, v) for key, history in self.histories.items() for v, data in history[:-1] if data is not None}

    def current(self) -> dict[str, bytes]:
        return {key: data for key, history in self.histories.items() if (data := history[-1][1]) is not None}


@dataclass
class History:
    """What a storage node does to its bucket. Each object has a name of its own and one DEK."""

    bucket: Bucket = field(default_factory=Bucket)
    kek_version: int = 1
    made: dict[str, int] = field(default_factory=dict)
    """Object that is there → its DEK's version."""
    deks: dict[str, int] = field(default_factory=dict)
    """The same of every object there ever was."""

    async def put(self) -> None:
        name = f"{PREFIX}{TIMELINE}/layers/{len(self.deks)}"
        self.made[name] = self.deks[name] = self.kek_version
        await self.bucket.put(f"{name}.key", envelope(self.kek_version, self.kek_version))
        await self.bucket.put(name, bytes(10 + len(self.deks)))

    async def rewrap(self, name: str) -> None:
        await self.bucket.put(f"{name}.key", envelope(self.kek_version, self.made[name]))

    async def delete(self, name: str) -> None:
        del self.made[name]
        await self.bucket.delete(name)
        await self.bucket.delete(f"{name}.key")


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "rewrap", "delete", "rotate", "lock"]), st.integers(0, 1 << 16)),
    max_size=40,
)


@example([("put", 0), ("delete", 0), ("lock", 0), ("rotate", 0)], 2)
@given(STEPS, st.integers(0, 10))
def test_what_is_counted_what_goes_and_what_stays(steps: list[tuple[str, int]], floor: int) -> None:
    asyncio.run(_run(steps, floor))


async def _run(steps: list[tuple[str, int]], floor: int) -> None:
    history = History()
    bucket = history.bucket
    for step, number in steps:
        names = sorted(history.made)
        old = sorted(bucket.old())
        if step == "put":
            await history.put()
        elif step == "rotate":
            history.kek_version += 1
        elif step == "lock" and old:
            bucket.locked.add(old[number % len(old)][1])
        elif step in ("rewrap", "delete") and names:
            await (history.rewrap if step == "rewrap" else history.delete)(names[number % len(names)])
    # The pass itself: nothing that is current is under older keys afterwards.
    dek_floor = min(floor, history.kek_version)
    for name in sorted(history.made):
        if history.made[name] < dek_floor:
            await history.put()
            await history.delete(name)
        else:
            await history.rewrap(name)

    versions = OldVersions(bucket, PREFIX)
    await _check_count(versions, bucket)
    before, current = bucket.old(), bucket.current()
    contents = {(key, v): data or b"" for key, of in bucket.histories.items() for v, data in of}
    refused = await versions.remove(history.kek_version, dek_floor)
    after = bucket.old()
    assert bucket.current() == current
    for key, version_id in before:
        name, is_envelope = key.removesuffix(".key"), key.endswith(".key")
        sealed = {(name, v) for k, v in before if k == name}
        holds = any(v in bucket.locked for _, v in sealed)
        if history.deks[name] < dek_floor:
            stays = version_id in bucket.locked or (is_envelope and holds)
        elif is_envelope and name in history.made:
            kek_version = Envelope.parse(contents[key, version_id]).kek_version
            stays = version_id in bucket.locked or kek_version == history.kek_version
        else:
            stays = True  # what was deleted above the floor outlives every re-wrap
        assert ((key, version_id) in after) == stays
    assert len(refused) == len(set(refused))
    assert all(any(f"version {version_id}: AccessDenied" in line for version_id in bucket.locked) for line in refused)
    if not refused:
        assert all(history.deks[key.removesuffix(".key")] >= dek_floor for key, _ in after)
    assert await versions.remove(history.kek_version, dek_floor) == refused
    assert bucket.old() == after
    await _check_count(versions, bucket)


async def _check_count(versions: OldVersions, bucket: Bucket) -> None:
    counters: dict[TimelineId, UseCounter] = {}
    await versions.count(counters, shared=False)
    uses = [use for counter in counters.values() for use in counter.uses()]
    old = bucket.old()
    assert all(use.superseded for use in uses)
    assert sum(use.objects for use in uses) == sum(key.endswith(".key") for key, _ in old)
    opened = {key.removesuffix(".key") for key, _ in old if key.endswith(".key")}
    sizes = {(k, v): len(data or b"") for k, of in bucket.histories.items() for v, data in of}
    assert sum(use.size_bytes for use in uses) == sum(sizes[each] for each in old if each[0] in opened)
