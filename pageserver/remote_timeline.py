"""A timeline in the object store: layers, and an index that says which of them count.

    projects/<project>/timelines/<timeline>/layers/<name>          a sealed layer; <name>.key, its envelope
    projects/<project>/timelines/<timeline>/index/<seq:016x>       one version of the index; <seq>.key, its envelope

Theory of operation. Upload order: layers, then the index that lists them, then deletes. Objects are put once and then
only deleted. Versions of the index are numbered slots, filled strictly one after the other:

    writer:  put_if_absent(<seq>.key)  →  put_if_absent(<seq>)  →  list: nothing newer is there  →  it counts
    loader:  newest <seq> that is there; if <seq+1>.key is there without its index, its writer died or is slow:
             put_if_absent(<seq+1>, VOID) closes the slot. If the writer was faster, load what it wrote.

So a slot is decided once, by the store, whoever writes or dies when. Of two pageservers on one timeline both may load
slot n, but only one gets n+1; the other's put fails, which is a FencedError, and it stops before it has told anybody
that its state is durable. (Neon has generation numbers from a control plane instead: docs/rfcs/025.)

The last look is for a writer that slept so long that the slot it wants was filled *and deleted* meanwhile. A slot is
deleted only when two newer versions exist, and *after all older ones*. So whoever fills a slot that others have used
has lost the version that it came from: to look for that one object is enough, and no listing is relied on.

Generations. The generation of a writer is the first slot that it will fill: the one after the version that it loaded.
Several may have loaded the same version, but only the one that fills that slot ever lists anything, so of all writers
whose objects count no two share a generation. It stands in the names of layers and in the index. Whoever deletes looks
at the slots first (`validate`, by single objects, too): only while its own version is the newest, and never objects of
a later generation. So a writer that was replaced deletes nothing, and where an object comes from can be told without
any key.

What the index cannot show by itself is that it is the *newest*: an object store that hides the last versions serves an
older, valid timeline. Two things can show it. The highest slot that this machine has seen is kept beside the layer
cache, and loading less is refused; and `at_least_lsn` is what the safekeepers remember to be durable, who are asked
when a timeline is attached (announced.py) and heard while it lives (walreceiver.py). With an empty disk and safekeepers
that know nothing, or cannot be reached, a rollback of the whole timeline is not detected (docs/formats/index.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from pageserver.index_part import IndexPart
from pageserver.layer.name import LayerDescriptor, LayerKind, parse_generation
from pageserver.layer_cache import LayerCache
from shared.api.keymanager import ObjectName
from shared.crypto.aead import AeadKey
from shared.crypto.context import EncryptionContext
from shared.crypto.envelope import Envelope
from shared.crypto.sealed_object import open_object, seal_object
from shared.errors import ConflictError, CorruptedError, IntegrityError, KeyAccessError, KeylakeError, NotFoundError
from shared.failpoints import failpoint
from shared.ids import ProjectId, TimelineId
from shared.lease import KeySource, Lease
from shared.retry import RetryPolicy, retry
from shared.storage.base import Data, ObjectExistsError, ObjectNotFoundError, ObjectStore
from shared.telemetry import get_logger

INDEX_KIND: Final = "index/2"
INDEX_CHUNK_SIZE_BYTES: Final = 64 * 1024
KEPT_INDEX_VERSIONS: Final = 2
VOID: Final = b"KLIV"
"""Content of an index slot that its loader closed. Public, and no sealed object: those start with KLOB."""
GONE: Final = b"KLGN"
"""So begins the content of the slot in which a timeline ends (removal.py): it and what came before do not count."""

ENVELOPE_SUFFIX: Final = ".key"
_PUTS_AT_ONCE: Final = 16
_SLOT: Final = re.compile(r"([0-9a-f]{16})(\.key)?", re.ASCII)
T = TypeVar("T")
_log = get_logger(__name__)


def slot_name(slot: int) -> str:
    return f"{slot:016x}"


async def list_slots(store: ObjectStore, prefix: str, *, strict: bool = True) -> tuple[set[int], set[int]]:
    """(slots whose index is there, slots whose envelope is there) of the index below `prefix`. Raises what the store
    raises; and if `strict`, IntegrityError for an object that is neither."""
    filled: set[int] = set()
    begun: set[int] = set()
    async for info in store.list(prefix):
        match = _SLOT.fullmatch(info.key[len(prefix) :])
        if match is None:
            if strict:
                raise IntegrityError("an object under the index has no slot's name")
            continue
        (begun if match[2] else filled).add(int(match[1], 16))
    return filled, begun


class FencedError(ConflictError):
    """Another pageserver writes this timeline: this one must stop."""


class TimelineExistsError(ConflictError):
    """The timeline was created before."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A version of the index on its way. A slot's DEK seals once, so a retry sends the same bytes again."""

    slot: int
    index: IndexPart
    envelope: bytes
    sealed: bytes


