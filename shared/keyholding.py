"""What `KeyClient` holds for one project: the lease, its DEKs, and the unwraps that are waiting for an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shared.api.keymanager import Grant, KeyItem, Keys, KeyState, ObjectName, WrappedObject
from shared.clock import Clock
from shared.crypto.aead import AeadKey, default_suite
from shared.crypto.envelope import Envelope, check_commitment
from shared.crypto.transport import KeyTransport
from shared.errors import IntegrityError, KeylakeError, LeaseExpiredError
from shared.ids import ProjectId
from shared.keycache import DEFAULT_TTL_S, DekCache, DekRoom
from shared.lease import CutHandler, KeyLoss, KeyLossHandler, Lease, nothing_to_cut


class Missing:
    """One envelope that is being unwrapped, and everybody who waits for it."""

    __slots__ = ("_future", "envelope", "name", "wrapped")

    def __init__(self, name: ObjectName, envelope: Envelope) -> None:
        self.name = name
        self.envelope = envelope
        self.wrapped = WrappedObject(object=name, envelope=envelope.serialize())
        self._future: asyncio.Future[AeadKey] = asyncio.get_running_loop().create_future()

    @property
    def done(self) -> bool:
        return self._future.done()

    @property
    def size_bytes(self) -> int:
        """Upper bound of its size in a message: JSON escapes a character into at most six bytes."""
        return 400 + 6 * len(self.name.object_name) + 6 * len(self.name.kind)

    async def wait(self) -> None:
        """Raises what the unwrap raised. Cancelling one waiter does not disturb the others."""
        await asyncio.shield(self._future)

    def result(self) -> AeadKey:
        return self._future.result()

    def resolve(self, held: HeldProject, transport: KeyTransport, item: KeyItem) -> None:
        """Take the DEK in. Raises IntegrityError when it is not the key of this envelope."""
        if self._future.done():
            return
        if item.envelope != self.wrapped.envelope:
            raise IntegrityError("the keymanager answered with another envelope")
        self._future.set_result(held.open(transport, self.name, self.envelope, item))

    def fail(self, error: KeylakeError) -> None:
        if not self._future.done():
            # One exception object per waiter's future: they grow tracebacks of their own.
            self._future.set_exception(type(error)(str(error)))
            self._future.exception()  # retrieved: whoever waited may be gone


class HeldProject:
    """State of one project in this instance. Not thread-safe; `KeyClient` is its only user."""

    def __init__(
        self,
        project_id: ProjectId,
        on_loss: KeyLossHandler,
        clock: Clock,
        cache_capacity: int,
        cache_ttl_s: float = DEFAULT_TTL_S,
        cut: CutHandler = nothing_to_cut,
        room: DekRoom | None = None,
    ) -> None:
        self.project_id = project_id
        self.on_loss = on_loss
        self.cut = cut
        self.lease = Lease(project_id, clock)
        self.cache = DekCache(cache_capacity, cache_ttl_s, clock.monotonic_s, room)
        self.granted = False
        """A lease was granted at least once (it may be over)."""
        self.lost = False
        """The lease is over and its DEKs are wiped."""
        self.closed = False
        self.refusal: Grant | None = None
        self.settled = asyncio.Event()
        self.epoch = 0
        """Counts losses: a key that was asked for in an earlier epoch must not be taken in."""
        self.handling = 0
        """Losses for which `on_loss` has not succeeded yet."""
        self.handled = asyncio.Event()
        """Set while there are none."""
        self.handled.set()
        self.handler_lock = asyncio.Lock()
        self.pumping = False
        self.missing: dict[tuple[str, str, str, Envelope], Missing] = {}

    def grant(self, grant: Grant, asked_at_s: float, generation: int) -> None:
        """Take a grant in, unless the service is still busy dropping what the last lease protected."""
        if self.closed or self.handling:
            return
        self.granted = True
        self.lease.granted(grant, asked_at_s, generation)
        if self.lease.live:
            self.lost = False

    @property
    def overdue(self) -> bool:
        """The lease ran out, and nobody has dealt with it yet."""
        return self.granted and not self.lost and not self.lease.live

    def lose(self, loss: KeyLoss) -> bool:
        """End the lease, wipe its keys, fail what waits. False if the lease was lost already."""
        self.lease.revoked(loss.state, loss.reason)
        first, self.lost = not self.lost, True
        self.epoch += 1
        self.cache.wipe()
        self.fail_missing(LeaseExpiredError("the lease ended while a key was unwrapped"))
        return first

    def handle(self) -> None:
        """`on_loss` is to be called: no grant is taken in before `was_handled`."""
        self.handling += 1
        self.handled.clear()

    def was_handled(self) -> None:
        self.handling -= 1
        if not self.handling:
            self.handled.set()

    def close(self, reason: str) -> None:
        """The lease was given back: wipe, and never grant again."""
        self.closed = True
        self.lose(KeyLoss(self.project_id, KeyState.ACTIVE, reason, None))
        self.settled.set()

    def check(self, epoch: int) -> None:
        """Raises KeyAccessError when the lease is not live, or was lost since `epoch`."""
        self.lease.check()
        if epoch != self.epoch:
            raise LeaseExpiredError("the lease ended while keys were on their way")

    def find(self, name: ObjectName, envelope: Envelope) -> AeadKey | Missing:
        """The cached key, or the one place where to wait for it."""
        cached = self.cache.get(name, envelope)
        if cached is not None:
            return cached
        key = (name.timeline_id.text, name.object_name, name.kind, envelope)
        missing = self.missing.get(key)
        if missing is None:
            missing = self.missing[key] = Missing(name, envelope)
        return missing

    def take_missing(self, limit: int, size_bytes: int) -> list[Missing]:
        """The next batch to ask for, at most `limit` items and about `size_bytes`."""
        batch: list[Missing] = []
        total = 0
        for missing in self.missing.values():
            total += missing.size_bytes
            if batch and (len(batch) >= limit or total > size_bytes):
                break
            batch.append(missing)
        return batch

    def forget(self, batch: Sequence[Missing]) -> None:
        """These are answered; whoever asks again finds them in the cache."""
        answered = set(map(id, batch))
        self.missing = {key: each for key, each in self.missing.items() if id(each) not in answered}

    def fail_missing(self, error: KeylakeError) -> None:
        missing, self.missing = self.missing, {}
        for each in missing.values():
            each.fail(error)

    def open(self, transport: KeyTransport, name: ObjectName, envelope: Envelope, item: KeyItem) -> AeadKey:
        """Open a DEK that came over the session, check its commitment ourselves, and cache it."""
        dek = transport.open_key(item.sealed_dek, item.envelope)
        try:
            check_commitment(
                envelope, dek, self.lease.scope.object_context(name.timeline_id, name.object_name, name.kind)
            )
        except IntegrityError:
            dek.wipe()
            raise
        key = AeadKey(dek, default_suite())
        self.cache.put(name, envelope, key)
        return key

    def accept(
        self, transport: KeyTransport, names: Sequence[ObjectName], keys: Keys
    ) -> list[tuple[AeadKey, Envelope]]:
        """Take newly generated DEKs in. Raises IntegrityError, CorruptedError."""
        made: list[tuple[AeadKey, Envelope]] = []
        for name, item in zip(names, keys.items, strict=True):
            envelope = Envelope.parse(item.envelope)
            made.append((self.open(transport, name, envelope, item), envelope))
        return made
