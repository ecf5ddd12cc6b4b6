"""Sealed WAL pieces: the on-disk format of a safekeeper's log. A core. (docs/formats/wal-piece.md tells it in prose.)

A piece is a run of WAL inside one 16 MiB segment, written in one term by one process, in a file named
`<segment:016x>.<term:016x>.<sequence:04x>` with its envelope (`shared.crypto.envelope`) in `….key` beside it. Format
version 1, big-endian: a header, then frames, then zeros (preallocated space).

Piece header, 40 bytes::

    offset | size | field
    -------+------+------------------------------------------------------------
    0      | 4    | magic "KLWP"
    4      | 1    | format version, 1
    5      | 1    | suite (1 = AES-256-GCM)
    6      | 2    | reserved, zero
    8      | 8    | segment number (LSN / 16 MiB)
    16     | 8    | term
    24     | 4    | sequence number of the piece, unique in its timeline
    28     | 8    | LSN of the first byte
    36     | 4    | CRC-32C of bytes 0 … 35

Frame header, 24 bytes, followed by the ciphertext and its 16-byte tag::

    offset | size | field
    -------+------+------------------------------------------------------------
    0      | 4    | CRC-32C of bytes 4 … 23
    4      | 4    | length of the plaintext, 1 … 1 MiB
    8      | 8    | frame number, 0, 1, 2, …
    16     | 8    | LSN of the first byte

A frame is sealed under the piece's own DEK with nonce = frame number and AAD = encryption context ‖ piece header ‖
frame header. Frames are contiguous in LSN and do not cross the segment's end. Only the process that made a piece
appends to it, and it makes each frame durable before it writes the next, so a (DEK, nonce) pair never seals twice and
**at most the last frame can be torn**. The CRC only tells whether a length may be believed; the tag is what protects.

*Torn or altered?* Space is zeroed before it is used and disks write whole sectors, so what a crash leaves of the frame
that was being written has at least one sector (or the frame's part of it) still all zero, or the file ends in it. That,
and only at the very end, is a torn tail: cut off, it was never acknowledged. Any other damage is an IntegrityError.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

import google_crc32c

from shared.crypto.aead import TAG_SIZE_BYTES, AeadKey, Buffer, Suite, check_suite, counter_nonce
from shared.errors import CorruptedError, IntegrityError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES

MAGIC: Final = b"KLWP"
FORMAT_VERSION: Final = 1
OBJECT_KIND: Final = f"wal-piece/{FORMAT_VERSION}"
_PIECE_HEADER: Final = struct.Struct(">4sBBHQQIQ")
_CRC: Final = struct.Struct(">I")
PIECE_HEADER_SIZE_BYTES: Final = _PIECE_HEADER.size + _CRC.size
_FRAME_FIELDS: Final = struct.Struct(">IQQ")
_FRAME_HEADER: Final = struct.Struct(">IIQQ")
FRAME_HEADER_SIZE_BYTES: Final = _FRAME_HEADER.size
FRAME_OVERHEAD_SIZE_BYTES: Final = FRAME_HEADER_SIZE_BYTES + TAG_SIZE_BYTES
MAX_FRAME_PLAINTEXT_BYTES: Final = 1024 * 1024
MAX_FRAME_SIZE_BYTES: Final = MAX_FRAME_PLAINTEXT_BYTES + FRAME_OVERHEAD_SIZE_BYTES
SECTOR_SIZE_BYTES: Final = 512
KEY_SUFFIX: Final = ".key"
_FILE_NAME: Final = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{16})\.([0-9a-f]{4,8})")


class PieceId(NamedTuple):
    segment_number: int
    term: int
    sequence: int

    @property
    def file_name(self) -> str:
        return f"{self.segment_number:016x}.{self.term:016x}.{self.sequence:04x}"

    @classmethod
    def parse(cls, file_name: str) -> PieceId | None:
        """None when it is not the name of a piece."""
        match = _FILE_NAME.fullmatch(file_name)
        if match is None:
            return None
        found = cls(int(match[1], 16), int(match[2], 16), int(match[3], 16))
        return found if found.file_name == file_name else None

    def object_name(self, node_id: str) -> str:
        """What the DEK is for. Each safekeeper's copy is another object with another DEK."""
        return f"wal/{node_id}/{self.file_name}"

    @property
    def segment_end_lsn(self) -> int:
        return (self.segment_number + 1) * WAL_SEGMENT_SIZE_BYTES


