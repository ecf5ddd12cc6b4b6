"""What is in a sealed object of a timeline, described: counts, names and positions, never a value.

The pageserver opens it, under the project's lease: no DEK leaves it, and nothing opens it once the keys are gone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from pageserver.index_part import IndexPart
from pageserver.layer.footer import FOOTER_SIZE_BYTES, Footer
from pageserver.layer.name import LayerKind, parse_layer_name
from pageserver.layer.opened import PARSE_INDEX
from pageserver.live import Live, TimelineServices
from pageserver.remote_timeline import INDEX_KIND, VOID
from shared.crypto.aead import AeadKey
from shared.crypto.context import EncryptionContext
from shared.crypto.sealed_object import open_object
from shared.errors import ConflictError, CorruptedError, NotFoundError, UnavailableError
from shared.keyspace import (
    CHECKPOINT,
    CONTROL_FILE,
    REL_BLOCK,
    REL_MAP,
    REL_SIZE,
    SLRU_PAGE,
    TWO_PHASE,
    WHOLE_KEYSPACE,
    unpack_key,
)
from shared.storage.base import ObjectNotFoundError

_FIELDS: Final = {
    REL_SIZE: "relation size",
    REL_MAP: "relation map",
    SLRU_PAGE: "SLRU page",
    TWO_PHASE: "two-phase file",
    CONTROL_FILE: "control file",
    CHECKPOINT: "checkpoint",
}


class Inspector:
    """Of one timeline. `current` gives its Live."""

    def __init__(self, services: TimelineServices, current: Callable[[], Live | None]) -> None:
        self._services = services
        self._current = current

    async def describe(self, name: str, sha256: str) -> dict[str, Any]:
        """`name`: layers/… or index/…; `sha256`: of the sealed object that is meant, in hexadecimal digits.

        Raises NotFoundError, ConflictError when other bytes are stored under the name, KeyAccessError,
        UnavailableError, IntegrityError.
        """
        live = self._current()
        if live is None:
            raise UnavailableError("the timeline is being loaded")
        with live.working():
            folder, _, file_name = name.partition("/")
            try:
                layer_kind = parse_layer_name(file_name)[0] if folder == "layers" else None
            except CorruptedError:  # as the name of a file it would be; here somebody asks for it
                raise NotFoundError("no layer has such a name") from None
            object_key = f"{live.remote.prefix}{name}"
            try:
                sealed = await self._services.store.get(object_key)
            except ObjectNotFoundError:
                raise NotFoundError("the object store has no such object") from None
            if hashlib.sha256(sealed).hexdigest() != sha256:
                raise ConflictError("the object store has other bytes under this name")
            if layer_kind is None and sealed == VOID:
                return {"void": True}
            kind = INDEX_KIND if layer_kind is None else layer_kind.object_kind
            key, context = await live.remote.stored_key(object_key, kind)
            found = await self._services.pool.run_to_end(_describe, layer_kind, key, context, sealed)
            live.check()  # Invariant: after decrypting, before anything leaves
            return found


def _describe(kind: LayerKind | None, key: AeadKey, context: EncryptionContext, sealed: bytes) -> dict[str, Any]:
    """In a thread. Raises IntegrityError."""
    plaintext = open_object(key, context, sealed)
    return index_content(plaintext) if kind is None else layer_content(kind, plaintext)


def index_content(plaintext: bytes) -> dict[str, Any]:
    """All of it. Raises CorruptedError for what a pageserver would refuse."""
    IndexPart.parse(plaintext)
    found: dict[str, Any] = json.loads(plaintext)
    return found


def layer_content(kind: LayerKind, plaintext: bytes) -> dict[str, Any]:
    """Counts, and which keys; no values. Raises CorruptedError."""
    footer = Footer.parse(plaintext[-FOOTER_SIZE_BYTES:], len(plaintext))
    start, end = footer.index_range(len(plaintext))
    index = PARSE_INDEX[kind](footer, plaintext[start:end])
    keys = index.keys_in(WHOLE_KEYSPACE)
    relations: Counter[tuple[int, int, int, int]] = Counter()
    other: Counter[str] = Counter()
    for key in keys:
        field1, spc, db, rel, fork, _ = unpack_key(key)
        if field1 == REL_BLOCK:
            relations[spc, db, rel, fork] += 1
        else:
            other[_FIELDS.get(field1, f"kind {field1}")] += 1
    return {
        "keys": footer.keys,
        "values": footer.values,
        "index_offset": footer.index_offset,
        "first_key": keys[0].hex() if keys else None,
        "last_key": keys[-1].hex() if keys else None,
        "blocks": [
            {"tablespace": spc, "database": db, "relfilenumber": rel, "fork": fork, "blocks": count}
            for (spc, db, rel, fork), count in sorted(relations.items())
        ],
        "other_keys": dict(sorted(other.items())),
    }
