"""Sealed objects that a bucket with versioning still keeps, though they were replaced or deleted: counted by their
keys, and removed where they would keep an old key in use.

    re-wrap   an envelope that was replaced is removed: the newer one is a wrap of the same DEK, so nothing is lost
    re-key    what is under a DEK from below the floor is removed, too: the sealed bytes first, then the envelopes, so
              that a crash leaves what the next look finds

What was *deleted* outlives a re-wrap: it is the history that the bucket's owner wished for. It is counted, apart, and a
KEK that it is under is not destroyed. Never removed: what is current, markers of deletions, and what the store refuses
to delete. See docs/adr/0043.

Bound to one layout: the envelope of object X is X.key, and all that are ever stored of one X are wraps of one DEK.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from shared.crypto.envelope import Envelope
from shared.errors import IntegrityError
from shared.ids import TimelineId
from shared.key_upkeep import UseCounter
from shared.storage.base import ObjectNotFoundError, ObjectStore, StoreDeniedError, StoreLacksError
from shared.storage.versions import KeepsOldVersions, OldVersion

_ENVELOPE_SUFFIX: Final = ".key"
_GETS_AT_ONCE: Final = 16


@dataclass(slots=True)
class _OldObject:
    """Old versions of one object, and of the envelope beside it; the newest first."""

    sealed: list[OldVersion] = field(default_factory=list)
    envelopes: list[tuple[OldVersion, Envelope]] = field(default_factory=list)

    def below(self, dek_floor: int) -> bool:
        return all(envelope.dek_version < dek_floor for _, envelope in self.envelopes)


class OldVersions:
    """Of one project: below `prefix`, after which the ids of timelines come. A store that keeps no versions has none.

    Both methods raise StoreUnavailableError; StoreDeniedError; and IntegrityError for an envelope that is none, since
    nobody knows what it is under.
    """

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    async def count(self, counters: dict[TimelineId, UseCounter], *, shared: bool) -> None:
        """One use per old envelope, the size of the sealed bytes with the newest. `shared`: other nodes count the
        same."""
        for key, old in (await self._look()).items():
            counter = counters.setdefault(timeline_of(key.removeprefix(self._prefix)), UseCounter())
            size_bytes = sum(version.size_bytes for version in old.sealed)
            for _, envelope in old.envelopes:
                counter.add(envelope, size_bytes, shared=shared, superseded=True)
                size_bytes = 0

    async def remove(self, kek_version: int, dek_floor: int) -> list[str]:
        """Call when nothing that is current is under older versions than these. Returns what the store would not
        delete, in words."""
        doomed = []
        replaced = []
        for old in (await self._look()).values():
            if old.below(dek_floor):
                doomed.append(old)
            else:
                outdated = [version for version, envelope in old.envelopes if envelope.kek_version < kek_version]
                replaced += [version for version in outdated if version.replaced]
        held = await self._delete(version for old in doomed for version in old.sealed)
        for old in doomed:
            if held.keys().isdisjoint(old.sealed):  # what a lock keeps can still be opened
                replaced += [version for version, _ in old.envelopes]
        held |= await self._delete(replaced)
        return [f"{version}: {code}" for version, code in held.items()]

    async def _look(self) -> dict[str, _OldObject]:
        """By object key; only what has old envelopes. Other sealed bytes open by a current one, or not at all."""
        store = self._store
        if not isinstance(store, KeepsOldVersions):
            return {}
        found: dict[str, _OldObject] = {}
        envelopes = []
        try:
            async for version in store.old_versions(self._prefix):
                if version.key.endswith(_ENVELOPE_SUFFIX):
                    envelopes.append(version)
                else:
                    found.setdefault(version.key, _OldObject()).sealed.append(version)
            for start in range(0, len(envelopes), _GETS_AT_ONCE):
                batch = envelopes[start : start + _GETS_AT_ONCE]
                for version, envelope in zip(
                    batch, await asyncio.gather(*(_envelope(store, each) for each in batch)), strict=True
                ):
                    if envelope is not None:
                        old = found.setdefault(version.key.removesuffix(_ENVELOPE_SUFFIX), _OldObject())
                        old.envelopes.append((version, envelope))
        except StoreLacksError:
            return {}  # who cannot list versions keeps none
        except StoreDeniedError as error:
            raise StoreDeniedError(
                "old versions of objects may keep a key in use, and the store does not let us look at them: "
                f"s3:ListBucketVersions and s3:GetObjectVersion are needed ({error})"
            ) from error
        return {key: old for key, old in found.items() if old.envelopes}

    async def _delete(self, versions: Iterable[OldVersion]) -> dict[OldVersion, str]:
        doomed = list(versions)
        store = self._store
        return await store.delete_old_versions(doomed) if doomed and isinstance(store, KeepsOldVersions) else {}


def timeline_of(name: str) -> TimelineId:
    """Of an object's key below such a prefix. Raises IntegrityError."""
    try:
        return TimelineId.parse(name.partition("/")[0])
    except ValueError:
        raise IntegrityError("the object store holds something under no timeline's name") from None


async def _envelope(store: KeepsOldVersions, version: OldVersion) -> Envelope | None:
    """None: it was removed just now."""
    try:
        return Envelope.parse(await store.get_version(version))
    except ObjectNotFoundError:
        return None
    except IntegrityError as error:
        raise IntegrityError(f"{version} is no envelope, and may keep a key in use: {error}") from None
