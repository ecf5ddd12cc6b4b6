"""The keys of a service: leases that renew themselves, DEKs that live and die with them.

Theory of operation. One task keeps a session (`keysession.py`) open and reconnects with backoff; while there is one,
all held leases are renewed in one message every ttl/3. Another task, the watchdog, watches only the clock: a lease that
ran out loses its keys whatever the network does. So keys go away in three ways, and all three end in `_lose`:

    Revoke pushed ────────────┐
    renewal answered "no" ────┼──► lease ended, DEKs wiped, the service's `cut` (in the same step of the event loop)
    lease ran out (watchdog) ─┘         └──► the service's `on_loss` awaited ──► Acknowledge, if it was a revocation

Invariant: between the arrival of a Revoke and the wiped DEKs there is no `await`. A key that was asked for before a
loss and arrives after it is thrown away (`HeldProject.epoch`), and a lease is not granted anew before its `on_loss` has
finished, successfully: one that fails is called again until it does not, and until then nothing is acknowledged. A
project that was released and is acquired again waits for that, too.

What may interleave: everything here runs on one event loop. Between awaits, `_held` may lose or gain projects and the
session may be another one; each place that awaits looks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

from shared.api.keymanager import (
    MAX_KEYS_PER_REQUEST,
    MAX_PROJECTS_PER_REQUEST,
    Grant,
    KeyState,
    KeyUse,
    ObjectName,
    Revoke,
    Role,
    TokenConfirmed,
    WrappedObject,
)
from shared.auth import PersonToken
from shared.clock import Clock, SystemClock
from shared.config import Address
from shared.confirmed import Confirmed
from shared.crypto.aead import AeadKey
from shared.crypto.envelope import Envelope
from shared.deletion import DeleteProject
from shared.errors import (
    ConflictError,
    IntegrityError,
    KeyAccessError,
    KeylakeError,
    LeaseExpiredError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from shared.ids import InstanceId, ProjectId, TokenId, WorkspaceId
from shared.keycache import DEFAULT_CAPACITY, DEFAULT_ROOM_SIZE_BYTES, DEFAULT_TTL_S, DekRoom
from shared.keyholding import HeldProject, Missing
from shared.keysession import (
    Dial,
    KeySession,
    ReplacedError,
    SessionEndedError,
    SessionIdentity,
    SessionOpener,
    TokenSource,
    dial_over_tls,
)
from shared.lease import RENEWALS_PER_TTL, CutHandler, KeyLoss, KeyLossHandler, Lease, key_access_error, nothing_to_cut
from shared.retry import RetryPolicy
from shared.telemetry import get_logger
from shared.tls import client_context

_log = get_logger(__name__)
T = TypeVar("T")

_RECONNECT: Final = RetryPolicy(attempts=1, first_delay_s=0.05, max_delay_s=1.0)
_GOOD_SESSION_S: Final = 5.0
"""A session that lasted this long was a good one: the next failure is the first again."""
_DELETE_AGAIN_S: Final = 1.0
_DROP_AGAIN_S: Final = 1.0
"""Between two calls of an `on_loss` that fails."""
_PEOPLE_TIMEOUT_S: Final = 1.0
"""A person waits so long while the keymanager cannot be asked about them."""
_WATCHDOG_PERIOD_S: Final = 0.5
"""At most this long between two looks at the clock: asyncio's timers stand still while the machine sleeps."""
_REMEMBERED_REVOCATIONS: Final = 1024
_MAX_BATCH_SIZE_BYTES: Final = 512 * 1024
"""Keeps a request well below MAX_MESSAGE_SIZE_BYTES even when object names are long."""


