"""What to compact: plans only; pageserver/compactor.py executes them. Neon: docs/pageserver-compaction.md. A core.

Theory of operation. A flush leaves an *L0* layer: a short range of LSNs, all keys. Enough of them are merged into *L1*
layers: the whole range of LSNs of all of them, and a share of the keys each. So a read meets one L1 layer of each merge
instead of all of its L0 layers. Where enough L1 layers lie above the last image of some keys, an image of these keys is
made at the newest LSN that L1 has got: a read needs nothing below it. What a read visits, at most:

    L0 layers: fewer than compaction_l0_layers, and what is flushed while a merge runs; past ingest_l0_layers ingest
               waits (flusher.py)
    L1 layers: image_layer_deltas that hold keys of its partition; or RANGE_FACTOR times as many that merely span it
    one image layer

A *partition* is a range of keys with the same newest image. The first one is the whole of initdb; images are cut at
compaction_target_bytes, so partitions become smaller as the database grows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pageserver.layer.name import LayerDescriptor, LayerKind
from shared.keyspace import WHOLE_KEYSPACE, KeyRange

RANGE_FACTOR: Final = 4
MAX_HOLES: Final = 16


def plan_merge(layers: Iterable[LayerDescriptor], threshold: int, at_most: int) -> list[LayerDescriptor]:
    """L0 layers to merge, oldest first; empty while there are fewer than `threshold`."""
    flushed = [layer for layer in layers if layer.kind is LayerKind.DELTA and layer.level == 0]
    if len(flushed) < threshold:
        return []
    return sorted(flushed, key=lambda layer: layer.lsn_start)[:at_most]


@dataclass(frozen=True, slots=True)
class Partition:
    """Keys whose newest image at the LSN in question is the same."""

    key_range: KeyRange
    image: LayerDescriptor | None


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """Make images of all keys of `key_range` at `lsn`."""

    key_range: KeyRange
    lsn: int


def image_lsn(layers: Iterable[LayerDescriptor]) -> int | None:
    """Where images can be made: the newest LSN that is compacted. None when nothing is."""
    return max((layer.last_lsn for layer in layers if layer.kind is LayerKind.DELTA and layer.level == 1), default=None)


def partitions(layers: Iterable[LayerDescriptor], lsn: int) -> list[Partition]:
    """The key space, cut where the newest image at `lsn` changes; ascending."""
    images = sorted(
        (layer for layer in layers if layer.kind is LayerKind.IMAGE and layer.lsn_start <= lsn),
        key=lambda layer: (-layer.lsn_start, layer.name),
    )
    # Newest first, each takes what is still free of its range.
    taken: list[Partition] = []
    for image in images:
        start = image.key_range.start
        for part in sorted(taken, key=lambda part: part.key_range.start):
            if part.key_range.end <= start or part.key_range.start >= image.key_range.end:
                continue
            if part.key_range.start > start:
                taken.append(Partition(KeyRange(start, part.key_range.start), image))
            start = part.key_range.end
        if start < image.key_range.end:
            taken.append(Partition(KeyRange(start, image.key_range.end), image))
    found: list[Partition] = []
    reached = WHOLE_KEYSPACE.start
    for part in sorted(taken, key=lambda part: part.key_range.start):
        if part.key_range.start > reached:
            found.append(Partition(KeyRange(reached, part.key_range.start), None))
        found.append(part)
        reached = part.key_range.end
    if reached < WHOLE_KEYSPACE.end:
        found.append(Partition(KeyRange(reached, WHOLE_KEYSPACE.end), None))
    return found


def deltas_above(layers: Iterable[LayerDescriptor], part: Partition, lsn: int) -> list[LayerDescriptor]:
    """Delta layers that a read of the partition at `lsn` may have to look into."""
    floor = -1 if part.image is None else part.image.lsn_start
    return [
        layer
        for layer in layers
        if layer.kind is LayerKind.DELTA
        and layer.lsn_start <= lsn
        and layer.last_lsn > floor
        and layer.key_range.start < part.key_range.end
        and part.key_range.start < layer.key_range.end
    ]


def depth(layers: Iterable[LayerDescriptor]) -> int:
    """How many of these delta layers one key can lie in: those of one merge share their LSNs, and no key."""
    return len({(layer.lsn_start, layer.lsn_end) for layer in layers})


def plan_images(
    parts: Sequence[tuple[Partition, Sequence[LayerDescriptor]]],
    lsn: int,
    threshold: int,
    holds: Callable[[LayerDescriptor, KeyRange], bool],
) -> list[ImagePlan]:
    """For partitions with their `deltas_above`: where images are due. Neighbours become one plan.

    `holds`: does this layer have any value of these keys?
    """
    plans: list[ImagePlan] = []
    for part, deltas in parts:
        if not (
            depth(deltas) >= threshold * RANGE_FACTOR
            or depth(layer for layer in deltas if holds(layer, part.key_range)) >= threshold
        ):
            continue
        if plans and plans[-1].key_range.end == part.key_range.start:
            plans[-1] = ImagePlan(KeyRange(plans[-1].key_range.start, part.key_range.end), lsn)
        else:
            plans.append(ImagePlan(part.key_range, lsn))
    return plans


def divided(plan: ImagePlan, layers: Iterable[LayerDescriptor], at_most: int) -> list[ImagePlan]:
    """The same in pieces, each of which `at_most` of `layers` have keys of: or more, where they lie that deep."""
    here = [
        layer.key_range
        for layer in layers
        if layer.key_range.start < plan.key_range.end and plan.key_range.start < layer.key_range.end
    ]
    start, last = plan.key_range.start, plan.key_range.start
    pieces: list[ImagePlan] = []
    for cut in sorted({keys.end for keys in here if keys.end < plan.key_range.end}):
        if last > start and sum(keys.start < cut and start < keys.end for keys in here) > at_most:
            pieces.append(ImagePlan(KeyRange(start, last), plan.lsn))
            start = last
        last = cut
    if last > start and sum(start < keys.end for keys in here) > at_most:
        pieces.append(ImagePlan(KeyRange(start, last), plan.lsn))
        start = last
    pieces.append(ImagePlan(KeyRange(start, plan.key_range.end), plan.lsn))
    return pieces


def holes(parts: Sequence[Partition], holds: Callable[[KeyRange], bool]) -> list[bytes]:
    """Keys where L1 layers are to be cut, ascending, because they would span partitions that they hold nothing of.

    The largest MAX_HOLES runs of such partitions, each given by its end. `holds`: is there any value of these keys?
    """
    runs: list[tuple[int, bytes]] = []  # (partitions, end)
    length = 0
    for part in parts:
        if holds(part.key_range):
            length = 0
            continue
        if length:
            runs.pop()
        length += 1
        runs.append((length, part.key_range.end))
    largest = sorted(runs, key=lambda run: -run[0])[:MAX_HOLES]
    return sorted(end for _, end in largest)


class Cuts:
    """Says whether a cut lies between a key and the one before."""

    def __init__(self, cuts: Sequence[bytes]) -> None:
        """`cuts`: ascending; a cut lies just before its key."""
        self._cuts = cuts
        self._passed = 0

    def between(self, key: bytes) -> bool:
        """Keys are asked for in ascending order."""
        passed = bisect_right(self._cuts, key)
        crossed = passed > self._passed
        self._passed = passed
        return crossed
