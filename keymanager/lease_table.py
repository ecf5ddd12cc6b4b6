"""Who holds a lease on what, as the keymanager knows it.

The keymanager believes in a lease for a little longer than its holder does: the holder counts `ttl` from before it
asked, the keymanager from when it answers, plus a margin for clocks that tick at different speeds. So when a lease has
run out here, it has run out there.

A lease that was granted before a restart of the keymanager is known by name from the database, but not until when it
was renewed: it counts as live for a whole ttl from the restart.

One that is over stays known until its row in the database is gone (`over`, `forget`): else nobody would delete it.

This file is a core: no I/O and no clock of its own. Seconds are the keymanager's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from shared.api.keymanager import Role
from shared.ids import InstanceId, ProjectId

CLOCK_DRIFT: Final = 0.02
"""Two clocks differ by less than 2 % in speed; crystals manage 0.01 %, virtual machines under load somewhat worse."""


@dataclass(frozen=True, slots=True)
class Holder:
    """An instance that holds leases."""

    instance_id: InstanceId
    node_id: str
    role: Role
    generation: int


@dataclass(frozen=True, slots=True)
class Held:
    """A lease: `holder` may use the keys of `project_id` before `expires_at_s` (half-open)."""

    project_id: ProjectId
    holder: Holder
    expires_at_s: float


class LeaseTable:
    """At most one lease per project and instance."""

    def __init__(self) -> None:
        self._by_project: dict[ProjectId, dict[InstanceId, Held]] = {}

    def grant(self, project_id: ProjectId, holder: Holder, ttl_s: float, now_s: float) -> bool:
        """Grant or renew. True when this instance held no live lease before. Never shortens a lease."""
        leases = self._by_project.setdefault(project_id, {})
        known = leases.get(holder.instance_id)
        expires_at_s = now_s + ttl_s * (1 + CLOCK_DRIFT)
        new = known is None or known.expires_at_s <= now_s
        if known is not None:
            expires_at_s = max(expires_at_s, known.expires_at_s)
        leases[holder.instance_id] = Held(project_id, holder, expires_at_s)
        return new

    def release(self, project_id: ProjectId, instance_id: InstanceId) -> Held | None:
        """The holder proved that it holds nothing, or its row is gone. None if there was no such lease."""
        leases = self._by_project.get(project_id, {})
        released = leases.pop(instance_id, None)
        if not leases:
            self._by_project.pop(project_id, None)
        return released

    def give_back(self, project_id: ProjectId, instance_id: InstanceId, now_s: float) -> Held | None:
        """The holder has no use for it: over from now on, and known. None if there was no live one."""
        held = self._by_project.get(project_id, {}).get(instance_id)
        if held is None or held.expires_at_s <= now_s:
            return None
        over = self._by_project[project_id][instance_id] = replace(held, expires_at_s=now_s)
        return over

    def over(self, now_s: float) -> list[Held]:
        """The leases that have run out, or were given back, and are not forgotten yet."""
        return [held for held in self.all() if held.expires_at_s <= now_s]

    def forget(self, over: Iterable[Held]) -> None:
        """Their rows are gone. One that was granted again meanwhile stays."""
        for held in over:
            if self._by_project.get(held.project_id, {}).get(held.holder.instance_id) == held:
                self.release(held.project_id, held.holder.instance_id)

    def holds(self, project_id: ProjectId, instance_id: InstanceId, now_s: float) -> bool:
        held = self._by_project.get(project_id, {}).get(instance_id)
        return held is not None and now_s < held.expires_at_s

    def outstanding(self, project_id: ProjectId, now_s: float) -> list[Held]:
        """The live leases on a project, by expiry."""
        live = (held for held in self._by_project.get(project_id, {}).values() if now_s < held.expires_at_s)
        return sorted(live, key=lambda held: (held.expires_at_s, held.holder.instance_id))

    def all(self) -> Iterable[Held]:
        return [held for leases in self._by_project.values() for held in leases.values()]
