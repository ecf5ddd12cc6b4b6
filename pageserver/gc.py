"""Which layers nobody can need any more. Neon: `gc_timeline` in timeline.rs. A core.

Who reads what: every LSN at or above the cutoff, and below it the *retained* LSNs only, that is, branch points and
leased LSNs. A layer stays if one of the five rules says so:

    space, time   it may hold values above the cutoff, which is the earlier one of both (retention.py)
    branches      a branch point at or above its start may need it
    leases        a leased LSN at or above its start may need it
    images        the cutoff itself may need it, as nothing newer stands in for it

"May need it" is exact to the image: a read at R needs of a layer only values above the newest image at or below R. So a
layer is not needed at R if images between its end and R cover all of its keys. (Neon keeps whatever starts below a
branch point; we look for images there, too.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from pageserver.layer.layer_map import is_needed_at
from pageserver.layer.name import LayerDescriptor, LayerKind


def unneeded_layers(
    layers: Iterable[LayerDescriptor], cutoff: int, retained: Iterable[int] = ()
) -> list[LayerDescriptor]:
    """Those of `layers` that can be removed, all at once."""
    layers = list(layers)
    images = sorted(
        (layer for layer in layers if layer.kind is LayerKind.IMAGE), key=lambda layer: layer.key_range.start
    )
    points = sorted({cutoff, *(lsn for lsn in retained if lsn < cutoff)})

    def readers(layer: LayerDescriptor) -> list[int]:
        """Behind a layer's end more and more images stand in for it: of the points there the first one decides."""
        return points[bisect_left(points, layer.lsn_start) : bisect_left(points, layer.last_lsn) + 1]

    return [
        layer
        for layer in layers
        if layer.last_lsn <= cutoff and not any(is_needed_at(layer, lsn, images) for lsn in readers(layer))
    ]
