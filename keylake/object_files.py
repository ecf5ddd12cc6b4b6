"""What a layer or an index is, from its file alone: without any key, what anybody could see.

What is in it says the pageserver, to those who may know (`pageserver.contents`): no service hands out a DEK.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pageserver.layer.name import parse_generation, parse_layer_name
from pageserver.remote_timeline import GONE, VOID
from shared.crypto.envelope import Envelope
from shared.crypto.sealed_object import HEADER_SIZE_BYTES, ObjectLayout
from shared.errors import CorruptedError, InvalidInputError, NotFoundError
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn

_ENVELOPE_SUFFIX: Final = ".key"


@dataclass(frozen=True, slots=True)
class Placed:
    """Whose object a file is, by where it lies."""

    project_id: ProjectId
    timeline_id: TimelineId
    name: str
    """Behind the timeline's prefix."""

    @classmethod
    def of(cls, path: Path) -> Placed:
        """Raises InvalidInputError. (Folders of a local store have an `@` at the end.)"""
        match [part.removesuffix("@") for part in path.absolute().parts]:
            case [*_, "projects", project, "timelines", timeline, folder, name]:
                pass
            case _:
                raise InvalidInputError("a file whose content is asked for lies under projects/…/timelines/…/")
        try:
            return cls(ProjectId.parse(project), TimelineId.parse(timeline), f"{folder}/{name}")
        except ValueError as error:
            raise InvalidInputError(str(error)) from None


def inspect_layer(path: Path) -> dict[str, Any]:
    """Raises NotFoundError, CorruptedError, IntegrityError."""
    sealed = _read(path)
    kind, lsn_start, lsn_end = parse_layer_name(path.name)
    return {
        "kind": kind.value,
        "lsn_start": str(Lsn(lsn_start)),
        "lsn_end": str(Lsn(lsn_end)),
        "generation": parse_generation(path.name),
        **_sealed(path, sealed),
    }


def inspect_index(path: Path) -> dict[str, Any]:
    """Raises as `inspect_layer`."""
    sealed = _read(path)
    try:
        slot = int(path.name, 16)
    except ValueError:
        raise CorruptedError("the name of an index is 16 hexadecimal digits") from None
    if sealed == VOID:
        return {"slot": slot, "void": True}
    if sealed.startswith(GONE):
        return {"slot": slot, "void": False, "deleted": True}
    return {"slot": slot, "void": False, **_sealed(path, sealed)}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"the file cannot be read: {error.strerror}") from None


def _sealed(path: Path, sealed: bytes) -> dict[str, Any]:
    """What a sealed object and the envelope beside it say to anybody."""
    layout = ObjectLayout.parse(sealed[:HEADER_SIZE_BYTES], len(sealed))
    found: dict[str, Any] = {
        "suite": layout.suite.name,
        "sealed_size_bytes": layout.sealed_size_bytes,
        "plaintext_size_bytes": layout.plaintext_size_bytes,
        "chunk_size_bytes": layout.chunk_size_bytes,
        "chunks": layout.chunks,
        "envelope": None,
    }
    beside = path.with_name(path.name + _ENVELOPE_SUFFIX)
    if beside.exists():
        envelope = Envelope.parse(_read(beside))
        found["envelope"] = {
            "kek_id": str(envelope.kek_id),
            "kek_version": envelope.kek_version,
            "dek_version": envelope.dek_version,
        }
    return found
