"""Which layers may answer for (key, LSN).

A sorted list, walked from the newest down. Neon keeps a persistent search tree here; with the dozens to few hundred
layers of one timeline of ours, comparing four bounds per layer costs less than looking one page up in any of them.

Invariant: delta layers whose key ranges overlap have disjoint LSN ranges. So walking them by descending LSN yields the
values of a key in descending LSN order.

A core. Immutable: a reader keeps the map it started with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from pageserver.layer.name import LayerDescriptor, LayerKind
from shared.errors import CorruptedError
from shared.keyspace import WHOLE_KEYSPACE, KeyRange

_Row = tuple[int, int, bytes, bytes, LayerDescriptor]


class LayerMap:
    __slots__ = ("_deltas", "_images", "layers")

    def __init__(self, layers: Iterable[LayerDescriptor] = ()) -> None:
        """Raises CorruptedError when the invariant does not hold or a name stands twice."""
        self.layers: Final = tuple(sorted(layers, key=lambda layer: (-layer.lsn_end, -layer.lsn_start, layer.name)))
        if len({layer.name for layer in self.layers}) != len(self.layers):
            raise CorruptedError("a layer is listed twice")
        rows = [(x.lsn_start, x.lsn_end, x.key_range.start, x.key_range.end, x) for x in self.layers]
        self._deltas: tuple[_Row, ...] = tuple(row for row in rows if row[4].kind is LayerKind.DELTA)
        self._images: tuple[_Row, ...] = tuple(row for row in rows if row[4].kind is LayerKind.IMAGE)
        for number, newer in enumerate(self._deltas):
            for older in self._deltas[number + 1 :]:
                if older[1] <= newer[0]:
                    break  # sorted by lsn_end: all that follow end before the newer one starts
                if older[2] < newer[3] and newer[2] < older[3]:
                    raise CorruptedError("two delta layers overlap")

    def changed(self, *, added: Iterable[LayerDescriptor] = (), removed: Iterable[str] = ()) -> LayerMap:
        """Another map with layers added, and removed by name."""
        gone = set(removed)
        return LayerMap([*(layer for layer in self.layers if layer.name not in gone), *added])

    def image(self, key: bytes, lsn: int) -> LayerDescriptor | None:
        """The newest image layer at or below `lsn` that is complete for `key`."""
        for at, _, start, end, layer in self._images:
            if at <= lsn and start <= key < end:
                return layer
        return None

    def deltas(self, key: bytes, lsn: int, floor: int) -> Iterator[LayerDescriptor]:
        """Delta layers that may hold values of `key` with floor < LSN <= lsn, newest first."""
        lowest = floor + 1
        for lsn_start, lsn_end, start, end, layer in self._deltas:
            if lsn_end <= lowest:
                return  # sorted by lsn_end: all that follow are older still
            if lsn_start <= lsn and start <= key < end:
                yield layer

    def overlapping(self, key_range: KeyRange, lsn: int) -> list[LayerDescriptor]:
        """All layers that a read of keys of the range at `lsn` may need, newest first: not those below images."""
        here = [
            layer
            for layer in self.layers
            if layer.lsn_start <= lsn
            and layer.key_range.start < key_range.end
            and key_range.start < layer.key_range.end
        ]
        images = sorted((x for x in here if x.kind is LayerKind.IMAGE), key=lambda image: image.key_range.start)
        return [layer for layer in here if is_needed_at(layer, lsn, images, key_range)]

    @property
    def size_bytes(self) -> int:
        """Of all sealed objects."""
        return sum(layer.size_bytes for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def is_needed_at(
    layer: LayerDescriptor, lsn: int, images: Sequence[LayerDescriptor], key_range: KeyRange = WHOLE_KEYSPACE
) -> bool:
    """May a read at `lsn`, of keys of the range, need anything of `layer`? It needs only values above the newest image
    at or below `lsn`. `images`: of the timeline, by the start of their key ranges."""
    if layer.lsn_start > lsn:
        return False
    # An image stands in for a delta layer that ends with it, but not for another image of its own LSN.
    lowest = layer.lsn_end if layer.kind is LayerKind.IMAGE else min(layer.last_lsn, lsn)
    reached, end = max(layer.key_range.start, key_range.start), min(layer.key_range.end, key_range.end)
    for image in images:
        if image.key_range.start > reached or reached >= end:
            break
        if lowest <= image.lsn_start <= lsn:
            reached = max(reached, image.key_range.end)
    return reached < end