class KeyClient:
    """Implements `shared.lease.KeySource` over a key session. Use as an async context manager.

    Entering does not wait for the keymanager; `acquire` does. Leaving wipes every DEK, gives every lease back and
    closes the session.
    """

    def __init__(
        self,
        keymanagers: Address | Sequence[Address],
        ca_certificate: Path,
        tokens: TokenSource,
        *,
        role: Role,
        node_id: str,
        instance_id: InstanceId | None = None,
        clock: Clock | None = None,
        cache_capacity: int = DEFAULT_CAPACITY,
        cache_ttl_s: float = DEFAULT_TTL_S,
        cache_size_bytes: int = DEFAULT_ROOM_SIZE_BYTES,
        request_timeout_s: float = 10.0,
        rng: random.Random | None = None,
        dial: Dial | None = None,
    ) -> None:
        """`keymanagers`: all replicas; the one that leads is found, and found again. `cache_capacity` is in DEKs per
        project, `cache_ttl_s` how long one is answered from the cache, `cache_size_bytes` what those of all projects
        may take together, about. `request_timeout_s` bounds every call, reconnecting included."""
        self.identity: Final = SessionIdentity(role, node_id, instance_id or InstanceId.new())
        self._clock = clock or SystemClock()
        addresses = (keymanagers,) if isinstance(keymanagers, Address) else tuple(keymanagers)
        dial = dial or dial_over_tls(client_context(ca_certificate))
        self._opener = SessionOpener(addresses, dial, self.identity, tokens, self._clock)
        self._cache_capacity = cache_capacity
        self._cache_ttl_s = cache_ttl_s
        self._room = DekRoom(cache_size_bytes)
        self._request_timeout_s = request_timeout_s
        self._rng = rng or random.SystemRandom()
        self._held: dict[ProjectId, HeldProject] = {}
        self._released: dict[ProjectId, HeldProject] = {}  # with plaintext that is still to be dropped
        self._session: KeySession | None = None
        self._changed = asyncio.Event()  # set and replaced whenever the session or its failure changes
        self._leases_changed = asyncio.Event()
        self._failure: KeylakeError | None = None
        self._replaced = asyncio.Event()
        self._closed = False
        self._acknowledged: dict[str, dict[str, float]] = {}
        self._confirmed = Confirmed()
        self._to_delete: dict[ProjectId, None] = {}  # in the order in which they came
        self._deletion_wanted = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None

    async def __aenter__(self) -> Self:
        started = asyncio.Event()
        self._main = asyncio.create_task(self._run(started), name="key-client")
        await started.wait()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Wipe, give the leases back, close. Idempotent. Raises what went wrong inside, if anything ever did."""
        main, self._main = self._main, None
        if main is None:
            return
        # Not those of which something may be left: a revocation that comes now has to count us in until they run out.
        session, projects = self._session, [each for each, held in self._held.items() if not held.handling]
        self._end("the key client was closed")
        if session is not None and projects:
            try:
                async with asyncio.timeout(1.0):
                    await session.release(projects)
            except (UnavailableError, TimeoutError):
                pass  # they run out by themselves
        main.cancel()
        try:
            await main
        except asyncio.CancelledError:
            if not main.cancelled():  # it was we who were cancelled
                raise

    @property
    def connected(self) -> bool:
        return self._session is not None

    @property
    def replaced(self) -> bool:
        """A newer instance of this node has taken over. This client is of no use any more; end the process."""
        return self._replaced.is_set()

    async def wait_replaced(self) -> None:
        """Returns when a newer instance of this node has taken over."""
        await self._replaced.wait()

    def leases(self) -> list[Lease]:
        """All leases that are held, live or not; for a status page."""
        return [held.lease for held in self._held.values()]

    # --- KeySource ---

    async def acquire(self, project_id: ProjectId, on_loss: KeyLossHandler, cut: CutHandler = nothing_to_cut) -> Lease:
        """See `KeySource.acquire`. The first caller's handlers stay until `release`. Raises also ConflictError when
        this instance was replaced, UnauthenticatedError and PermissionDeniedError when our token is refused."""
        deadline_s = self._deadline_s()
        while True:
            self._check_open()
            held, released = self._held.get(project_id), self._released.get(project_id)
            if held is not None and held.granted:
                return held.lease
            if held is not None:
                await held.settled.wait()  # somebody else is asking; if they fail, it is our turn
            elif released is not None:
                await self._dropped(released, deadline_s)
            else:
                break
        held = HeldProject(project_id, on_loss, self._clock, self._cache_capacity, self._cache_ttl_s, cut, self._room)
        self._held[project_id] = held
        try:
            while not held.granted:
                if held.refusal is not None:
                    raise key_access_error(held.refusal.state, held.refusal.reason, held.refusal.workspace_id)
                session = await self._connected(deadline_s)
                try:
                    await session.renew([project_id], self._remaining_s(deadline_s))
                except SessionEndedError:
                    continue  # reconnects until the deadline
                if held.closed:
                    raise LeaseExpiredError("the lease was released while it was asked for")
                if not held.granted and held.refusal is None:
                    raise NotFoundError("there is no such project, or this token may not use it")
            return held.lease
        finally:
            if not held.granted and self._held.get(project_id) is held:
                del self._held[project_id]
                held.close("not granted")
            held.settled.set()
            self._leases_changed.set()

    async def release(self, project_id: ProjectId) -> None:
        held = self._held.pop(project_id, None)
        if held is None:
            return
        held.close("released")
        if held.handling:  # something may be left: it is not given back, and runs out by itself
            self._released[project_id] = held
            return
        if self._session is not None:
            with contextlib.suppress(UnavailableError):  # it runs out by itself
                await self._session.release([project_id])

    async def _dropped(self, released: HeldProject, deadline_s: float) -> None:
        """Return when what a released lease protected is gone. Raises UnavailableError."""
        try:
            async with asyncio.timeout(self._remaining_s(deadline_s)):
                await released.handled.wait()
        except TimeoutError:
            raise UnavailableError("plaintext under the last lease is still being dropped") from None

    async def generate(self, project_id: ProjectId, objects: Sequence[ObjectName]) -> list[tuple[AeadKey, Envelope]]:
        held, deadline_s = self._live(project_id), self._deadline_s()
        made: list[tuple[AeadKey, Envelope]] = []
        for batch in _batches(objects):
            epoch = held.epoch
            while True:
                session = await self._connected(deadline_s)
                try:
                    answer = await session.generate(project_id, batch, self._remaining_s(deadline_s))
                    break
                except SessionEndedError:
                    continue  # the keys that were lost with the session were never used
            held.check(epoch)
            made += held.accept(session.transport, batch, answer)
        held.lease.check()
        return made

    async def unwrap(self, project_id: ProjectId, items: Sequence[tuple[ObjectName, Envelope]]) -> list[AeadKey]:
        held = self._live(project_id)
        found = [held.find(name, envelope) for name, envelope in items]
        self._pump(held)
        for missing in found:
            if isinstance(missing, Missing):
                await missing.wait()
        held.lease.check()
        return [key.result() if isinstance(key, Missing) else key for key in found]

    # --- PeopleRegistry ---

    async def confirm(self, person: PersonToken) -> None:
        """See `PeopleRegistry.confirm`. Takes nobody's word without a session: a revocation would not be heard of."""
        if self._holds(person):
            return
        deadline_s = asyncio.get_running_loop().time() + _PEOPLE_TIMEOUT_S
        session = await self._to_ask_about_people(deadline_s)
        await session.confirm_token(person, self._remaining_s(deadline_s))
        if not self._holds(person):
            raise UnauthenticatedError("the token was revoked")  # between the answer and now

    async def _to_ask_about_people(self, deadline_s: float) -> KeySession:
        try:
            return await self._connected(deadline_s)
        except KeylakeError as error:  # it is about us, whatever it is: nothing is wrong with the person's token
            raise UnavailableError(f"the keymanager cannot be asked about people's tokens: {error}") from None

    def _holds(self, person: PersonToken) -> bool:
        live = self._session is not None and not self._session.ended
        return live and self._confirmed.holds(person, self._clock.monotonic_s())

    async def workspaces_of(self, project_ids: Iterable[ProjectId]) -> Mapping[ProjectId, WorkspaceId]:
        """See `PeopleRegistry.workspaces_of`."""
        wanted = list(dict.fromkeys(project_ids))
        found = self._confirmed.workspaces(wanted)
        missing = [each for each in wanted if each not in found]
        deadline_s = asyncio.get_running_loop().time() + _PEOPLE_TIMEOUT_S
        for start in range(0, len(missing), MAX_PROJECTS_PER_REQUEST):
            session = await self._to_ask_about_people(deadline_s)
            batch = missing[start : start + MAX_PROJECTS_PER_REQUEST]
            located = await session.locate(batch, self._remaining_s(deadline_s))
            self._confirmed.locate(located)
            found |= located
        return found

    async def rewrap(self, project_id: ProjectId, items: Sequence[tuple[ObjectName, Envelope]]) -> list[Envelope]:
        held, deadline_s = self._live(project_id), self._deadline_s()
        made: list[Envelope] = []
        for batch in _batches(items):
            wrapped = [WrappedObject(object=name, envelope=envelope.serialize()) for name, envelope in batch]
            while True:
                session = await self._connected(deadline_s)
                try:
                    answer = await session.rewrap(project_id, wrapped, self._remaining_s(deadline_s))
                    break
                except SessionEndedError:
                    continue  # what was lost with the session was wrapped for nothing, and no harm is done
            made += (same_dek(before, Envelope.parse(after)) for (_, before), after in zip(batch, answer, strict=True))
        held.lease.check()
        return made

    async def report(self, project_id: ProjectId, kek_version: int, uses: Sequence[KeyUse]) -> None:
        self._live(project_id)
        deadline_s = self._deadline_s()
        while True:
            session = await self._connected(deadline_s)
            try:
                await session.report(project_id, kek_version, uses, self._remaining_s(deadline_s))
                return
            except SessionEndedError:
                continue  # it is what it is

    async def note_branch(self, project_id: ProjectId, ancestor_project_id: ProjectId) -> None:
        self._live(project_id)
        deadline_s = self._deadline_s()
        while True:
            session = await self._connected(deadline_s)
            try:
                await session.note_branch(project_id, ancestor_project_id, self._remaining_s(deadline_s))
                return
            except SessionEndedError:
                continue  # it is what it is

    # --- SessionEvents: called by the session's reader; no awaits ---

    def on_token_confirmed(self, confirmed: TokenConfirmed, asked_at_s: float) -> None:
        self._confirmed.confirm(confirmed.token_id, confirmed.digest, asked_at_s + confirmed.ttl_s)

    def on_token_revoked(self, token_id: TokenId) -> None:
        self._confirmed.revoke(token_id)

    def on_grants(self, grants: Sequence[Grant], asked_at_s: float, generation: int) -> None:
        for grant in grants:
            held = self._held.get(grant.project_id)
            if held is None:
                continue
            if held.overdue:  # we slept, or the watchdog is late: what the old lease protected goes first
                self._lose(held, KeyLoss(grant.project_id, KeyState.ACTIVE, "the lease ran out", None))
            if grant.state is KeyState.ACTIVE:
                held.grant(grant, asked_at_s, generation)
            elif held.granted:
                self._lose(held, KeyLoss(grant.project_id, grant.state, grant.reason, None))
            else:
                held.refusal = grant
        self._leases_changed.set()

    def on_revoke(self, revoke: Revoke) -> None:
        loss = KeyLoss(revoke.project_id, revoke.state, revoke.reason, revoke.revocation_id)
        held = self._held.get(revoke.project_id)
        if held is None or not held.granted:
            held = self._released.get(revoke.project_id)
        if held is None:
            self._spawn_acknowledge(loss, {})  # nothing is held, so there is nothing to drop
        else:
            self._lose(held, loss)

    def on_restored(self, project_id: ProjectId) -> None:
        held = self._held.get(project_id)
        if held is not None and self._tasks is not None:
            self._tasks.create_task(self._renew([project_id]))

    def on_delete_data(self, project_ids: Sequence[ProjectId]) -> None:
        self._to_delete.update(dict.fromkeys(project_ids))
        self._deletion_wanted.set()

    # --- shredded projects ---

    async def tend_deletions(self, delete: DeleteProject) -> None:
        """Delete what this node stores of shredded projects, whenever the keymanager says so, and report it. Until
        cancelled. What fails is done again: the keymanager asks until nothing is left."""
        while True:
            await self._deletion_wanted.wait()
            self._deletion_wanted.clear()
            while self._to_delete:
                project_id = next(iter(self._to_delete))
                del self._to_delete[project_id]  # asked for again meanwhile: look again
                try:
                    await self._delete(project_id, delete)
                except KeylakeError as error:
                    _log.warning("deletion waits", project_id=str(project_id), code=error.code, error=str(error))
                    await self._delete_again(project_id)
                except Exception as error:
                    # A defect with one project is no reason to leave the others.
                    _log.error("deletion failed", project_id=str(project_id), exc_info=error)
                    await self._delete_again(project_id)

    async def _delete_again(self, project_id: ProjectId) -> None:
        self._to_delete[project_id] = None
        await asyncio.sleep(_DELETE_AGAIN_S)

    async def _delete(self, project_id: ProjectId, delete: DeleteProject) -> None:
        done = await delete(project_id)
        await self.release(project_id)
        holds_keys = project_id in self._held or project_id in self._released
        _log.warning(
            "deleted a shredded project",
            project_id=str(project_id),
            objects=done.total.objects,
            left=done.left_objects,
        )
        deadline_s = self._deadline_s()
        while True:
            session = await self._connected(deadline_s)
            try:
                remaining_s = self._remaining_s(deadline_s)
                await session.report_deletion(project_id, done, remaining_s, holds_keys=holds_keys)
                return
            except SessionEndedError:
                continue
            except UnavailableError:
                # What was deleted is not there any more at the next look: its count must not get lost.
                deadline_s = self._deadline_s()
                await asyncio.sleep(_DELETE_AGAIN_S)

    # --- loss ---

    def _lose(self, held: HeldProject, loss: KeyLoss) -> None:
        """End the lease and wipe its keys now; the rest follows in a task."""
        first = held.lose(loss)
        if loss.revocation_id is None and not first:
            return  # known already: a renewal says the same every ttl/3
        try:
            held.cut(loss)
        except Exception as error:  # `on_loss` is called until it has made up for it
            _log.error("cutting a project's connections failed", project_id=str(loss.project_id), exc_info=error)
        if self._tasks is not None:
            held.handle()
            self._tasks.create_task(self._handle_loss(held, loss))

    async def _handle_loss(self, held: HeldProject, loss: KeyLoss) -> None:
        steps_s = self._acknowledged.get(loss.revocation_id or "")  # pushed again after a reconnect?
        async with held.handler_lock:
            while steps_s is None:
                steps_s = await self._drop(held, loss)
        held.was_handled()
        if not held.handling and self._released.get(loss.project_id) is held:
            del self._released[loss.project_id]
        await self._acknowledge(loss, steps_s)
        if not held.closed:
            await self._renew([loss.project_id])  # it may have been restored meanwhile

    @staticmethod
    async def _drop(held: HeldProject, loss: KeyLoss) -> dict[str, float] | None:
        """One call of `on_loss`. None, after a pause, when it failed: plaintext may be left then, so the loss is
        neither acknowledged nor over. The keymanager will say "fenced" when the lease has run out, which is what is
        true."""
        try:
            return await held.on_loss(loss)
        except Exception as error:
            _log.error("dropping a project's plaintext failed", project_id=str(loss.project_id), exc_info=error)
        await asyncio.sleep(_DROP_AGAIN_S)
        return None

    def _spawn_acknowledge(self, loss: KeyLoss, steps_s: dict[str, float]) -> None:
        if self._tasks is not None:
            self._tasks.create_task(self._acknowledge(loss, steps_s))

    async def _acknowledge(self, loss: KeyLoss, steps_s: dict[str, float]) -> None:
        if loss.revocation_id is None:
            return
        self._acknowledged[loss.revocation_id] = steps_s
        while len(self._acknowledged) > _REMEMBERED_REVOCATIONS:
            del self._acknowledged[next(iter(self._acknowledged))]
        if self._session is not None:
            with contextlib.suppress(UnavailableError):  # the Revoke comes again, and is answered from memory
                await self._session.acknowledge(loss.revocation_id, loss.project_id, steps_s)

    # --- unwrapping ---

    def _pump(self, held: HeldProject) -> None:
        if held.missing and not held.pumping and self._tasks is not None:
            held.pumping = True
            self._tasks.create_task(self._unwrap_missing(held))

    async def _unwrap_missing(self, held: HeldProject) -> None:
        """Unwrap what is asked for, batch after batch. What is asked while one batch is under way is the next batch."""
        try:
            while batch := held.take_missing(MAX_KEYS_PER_REQUEST, _MAX_BATCH_SIZE_BYTES):
                try:
                    await self._unwrap_batch(held, batch)
                finally:
                    held.forget(batch)
        finally:
            held.pumping = False
            held.fail_missing(UnavailableError("unwrapping was interrupted"))

    async def _unwrap_batch(self, held: HeldProject, batch: Sequence[Missing]) -> None:
        deadline_s, epoch = self._deadline_s(), held.epoch
        batch = [missing for missing in batch if not missing.done]
        if not batch:
            return
        try:
            while True:
                session = await self._connected(deadline_s)
                try:
                    items = [missing.wrapped for missing in batch]
                    answer = await session.unwrap(held.project_id, items, self._remaining_s(deadline_s))
                    break
                except SessionEndedError:
                    continue  # unwrapping is idempotent
            held.check(epoch)
            for missing, item in zip(batch, answer.items, strict=True):
                missing.resolve(held, session.transport, item)
        except (KeyAccessError, UnavailableError, PermissionDeniedError, UnauthenticatedError, ConflictError) as error:
            for missing in batch:
                missing.fail(error)
        except KeylakeError as error:
            # One bad envelope fails its whole message, and strangers share messages: find out whose it is.
            if len(batch) == 1:
                batch[0].fail(error)
                return
            middle = len(batch) // 2
            await self._unwrap_batch(held, batch[:middle])
            await self._unwrap_batch(held, batch[middle:])

    # --- session ---

    async def _run(self, started: asyncio.Event) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._watch_leases())
                self._tasks.create_task(self._stay_connected())
                started.set()
        finally:
            self._tasks = None
            self._end("the key client has stopped")

    async def _stay_connected(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            opened_at = loop.time()
            try:
                session = await self._open()
                await self._use(session)
            except ReplacedError as error:
                _log.error("a newer instance of this node took over; fenced for good", node_id=self.identity.node_id)
                self._replaced.set()
                self._set_session(None, error)
                self._drop_all("a newer instance of this node has taken over")
                return
            except KeylakeError as error:
                failures = failures + 1 if loop.time() - opened_at < _GOOD_SESSION_S else 1
                if failures == 1:
                    _log.warning("no key session", reason=str(error), code=error.code)
            await asyncio.sleep(_RECONNECT.delay_s(failures, self._rng))

    async def _open(self) -> KeySession:
        try:
            return await self._opener.open(self)
        except KeylakeError as error:
            self._set_session(None, error)
            raise

    async def _use(self, session: KeySession) -> None:
        """Run a session until it ends. Raises what ended it."""
        running = asyncio.create_task(session.run())
        renewing = asyncio.create_task(self._keep_renewed(session))
        self._set_session(session, None)
        try:
            await asyncio.wait({running, renewing}, return_when=asyncio.FIRST_COMPLETED)
            await (running if running.done() else renewing)
        except asyncio.CancelledError:
            await session.close()
            raise
        finally:
            self._set_session(None, None)
            for task in (running, renewing):
                task.cancel()
            await asyncio.gather(running, renewing, return_exceptions=True)
            session.abort()

    async def _keep_renewed(self, session: KeySession) -> None:
        """Renew all leases every ttl/3; with none to renew, the empty message still shows whether anybody is there.

        Raises UnavailableError when a renewal is not answered by the time of the next: the connection is dead.
        """
        period_s = session.lease_ttl_s / RENEWALS_PER_TTL
        loop = asyncio.get_running_loop()
        while True:
            next_at = loop.time() + period_s
            projects = list(self._held)
            for start in range(0, max(1, len(projects)), MAX_PROJECTS_PER_REQUEST):
                await session.renew(projects[start : start + MAX_PROJECTS_PER_REQUEST], period_s)
            await asyncio.sleep(max(0.0, next_at - loop.time()))

    async def _renew(self, project_ids: Sequence[ProjectId]) -> None:
        """Ask once, now; the periodic renewal covers a failure."""
        if self._session is not None:
            try:
                await self._session.renew(project_ids, self._session.lease_ttl_s)
            except KeylakeError as error:
                _log.info("an extra lease renewal failed", code=error.code)

    def _set_session(self, session: KeySession | None, failure: KeylakeError | None) -> None:
        self._session, self._failure = session, failure
        self._confirmed.forget_tokens()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _connected(self, deadline_s: float) -> KeySession:
        """The session, waited for. Raises why there is none."""
        try:
            async with asyncio.timeout(self._remaining_s(deadline_s)):
                # A session that has ended is not handed out again: whoever retries would spin until it is cleared away.
                while self._session is None or self._session.ended:
                    self._check_open()
                    if isinstance(self._failure, UnauthenticatedError | PermissionDeniedError):
                        raise type(self._failure)(str(self._failure))
                    await self._changed.wait()
        except TimeoutError:
            raise UnavailableError("the keymanager cannot be reached") from None
        return self._session

    # --- leases ---

    async def _watch_leases(self) -> None:
        """The watchdog: what has run out loses its keys, whether or not the keymanager can be reached."""
        while True:
            self._leases_changed.clear()
            for held in list(self._held.values()):
                if held.overdue:
                    self._lose(held, KeyLoss(held.project_id, KeyState.ACTIVE, "the lease ran out", None))
            live = (held.lease.remaining_s for held in self._held.values() if held.granted and not held.lost)
            pause_s = min(live, default=_WATCHDOG_PERIOD_S)
            try:
                async with asyncio.timeout(min(pause_s, _WATCHDOG_PERIOD_S)):
                    await self._leases_changed.wait()
            except TimeoutError:
                pass

    def _live(self, project_id: ProjectId) -> HeldProject:
        self._check_open()
        held = self._held.get(project_id)
        if held is None or not held.granted:
            raise LeaseExpiredError("there is no lease on this project: acquire one first")
        held.lease.check()
        return held

    def _drop_all(self, reason: str) -> None:
        for held in self._held.values():
            if held.granted:
                self._lose(held, KeyLoss(held.project_id, KeyState.ACTIVE, reason, None))

    def _end(self, reason: str) -> None:
        self._closed = True
        for held in self._held.values():
            held.close(reason)
        self._held.clear()
        self._set_session(None, None)

    def _check_open(self) -> None:
        if self._replaced.is_set():
            raise ReplacedError("a newer instance of this node has taken over its leases")
        if self._closed or self._tasks is None:
            raise LeaseExpiredError("the key client is closed")

    def _deadline_s(self) -> float:
        return asyncio.get_running_loop().time() + self._request_timeout_s

    @staticmethod
    def _remaining_s(deadline_s: float) -> float:
        return max(0.0, deadline_s - asyncio.get_running_loop().time())


def _batches(things: Sequence[T]) -> Iterable[Sequence[T]]:
    size = MAX_KEYS_PER_REQUEST // 2  # keeps 512-character names below the message limit
    return (things[start : start + size] for start in range(0, len(things), size))


def same_dek(before: Envelope, after: Envelope) -> Envelope:
    """`after`, if it can be the same DEK wrapped again. Raises IntegrityError."""
    if (after.commitment, after.dek_version) != (before.commitment, before.dek_version):
        raise IntegrityError("the keymanager answered with the envelope of another key")
    return after