class RemoteTimeline:
    """One writer's view of one timeline. After a FencedError, or when keys were lost, make another one and load."""

    def __init__(
        self,
        project_id: ProjectId,
        timeline_id: TimelineId,
        store: ObjectStore,
        files: LayerCache,
        keys: KeySource,
        lease: Lease,
        retry_policy: RetryPolicy,
    ) -> None:
        self.project_id = project_id
        self.timeline_id = timeline_id
        self._store = store
        self._files = files
        self._keys = keys
        self._lease = lease
        self._retry_policy = retry_policy
        self._prefix = f"projects/{project_id}/timelines/{timeline_id}"
        self._envelopes: dict[str, Envelope] = {}
        self._slots: set[int] = set()
        self._index_slot = 0
        self._pending: _Pending | None = None
        self._orphans: list[str] = []
        self._generation = 0

    # --- names and keys ---

    @property
    def prefix(self) -> str:
        """Every object of this timeline starts with it."""
        return f"{self._prefix}/"

    @property
    def generation(self) -> int:
        """Of this writer; after `load`."""
        return self._generation

    def layer_object_key(self, name: str) -> str:
        return f"{self._prefix}/layers/{name}"

    def object_context(self, object_key: str, kind: LayerKind) -> EncryptionContext:
        """What the chunks of a layer are bound to."""
        return self._context(self._name(object_key, kind.object_kind))

    async def layer_key(self, layer: LayerDescriptor) -> AeadKey:
        """The DEK of a listed layer. Raises KeyAccessError, UnavailableError, IntegrityError."""
        name = self._name(self.layer_object_key(layer.name), layer.kind.object_kind)
        try:
            (key,) = await self._keys.unwrap(self.project_id, [(name, self._envelopes[layer.name])])
        except (IntegrityError, NotFoundError):
            # The index has a copy of the envelope, made when the layer was. After a KEK rotation only the object
            # beside the layer is under a KEK that still exists.
            envelope = await self._read_envelope(name.object_name)
            (key,) = await self._keys.unwrap(self.project_id, [(name, envelope)])
            self._envelopes[layer.name] = envelope
        return key

    async def _unwrap_ahead(self, index: IndexPart) -> None:
        """Have the DEKs of all layers cached, in one round trip instead of one per layer."""
        names = [
            (self._name(self.layer_object_key(layer.name), layer.kind.object_kind), envelope)
            for layer, envelope in index.layers
        ]
        if names:
            with contextlib.suppress(IntegrityError, NotFoundError):  # a re-wrapped one: `layer_key` finds its way
                await self._keys.unwrap(self.project_id, names)

    async def new_layer_key(self, object_key: str, kind: LayerKind) -> tuple[AeadKey, Envelope]:
        """A fresh DEK for a layer about to be sealed. Raises KeyAccessError, UnavailableError."""
        name = self._name(object_key, kind.object_kind)
        ((key, envelope),) = await self._keys.generate(self.project_id, [name])
        return key, envelope

    # --- layers ---

    async def upload_layer(self, layer: LayerDescriptor, envelope: Envelope, sealed: Data) -> None:
        """Make a layer durable. It does not count until an index lists it.

        The envelope goes first, so that there is never a layer in the store that nobody can shred or re-wrap.
        """
        object_key = self.layer_object_key(layer.name)
        await self._put_once(object_key + ENVELOPE_SUFFIX, envelope.serialize())
        failpoint("layer-key-put")
        await self._put_once(object_key, sealed)
        failpoint("layer-put")
        self._envelopes[layer.name] = envelope

    async def rewrap_layers(self, layers: Sequence[LayerDescriptor]) -> dict[str, Envelope]:
        """Wrap the DEKs of listed layers again, and store the envelopes beside them. Returns them by layer name.

        An index that is published afterwards is to list them. Until then its copies are older wraps of the same DEKs,
        under KEKs that exist for as long as any stored index is under them. Raises KeyAccessError, UnavailableError,
        ConflictError, IntegrityError.
        """
        names = [self._name(self.layer_object_key(layer.name), layer.kind.object_kind) for layer in layers]
        before = [self._envelopes[layer.name] for layer in layers]
        try:
            after = await self._keys.rewrap(self.project_id, list(zip(names, before, strict=True)))
        except IntegrityError:  # see `layer_key`
            before = [await self._read_envelope(name.object_name) for name in names]
            after = await self._keys.rewrap(self.project_id, list(zip(names, before, strict=True)))
        changed = [(name.object_name, new) for name, old, new in zip(names, before, after, strict=True) if new != old]
        for start in range(0, len(changed), _PUTS_AT_ONCE):
            # All of them end before an error is raised: none may land behind the put of a later pass.
            results = await asyncio.gather(
                *(
                    self._put(object_key + ENVELOPE_SUFFIX, envelope.serialize())
                    for object_key, envelope in changed[start : start + _PUTS_AT_ONCE]
                ),
                return_exceptions=True,
            )
            failpoint("layers-rewrapped")
            for result in results:
                if result is not None:
                    raise result
        made = {layer.name: envelope for layer, envelope in zip(layers, after, strict=True)}
        self._envelopes |= made
        return made

    async def slot_envelopes(self) -> list[Envelope]:
        """Of the versions of the index that are in the store, and of one that may be on its way there."""
        found = [] if self.envelope_under_way is None else [self.envelope_under_way]
        _, begun = await self._retry(self._list_slots)
        return found + [await self._read_envelope(self._slot_key(slot)) for slot in sorted(begun)]

    @property
    def envelope_under_way(self) -> Envelope | None:
        """Of a version of the index that may or may not arrive in the store yet."""
        return None if self._pending is None else Envelope.parse(self._pending.envelope)

    async def look_for_orphans(self, keep: Set[str]) -> None:
        """Note layer objects that are not of the layers named in `keep`: the next `publish` deletes them.

        Before a publish and not after it: what a rival has put there by now, it can list only in the slot that becomes
        ours, or ours fails.
        """
        on_its_way = () if self._pending is None else self._pending.index.layers
        self._orphans = await self._list_orphans(keep | {layer.name for layer, _ in on_its_way})

    async def delete_layers(self, names: Iterable[str]) -> None:
        """Objects of layers that no index lists any more and nobody reads. Raises FencedError, and what the store
        raises: then the next `publish` deletes them."""
        names = list(names)
        self.abandon_layers(names)
        await self.validate()
        await self._delete_layers(names)
        self._orphans = [key for key in self._orphans if key not in self._object_keys(names)]

    def abandon_layers(self, names: Iterable[str]) -> None:
        """These were uploaded, or listed, and are not to be listed (again): the next `publish` deletes them."""
        names = list(names)
        self.forget_layers(names)
        self._orphans += self._object_keys(names)

    async def validate(self) -> None:
        """Raises FencedError unless the newest version of the index is this writer's, and UnavailableError.

        The next slot first: were it filled by then, and deleted since, this writer's would be gone, too.
        """
        while True:
            before = self._index_slot, self._pending
            newest = max(self._slots, default=0) if self._pending is None else self._pending.slot
            following = self._slot_key(newest + 1)
            is_newest = not (await self._holds(following) or await self._holds(following + ENVELOPE_SUFFIX))
            is_there = await self._holds(self._slot_key(self._index_slot))
            if before == (self._index_slot, self._pending):
                break  # or it has published meanwhile, and the look is of no use
        if not (is_newest and is_there):
            raise FencedError("another pageserver writes this timeline: nothing is deleted")

    async def _holds(self, key: str) -> bool:
        """Is this object there?"""
        try:
            await self._retry(lambda: self._store.head(key))
        except ObjectNotFoundError:
            return False
        return True

    def forget_layers(self, names: Iterable[str]) -> None:
        """These were uploaded, or listed, and are not to be listed (again)."""
        for name in names:
            self._envelopes.pop(name, None)

    async def stored_key(self, object_key: str, kind: str) -> tuple[AeadKey, EncryptionContext]:
        """The DEK of any sealed object, listed or not, by the envelope beside it, and what its chunks are bound to.
        Raises KeyAccessError, UnavailableError, IntegrityError."""
        name = self._name(object_key, kind)
        (key,) = await self._keys.unwrap(self.project_id, [(name, await self._read_envelope(object_key))])
        return key, self._context(name)

    async def stored_envelope(self, object_key: str) -> Envelope | None:
        """What lies beside an object; None when nothing does. Raises IntegrityError, and what the store raises."""
        try:
            return Envelope.parse(await self._read(object_key + ENVELOPE_SUFFIX))
        except ObjectNotFoundError:
            return None

    # --- the index ---

    async def load(self, *, at_least_lsn: int = 0) -> IndexPart | None:
        """The newest index, None when there is no timeline. From now on `publish` fills the slot after it.

        Raises IntegrityError when it does not open, when it is older than this machine has seen, or when it does not
        reach `at_least_lsn`; KeyAccessError; UnavailableError. There is no falling back to an older version: that would
        silently take back what was announced as durable.
        """
        filled, begun = await self._list_slots()
        while begun - filled and max(begun) > max(filled, default=0):
            await self._put_once(self._slot_key(max(begun)), VOID, or_else=True)
            failpoint("slot-closed")
            filled, begun = await self._list_slots()
        self._slots = filled | begun
        self._generation = max(self._slots, default=0) + 1
        index, slot = await self._open_newest(sorted(filled, reverse=True))
        if slot < await self._files.recall_number(self._seen_key):
            raise IntegrityError("the object store shows an older index than this machine has seen")
        if (0 if index is None else index.disk_consistent_lsn) < at_least_lsn:
            raise IntegrityError("the object store shows an index that lacks what was announced as durable")
        self._index_slot = 0 if index is None else slot
        self._envelopes = {} if index is None else {layer.name: envelope for layer, envelope in index.layers}
        self._orphans = await self._list_orphans(self._envelopes.keys())
        if index is None:
            return None
        await self._unwrap_ahead(index)
        await self._files.remember_number(self._seen_key, slot)
        return index

    async def publish(self, index: IndexPart, *, removed: Iterable[str] = ()) -> None:
        """Make `index` the newest version; when this returns it is durable. Then delete the objects of layers named in
        `removed`, and versions older than the last two.

        Raises FencedError when another writer was faster: this object is of no more use. After any other error
        (KeyAccessError, UnavailableError, StoreDeniedError) it may be called again with the same or a newer index.
        """
        index = replace(index, generation=self._generation)
        if self._pending is not None:
            # An attempt ended in the dark. Its slot must hold exactly its bytes, or somebody else's; never others.
            finished = self._pending.index
            await self._fill(self._pending, ())
            if finished == index:
                await self._delete_layers(removed)
                return
        slot = max(self._slots, default=0) + 1
        name = self._name(self._slot_key(slot), INDEX_KIND)
        ((key, envelope),) = await self._keys.generate(self.project_id, [name])
        sealed = seal_object(key, self._context(name), index.serialize(), INDEX_CHUNK_SIZE_BYTES)
        self._pending = _Pending(slot, index, envelope.serialize(), sealed)
        await self._fill(self._pending, removed)

    async def _fill(self, pending: _Pending, removed: Iterable[str]) -> None:
        object_key = self._slot_key(pending.slot)
        try:
            await self._put_once(object_key + ENVELOPE_SUFFIX, pending.envelope)
            failpoint("index-key-put")
            await self._put_once(object_key, pending.sealed)
            failpoint("index-put")
        except ObjectExistsError:
            raise FencedError("another pageserver writes this timeline") from None
        filled, begun = await self._retry(self._list_slots)
        if max(filled | begun) > pending.slot:
            raise FencedError("another pageserver wrote this timeline meanwhile")
        if self._index_slot and not await self._holds(self._slot_key(self._index_slot)):
            with contextlib.suppress(KeylakeError):  # the newest version it would be, had the timeline been deleted
                await self._store.delete_many([object_key, object_key + ENVELOPE_SUFFIX])
            raise FencedError("another pageserver has long gone on with this timeline")
        self._pending = None
        self._slots = filled | begun
        previous, self._index_slot = self._index_slot, pending.slot
        failpoint("index-counts")
        await self._files.remember_number(self._seen_key, pending.slot)
        failpoint("index-remembered")
        # Invariant: from here on it is durable, so nothing below may fail it. What is not deleted now is deleted by
        # the next publish, or ignored.
        old = sorted(slot for slot in self._slots if slot < previous)
        orphans, self._orphans = self._orphans, []
        try:
            for slot in old:  # one after the other: see the theory of operation
                await self._store.delete_many([self._slot_key(slot), self._slot_key(slot) + ENVELOPE_SUFFIX])
                failpoint("old-index-deleted")
                self._slots.discard(slot)
            # Whoever wrote them without listing them cannot list them any more: the slot is ours.
            await self._store.delete_many(orphans)
            failpoint("orphans-deleted")
            await self._delete_layers(removed)
        except KeylakeError as error:
            _log.info("old objects were not deleted", timeline_id=str(self.timeline_id), code=error.code)

    async def _delete_layers(self, names: Iterable[str]) -> None:
        names = list(names)
        await self._store.delete_many(self._object_keys(names))
        failpoint("layers-deleted")
        for name in names:
            await self._files.drop(self.layer_object_key(name))

    def _object_keys(self, names: Iterable[str]) -> list[str]:
        keys = [self.layer_object_key(name) for name in names]
        return [*keys, *(key + ENVELOPE_SUFFIX for key in keys)]

    async def _open_newest(self, slots: list[int]) -> tuple[IndexPart | None, int]:
        for slot in slots:
            name = self._name(self._slot_key(slot), INDEX_KIND)
            sealed = await self._read(name.object_name)
            if sealed == VOID:
                continue
            if sealed.startswith(GONE):
                return None, slot
            envelope = await self._read_envelope(name.object_name)
            (key,) = await self._keys.unwrap(self.project_id, [(name, envelope)])
            index = IndexPart.parse(open_object(key, self._context(name), sealed))
            if (index.project_id, index.timeline_id) != (self.project_id, self.timeline_id):
                raise IntegrityError("the index belongs to another timeline")
            if index.generation > slot:
                raise IntegrityError("the index is of a later generation than its slot")
            return index, slot
        return None, 0

    # --- the store ---

    async def _list_slots(self) -> tuple[set[int], set[int]]:
        return await list_slots(self._store, self._slot_prefix)

    async def _list_orphans(self, keep: Set[str]) -> list[str]:
        prefix = f"{self._prefix}/layers/"
        start = len(prefix)
        keys = [info.key async for info in self._store.list(prefix)]
        return [
            key
            for key in keys
            if (name := key[start:].removesuffix(ENVELOPE_SUFFIX)) not in keep and not self._is_newer(name)
        ]

    def _is_newer(self, name: str) -> bool:
        """Is this the name of a layer of a writer that comes after this one?"""
        try:
            return parse_generation(name) > self._generation
        except CorruptedError:
            return False  # no layer at all

    async def _put_once(self, key: str, data: Data, *, or_else: bool = False) -> None:
        """Create an object, with retries. Ours, from an attempt whose answer was lost, counts as created.

        Raises ObjectExistsError when there is another one, unless `or_else`.
        """

        async def attempt() -> None:
            try:
                await self._store.put_if_absent(key, data)
            except ObjectExistsError:
                if not or_else and await self._store.get(key) != data:
                    raise

        await self._retry(attempt)

    async def _put(self, key: str, data: Data) -> None:
        await self._retry(lambda: self._store.put(key, data))

    async def _read_envelope(self, object_key: str) -> Envelope:
        try:
            return Envelope.parse(await self._read(object_key + ENVELOPE_SUFFIX))
        except ObjectNotFoundError:
            raise IntegrityError("a sealed object has no envelope") from None

    async def _read(self, key: str) -> bytes:
        return await self._retry(lambda: self._store.get(key))

    async def _retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        return await retry(
            self._retry_policy,
            lambda _: attempt(),
            retryable=lambda error: (
                isinstance(error, KeylakeError) and error.retryable and not isinstance(error, KeyAccessError)
            ),
        )

    @property
    def _slot_prefix(self) -> str:
        return f"{self._prefix}/index/"

    @property
    def _seen_key(self) -> str:
        return f"{self._prefix}/index-seen"

    def _slot_key(self, slot: int) -> str:
        return self._slot_prefix + slot_name(slot)

    def _name(self, object_key: str, kind: str) -> ObjectName:
        return ObjectName(timeline_id=self.timeline_id, object_name=object_key, kind=kind)

    def _context(self, name: ObjectName) -> EncryptionContext:
        return self._lease.scope.object_context(name.timeline_id, name.object_name, name.kind)