@dataclass(frozen=True, slots=True)
class PieceHeader:
    piece: PieceId
    start_lsn: int
    suite: Suite

    def serialize(self) -> bytes:
        segment_number, term, sequence = self.piece
        fields = _PIECE_HEADER.pack(
            MAGIC, FORMAT_VERSION, self.suite, 0, segment_number, term, sequence, self.start_lsn
        )
        return fields + _CRC.pack(google_crc32c.value(fields))

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """From the first bytes of the file. Raises CorruptedError; IntegrityError for a suite that is refused."""
        raw = bytes(data[:PIECE_HEADER_SIZE_BYTES])
        if len(raw) < PIECE_HEADER_SIZE_BYTES:
            raise CorruptedError("a WAL piece is shorter than its header")
        fields = raw[: _PIECE_HEADER.size]
        if _CRC.unpack_from(raw, _PIECE_HEADER.size)[0] != google_crc32c.value(fields):
            raise CorruptedError("the header of a WAL piece has a wrong CRC")
        magic, version, suite, reserved, segment_number, term, sequence, start_lsn = _PIECE_HEADER.unpack(fields)
        if magic != MAGIC or version != FORMAT_VERSION or reserved:
            raise CorruptedError("not a WAL piece of a version that we know")
        if start_lsn // WAL_SEGMENT_SIZE_BYTES != segment_number:
            raise CorruptedError("a WAL piece starts outside of its segment")
        return cls(PieceId(segment_number, term, sequence), start_lsn, check_suite(suite))


class PieceCipher:
    """Seals and opens the frames of one piece. Thread-safe but for the key being wiped, which raises KeyWipedError."""

    __slots__ = ("_aad", "_key", "header")

    def __init__(self, key: AeadKey, context_aad: bytes, header: PieceHeader) -> None:
        """`context_aad`: canonical encryption context of the object.

        Raises IntegrityError for a key of another suite.
        """
        if key.suite is not header.suite:
            raise IntegrityError("a WAL piece names another suite than its key")
        self._key = key
        self._aad = context_aad + header.serialize()
        self.header = header

    def seal(self, number: int, lsn: int, plaintext: Buffer) -> tuple[bytes, bytes]:
        """(frame header, ciphertext with tag). The caller never uses a number twice."""
        fields = _FRAME_FIELDS.pack(len(plaintext), number, lsn)
        header = _CRC.pack(google_crc32c.value(fields)) + fields
        return header, self._key.seal(counter_nonce(number), plaintext, self._aad + header)

    def open(self, number: int, header: bytes, sealed: Buffer) -> bytes:
        """Plaintext of frame `number`. Raises IntegrityError, KeyWipedError."""
        return self._key.open(counter_nonce(number), sealed, self._aad + header)


@dataclass(slots=True)
class FrameIndex:
    """Where the frames of one piece are: frame i is [lsns[i], next start) at file offset offsets[i].

    The last elements are sentinels: `lsns[-1]` is where the next frame starts, `offsets[-1]` where it would be written.
    """

    lsns: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))

    @classmethod
    def empty(cls, start_lsn: int) -> FrameIndex:
        return cls(array("Q", [start_lsn]), array("Q", [PIECE_HEADER_SIZE_BYTES]))

    @property
    def frames(self) -> int:
        return len(self.lsns) - 1

    @property
    def end_lsn(self) -> int:
        return self.lsns[-1]

    @property
    def end_offset(self) -> int:
        return self.offsets[-1]

    def append(self, size_bytes: int) -> None:
        """The next frame holds `size_bytes` of WAL. Offsets first: a reader in another thread trusts `lsns`."""
        self.offsets.append(self.offsets[-1] + size_bytes + FRAME_OVERHEAD_SIZE_BYTES)
        self.lsns.append(self.lsns[-1] + size_bytes)

    def frame_of(self, lsn: int) -> int:
        """Number of the frame that holds the byte at `lsn`, which must be in [first start, end_lsn)."""
        return bisect_right(self.lsns, lsn, 0, len(self.lsns) - 1) - 1


class _FrameHeader(NamedTuple):
    length: int
    number: int
    lsn: int


def _parse_frame_header(data: Buffer, offset: int) -> _FrameHeader | None:
    """None unless the CRC matches and the length is possible."""
    check, length, number, lsn = _FRAME_HEADER.unpack_from(data, offset)
    raw = bytes(data[offset + _CRC.size : offset + FRAME_HEADER_SIZE_BYTES])
    if check != google_crc32c.value(raw) or not 1 <= length <= MAX_FRAME_PLAINTEXT_BYTES:
        return None
    return _FrameHeader(length, number, lsn)


def index_frames(data: Buffer, header: PieceHeader, end_lsn: int) -> FrameIndex:
    """Find the frames of a closed piece, up to the one that reaches `end_lsn`, by their headers alone.

    What stands behind that (a torn frame, clipped frames) is not looked at. Whether the frames are genuine shows when
    they are opened. Raises IntegrityError when the piece does not reach that far in one contiguous run.
    """
    index = FrameIndex.empty(header.start_lsn)
    while index.end_lsn < end_lsn:
        frame = _frame_at(data, index)
        if frame is None:
            raise IntegrityError("a WAL piece is damaged: a frame that was acknowledged is missing or cut off")
        index.append(frame.length)
    return index


def _frame_at(data: Buffer, index: FrameIndex) -> _FrameHeader | None:
    """The next frame's header; None unless it is intact, whole, and the one that belongs there."""
    if len(data) - index.end_offset < FRAME_HEADER_SIZE_BYTES:
        return None
    frame = _parse_frame_header(data, index.end_offset)
    if frame is None or frame.number != index.frames or frame.lsn != index.end_lsn:
        return None
    if index.end_offset + frame.length + FRAME_OVERHEAD_SIZE_BYTES > len(data):
        return None
    return frame


