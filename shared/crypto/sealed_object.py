"""An immutable object sealed in chunks, so that a part of it can be opened without the rest (layer files, indexes).

Format version 1, big-endian::

    offset | size | field
    -------+------+---------------------------------------------------
    0      | 4    | magic "KLOB"
    4      | 1    | format version, 1
    5      | 1    | suite (1 = AES-256-GCM)
    6      | 2    | reserved, zero
    8      | 4    | chunk size c: plaintext bytes of every chunk but the last
    12     | 4    | reserved, zero
    16     | …    | chunk 0, chunk 1, … each its ciphertext and a 16-byte tag

Chunk i is sealed under nonce i with AAD = header ‖ context ‖ i (u64) ‖ last (u8). The last chunk holds 0 … c bytes
and is the only one with last = 1, so an object cut at a chunk boundary, extended, reordered or spliced does not open
(the STREAM construction of Hoang, Reyhanitabar, Rogaway, Vizár 2015, with the context bound as well). An empty object
is one empty last chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shared.crypto.aead import TAG_SIZE_BYTES, AeadKey, Suite, check_suite, counter_nonce
from shared.crypto.context import EncryptionContext
from shared.crypto.limits import MAX_BYTES_PER_DEK, MAX_CHUNKS_PER_DEK
from shared.errors import CorruptedError, IntegrityError

MAGIC: Final = b"KLOB"
FORMAT_VERSION: Final = 1
_HEADER: Final = struct.Struct(">4sBBHII")
HEADER_SIZE_BYTES: Final = _HEADER.size
_CHUNK_AAD: Final = struct.Struct(">QB")
MAX_CHUNK_SIZE_BYTES: Final = 16 * 1024 * 1024


def seal_object(
    key: AeadKey, context: EncryptionContext, plaintext: bytes | bytearray | memoryview, chunk_size_bytes: int
) -> bytes:
    """The whole sealed object. `key` must be fresh: one DEK seals one object, once.

    Raises ValueError for a chunk size out of range, and for more than one key may seal (limits.py).
    """
    if not 0 < chunk_size_bytes <= MAX_CHUNK_SIZE_BYTES:
        raise ValueError(f"chunk size out of range: {chunk_size_bytes}")
    if len(plaintext) > MAX_BYTES_PER_DEK:
        raise ValueError("object is larger than one DEK may seal")
    chunks = max(1, -(-len(plaintext) // chunk_size_bytes))
    if chunks > MAX_CHUNKS_PER_DEK:
        raise ValueError("object has more chunks than one DEK may seal")
    header = _HEADER.pack(MAGIC, FORMAT_VERSION, key.suite, 0, chunk_size_bytes, 0)
    aad = header + context.to_aad()
    view = memoryview(plaintext)
    parts = [header]
    parts += (
        key.seal(
            counter_nonce(i),
            view[i * chunk_size_bytes : (i + 1) * chunk_size_bytes],
            aad + _CHUNK_AAD.pack(i, i == chunks - 1),
        )
        for i in range(chunks)
    )
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class ObjectLayout:
    """Where the chunks of a sealed object lie. Built from its first 16 bytes and its size; holds no key."""

    suite: Suite
    chunk_size_bytes: int
    sealed_size_bytes: int
    header: bytes

    @classmethod
    def parse(cls, header: bytes, sealed_size_bytes: int) -> ObjectLayout:
        """Raises CorruptedError for bytes or a size that no sealed object has."""
        if len(header) < HEADER_SIZE_BYTES:
            raise CorruptedError("sealed object is shorter than its header")
        header = bytes(header[:HEADER_SIZE_BYTES])
        magic, version, suite, reserved, chunk_size, reserved2 = _HEADER.unpack(header)
        if magic != MAGIC:
            raise CorruptedError("not a sealed object: wrong magic")
        if version != FORMAT_VERSION or reserved or reserved2:
            raise CorruptedError(f"sealed object format version {version} is not supported")
        if not 0 < chunk_size <= MAX_CHUNK_SIZE_BYTES:
            raise CorruptedError("sealed object has an impossible chunk size")
        layout = cls(check_suite(suite), chunk_size, sealed_size_bytes, header)
        last = (sealed_size_bytes - HEADER_SIZE_BYTES) - (layout.chunks - 1) * (chunk_size + TAG_SIZE_BYTES)
        if layout.chunks < 1 or last < TAG_SIZE_BYTES:
            raise CorruptedError("sealed object has an impossible size")
        return layout

    @property
    def chunks(self) -> int:
        return -(-(self.sealed_size_bytes - HEADER_SIZE_BYTES) // (self.chunk_size_bytes + TAG_SIZE_BYTES))

    @property
    def plaintext_size_bytes(self) -> int:
        return self.sealed_size_bytes - HEADER_SIZE_BYTES - self.chunks * TAG_SIZE_BYTES

    def chunk_range(self, start: int, end: int) -> range:
        """Chunks that hold plaintext bytes [start, end). Raises IntegrityError when the object is shorter."""
        if not 0 <= start <= end <= self.plaintext_size_bytes:
            raise IntegrityError("sealed object is shorter than its index says")
        return range(start // self.chunk_size_bytes, max(-(-end // self.chunk_size_bytes), 0))

    def sealed_range(self, chunks: range) -> tuple[int, int]:
        """Half-open byte range of these consecutive chunks in the sealed object."""
        sealed_chunk = self.chunk_size_bytes + TAG_SIZE_BYTES
        start = HEADER_SIZE_BYTES + chunks.start * sealed_chunk
        return start, min(HEADER_SIZE_BYTES + chunks.stop * sealed_chunk, self.sealed_size_bytes)


class ObjectOpener:
    """Opens chunks of one sealed object."""

    __slots__ = ("_aad", "_key", "layout")

    def __init__(self, key: AeadKey, context: EncryptionContext, layout: ObjectLayout) -> None:
        if key.suite is not layout.suite:
            raise IntegrityError("sealed object names another suite than its key")
        self._key = key
        self._aad = layout.header + context.to_aad()
        self.layout = layout

    def open_chunk(self, index: int, sealed: bytes | memoryview) -> bytes:
        """Plaintext of chunk `index`. Raises IntegrityError when it does not verify."""
        last = index == self.layout.chunks - 1
        return self._key.open(counter_nonce(index), sealed, self._aad + _CHUNK_AAD.pack(index, last))

    def open_chunks(self, chunks: range, sealed: bytes | memoryview) -> Sequence[bytes]:
        """Open consecutive chunks that were read as one byte range (`ObjectLayout.sealed_range`)."""
        step = self.layout.chunk_size_bytes + TAG_SIZE_BYTES
        view = memoryview(sealed)
        return [self.open_chunk(c, view[n * step : (n + 1) * step]) for n, c in enumerate(chunks)]

    def open_all(self, sealed: bytes | memoryview) -> bytes:
        """The whole plaintext of a whole sealed object."""
        if len(sealed) != self.layout.sealed_size_bytes:
            raise IntegrityError("sealed object has another size than announced")
        return b"".join(self.open_chunks(range(self.layout.chunks), memoryview(sealed)[HEADER_SIZE_BYTES:]))


def open_object(key: AeadKey, context: EncryptionContext, sealed: bytes) -> bytes:
    """Open a whole object. Raises IntegrityError."""
    layout = ObjectLayout.parse(sealed[:HEADER_SIZE_BYTES], len(sealed))
    return ObjectOpener(key, context, layout).open_all(sealed)
