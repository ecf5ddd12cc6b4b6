"""Keylake with one safeguard taken away: what the simulation has to find, or it is worth nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final
from unittest.mock import patch

from keymanager.cmk import PROBE_OUTCOMES
from keymanager.kms.base import Verdict
from keymanager.leadership import Election
from keymanager.lease_table import LeaseTable
from keymanager.projects import ProjectEntry
from keymanager.revocation import Revoker
from keymanager.session import Session, Sessions
from keymanager.watch import ProbeOutcome
from keymanager.watcher import Watcher
from shared.api.keymanager import Grant
from shared.keycache import DekCache
from shared.lease import Lease

_granted = Lease.granted
_free_at_s = Election._free_at_s


async def _write_without_a_look_at_the_term(self: Session) -> None:
    while True:
        await self._socket.send_text(await self._outbox.get())


def _add_without_ending_the_other(self: Sessions, session: Session) -> None:
    self._by_node[session.holder.node_id] = session
    self._by_instance[session.holder.instance_id] = session


def _remove(self: Sessions, session: Session) -> None:
    self._by_instance.pop(session.holder.instance_id, None)


def _granted_from_now(self: Lease, grant: Grant, asked_at_s: float, generation: int) -> None:
    _granted(self, grant, self._clock.monotonic_s(), generation)


def _outstanding_for_a_moment(self: LeaseTable, project_id: Any, now_s: float) -> Sequence[Any]:
    return []


def _free_too_early(self: Election) -> float:
    return _free_at_s(self) - self._ttl_s / 2


async def _restore_nothing(self: Revoker, entry: ProjectEntry, *_: Any) -> None:
    await asyncio.sleep(0)


def _end_at_once(self: ProjectEntry, reason: str) -> None:
    self.state, self.reason = self.access.state, reason
    self.epoch += 1


async def _heard_nothing(self: Watcher, key_configuration_id: Any) -> None:
    await asyncio.sleep(0)


MUTANTS: Final[dict[str, tuple[int, Callable[[], AbstractContextManager[Any]]]]] = {
    "the lease is not checked before serving": (7, lambda: patch.object(Lease, "check", lambda self: None)),
    "a lease counts from the answer": (627, lambda: patch.object(Lease, "granted", _granted_from_now)),
    "one denial revokes": (2, lambda: patch("keymanager.watch.DENIALS_TO_REVOKE", 1)),
    "no denial revokes": (6, lambda: patch("keymanager.watch.DENIALS_TO_REVOKE", 10**9)),
    "no answer is a denial": (1, lambda: patch.dict(PROBE_OUTCOMES, {Verdict.UNREACHABLE: ProbeOutcome.DENIED})),
    "a leader's last messages leave after its term": (
        100,
        lambda: patch.object(Session, "_write", _write_without_a_look_at_the_term),
    ),
    "the seat is taken too early": (36, lambda: patch.object(Election, "_free_at_s", _free_too_early)),
    "nobody waits for those who hold leases": (
        0,
        lambda: patch.object(LeaseTable, "outstanding", _outstanding_for_a_moment),
    ),
    "DEKs outlive their lease": (0, lambda: patch.object(DekCache, "wipe", lambda self: 0)),
    "an older instance keeps its session": (
        1,
        lambda: patch.multiple(Sessions, add=_add_without_ending_the_other, remove=_remove),
    ),
    "SHREDDED is said before it is stored": (2, lambda: patch.object(ProjectEntry, "stop", _end_at_once)),
    "a leader counts the grace of a database": (29, lambda: patch.object(Watcher, "heard", _heard_nothing)),
    "nothing comes back": (0, lambda: patch.object(Revoker, "_restore", _restore_nothing)),
}
"""What is missing → a seed that finds it, and the way to take it away."""
