"""The object store against the index: what is missing, left over, unreadable, or under a key that it should not be.

Every layer that the index lists is read from the object store as a whole (not from the local copy), every chunk is
opened, and its footer and index are held against the timeline's index. So is every version of the index that is kept.
Nothing is changed. Plaintext is dropped layer by layer. (Offloaded WAL is the safekeepers': `safekeeper/scrub.py`.)

What is listed and what is there is compared at one moment, under the locks of all who change either; so what is
reported is so, whatever ingest, compaction and key upkeep do meanwhile. A layer that goes away while its turn has not
come is skipped.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pageserver.compactor import Compactor
from pageserver.flusher import Flusher
from pageserver.index_part import IndexPart
from pageserver.layer.footer import FOOTER_SIZE_BYTES, Footer
from pageserver.layer.name import LayerDescriptor, parse_generation
from pageserver.layer.opened import PARSE_INDEX
from pageserver.live import Live, TimelineServices
from pageserver.remote_timeline import INDEX_KIND, KEPT_INDEX_VERSIONS, VOID
from shared.api.pageserver import Finding, FindingKind, ScrubReport
from shared.crypto.aead import AeadKey
from shared.crypto.context import EncryptionContext
from shared.crypto.envelope import Envelope
from shared.crypto.sealed_object import open_object
from shared.errors import ConflictError, CorruptedError, IntegrityError, NotFoundError, UnavailableError
from shared.storage.base import ObjectNotFoundError

_ENVELOPE_SUFFIX: Final = ".key"
_SLOT: Final = re.compile(r"index/[0-9a-f]{16}(\.key)?", re.ASCII)
MAX_FINDINGS: Final = 1000


@dataclass(frozen=True, slots=True)
class _Moment:
    """What was listed and what was there."""

    layers: tuple[tuple[LayerDescriptor, Envelope], ...]
    objects: dict[str, int]
    """Key behind the timeline's prefix → size in bytes."""
    on_their_way: frozenset[str]
    """Names of layers that are stored, and whose index is not written yet."""


class Scrubber:
    """One run at a time. `current` gives the timeline's Live."""

    def __init__(
        self,
        services: TimelineServices,
        flusher: Flusher,
        compactor: Compactor,
        current: Callable[[], Live | None],
    ) -> None:
        self._services = services
        self._flusher = flusher
        self._compactor = compactor
        self._current = current
        self._running = asyncio.Lock()

    async def run(self, kek_version: int, dek_floor: int) -> ScrubReport:
        """`kek_version`, `dek_floor`: what should be in force. What is under older keys is reported as outdated.

        Raises ConflictError while another run is under way; KeyAccessError, UnavailableError.
        """
        if self._running.locked():
            raise ConflictError("the timeline is being looked at already")
        async with self._running:
            live = self._current()
            if live is None:
                raise UnavailableError("the timeline is being loaded")
            with live.working():
                return await self._run(live, kek_version, dek_floor)

    async def _run(self, live: Live, kek_version: int, dek_floor: int) -> ScrubReport:
        async with self._compactor.lock, self._flusher.lock:
            moment = await self._look(live)
        findings = _strays(live, moment)
        for slot in _kept_slots(moment):
            live.check()
            found = await self._examine_index(live, slot, kek_version, dek_floor)
            if found is not None:
                findings.append(found)
        size_bytes = 0
        for layer, listed in moment.layers:
            live.check()
            if f"layers/{layer.name}" not in moment.objects:
                findings.append(Finding(kind=FindingKind.MISSING, object=f"layers/{layer.name}"))
                continue
            found = await self._examine(live, layer, listed, kek_version, dek_floor)
            if found is not None and self._is_listed(live, layer):
                findings.append(found)
            size_bytes += layer.size_bytes
        return ScrubReport(
            layers=len(moment.layers),
            size_bytes=size_bytes,
            objects=len(moment.objects),
            findings=findings[:MAX_FINDINGS],
            more_findings=max(0, len(findings) - MAX_FINDINGS),
        )

    async def _look(self, live: Live) -> _Moment:
        prefix = live.remote.prefix
        objects = {info.key[len(prefix) :]: info.size_bytes async for info in self._services.store.list(prefix)}
        about_to = frozenset(layer.name for frozen in live.frozen for layer, _ in frozen.unlisted)
        return _Moment(live.index.layers, objects, about_to)

    @staticmethod
    def _is_listed(live: Live, layer: LayerDescriptor) -> bool:
        return any(known.name == layer.name for known, _ in live.index.layers)

    async def _examine_index(self, live: Live, name: str, kek_version: int, dek_floor: int) -> Finding | None:
        """The first thing that is wrong with a version of the index; nothing with one that has been deleted since."""
        object_key = live.remote.prefix + name
        try:
            sealed = await self._services.store.get(object_key)
            if sealed == VOID:
                return None
            envelope = await live.remote.stored_envelope(object_key)
            if envelope is None:
                return None  # missing, which the listing has said
            key, context = await live.remote.stored_key(object_key, INDEX_KIND)
            index = IndexPart.parse(await self._services.pool.run(open_object, key, context, sealed))
            if (index.project_id, index.timeline_id) != (live.index.project_id, live.index.timeline_id):
                raise CorruptedError("the index belongs to another timeline")
        except ObjectNotFoundError:
            return None
        except (IntegrityError, NotFoundError) as error:  # also of the KEK that it is under
            return Finding(kind=FindingKind.UNREADABLE, object=name, detail=str(error))
        if envelope.kek_version < kek_version or envelope.dek_version < dek_floor:
            detail = f"KEK version {envelope.kek_version}, DEK of version {envelope.dek_version}"
            return Finding(kind=FindingKind.OUTDATED_KEY, object=name, detail=detail)
        return None

    async def _examine(
        self, live: Live, layer: LayerDescriptor, listed: Envelope, kek_version: int, dek_floor: int
    ) -> Finding | None:
        """The first thing that is wrong with a layer."""
        name = f"layers/{layer.name}"
        object_key = live.remote.layer_object_key(layer.name)
        try:
            beside = await live.remote.stored_envelope(object_key)
            if beside is None:
                return Finding(kind=FindingKind.MISSING, object=name + _ENVELOPE_SUFFIX)
            if beside.kek_version < listed.kek_version or beside.dek_version != listed.dek_version:
                return Finding(
                    kind=FindingKind.WRONG_KEY, object=name, detail="the envelope beside it is older than the index's"
                )
            sealed = await self._services.store.get(object_key)
            key = await live.remote.layer_key(layer)
            context = live.remote.object_context(object_key, layer.kind)
            await self._services.pool.run_to_end(_verify, key, context, layer, sealed)
        except ObjectNotFoundError:
            return Finding(kind=FindingKind.MISSING, object=name)
        except IntegrityError as error:
            return Finding(kind=FindingKind.UNREADABLE, object=name, detail=str(error))
        if beside.kek_version < kek_version or beside.dek_version < dek_floor:
            detail = f"KEK version {beside.kek_version}, DEK of version {beside.dek_version}"
            return Finding(kind=FindingKind.OUTDATED_KEY, object=name, detail=detail)
        return None


