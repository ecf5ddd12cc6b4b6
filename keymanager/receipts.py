"""Makes receipts of what is over, out of what is stored: rows, audit chain, recorded calls to the KMS.

Nothing is kept: a receipt can be had again, with a newer head of the audit chain in it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from keymanager import shred_store
from keymanager.anchoring import AnchorKeys
from keymanager.key_users import KeyUsers
from keymanager.projects import ProjectEntry, Projects
from keymanager.records import StoredKeyConfiguration, StoredKeyUser
from keymanager.repository import Repository
from keymanager.shredding import Shredder
from shared.api.keymanager import AuditVerification, InstanceSealed, KeyState, Revocation
from shared.api.shredding import ShredNode
from shared.audit_chain import Link
from shared.audit_kms_calls import RecordedCall, recorded_calls
from shared.clock import Clock
from shared.errors import ConflictError, CorruptedError, InvalidInputError, NotFoundError
from shared.ids import KeyConfigurationId, ProjectId
from shared.receipt import (
    ErasureReceipt,
    ReceiptAudit,
    ReceiptDestroyedKey,
    ReceiptGrant,
    ReceiptInstance,
    ReceiptKek,
    ReceiptKept,
    ReceiptKey,
    ReceiptKmsCall,
    ReceiptNode,
    ReceiptObjects,
    ReceiptPrecondition,
    RestoreReceipt,
    RevocationReceipt,
    ShredReceipt,
    Signer,
)

ReceiptKind = Literal["revocation", "restore", "shred", "erasure"]
_BEFORE_DETECTION: Final = timedelta(seconds=60)
"""How far back the denials that a revocation goes back to may lie: a confirmation is asked for at once."""
_BEFORE_RESTORE: Final = timedelta(seconds=5)
_MAX_REVOCATIONS: Final = 10_000
_GIVING: Final = frozenset({"lease.grant", "kek.unwrap", "dek.generate", "dek.unwrap", "dek.rewrap"})
_WORD: Final = "that the instances did what they say they did: an acknowledgement is an instance's own word"
_COPIES: Final = "that nobody kept plaintext outside of Keylake: query results, dumps, screenshots"
_DENIAL: Final = "that the customer's cloud keeps to its own denial: the next probe that it answers gives the data back"
_SILENCE: Final = "that the customer's cloud stays silent: the next probe that it allows gives the data back"
_NOT_LOGGED: Final = (
    "that the customer's own log has the calls that were throttled, failed or not answered: they may not have got that "
    "far"
)
_NODES: Final = "that the nodes deleted what they say they deleted, and that their disks and stores keep no copy of it"
_COUNTS: Final = "that nothing is stored beyond the counts of objects: they are what the nodes reported last"
_BACKUPS: Final = (
    "that no copy of the metadata database and of the object store was made before: together they bring the data back "
    "while the customer's key exists"
)


class Receipts:
    def __init__(
        self,
        repository: Repository,
        projects: Projects,
        shredder: Shredder,
        key_users: KeyUsers,
        clock: Clock,
        keys: AnchorKeys | None,
        configuration_of: Callable[[KeyConfigurationId], StoredKeyConfiguration],
        verify_audit: Callable[[], Awaitable[AuditVerification]],
        record_calls: Callable[[], Awaitable[None]],
    ) -> None:
        """`record_calls`: puts the KMS calls that are still in memory into the audit chain."""
        self._repository = repository
        self._projects = projects
        self._shredder = shredder
        self._key_users = key_users
        self._clock = clock
        self._keys = keys
        self._configuration_of = configuration_of
        self._verify_audit = verify_audit
        self._record_calls = record_calls

    async def issue(
        self,
        project_id: ProjectId,
        kind: ReceiptKind = "revocation",
        revocation_id: str | None = None,
        restoration_id: str | None = None,
    ) -> bytes:
        """A signed receipt, as `SignedReceipt.serialize` writes it. Without an id: of the newest.

        Raises InvalidInputError for an id that is of another kind; NotFoundError; ConflictError while it is not over;
        UnavailableError.
        """
        for given, own in ((revocation_id, "revocation"), (restoration_id, "restore")):
            if given is not None and kind != own:
                raise InvalidInputError(f"{given} is a {own}'s id, and the receipt asked for is of kind {kind}")
        entry = self._projects.get(project_id)
        match kind:
            case "revocation":
                return await self._of_revocation(entry, revocation_id)
            case "restore":
                return await self._of_restore(entry, restoration_id)
            case "shred":
                return await self._of_shred(entry)
            case "erasure":
                return await self._of_erasure(entry)

    # --- the kinds ---

    async def _of_revocation(self, entry: ProjectEntry, revocation_id: str | None) -> bytes:
        known = await self._repository.revocations({entry.project_id}, _MAX_REVOCATIONS)
        wanted = [
            each
            for each in known
            if each.revocation_id == revocation_id or (revocation_id is None and not each.state.final)
        ]
        if not wanted:
            raise NotFoundError("the project has no such revocation" if known else "the project was never revoked")
        revocation = wanted[0]
        signer = self._signer()
        sealed_after_s = _sealed(revocation)
        records = await self._records(entry.project_id, revocation)
        key, recorded = await self._revoked_key(entry, revocation)
        changed = None
        if not recorded:
            changed = await self._repository.key_change_after(
                entry.project_id, entry.key_configuration_id, records[0].sequence
            )
        audited = await self._verify_audit()
        begin = max(
            [revocation.detected_at - _BEFORE_DETECTION]
            + [
                restored.detected_at  # what was refused before led to another one
                for restored in await self._repository.restorations(entry.project_id)
                if restored.detected_at < revocation.detected_at
            ]
        )
        end = revocation.detected_at + timedelta(seconds=sealed_after_s)
        suspended = revocation.state is KeyState.SUSPENDED
        return _signed(
            RevocationReceipt(
                **self._common(entry, key, audited, records[0], signer),
                **_sealing(revocation),
                state=revocation.state.value,
                reason=revocation.reason,
                detected_at=revocation.detected_at,
                kms_calls=await self._kms_calls(key, begin, end, _is_no_yes if suspended else _is_denial),
                verified=_verified(revocation, records, audited),
                not_verified=_not_verified(
                    records,
                    audited,
                    changed,
                    [_WORD, _COUNTS, _COPIES, *((_SILENCE, _NOT_LOGGED) if suspended else (_DENIAL,))],
                ),
            ),
            signer,
        )

    async def _of_restore(self, entry: ProjectEntry, restoration_id: str | None) -> bytes:
        project_id = entry.project_id
        known_restores = await self._repository.restorations(project_id)
        if not known_restores:
            raise NotFoundError("the project never came back, or from before that was written down")
        wanted = [each for each in known_restores if restoration_id in (None, each.restoration_id)]
        if not wanted:
            raise NotFoundError("the project has no such restore: its revocations name those that ended them")
        restored, signer = wanted[0], self._signer()
        await self._record_calls()
        marks = await self._repository.audit_of(
            project_id, "project.restored", "restoration_id", restored.restoration_id
        )
        if not marks:
            raise CorruptedError("the audit records of this restore are missing: see `keylake audit verify`")
        known = await self._repository.revocations({project_id}, _MAX_REVOCATIONS)
        ended = next((each for each in known if each.detected_at <= restored.detected_at), None)
        between = [] if ended is None else await self._between(project_id, ended, marks[-1])
        audited = await self._verify_audit()
        key = _key_of(restored.key_configuration_id, restored.key)
        end = restored.detected_at + timedelta(seconds=restored.restored_after_s)
        calls = await self._kms_calls(key, restored.detected_at - _BEFORE_RESTORE, end, _is_yes)
        verified = _about_audit(audited)
        if between and not _uses(between):
            verified.insert(0, _nothing_given(between))
        if calls:
            verified.insert(0, "the customer's cloud answered with the use of the key: its own log has the ids")
        return _signed(
            RestoreReceipt(
                **self._common(entry, key, audited, marks[-1], signer),
                state=KeyState.ACTIVE.value,
                reason=restored.reason,
                detected_at=restored.detected_at,
                restoration_id=restored.restoration_id,
                revocation_id=None if ended is None else ended.revocation_id,
                restored_after_s=restored.restored_after_s,
                instances=await self._grants(project_id, marks[-1], restored.detected_at),
                kms_calls=calls,
                verified=verified,
                not_verified=_not_verified(between, audited, None, [_COUNTS, _COPIES]),
            ),
            signer,
        )

    async def _of_shred(self, entry: ProjectEntry) -> bytes:
        shred = await self._shredder.status(entry.project_id)
        revocation = shred.revocation
        if revocation is None or shred.decided_by is None:
            raise ConflictError(f"the project is not shredded: the newest request is {shred.state}")
        signer = self._signer()
        _sealed(revocation)
        records = await self._records(entry.project_id, revocation)
        key, _ = await self._revoked_key(entry, revocation)
        audited = await self._verify_audit()
        verified = _verified(revocation, records, audited)
        silent = [node.node_id for node in shred.nodes if not node.done]
        if await shred_store.wraps_left(self._repository, entry.project_id) == 0:
            verified.insert(0, "no wrapped KEK of the project is in the metadata database, in use or staged")
        if not silent:
            verified.append(f"all {len(shred.nodes)} nodes that keep anything of it have reported that nothing is left")
        not_verified = [f"what {node_id} stores: it has not reported that nothing is left" for node_id in silent]
        not_verified += [
            f"by {node.node_id}: {text}" for node in shred.nodes if node.looked_at for text in node.not_checked
        ]
        return _signed(
            ShredReceipt(
                **self._common(entry, key, audited, records[0], signer),
                **_sealing(revocation),
                state=KeyState.SHREDDED.value,
                reason=shred.reason,
                detected_at=revocation.detected_at,
                kms_calls=[],
                shred_id=shred.shred_id,
                asked_by=shred.asked_by,
                asked_at=shred.asked_at,
                approved_by=shred.decided_by,
                keks_destroyed=shred.keks_destroyed,
                staged_destroyed=shred.staged_destroyed,
                nodes=_nodes(shred.nodes),
                left=shred.left,
                verified=verified,
                not_verified=[
                    *not_verified,
                    *_not_verified(records, audited, None, [_WORD, _NODES, _BACKUPS, _COPIES]),
                ],
            ),
            signer,
        )

    async def _of_erasure(self, entry: ProjectEntry) -> bytes:
        report = await shred_store.erasure(self._repository, entry.project_id)
        if report is None:
            raise ConflictError("the project is not erased: `keylake project verify-erasure` says what is missing")
        signer = self._signer()
        shred = await self._shredder.status(entry.project_id)
        marks = await self._repository.audit_of(entry.project_id, "shred.ask", "shred_id", shred.shred_id)
        if not marks:
            raise CorruptedError("the audit records of this shredding are missing: see `keylake audit verify`")
        audited = await self._verify_audit()
        words = [each for each in report.preconditions if each.outcome == "attested"]
        return _signed(
            ErasureReceipt(
                **self._common(entry, self._key(entry), audited, marks[0], signer),
                state=report.state.value,
                reason=shred.reason,
                detected_at=report.checked_at,
                kms_calls=[],
                shred_id=shred.shred_id,
                checked_by=report.checked_by,
                keys=[ReceiptDestroyedKey(**dict(each)) for each in report.keys],
                preconditions=[ReceiptPrecondition(**dict(each)) for each in report.preconditions],
                nodes=_nodes(shred.nodes),
                verified=[
                    *(each.name for each in report.preconditions if each.outcome == "met"),
                    *_about_audit(audited),
                ],
                not_verified=[
                    *(f"attested, and not checked: {each.name}" for each in words),
                    *_not_verified([], audited, None, [_NODES, _COPIES]),
                ],
            ),
            signer,
        )

    # --- parts ---

    def _signer(self) -> Signer:
        if self._keys is None:
            raise ConflictError("this keymanager has no key to sign with: give it `audit_anchors` and a signing key")
        return self._keys.signer

    def _common(
        self, entry: ProjectEntry, key: ReceiptKey, audited: AuditVerification, first: Link, signer: Signer
    ) -> dict[str, Any]:
        return {
            "issued_at": self._clock.now(),
            "account_id": entry.scope.account_id,
            "workspace_id": entry.scope.workspace_id,
            "project_id": entry.project_id,
            "project_name": entry.name,
            "key": key,
            "keks": [
                ReceiptKek(
                    kek_id=kek.kek_id,
                    kek_version=version,
                    cmk_key_version=kek.cmk_key_version,
                    destroyed=kek.wrapped is None,
                )
                for version, kek in sorted(entry.keks.items())
            ],
            "kept": [] if entry.state.final else _kept(self._key_users.of(entry.project_id)),
            "audit": ReceiptAudit(
                first_sequence=first.sequence, head_sequence=audited.records, head_hash=audited.head_hash
            ),
            "kid": signer.kid,
        }

    async def _records(self, project_id: ProjectId, revocation: Revocation) -> list[Link]:
        await self._record_calls()
        records = await self._repository.revocation_records(project_id, revocation.revocation_id)
        if not records:
            raise CorruptedError("the audit records of this revocation are missing: see `keylake audit verify`")
        return records

    async def _revoked_key(self, entry: ProjectEntry, revocation: Revocation) -> tuple[ReceiptKey, bool]:
        """The key as it was then; of a revocation from before that was written down, the key of now, and False."""
        stored = await self._repository.revoked_key(revocation.revocation_id)
        return (self._key(entry), False) if stored is None else (_key_of(*stored), True)

    def _key(self, entry: ProjectEntry) -> ReceiptKey:
        return _key_of(entry.key_configuration_id, self._configuration_of(entry.key_configuration_id).key)

    async def _kms_calls(
        self,
        key: ReceiptKey,
        begin: datetime,
        end: datetime,
        wanted: Callable[[RecordedCall], bool],
    ) -> list[ReceiptKmsCall]:
        """The wanted calls to that key in this time."""
        links = await self._repository.audit_since(begin)
        calls = {_identity(call): call for call in _calls(links) if call.key == key.identifier}
        return [
            ReceiptKmsCall(at=call.at, operation=call.operation, request_id=call.request_id, verdict=call.verdict)
            for call in sorted(calls.values(), key=lambda call: call.at)
            if begin <= call.at <= end and wanted(call)
        ]

    async def _between(self, project_id: ProjectId, ended: Revocation, restored: Link) -> list[Link]:
        """The project's records from the beginning of a revocation to the restore."""
        records = await self._repository.revocation_records(project_id, ended.revocation_id)
        if not records:
            return []
        return await self._repository.audit_range(project_id, records[0].sequence, restored.sequence)

    async def _grants(self, project_id: ProjectId, restored: Link, detected_at: datetime) -> list[ReceiptGrant]:
        """Who got a lease again, until the next revocation; each instance once."""
        later = await self._repository.audit_range(project_id, restored.sequence, None)
        found: dict[str, ReceiptGrant] = {}
        for link in later:
            if link.entry.action == "project.revoking":
                break
            if link.entry.action != "lease.grant" or link.entry.outcome != "ok":
                continue
            details = link.entry.details
            after_s = max(0.0, (link.at - detected_at).total_seconds())
            grant = ReceiptGrant(
                node_id=link.entry.actor.removeprefix("node/"),
                role=details["role"],
                generation=int(details["generation"]),
                after_s=after_s,
            )
            found.setdefault(details["instance_id"], grant)
        return list(found.values())


