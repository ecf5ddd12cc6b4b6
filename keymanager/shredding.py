"""The end of a project, by the word of two people.

    ask        one person, with the project's name typed and a reason
    approve    another person, within a time, the name typed again; from here on there is no way back:
                 1  stop and drop the KEKs, as in a revocation; fan out when it is stored  (revocation.py)
                 2  in the transaction that stores this: every wrapped KEK, of all versions, staged ones too, is gone
                 3  the tables that held them are written anew
                 4  when all leases are over, every node that stores data deletes what it has, and says what is left;
                    so does the compute manager, which has verifiers of passwords
    cancel     anybody who may ask, before that

Neither person is the owner's signing key: that is a key, and whoever has it could be both. Two tokens with one name are
one person. Whoever can issue tokens can make two people up; that issuing stands in the audit chain is what there is
against it.

A node deletes because the keymanager says so, again and again until it reports that nothing is left; a node that was
away is told when it is back. What may interleave: the key configuration's lock and the project's lock are held while
the KEKs go, so nobody stores a wrap that is destroyed; `_changing` keeps one decision the only one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Final, Protocol

from keymanager import shred_store
from keymanager.key_users import KeyUsers
from keymanager.projects import ProjectEntry, Projects
from keymanager.repository import Repository
from keymanager.revocation import Revoker
from keymanager.shred_store import StoredShred
from keymanager.transaction import Transaction
from shared.api.keymanager import MAX_PROJECTS_PER_REQUEST, DeleteData, KeyState, ReportDeletion, Revocation, Role
from shared.api.shredding import ApproveShred, AskShred, Shred, ShredNode
from shared.audit_chain import AuditEntry
from shared.auth import Principal
from shared.clock import Clock
from shared.deletion import ObjectKind
from shared.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    NotLeaderError,
    PermissionDeniedError,
    UnavailableError,
)
from shared.ids import KeyConfigurationId, ProjectId
from shared.telemetry import get_logger

_log = get_logger(__name__)
_REASON: Final = "shredded by two people's word"
_FRESH_LOOK_S: Final = 30.0
_ASK_AGAIN_S: Final = 30.0
"""Of who has not said yet that nothing is left: a store that was away, an object under a lock."""
_MAX_REVOCATIONS: Final = 1000


class Keepers(Protocol):
    """The sessions, as seen from here. Must not block and must not raise."""

    def delete_data(self, node_id: str, message: DeleteData) -> bool: ...

    def keepers(self) -> list[str]: ...


class Shredder:
    """Use cases of the admin API, and what follows from them."""

    def __init__(
        self,
        repository: Repository,
        projects: Projects,
        key_users: KeyUsers,
        revoker: Revoker,
        keepers: Keepers,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        lock_of: Callable[[ProjectId | KeyConfigurationId], asyncio.Lock],
        forget_staged: Callable[[ProjectId], None],
        approval: timedelta,
    ) -> None:
        """`lock_of`: what rotation holds. `forget_staged`: drop wraps that wait in memory for another CMK."""
        self._repository = repository
        self._projects = projects
        self._key_users = key_users
        self._revoker = revoker
        self._keepers = keepers
        self._clock = clock
        self._tasks = tasks
        self._lock_of = lock_of
        self._forget_staged = forget_staged
        self._approval = approval
        self._changing = asyncio.Lock()
        self._open: set[ProjectId] = set()
        """Shredded, and not everybody has said that nothing is left."""
        self._shredded: set[ProjectId] = set()
        """All of them."""
        self._told: dict[ProjectId, set[str]] = {}
        """Those that we have told, whether or not they were given keys."""
        self._done: set[tuple[ProjectId, str]] = set()
        """Nodes that have said so."""
        self._heard: dict[ProjectId, asyncio.Event] = {}
        """Set and replaced with each report."""

    async def load(self) -> None:
        """Go on with what was approved before. Call when revocations are resumed."""
        self._done = await shred_store.done_nodes(self._repository)
        for project_id in await shred_store.approved(self._repository):
            entry = self._projects.get(project_id)
            self._open.add(project_id)
            self._shredded.add(project_id)
            if not entry.access.state.final:
                _log.error("a project was shredded, and is not: its row was changed", project_id=str(project_id))
                continue
            self._tasks.create_task(self._delete(entry))

    # --- two people ---

    async def ask(self, project_id: ProjectId, request: AskShred, caller: Principal) -> Shred:
        """Raises NotFoundError, InvalidInputError for another name, ConflictError when it was asked for, or done,
        already, PermissionDeniedError for who is not a person."""
        entry = self._projects.get(project_id)
        subject = _person(caller)
        _confirm(entry, request.project_name)
        async with self._changing:
            current = await self._current(project_id)
            if current is not None and current.state in ("asked", "approved"):
                raise ConflictError("the project is shredded" if current.state == "approved" else _asked(current))
            now = self._clock.now()
            stored = StoredShred(
                f"shr-{secrets.token_hex(8)}",
                project_id,
                "asked",
                request.reason,
                caller.actor,
                subject,
                now,
                now + self._approval,
            )
            details = {
                "shred_id": stored.shred_id,
                "reason": stored.reason,
                "subject": subject,
                "expires_at": stored.expires_at.isoformat(),
            }
            async with self._repository.transaction() as transaction:
                await shred_store.insert_shred(transaction, stored)
                await transaction.audit([AuditEntry(caller.actor, "shred.ask", "ok", project_id, details)])
        return await self.status(project_id)

    async def approve(self, project_id: ProjectId, request: ApproveShred, caller: Principal) -> Shred:
        """Returns when the KEKs are destroyed and the fan-out is on its way.

        Raises as `ask`; ConflictError when nothing (of this id) waits; PermissionDeniedError for whoever asked.
        """
        entry = self._projects.get(project_id)
        subject = _person(caller)
        _confirm(entry, request.project_name)
        configuration = entry.key_configuration_id
        # In this order, as whoever else takes both (moving.py).
        async with self._changing, self._lock_of(configuration), self._lock_of(project_id):
            stored = await self._waiting(project_id)
            if stored.shred_id != request.shred_id:
                raise ConflictError(f"what waits is {stored.shred_id}, not {request.shred_id}: look at it first")
            if _same_person(stored, caller, subject):
                await self._refused(stored, caller)
                raise PermissionDeniedError("it takes another person than the one who asked")
            if entry.key_configuration_id != configuration:
                raise ConflictError("the project was moved to another key meanwhile: try again")
            await self._shred(entry, stored, caller, subject)
        return await self.status(project_id)

    async def cancel(self, project_id: ProjectId, caller: Principal) -> Shred:
        """Raises NotFoundError, ConflictError when nothing waits, PermissionDeniedError for who is not a person."""
        self._projects.get(project_id)
        subject = _person(caller)
        async with self._changing:
            stored = await self._waiting(project_id)
            cancelled = replace(
                stored,
                state="cancelled",
                decided_by=caller.actor,
                decided_subject=subject,
                decided_at=self._clock.now(),
            )
            async with self._repository.transaction() as transaction:
                await shred_store.decide(transaction, cancelled)
                details = {"shred_id": stored.shred_id}
                await transaction.audit([AuditEntry(caller.actor, "shred.cancel", "ok", project_id, details)])
        return await self.status(project_id)

    async def _refused(self, stored: StoredShred, caller: Principal) -> None:
        async with self._repository.transaction() as transaction:
            details = {"shred_id": stored.shred_id, "asked_by": stored.asked_by}
            entry = AuditEntry(caller.actor, "shred.approve", PermissionDeniedError.code, stored.project_id, details)
            await transaction.audit([entry])

    async def _current(self, project_id: ProjectId) -> StoredShred | None:
        """The newest; `expired` is written down when somebody looks for the first time after it."""
        found = await shred_store.shreds(self._repository, project_id)
        if not found:
            return None
        stored = found[0]
        if stored.state == "asked" and stored.expires_at <= self._clock.now():
            stored = replace(stored, state="expired")
            async with self._repository.transaction() as transaction:
                await shred_store.decide(transaction, stored)
                details = {"shred_id": stored.shred_id}
                await transaction.audit([AuditEntry("keymanager", "shred.expire", "ok", project_id, details)])
        return stored

    async def _waiting(self, project_id: ProjectId) -> StoredShred:
        """Raises ConflictError."""
        stored = await self._current(project_id)
        if stored is None or stored.state != "asked":
            raise ConflictError(
                "no shredding of this project waits for an approval" if stored is None else _over(stored)
            )
        return stored

    # --- the end of the keys ---

    async def _shred(self, entry: ProjectEntry, stored: StoredShred, caller: Principal, subject: str) -> None:
        now = self._clock.now()
        done = stored

        async def destroy(transaction: Transaction) -> list[AuditEntry]:
            nonlocal done
            keks, staged = await shred_store.destroy_keks(transaction, entry.project_id, now)
            done = replace(
                stored,
                state="approved",
                decided_by=caller.actor,
                decided_subject=subject,
                decided_at=now,
                keks_destroyed=keks,
                staged_destroyed=staged,
            )
            await shred_store.decide(transaction, done)
            details = {
                "shred_id": stored.shred_id,
                "asked_by": stored.asked_by,
                "reason": stored.reason,
                "keks_destroyed": str(keks),
                "staged_destroyed": str(staged),
                "kek_versions": ",".join(str(v) for v, kek in sorted(entry.keks.items()) if kek.wrapped is not None),
            }
            return [AuditEntry(caller.actor, "shred.approve", "ok", entry.project_id, details)]

        await self._revoker.shred(entry, _REASON, caller.actor, destroy)
        for version, kek in entry.keks.items():
            if kek.wrapped is not None:
                entry.keks[version] = replace(kek, wrapped=None, destroyed_at=now)
        self._forget_staged(entry.project_id)
        self._open.add(entry.project_id)
        self._shredded.add(entry.project_id)
        self._tasks.create_task(self._delete(entry))
        await self._vacuum(done)

    async def _vacuum(self, stored: StoredShred) -> None:
        """A row that was changed stays in the table's file until it is vacuumed: with the wrap that is destroyed."""
        try:
            await self._repository.vacuum_keks()
            async with self._repository.transaction() as transaction:
                await shred_store.set_vacuumed(transaction, stored.shred_id, self._clock.now())
                details = {"shred_id": stored.shred_id}
                await transaction.audit([AuditEntry("keymanager", "shred.vacuum", "ok", stored.project_id, details)])
        except NotLeaderError:
            raise
        except UnavailableError as error:
            _log.error("the tables of wrapped KEKs could not be written anew", reason=str(error))

    async def vacuum_if_needed(self, project_id: ProjectId) -> None:
        """What could not be done with the approval. Raises NotLeaderError."""
        stored = await self._current(project_id)
        if stored is not None and stored.state == "approved" and stored.vacuumed_at is None:
            await self._vacuum(stored)

    # --- the data ---

    async def _delete(self, entry: ProjectEntry) -> None:
        """Tell everybody, when no lease is left: nobody who was told writes afterwards. Until all are done."""
        project_id = entry.project_id
        while entry.unsealed:
            await entry.sealed.wait()
        self._look(project_id, self._keepers.keepers())
        while waiting := {each for each in self._wanted(project_id) if (project_id, each) not in self._done}:
            await asyncio.sleep(_ASK_AGAIN_S)
            self._look(project_id, waiting.intersection(self._keepers.keepers()))
        self._open.discard(project_id)

    def _wanted(self, project_id: ProjectId) -> set[str]:
        """Who has to say that nothing is left: those that were given keys of it, and whoever else was told."""
        return {user.node_id for user in self._key_users.of(project_id)} | self._told.get(project_id, set())

    def _look(self, project_id: ProjectId, node_ids: Iterable[str]) -> list[str]:
        """Have these nodes delete what they have, and say what is left. Returns those that were told."""
        message = DeleteData(project_ids=[project_id])
        told = [node_id for node_id in node_ids if self._keepers.delete_data(node_id, message)]
        self._told.setdefault(project_id, set()).update(told)
        return told

    def due(self, node_id: str, role: Role) -> list[ProjectId]:
        """What a node that has just connected still has to delete: of what it was given keys for; a manager, whatever
        it has not spoken of yet."""
        wanted = (
            project_id
            for project_id in (self._shredded if role is Role.MANAGER else self._open)
            if (project_id, node_id) not in self._done
            and not self._projects.get(project_id).unsealed
            and (role is Role.MANAGER or node_id in self._wanted(project_id))
        )
        return sorted(wanted)[:MAX_PROJECTS_PER_REQUEST]

    async def reported(self, node_id: str, said: ReportDeletion) -> None:
        """A node's word. Raises NotFoundError, ConflictError for a project that is not shredded, UnavailableError."""
        if not self._projects.get(said.project_id).state.final:
            raise ConflictError("the project is not shredded: nothing of it is to be deleted")
        details = {
            "node_id": node_id,
            "deleted_objects": str(sum(each.objects for each in said.deleted)),
            "deleted_size_bytes": str(sum(each.size_bytes for each in said.deleted)),
            "left_objects": str(said.left_objects),
            "not_checked": "; ".join(said.not_checked),
            "holds_keys": str(said.holds_keys).lower(),
        }
        outcome = "ok" if said.left_objects == 0 and not said.holds_keys else "left"
        async with self._repository.transaction() as transaction:
            await shred_store.upsert_node(transaction, node_id, said, self._clock.now())
            await transaction.audit([AuditEntry(f"node/{node_id}", "shred.node", outcome, said.project_id, details)])
        if outcome == "ok":
            self._done.add((said.project_id, node_id))
        else:
            self._done.discard((said.project_id, node_id))
        heard = self._heard.pop(said.project_id, None)
        if heard is not None:
            heard.set()

    async def fresh_look(self, project_id: ProjectId) -> list[ShredNode]:
        """Have everybody look again now, and wait for those that are connected, for a while."""
        asked_at = self._clock.now()
        asked = set(self._look(project_id, self._keepers.keepers()))
        with suppress(TimeoutError):
            async with asyncio.timeout(_FRESH_LOOK_S):
                while True:
                    heard = self._heard.setdefault(project_id, asyncio.Event())
                    nodes = await self.nodes(project_id)
                    fresh = {n.node_id for n in nodes if n.looked_at is not None and n.looked_at >= asked_at}
                    if asked <= fresh:
                        break
                    await heard.wait()
        return [
            node
            if node.looked_at is not None and node.looked_at >= asked_at
            else ShredNode(**dict(node) | {"looked_at": None})
            for node in await self.nodes(project_id)
        ]

    async def nodes(self, project_id: ProjectId) -> list[ShredNode]:
        """Everybody who was given keys of it or was told, and everybody who has said something, by name."""
        said = await shred_store.nodes(self._repository, project_id)
        for node_id in self._wanted(project_id):
            said.setdefault(node_id, ShredNode(node_id=node_id, looked_at=None))
        return [said[node_id] for node_id in sorted(said)]

    # --- what there is to see ---

    async def status(self, project_id: ProjectId) -> Shred:
        """The newest request, and how far it is. Raises NotFoundError when there never was one."""
        entry = self._projects.get(project_id)
        stored = await self._current(project_id)
        if stored is None:
            raise NotFoundError("nobody has asked for this project to be shredded")
        shredded = stored.state == "approved"
        nodes = await self.nodes(project_id) if shredded else []
        revocation = await self.revocation(project_id) if shredded else None
        over = revocation is not None and revocation.sealed_after_s is not None and all(node.done for node in nodes)
        return Shred(
            shred_id=stored.shred_id,
            project_id=project_id,
            project_name=entry.name,
            state=("done" if over else "deleting") if stored.state == "approved" else stored.state,
            reason=stored.reason,
            asked_by=stored.asked_by,
            asked_at=stored.asked_at,
            expires_at=stored.expires_at,
            decided_by=stored.decided_by,
            decided_at=stored.decided_at,
            keks_destroyed=stored.keks_destroyed,
            staged_destroyed=stored.staged_destroyed,
            revocation=revocation,
            nodes=nodes,
            left=await self._left(stored, nodes) if shredded else [],
        )

    async def revocation(self, project_id: ProjectId) -> Revocation | None:
        """The fan-out of the shredding."""
        found = await self._repository.revocations({project_id}, _MAX_REVOCATIONS)
        return next((each for each in found if each.state is KeyState.SHREDDED), None)

    async def _left(self, stored: StoredShred, nodes: Iterable[ShredNode]) -> list[str]:
        used = await shred_store.used_cmks(self._repository, stored.project_id)
        keys = ", ".join(each.key.identifier for each in used)
        left = [
            f"whatever was copied before: backups of the metadata database hold wrapped KEKs, and bring the data back "
            f"together with a copy of the object store until these keys are destroyed: {keys}",
            "the metadata database's write-ahead log, until it is recycled: the same wraps",
            "names, ids, times and the audit chain, in the metadata database; names of its endpoints, in the compute "
            "manager's",
            "freed blocks of the disks, with sealed bytes that no KEK opens",
        ]
        left += [
            f"on branches in {branch.name} ({branch.project_id}), which is {branch.state}: copies of what was changed "
            "there, under its keys; nothing of it can be read without this project, and it is not ERASED before that "
            "one is shredded, too"
            for each in await shred_store.branches(self._repository, stored.project_id)
            if not (branch := self._projects.get(each)).state.final
        ]
        if not any(each.kind is ObjectKind.VERIFIER for node in nodes for each in node.deleted):
            left.append(
                "verifiers of its roles' passwords, if it had endpoints, in the compute manager's database: no manager "
                "has said that it deleted any"
            )
        if stored.vacuumed_at is None:
            left.insert(1, "the tables of wrapped KEKs were not written anew: their files may hold the same wraps")
        for node in nodes:
            if node.looked_at is None:
                left.append(f"whatever {node.node_id} stores: it has not said anything yet")
            if node.left_objects:
                named = "; ".join(node.remains)
                left.append(f"{node.left_objects} objects that {node.node_id} could not delete: {named}")
            if node.holds_keys:
                left.append(f"a plaintext key in {node.node_id}")
            left += [f"not checked by {node.node_id}: {text}" for text in node.not_checked]
        return left


def _person(caller: Principal) -> str:
    """Who it is. Raises PermissionDeniedError for a signing key."""
    if caller.person is None:
        raise PermissionDeniedError("this takes two people, each with a token of their own: a signing key is nobody")
    return caller.subject.strip().casefold()


def _same_person(stored: StoredShred, caller: Principal, subject: str) -> bool:
    return subject == stored.asked_subject or caller.actor == stored.asked_by


def _confirm(entry: ProjectEntry, typed: str) -> None:
    if typed != entry.name:
        raise InvalidInputError("the name that was typed is not the name of this project")


def _asked(stored: StoredShred) -> str:
    return f"{stored.asked_by} has asked already ({stored.shred_id}): approve or cancel that"


def _over(stored: StoredShred) -> str:
    return {
        "approved": "the project is shredded",
        "expired": "the request was not approved in time: ask again",
        "cancelled": "the request was cancelled: ask again",
    }.get(stored.state, "")
