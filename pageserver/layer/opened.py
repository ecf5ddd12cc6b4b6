"""A layer that can be read: what it is, the opener of its chunks, its index. A core; it holds a DEK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pageserver.layer.delta import DeltaIndex
from pageserver.layer.footer import Footer
from pageserver.layer.image import ImageIndex
from pageserver.layer.name import LayerDescriptor, LayerKind
from shared.crypto.sealed_object import ObjectOpener

LayerIndex = DeltaIndex | ImageIndex

PARSE_INDEX: Final[dict[LayerKind, Callable[[Footer, bytes], LayerIndex]]] = {
    LayerKind.DELTA: DeltaIndex,
    LayerKind.IMAGE: ImageIndex,
}


@dataclass(frozen=True, slots=True)
class OpenLayer:
    descriptor: LayerDescriptor
    opener: ObjectOpener
    index: LayerIndex
