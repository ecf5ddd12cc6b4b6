"""How much one key seals at most. The files are sparse: they are as large as they say and take no room."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compute.volume.sealed_blocks import BLOCK_SIZE_BYTES, BLOCKS_PER_KEY
from shared.crypto.aead import AeadKey
from shared.crypto.context import EncryptionContext
from shared.crypto.limits import MAX_BYTES_PER_DEK, MAX_CHUNKS_PER_DEK
from shared.crypto.sealed_object import MAX_CHUNK_SIZE_BYTES, seal_object
from shared.crypto.secret import SecretKey
from shared.lsn import WAL_SEGMENT_SIZE_BYTES

CONTEXT = EncryptionContext({"a": "b"})


@contextmanager
def zeros(directory: Path, size_bytes: int) -> Iterator[memoryview]:
    path = directory / "zeros"
    with path.open("w+b") as file:
        file.truncate(size_bytes)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages, memoryview(pages) as view:
            yield view


@pytest.mark.parametrize(
    ("size_bytes", "chunk_size_bytes", "what"),
    [
        (MAX_BYTES_PER_DEK + 1, MAX_CHUNK_SIZE_BYTES, "larger than one DEK"),
        (MAX_CHUNKS_PER_DEK + 1, 1, "more chunks than one DEK"),
    ],
)
def test_more_than_one_key_may_seal_is_refused(
    tmp_path: Path, size_bytes: int, chunk_size_bytes: int, what: str
) -> None:
    with zeros(tmp_path, size_bytes) as plaintext, pytest.raises(ValueError, match=what):
        seal_object(AeadKey(SecretKey.generate()), CONTEXT, plaintext, chunk_size_bytes)


def test_what_else_one_key_seals_is_within_the_limits() -> None:
    """A volume takes another key after so many blocks (tests/unit/test_compute_volume.py); a piece of WAL is at most a
    segment, in frames of a byte at least."""
    assert BLOCKS_PER_KEY * BLOCK_SIZE_BYTES <= MAX_BYTES_PER_DEK
    assert BLOCKS_PER_KEY <= MAX_CHUNKS_PER_DEK
    assert min(MAX_BYTES_PER_DEK, MAX_CHUNKS_PER_DEK) >= WAL_SEGMENT_SIZE_BYTES
