"""How a key is read at an LSN: which values, from where, applied in which order.

Two steps, both without I/O. `gather` walks from the newest source down (open layer, frozen layers, delta layers, image
layer) and collects the key's *chain*: values from the LSN downwards until one that starts a chain, or until a base: a
cached page, or a value of an image layer. `reconstruct` then applies the chain upwards, in runs: consecutive WAL
records go to redo together, native changes are applied here, in LSN order with each other.

Both are generators. What they cannot do themselves they yield as a request, and the driver (page_reader.py) sends the
result in: at once if it is in memory, or after awaiting it.

A branch has values of its own only above the LSN at which it left its ancestor. A chain that neither starts there nor
finds a base there goes on in the ancestor, at the LSN read or at the branch point, whichever is lower (Neon:
`Timeline::get_vectored_reconstruct_data`). So nothing is copied when a branch is made, and neither side ever sees what
the other one writes later. An image of a branch has the keys that the branch has changed: one that is not in there is
inherited.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from pageserver.layer.delta import DeltaIndex, RunHeader, run_header_range
from pageserver.layer.image import ImageIndex
from pageserver.layer.in_memory import InMemoryLayer
from pageserver.layer.layer_map import LayerMap
from pageserver.layer.name import LayerDescriptor
from pageserver.layer.opened import OpenLayer
from pageserver.native import PAGE_SIZE_BYTES, ZERO_PAGE, apply_native
from pageserver.value import Value, ValueKind
from shared.errors import CorruptedError
from shared.keyspace import REL_BLOCK, Fork

_WAL: Final = int(ValueKind.WAL)
_WAL_INIT: Final = int(ValueKind.WAL_INIT)
_IMAGE: Final = int(ValueKind.IMAGE)
_NATIVE: Final = int(ValueKind.NATIVE)
_TOMBSTONE: Final = int(ValueKind.TOMBSTONE)
_NATIVE_RUN: Final = re.compile(b"%c+" % _NATIVE)
_RECORD_RUN: Final = re.compile(b"[%c%c]+" % (_WAL, _WAL_INIT))


class Memory(Protocol):
    """What can be had without waiting; None when it cannot."""

    def peek(self, layer: LayerDescriptor) -> OpenLayer | None: ...

    def peek_bytes(self, layer: OpenLayer, start: int, end: int) -> bytes | None: ...


class Layers(Memory, Protocol):
    """Layers of one timeline. `gather` asks `Memory` only; what has to be awaited is for the driver."""

    async def open(self, layer: LayerDescriptor) -> OpenLayer: ...

    async def read(self, layer: OpenLayer, start: int, end: int) -> bytes: ...


class Snapshot(NamedTuple):
    """Where to look: what stood at one moment. None of it goes away while it is held."""

    in_memory: tuple[InMemoryLayer, ...]
    """Newest first."""
    layer_map: LayerMap
    ancestor: Ancestry | None = None
    """Where a branch goes on below its own values."""


class Ancestry(NamedTuple):
    """Another timeline, as of `lsn`."""

    snapshot: Snapshot
    layers: Layers
    lsn: int


class OpenRequest(NamedTuple):
    """Answer: the OpenLayer. `layers`: whose it is."""

    layers: Layers
    layer: LayerDescriptor


class ReadRequest(NamedTuple):
    """Answer: the plaintext bytes [start, end) of the layer."""

    layers: Layers
    layer: OpenLayer
    start: int
    end: int


class RedoRequest(NamedTuple):
    """Answer: the page after the records, (end LSN, record), oldest first."""

    base: bytes | None
    records: list[tuple[int, bytes]]


GatherRequest = OpenRequest | ReadRequest


@dataclass(frozen=True, slots=True)
class Base:
    """What a key is as of `lsn`: `value` None when it does not exist. `changed_lsn`: when it became that, or earlier
    than that was known."""

    value: bytes | None
    changed_lsn: int
    lsn: int


class Chain(NamedTuple):
    """Values newest first, on top of `base` if there is one."""

    values: list[Value]
    base: Base | None


def gather(
    snapshot: Snapshot, layers: Layers, key: bytes, lsn: int, cached: Base | None
) -> Generator[GatherRequest, Any, Chain]:
    """The chain of `key` at `lsn`. `cached`, if given, is a base at or below `lsn` (its `lsn` may lie above).

    `layers` are those of `snapshot`. Raises CorruptedError.
    """
    values: list[Value] = []
    floor = -1 if cached is None else cached.lsn
    image = snapshot.layer_map.image(key, lsn)
    if image is not None and image.lsn_start > floor:
        cached = None
        floor = image.lsn_start
    else:
        image = None
    for in_memory in snapshot.in_memory:
        if in_memory.gather(key, lsn, floor, values):
            return Chain(values, None)
    for layer in snapshot.layer_map.deltas(key, lsn, floor):
        opened: OpenLayer = layers.peek(layer) or (yield OpenRequest(layers, layer))
        index = opened.index
        if not isinstance(index, DeltaIndex):
            raise CorruptedError("a layer is listed as a delta layer and is none")
        entry = index.find(key)
        if entry is None or entry.first_lsn > lsn or entry.last_lsn <= floor:
            continue
        start, end = run_header_range(entry)
        data = layers.peek_bytes(opened, start, end)
        if data is None:
            data = yield ReadRequest(layers, opened, start, end)
        header = RunHeader(entry, data)
        selection = header.select(entry, lsn, floor)
        if selection.first == selection.end:
            continue
        start = entry.payload_offset + selection.payload_start
        end = entry.payload_offset + selection.payload_end
        data = layers.peek_bytes(opened, start, end)
        if data is None:
            data = yield ReadRequest(layers, opened, start, end)
        header.take(selection, data, values)
        if selection.complete:
            return Chain(values, None)
    ancestor = snapshot.ancestor
    if image is not None:
        opened = layers.peek(image) or (yield OpenRequest(layers, image))
        if not isinstance(opened.index, ImageIndex):
            raise CorruptedError("a layer is listed as an image layer and is none")
        place = opened.index.find(key)
        if place is not None:
            value = layers.peek_bytes(opened, *place)
            if value is None:
                value = yield ReadRequest(layers, opened, *place)
            return Chain(values, Base(value or None, image.lsn_start, image.lsn_start))
        if ancestor is None:
            return Chain(values, Base(None, image.lsn_start, image.lsn_start))
    elif ancestor is None or floor >= ancestor.lsn:
        return Chain(values, cached)
    older = yield from gather(ancestor.snapshot, ancestor.layers, key, min(lsn, ancestor.lsn), cached)
    return Chain(values + older.values, older.base)


def reconstruct(key: bytes, chain: Chain) -> Generator[RedoRequest, bytes, bytes | None]:
    """The value of `key`: its chain applied. None when it does not exist (a block never does not: then it is zeros).

    Raises CorruptedError for a chain that cannot be applied.
    """
    values, base = chain
    is_block = key[0] == REL_BLOCK
    current: bytes | None = None if base is None else base.value
    started = base is not None and base.value is not None
    columns: Iterable[tuple[Any, ...]] = zip(*reversed(values), strict=True) if values else ((), (), ())
    lsns, each_kind, payloads = columns
    kinds, index = bytes(each_kind), 0
    while index < len(kinds):
        kind, first = kinds[index], index
        if kind == _IMAGE:
            current, started = payloads[index], True
            index += 1
        elif kind == _TOMBSTONE:
            # A dropped file is gone; a block that has no life of its own yet starts from zeros.
            current, started = None, is_block
            index += 1
        elif run := _NATIVE_RUN.match(kinds, index):
            index = run.end()
            current = apply_native(key, current, payloads[first:index])
            started = True
        elif run := _RECORD_RUN.match(kinds, index):
            if not is_block:
                raise CorruptedError("a WAL record stands under a key that is no block")
            if kind == _WAL_INIT:
                current = None
            elif not started and key[13] != Fork.VISIBILITY_MAP:
                # Redo makes a page of a visibility map out of nothing (heap_xlog_visible), and no other.
                raise CorruptedError("a WAL record needs a page and there is none")
            index = run.end()
            current = yield RedoRequest(current, list(zip(lsns[first:index], payloads[first:index], strict=True)))
            started = True
        else:
            raise CorruptedError(f"a value is of unknown kind {kind}")
    if not is_block:
        return current
    if current is None:
        return ZERO_PAGE if values else None
    if len(current) != PAGE_SIZE_BYTES:
        raise CorruptedError("a block's value is not a page")
    return current


def changed_lsn(chain: Chain) -> int:
    """When the value became what it is; 0 when it never was anything."""
    if chain.values:
        return chain.values[0][0]
    return 0 if chain.base is None else chain.base.changed_lsn
