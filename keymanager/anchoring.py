"""Puts the head of the audit chain into object storage, signed, and reads what is there when the chain is verified.

Every interval in which something was recorded, and after every revocation, at once. Nothing waits for it: an object
store that does not answer makes the anchor late, never a revocation. How late it is stands in the status and in the
metrics. What an anchor is: `shared.audit_anchor`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from keymanager.repository import Repository
from shared import auth
from shared.api.keymanager import AnchoringStatus, AuditVerification
from shared.audit_anchor import (
    ANCHOR_PREFIX,
    Anchor,
    AnchorComparison,
    NamedAnchor,
    SignatureVerifier,
    Signer,
    anchored_sequence,
    read_anchor,
)
from shared.audit_chain import ChainHead, Link
from shared.auth import TokenIssuer, TrustBundle
from shared.clock import Clock
from shared.config import Identity
from shared.errors import CorruptedError, InvalidInputError, KeylakeError
from shared.storage.base import ObjectExistsError, ObjectStore
from shared.storage.config import ObjectStoreSettings, open_store
from shared.telemetry import get_logger

_log = get_logger(__name__)
_READ_AT_ONCE: Final = 16
_TRIAL: Final = b"keylake/v1/trial\0"


@dataclass(frozen=True, slots=True)
class AnchorKeys:
    """What signs anchors here, and what says whose signatures are good."""

    signer: Signer
    verifier: SignatureVerifier

    @classmethod
    def of(cls, identity: Identity) -> AnchorKeys:
        """The service's own. Raises InvalidInputError, also when the trust bundle does not know our key."""
        signer = TokenIssuer.load(identity.signing_key)
        verifier = auth.SignatureVerifier(TrustBundle.load(identity.trust_bundle))
        if not verifier.verify(signer.kid, _TRIAL, b"", signer.sign(_TRIAL, b"")):
            raise InvalidInputError("the trust bundle lacks the keymanager's own key, or grants it scopes")
        return cls(signer, verifier)


class Anchorer:
    """`run` it in a task. The store is opened when it is first needed, and again after a failure to open it."""

    def __init__(
        self, settings: ObjectStoreSettings, keys: AnchorKeys, repository: Repository, clock: Clock, interval_s: float
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._repository = repository
        self._clock = clock
        self._interval_s = interval_s
        self._now = asyncio.Event()
        self._store: ObjectStore | None = None
        self._opening = asyncio.Lock()
        self._last = ChainHead()
        self.status = AnchoringStatus(sequence=0, at=None, problem=None, failures=0)

    def soon(self) -> None:
        """Do not wait for the end of the interval."""
        self._now.set()

    async def run(self) -> None:
        try:
            while True:
                await self._try()
                try:
                    async with asyncio.timeout(self._interval_s):
                        await self._now.wait()
                except TimeoutError:
                    pass
                self._now.clear()
        finally:
            if self._store is not None:
                await self._store.close()

    async def _try(self) -> None:
        try:
            await self.anchor()
        except KeylakeError as error:
            problem = f"{error.code}: {error}"
            if problem != self.status.problem:
                _log.error("the audit chain could not be anchored", reason=str(error), code=error.code)
            self.status = self.status.model_copy(update={"problem": problem, "failures": self.status.failures + 1})

    async def anchor(self) -> None:
        """Anchor the chain as it is stored now, unless that was done.

        Raises StoreUnavailableError, StoreDeniedError, UnavailableError (the database), CorruptedError when another
        hash of this record was anchored before: then somebody has rewritten the chain.
        """
        head = await self._repository.audit_head()
        if head.sequence == 0 or head == self._last:
            return
        store = await self._opened()
        anchor = Anchor.sign(head, self._clock.now(), self._keys.signer)
        try:
            await store.put_if_absent(anchor.key, anchor.encode())
        except ObjectExistsError:
            # Ours, from before a restart or a lost answer; or the chain is another one than it was.
            there = read_anchor(anchor.key, await store.get(anchor.key), self._keys.verifier)
            if there.anchor is None or not hmac.compare_digest(there.anchor.head.record_hash, head.record_hash):
                raise CorruptedError(
                    there.problem or f"record {head.sequence} was anchored with another hash: the chain was rewritten"
                ) from None
            anchor = there.anchor
        self._last = head
        self.status = self.status.model_copy(update={"sequence": head.sequence, "at": anchor.at, "problem": None})

    async def names(self) -> list[str]:
        """Of every anchor in the store, in order. Raises StoreUnavailableError, StoreDeniedError."""
        store = await self._opened()
        return [info.key async for info in store.list(ANCHOR_PREFIX) if anchored_sequence(info.key) is not None]

    async def read(self, names: Sequence[str]) -> AsyncIterator[NamedAnchor]:
        """Raises StoreUnavailableError, StoreDeniedError, ObjectNotFoundError."""
        store = await self._opened()
        for start in range(0, len(names), _READ_AT_ONCE):
            group = names[start : start + _READ_AT_ONCE]
            for name, data in zip(group, await asyncio.gather(*(store.get(name) for name in group)), strict=True):
                yield read_anchor(name, data, self._keys.verifier)

    async def _opened(self) -> ObjectStore:
        async with self._opening:
            if self._store is None:
                self._store = await open_store(self._settings)
            return self._store


async def verify(repository: Repository, anchorer: Anchorer | None) -> AuditVerification:
    """Walk the whole chain, and compare it with every anchor there is. Raises UnavailableError (the database)."""
    comparison, anchors_problem, names = AnchorComparison(), None, list[str]()
    if anchorer is not None:
        try:
            names = await anchorer.names()  # before the chain's snapshot: no anchor is newer than that
        except KeylakeError as error:
            anchors_problem = f"the anchors could not be read: {error}"
    waiting = None if anchorer is None else anchorer.read(names)

    async def offer_next() -> bool:
        nonlocal anchors_problem
        if waiting is None or anchors_problem is not None:
            return False
        try:
            anchor = await anext(waiting, None)
        except KeylakeError as error:
            anchors_problem = f"the anchors could not be read: {error}"
            return False
        if anchor is not None:
            comparison.offer(anchor)
        return anchor is not None

    async def compare(link: Link) -> None:
        while comparison.wants(link.sequence) and await offer_next():
            pass
        comparison.feed(link)

    verifier = await repository.verify_audit(compare)
    if verifier.problem is None:
        while await offer_next():
            pass
        if anchors_problem is None:
            comparison.finish()
    # An anchor says that history was rewritten, which a chain that fits itself does not show: it goes first.
    problem = comparison.problem or verifier.problem
    return AuditVerification(
        intact=problem is None,
        records=verifier.head.sequence,
        head_hash=verifier.head.record_hash.hex(),
        problem=problem,
        anchors=None if anchorer is None else comparison.compared,
        anchors_problem=anchors_problem,
    )