def _verify(key: AeadKey, context: EncryptionContext, layer: LayerDescriptor, sealed: bytes) -> None:
    """In a thread. Raises IntegrityError."""
    if len(sealed) < layer.size_bytes:
        raise CorruptedError("the object is shorter than the timeline's index says")
    plaintext = memoryview(open_object(key, context, sealed[: layer.size_bytes]))
    footer = Footer.parse(plaintext[-FOOTER_SIZE_BYTES:], len(plaintext))
    if (footer.kind, footer.lsn_start, footer.lsn_end) != (layer.kind, layer.lsn_start, layer.lsn_end):
        raise CorruptedError("a layer's footer contradicts the timeline's index")
    start, end = footer.index_range(len(plaintext))
    index = PARSE_INDEX[layer.kind](footer, bytes(plaintext[start:end]))
    keys = index.keys_in(layer.key_range)
    if len(keys) != index.key_count:
        raise CorruptedError("a layer holds keys outside of the range that the timeline's index gives it")
    for one in keys:
        index.find(one)


def _kept_slots(moment: _Moment) -> list[str]:
    """Names of the newest versions of the index."""
    slots = sorted({name.removesuffix(_ENVELOPE_SUFFIX) for name in moment.objects if _SLOT.fullmatch(name)})
    return slots[-KEPT_INDEX_VERSIONS:]


def _strays(live: Live, moment: _Moment) -> list[Finding]:
    """Objects that nothing refers to. Some of them are ordinary: what a crash left goes with a later index."""
    listed = {layer.name for layer, _ in moment.layers} | moment.on_their_way
    findings = []
    kept = set(_kept_slots(moment))
    for name in sorted(moment.objects):
        base = name.removesuffix(_ENVELOPE_SUFFIX)
        if base in kept:
            if name == base and name + _ENVELOPE_SUFFIX not in moment.objects:
                findings.append(Finding(kind=FindingKind.MISSING, object=name + _ENVELOPE_SUFFIX))
            continue
        layer_name = base.removeprefix("layers/")
        if base.startswith("layers/") and layer_name in listed:
            continue
        findings.append(Finding(kind=FindingKind.ORPHAN, object=name, detail=_origin(live, layer_name)))
    return findings


def _origin(live: Live, name: str) -> str:
    try:
        generation = parse_generation(name)
    except CorruptedError:
        return ""
    if generation > live.remote.generation:
        return f"of generation {generation}, which comes after this pageserver's {live.remote.generation}"
    return f"of generation {generation}"
