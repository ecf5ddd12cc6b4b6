"""The plaintext KEKs that a keymanager keeps.

Bounded in number, and so in bytes (all are of one size, about a kilobyte with their cipher contexts): the least
recently used is forgotten when there are too many, and each when nobody has used it for a while. Forgetting a KEK
leaves it working for whoever is in the middle of using it, and overwrites it when the last of them lets go, which is at
once when there is none; `drop` overwrites all of a project's at once, forgotten or not, whoever uses them.

A core: no I/O; the clock is the caller's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary

from shared.crypto.aead import AeadKey
from shared.ids import ProjectId

_Kek = tuple[ProjectId, int]


class KekCache:
    """Not thread-safe; lives on one event loop."""

    def __init__(self, entries: int, idle_ttl_s: float, now_s: Callable[[], float]) -> None:
        """At most `entries` KEKs, each for `idle_ttl_s` after its last use. Raises ValueError for less than one."""
        if entries < 1:
            raise ValueError("a key cache holds at least one key")
        self._entries = entries
        self._idle_ttl_s = idle_ttl_s
        self._now_s = now_s
        self._kept: OrderedDict[_Kek, tuple[AeadKey, float]] = OrderedDict()
        """With when it was last used, in that order."""
        self._live: dict[ProjectId, WeakKeyDictionary[AeadKey, int]] = {}
        """Everything that is referenced by anybody, with its version."""

    @property
    def projects(self) -> list[ProjectId]:
        """The project of each KEK that is in memory."""
        return [project_id for project_id, live in self._live.items() for cipher in list(live) if not cipher.wiped]

    @property
    def live(self) -> list[tuple[ProjectId, int, AeadKey]]:
        """Each KEK that is in memory, with its project and version."""
        return [
            (project_id, version, cipher)
            for project_id, live in self._live.items()
            for cipher, version in list(live.items())
            if not cipher.wiped
        ]

    def get(self, project_id: ProjectId, kek_version: int) -> AeadKey | None:
        """The KEK, which is used now."""
        kept = self._kept.get((project_id, kek_version))
        if kept is None or self._is_idle(kept[1]):
            return None
        self._kept[project_id, kek_version] = kept[0], self._now_s()
        self._kept.move_to_end((project_id, kek_version))
        return kept[0]

    def put(self, project_id: ProjectId, kek_version: int, cipher: AeadKey) -> None:
        """Keep `cipher`, and answer for wiping it from now on."""
        self._live.setdefault(project_id, WeakKeyDictionary())[cipher] = kek_version
        self._kept[project_id, kek_version] = cipher, self._now_s()
        self._kept.move_to_end((project_id, kek_version))
        while len(self._kept) > self._entries:
            self._forget_oldest()

    def expire(self) -> None:
        """Forget what was not used for `idle_ttl_s`. To be called now and then."""
        while self._kept and self._is_idle(next(iter(self._kept.values()))[1]):
            self._forget_oldest()
        self._live = {project_id: live for project_id, live in self._live.items() if live}

    def drop(self, project_id: ProjectId, kek_version: int | None = None) -> int:
        """Wipe the project's KEKs, or one of them. Returns how many were live."""
        live = self._live.get(project_id, WeakKeyDictionary())
        ending = [cipher for cipher, version in live.items() if kek_version in (None, version) and not cipher.wiped]
        versions = {version for version in live.values() if kek_version in (None, version)}
        for cipher in ending:
            cipher.wipe()
            del live[cipher]
        for version in versions:
            self._kept.pop((project_id, version), None)
        if not live:
            self._live.pop(project_id, None)
        return len(ending)

    def wipe(self) -> None:
        """Everything."""
        for project_id in list(self._live):
            self.drop(project_id)

    def _is_idle(self, used_at_s: float) -> bool:
        return self._now_s() - used_at_s >= self._idle_ttl_s

    def _forget_oldest(self) -> None:
        """It is overwritten when the last reference goes: now, unless somebody is using it."""
        self._kept.popitem(last=False)

    def __len__(self) -> int:
        return len(self._kept)