def _signed(receipt: RevocationReceipt | RestoreReceipt | ShredReceipt | ErasureReceipt, signer: Signer) -> bytes:
    return receipt.sign(signer).serialize()


def _key_of(key_configuration_id: KeyConfigurationId, key: Any) -> ReceiptKey:
    return ReceiptKey(
        key_configuration_id=key_configuration_id,
        provider=key.provider,
        identifier=key.identifier,
        principal=key.principal,
    )


def _sealed(revocation: Revocation) -> float:
    """Raises ConflictError while it is not over."""
    if revocation.sealed_after_s is None:
        waiting = ", ".join(i.node_id for i in revocation.instances if i.outcome == "pending")
        raise ConflictError(f"the revocation is not over: it waits for {waiting or 'its last step'}")
    return revocation.sealed_after_s


def _sealing(revocation: Revocation) -> dict[str, Any]:
    return {
        "revocation_id": revocation.revocation_id,
        "keks_dropped_after_s": revocation.keks_dropped_after_s or 0.0,
        "sealed_after_s": revocation.sealed_after_s,
        "instances": [_instance(each) for each in revocation.instances],
    }


def _nodes(nodes: Iterable[ShredNode]) -> list[ReceiptNode]:
    return [
        ReceiptNode(
            **dict(node)
            | {
                "deleted": [ReceiptObjects(**dict(each)) for each in node.deleted],
                "deleted_objects": node.deleted_objects,
                "deleted_size_bytes": node.deleted_size_bytes,
            }
        )
        for node in nodes
    ]


