"""Changing bytes on disks as somebody would who may write there, and putting them back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.crypto.aead import TAG_SIZE_BYTES
from shared.crypto.sealed_object import HEADER_SIZE_BYTES, ObjectLayout

Change = Callable[[bytes], bytes | None]
"""What becomes of a file's content; None: the file is removed."""


@contextmanager
def changed(*changes: tuple[Path, Change]) -> Iterator[None]:
    """The files are changed inside, and afterwards as they were."""
    before = [(path, path.read_bytes()) for path, _ in changes]
    try:
        for (path, change), (_, content) in zip(changes, before, strict=True):
            after = change(content)
            assert after != content, "a change that changes nothing tests nothing"
            if after is None:
                path.unlink()
            else:
                path.write_bytes(after)
        yield
    finally:
        for path, content in before:
            path.write_bytes(content)


@contextmanager
def swapped(*pairs: tuple[Path, Path]) -> Iterator[None]:
    """The files have each other's content inside."""
    changes: list[tuple[Path, Change]] = []
    for one, other in pairs:
        contents = {one: other.read_bytes(), other: one.read_bytes()}
        changes += [(path, _become(content)) for path, content in contents.items()]
    with changed(*changes):
        yield


def _become(content: bytes) -> Change:
    return lambda _: content


@contextmanager
def preserved(*directories: Path) -> Iterator[None]:
    """Whatever happens to these directories inside, afterwards they are as they were."""
    kept = {directory: directory.with_name(f"{directory.name}.kept") for directory in directories}
    for directory, copy in kept.items():
        shutil.copytree(directory, copy)
    try:
        yield
    finally:
        for directory, copy in kept.items():
            shutil.rmtree(directory, ignore_errors=True)
            copy.rename(directory)


# --- changes of any file ---


def flip(position: int, bit: int = 0) -> Change:
    """One bit of the byte at `position`, from the end if negative."""

    def change(data: bytes) -> bytes:
        changed_data = bytearray(data)
        changed_data[position] ^= 1 << bit
        return bytes(changed_data)

    return change


def put(position: int, new: bytes) -> Change:
    return lambda data: data[:position] + new + data[position + len(new) :]


def cut(length: int) -> Change:
    """Keep the first `length` bytes, or all but the last `-length`."""
    return lambda data: data[:length]


def extend(more: bytes) -> Change:
    return lambda data: data + more


def become(content: bytes) -> Change:
    return lambda _: content


def remove(_: bytes) -> None:
    return None


# --- changes of a sealed object (shared/crypto/sealed_object.py) ---


def chunks_of(data: bytes) -> tuple[bytes, list[bytes]]:
    """(header, sealed chunks)."""
    layout = ObjectLayout.parse(data, len(data))
    step = layout.chunk_size_bytes + TAG_SIZE_BYTES
    return data[:HEADER_SIZE_BYTES], [data[at : at + step] for at in range(HEADER_SIZE_BYTES, len(data), step)]


def in_chunks(change: Callable[[list[bytes]], list[bytes]]) -> Change:
    """Chunks added, dropped, moved, doubled; the header stays."""

    def of_object(data: bytes) -> bytes:
        header, chunks = chunks_of(data)
        return header + b"".join(change(chunks))

    return of_object