def next_frame_length(data: Buffer, index: FrameIndex) -> int | None:
    """How much WAL the frame behind those of `index` says it has. None unless its header is intact and it is whole."""
    frame = _frame_at(data, index)
    return None if frame is None else frame.length


def open_frames(cipher: PieceCipher, index: FrameIndex, first: int, data: Buffer, count: int) -> list[bytes]:
    """Open `count` frames from number `first` on; `data` starts at the first one's offset.

    Raises IntegrityError when one is not what the index says, or not genuine.
    """
    view, base = memoryview(data), index.offsets[first]
    opened = []
    for number in range(first, first + count):
        start, end = index.offsets[number] - base, index.offsets[number + 1] - base
        raw = bytes(view[start : start + FRAME_HEADER_SIZE_BYTES])
        if end > len(view):
            raise IntegrityError("a WAL piece is shorter than it was")
        length, lsn = index.lsns[number + 1] - index.lsns[number], index.lsns[number]
        if _parse_frame_header(raw, 0) != (length, number, lsn):
            raise IntegrityError("a WAL frame was altered after it was written")
        opened.append(cipher.open(number, raw, view[start + FRAME_HEADER_SIZE_BYTES : end]))
    return opened


@dataclass(frozen=True, slots=True)
class VerifiedTail:
    index: FrameIndex
    torn: bool
    """Bytes of a frame that was being written stand behind the last good one."""


def verify_tail(data: Buffer, cipher: PieceCipher) -> VerifiedTail:
    """Open every frame of the piece that was open when its process ended; answer the good ones.

    Raises IntegrityError for any damage that a crash cannot explain (module docstring).
    """
    header = cipher.header
    if bytes(data[:PIECE_HEADER_SIZE_BYTES]) != header.serialize():
        raise IntegrityError("a WAL piece was replaced: its header is another one")
    index = FrameIndex.empty(header.start_lsn)
    view = memoryview(data)
    used = len(bytes(data).rstrip(b"\0"))
    while index.end_offset < used:
        frame = _frame_at(data, index)
        if frame is None or index.end_lsn + frame.length > header.piece.segment_end_lsn:
            _check_torn(data, index, used, cipher)
            return VerifiedTail(index, torn=True)
        start = index.end_offset
        end = start + FRAME_OVERHEAD_SIZE_BYTES + frame.length
        raw = bytes(view[start : start + FRAME_HEADER_SIZE_BYTES])
        try:
            cipher.open(frame.number, raw, view[start + FRAME_HEADER_SIZE_BYTES : end])
        except IntegrityError:
            _check_torn(data, index, used, cipher)
            return VerifiedTail(index, torn=True)
        index.append(frame.length)
    return VerifiedTail(index, torn=False)


def _check_torn(data: Buffer, index: FrameIndex, used: int, cipher: PieceCipher) -> None:
    """Raises IntegrityError unless what stands at the end of `index` can be the rest of one torn frame."""
    start, number = index.end_offset, index.frames
    if len(data) - start < FRAME_HEADER_SIZE_BYTES:
        return  # the file ends inside the frame's header
    frame = _parse_frame_header(data, start)
    if frame is None:
        if used - start > MAX_FRAME_SIZE_BYTES or _successor_exists(data, start, used, number + 1):
            raise IntegrityError("a WAL frame in the middle of a piece is damaged")
        if not _has_zero_sector(data, start, start + FRAME_HEADER_SIZE_BYTES):
            raise IntegrityError("the last frame of a WAL piece was altered after it was written")
        return
    end = start + frame.length + FRAME_OVERHEAD_SIZE_BYTES
    fits = index.end_lsn + frame.length <= cipher.header.piece.segment_end_lsn
    if frame.number != number or frame.lsn != index.end_lsn or not fits:
        raise IntegrityError("a WAL piece has a gap, or a frame that is not its own")
    if used > end:
        raise IntegrityError("a WAL frame in the middle of a piece is damaged")
    if end <= len(data) and not _has_zero_sector(data, start, end):
        raise IntegrityError("the last frame of a WAL piece was altered after it was written")


def _successor_exists(data: Buffer, start: int, used: int, number: int) -> bool:
    """Does a good header of frame `number` stand anywhere in data[start:used]?"""
    region = bytes(data[start:used])
    wanted = number.to_bytes(8, "big")
    position = region.find(wanted)
    while position >= 0:
        at = position - 8
        if at >= 0 and at + FRAME_HEADER_SIZE_BYTES <= len(region):
            found = _parse_frame_header(region, at)
            if found is not None and found.number == number:
                return True
        position = region.find(wanted, position + 1)
    return False


def _has_zero_sector(data: Buffer, start: int, end: int) -> bool:
    """Is the part of [start, end) in any one sector all zero?"""
    position = start
    while position < end:
        sector_end = min(end, (position // SECTOR_SIZE_BYTES + 1) * SECTOR_SIZE_BYTES)
        if not any(bytes(data[position:sector_end])):
            return True
        position = sector_end
    return False