def _kept(users: Iterable[StoredKeyUser]) -> list[ReceiptKept]:
    """Of each node, by version of the KEK; one line also for who keeps nothing, or has said nothing."""
    found = []
    for user in users:
        sums: dict[int, tuple[int, int]] = {}
        for use in user.uses:
            objects, size_bytes = sums.get(use.kek_version, (0, 0))
            sums[use.kek_version] = objects + use.objects, size_bytes + use.size_bytes
        found += [
            ReceiptKept(
                node_id=user.node_id,
                reported_at=user.reported_at,
                kek_version=kek_version,
                objects=objects,
                size_bytes=size_bytes,
            )
            for kek_version, (objects, size_bytes) in sorted((sums or {0: (0, 0)}).items())
        ]
    return found


def _calls(links: Sequence[Link]) -> list[RecordedCall]:
    return [call for link in links for call in recorded_calls(link)]


def _is_yes(call: RecordedCall) -> bool:
    return call.verdict == "ok"


def _is_denial(call: RecordedCall) -> bool:
    return call.verdict == "denied"


def _is_no_yes(call: RecordedCall) -> bool:
    """What a suspension goes back to: no answer, a throttled one, an error, a lone denial among them."""
    return not _is_yes(call)


def _identity(call: RecordedCall) -> tuple[str, str]:
    """A call may stand in two records: in the ledger's, and in that of what it was made for."""
    return call.request_id or call.at.isoformat(), call.operation


