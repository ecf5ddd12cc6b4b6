"""Keys of one timeline's objects: wrapped again under a newer KEK, replaced by sealing the data anew, and counted.

    re-wrap   new envelopes beside the layers (`<layer>.key`)  →  an index that lists them  →  once more, so that the
              version before it goes, too
    re-key    a layer under a new name and DEK: uploaded  →  an index that lists it instead of the old one  →  when the
              last reader of the old one has left, its objects are deleted

Invariant: for every listed layer, its envelope in each stored index and the one beside it are wraps of one DEK, and the
one beside it is never older than the newest index's copy. So a KEK may go when no stored index and no envelope beside
an object is under it; a crash between any two steps leaves copies under KEKs that are still counted, or an orphan. Each
step can be done again: the next pass looks at the index, and does what is left.

What may interleave: flushes, which publish indexes, too (both do so under `Flusher.lock`, from the index of then); the
loss of the keys, which closes `Live`. Not compaction and GC, between any two steps of which this goes on.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from pageserver.flusher import Flusher
from pageserver.layer.name import LayerDescriptor, layer_name
from pageserver.live import Live, TimelineConfig, TimelineServices
from pageserver.remote_timeline import KEPT_INDEX_VERSIONS
from shared.crypto.aead import AeadKey
from shared.crypto.envelope import Envelope
from shared.crypto.sealed_object import HEADER_SIZE_BYTES, ObjectLayout, ObjectOpener, open_object, seal_object
from shared.errors import IntegrityError, UnavailableError
from shared.failpoints import failpoint
from shared.key_upkeep import Pace

_BATCH: Final = 512
"""Envelopes that are wrapped again between two indexes: a crash makes at most so many wraps useless."""
_ENVELOPE_SUFFIX: Final = ".key"
_Layers = tuple[tuple[LayerDescriptor, Envelope], ...]


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """Envelopes that the timeline itself knows of, by object key. All others lie beside their objects."""

    prefix: str
    envelopes: Mapping[str, Envelope]
    under_way: Envelope | None
    """Of an index that may or may not arrive in the store yet."""


class TimelineKeys:
    """`current` gives the timeline's Live; `layers` is the lock of those who replace layers (Compactor.lock)."""

    def __init__(
        self,
        services: TimelineServices,
        config: TimelineConfig,
        flusher: Flusher,
        layers: asyncio.Lock,
        current: Callable[[], Live | None],
    ) -> None:
        self._services = services
        self._config = config
        self._flusher = flusher
        self._layers = layers
        self._current = current

    # --- re-wrap ---

    async def rewrap(self, kek_version: int, pace: Pace) -> None:
        """See `UpkeepProject.rewrap`."""
        live = self._live()
        await self._flusher.flush(live)  # layers that are stored and not listed yet get listed
        while True:
            async with self._layers:
                live = self._live()
                outdated = [layer for layer, envelope in live.index.layers if envelope.kek_version < kek_version]
                outdated = outdated[:_BATCH]
                if not outdated:
                    break
                made = await live.remote.rewrap_layers(outdated)
                if any(envelope.kek_version < kek_version for envelope in made.values()):
                    raise IntegrityError("the keymanager wrapped DEKs under an older KEK than the one in force")
                await self._publish(live, functools.partial(_with_envelopes, made))
            await pace.rewrapped(len(outdated))
        await self._renew_index(lambda envelope: envelope.kek_version >= kek_version)

    async def _renew_index(self, good: Callable[[Envelope], bool]) -> None:
        """Publish until every stored version of the index is under a good key; and delete orphans with it."""
        for _ in range(KEPT_INDEX_VERSIONS + 1):
            async with self._layers:
                live = self._live()
                orphans_good = await self._orphans_good(live, good)
                if orphans_good and all(good(envelope) for envelope in await live.remote.slot_envelopes()):
                    return
                await self._publish(live, lambda layers: layers, sweep=not orphans_good)

    async def _orphans_good(self, live: Live, good: Callable[[Envelope], bool]) -> bool:
        prefix = f"{live.remote.prefix}layers/"
        known = self._listed(live)
        async for info in self._services.store.list(prefix):
            object_key = info.key.removesuffix(_ENVELOPE_SUFFIX)
            if object_key[len(prefix) :] not in known:
                try:
                    envelope = await live.remote.stored_envelope(object_key)
                except IntegrityError:
                    return False  # nobody can open it
                if envelope is not None and not good(envelope):
                    return False
        return True

    # --- re-key ---

    async def rekey(self, dek_floor: int, pace: Pace) -> None:
        """See `UpkeepProject.rekey`."""
        if dek_floor == 0:
            return
        await self._flusher.flush(self._live())
        while True:
            async with self._layers:
                live = self._live()
                old = next((layer for layer, envelope in live.index.layers if envelope.dek_version < dek_floor), None)
                if old is None:
                    break
                await self._rekey_layer(live, old)
            await pace.rekeyed(old.size_bytes)
        await self._renew_index(lambda envelope: envelope.dek_version >= dek_floor)

    async def _rekey_layer(self, live: Live, old: LayerDescriptor) -> None:
        remote, kind = live.remote, old.kind
        name = layer_name(kind, old.lsn_start, old.lsn_end, remote.generation, secrets.token_hex(8))
        object_key = remote.layer_object_key(name)
        context = remote.object_context(object_key, kind)
        # Both keys first: with plaintext in hand nobody waits for the keymanager, which may not answer before the lease
        # is over.
        key = await remote.layer_key(old)
        new_key, envelope = await remote.new_layer_key(object_key, kind)
        live.check()
        with live.in_use():
            plaintext = await self._open(live, key, old)
            live.check()
            pool = self._services.pool
            sealed = await pool.run_to_end(seal_object, new_key, context, plaintext, self._config.chunk_size_bytes)
            del plaintext
            live.check()
        new = replace(old, name=name, size_bytes=len(sealed))
        try:
            await remote.upload_layer(new, envelope, sealed)
            failpoint("rekey-stored")
            await self._services.files.insert(object_key, sealed)
            opener = ObjectOpener(new_key, context, ObjectLayout.parse(sealed[:HEADER_SIZE_BYTES], len(sealed)))
            del sealed
            await self._publish(
                live,
                lambda layers: tuple(((new, envelope) if layer == old else (layer, kept)) for layer, kept in layers),
                on_listed=lambda: self._take_over(live, old, new, opener),
            )
        except BaseException:
            if all(layer != new for layer, _ in live.index.layers):
                remote.forget_layers([name])  # an orphan now
            raise
        failpoint("rekey-listed")
        await live.older_readers_left()
        await remote.delete_layers([old.name])

    async def _open(self, live: Live, key: AeadKey, layer: LayerDescriptor) -> bytes:
        """The whole plaintext; from the object store when the local copy is damaged."""
        files, pool = self._services.files, self._services.pool
        object_key = live.remote.layer_object_key(layer.name)
        context = live.remote.object_context(object_key, layer.kind)
        try:
            return await pool.run_to_end(open_object, key, context, await files.read(object_key, 0, layer.size_bytes))
        except IntegrityError:
            await files.drop(object_key)
            sealed = await files.read(object_key, 0, layer.size_bytes, remote=True)
            return await pool.run_to_end(open_object, key, context, sealed)

    @staticmethod
    def _take_over(live: Live, old: LayerDescriptor, new: LayerDescriptor, opener: ObjectOpener) -> None:
        """The plaintext is the same, so the index of it is, too."""
        opened = live.layers.peek(old)
        if opened is not None:
            live.layers.install(new, opener, opened.index)

    # --- what is there ---

    async def known(self) -> KnownKeys:
        """Waits for what is being flushed: no key that was asked for before is on its way to the store afterwards,
        but that of `under_way`. Raises UnavailableError when the timeline is not loaded."""
        async with self._layers, self._flusher.lock:
            live = self._live()
            remote = live.remote
            return KnownKeys(
                remote.prefix,
                {remote.layer_object_key(name): envelope for name, envelope in self._listed(live).items()},
                remote.envelope_under_way,
            )

    @staticmethod
    def _listed(live: Live) -> dict[str, Envelope]:
        """Layers that an index lists, or is about to."""
        about_to = {layer.name: envelope for frozen in live.frozen for layer, envelope in frozen.unlisted}
        return about_to | {layer.name: envelope for layer, envelope in live.index.layers}

    # --- publishing ---

    async def _publish(
        self,
        live: Live,
        change: Callable[[_Layers], _Layers],
        *,
        sweep: bool = False,
        on_listed: Callable[[], None] = lambda: None,
    ) -> None:
        """A new version of the index. Raises what publishing raises; `live.index` is the old one then."""
        await self._flusher.publish(
            live,
            lambda index: replace(index, layers=change(index.layers)),
            keep_of_orphans=(lambda: self._listed(live).keys()) if sweep else None,
            on_listed=on_listed,
        )

    def _live(self) -> Live:
        live = self._current()
        if live is None:
            raise UnavailableError("the timeline is not loaded")
        return live


def _with_envelopes(made: Mapping[str, Envelope], layers: _Layers) -> _Layers:
    return tuple((layer, made.get(layer.name, old)) for layer, old in layers)