def _instance(sealed: InstanceSealed) -> ReceiptInstance:
    return ReceiptInstance.model_validate(
        {
            "node_id": sealed.node_id,
            "role": sealed.role.value,
            "generation": sealed.generation,
            "outcome": sealed.outcome,
            "after_s": sealed.after_s,
            "steps_s": sealed.steps_s,
        }
    )


def _uses(records: Sequence[Link]) -> list[Link]:
    """Where keys or leases were given out: there should be none among a revocation's records."""
    return [link for link in records if link.entry.action in _GIVING and link.entry.outcome == "ok"]


def _nothing_given(records: Sequence[Link]) -> str:
    return (
        f"from record {records[0].sequence} to {records[-1].sequence} of the audit chain no lease was granted, no "
        "KEK unwrapped, and no DEK made, unwrapped or wrapped again for the project"
    )


def _about_audit(audited: AuditVerification) -> list[str]:
    if not audited.intact:
        return []
    anchors = "" if audited.anchors is None else f", and fits {audited.anchors} anchors in the object store"
    return [f"the audit chain is whole up to record {audited.records}{anchors}"]


def _verified(revocation: Revocation, records: Sequence[Link], audited: AuditVerification) -> list[str]:
    acknowledged = sum(each.outcome == "acknowledged" for each in revocation.instances)
    fenced = len(revocation.instances) - acknowledged
    found = [
        f"of {len(revocation.instances)} instances that held a lease, {acknowledged} acknowledged that they hold "
        f"nothing any more, and the leases of {fenced} have run out",
    ]
    if not _uses(records):
        found.append(_nothing_given(records))
    return found + _about_audit(audited)


def _not_verified(
    records: Sequence[Link], audited: AuditVerification, changed: int | None, always: Sequence[str]
) -> list[str]:
    """`changed`: the record since which the project is under another CMK than the one that was revoked."""
    found = [f"the audit chain: {audited.problem}"] if not audited.intact else []
    if changed is not None:
        found.append(
            "that the key named here is the one that was revoked, and which calls to that one were refused: the "
            f"project came under the key named here with record {changed}, after the revocation"
        )
    found += [
        f"that nothing was given out meanwhile: record {link.sequence} is {link.entry.action}"
        for link in _uses(records)
    ]
    return found + list(always)
