"""Postgres's log, sealed under a key of the boot key: readable while the compute lives, noise afterwards.

Error messages quote SQL and rows, so the log is user data. It is kept in two files of bounded size, `<path>.0` and
`<path>.1`, used in turn: a full one makes the other start anew. Each file, integers big-endian::

    offset | size | field
    -------+------+-------------------------------------------------------------
    0      | 8    | magic "KLLOG" 00 00 01
    8      | …    | batches, each:
           | 4    |   length of the sealed bytes, tag included
           | 8    |   batch counter: the GCM nonce; rises over all files of a boot
           | …    |   sealed bytes of one batch of lines

AAD: domain, instance id, and the counter through the nonce. One key seals all batches of one boot, and no counter is
used twice, because the counter is never reset and the key never leaves the process that counts. For the same reason
that process knows which batches the files have to hold: one that is gone, or there twice, is noticed, also where a file
was cut between two.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final

from shared.crypto.aead import AeadKey, counter_nonce
from shared.errors import CorruptedError
from shared.ids import InstanceId

KEY_LABEL: Final = b"keylake/v1/compute-log"
"""The log's key is that of its compute's boot key (shared/crypto/derive.py)."""
MAGIC: Final = b"KLLOG\x00\x00\x01"
_HEADER: Final = struct.Struct(">IQ")
MAX_BATCH_SIZE_BYTES: Final = 64 * 1024
"""Plaintext of one batch."""
_MAX_SEALED_SIZE_BYTES: Final = MAX_BATCH_SIZE_BYTES + 16


class SealedLog:
    """Appends batches, reads them back. Blocking file I/O of at most 64 KiB at a time: no fsync, it need not
    survive.
    """

    def __init__(self, path: Path, key: AeadKey, instance_id: InstanceId, limit_bytes: int) -> None:
        """`limit_bytes` bounds both files together. The key stays the caller's."""
        self._paths = (path.with_name(path.name + ".0"), path.with_name(path.name + ".1"))
        self._key = key
        self._aad = b"keylake compute log 1\0" + str(instance_id).encode()
        self._file_limit_bytes = max(limit_bytes // 2, 2 * _MAX_SEALED_SIZE_BYTES)
        self._counter = 0
        self._written: tuple[list[int], list[int]] = ([], [])  # counters of the batches in each file
        self._current = 0
        self._file: BinaryIO | None = None
        self._size_bytes = 0

    def append(self, text: bytes) -> None:
        """Seal and write `text`, in as many batches as it takes. Raises KeyWipedError, OSError."""
        for start in range(0, len(text), MAX_BATCH_SIZE_BYTES):
            self._append(text[start : start + MAX_BATCH_SIZE_BYTES])

    def _append(self, batch: bytes) -> None:
        self._counter += 1
        sealed = self._key.seal(counter_nonce(self._counter), batch, self._aad)
        record = _HEADER.pack(len(sealed), self._counter) + sealed
        if self._file is None or self._size_bytes + len(record) > self._file_limit_bytes:
            self._rotate()
        assert self._file is not None  # noqa: S101 - _rotate opened it
        self._file.write(record)
        self._written[self._current].append(self._counter)
        self._size_bytes += len(record)

    def _rotate(self) -> None:
        if self._file is not None:
            self._file.close()
            self._current = 1 - self._current
        self._file = self._paths[self._current].open("wb", buffering=0)
        self._written[self._current].clear()
        self._paths[self._current].chmod(0o600)
        self._file.write(MAGIC)
        self._size_bytes = len(MAGIC)

    def tail(self, size_bytes: int) -> bytes:
        """The last `size_bytes` of the log in the clear, or less. Raises KeyWipedError, IntegrityError,
        CorruptedError, OSError.
        """
        batches: list[tuple[int, bytes]] = []
        for path, written in zip(self._paths, self._written, strict=True):
            found = read_batches(path.read_bytes()) if written else []
            if [counter for counter, _ in found] != written:
                raise CorruptedError("a sealed log lacks batches that were written, or has others")
            batches += found
        opened = [self._key.open(counter_nonce(counter), sealed, self._aad) for counter, sealed in sorted(batches)]
        return b"".join(opened)[-size_bytes:]

    def close(self) -> None:
        """Close and remove the files: without the key they are noise."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for path in self._paths:
            path.unlink(missing_ok=True)


def read_batches(data: bytes) -> list[tuple[int, bytes]]:
    """(counter, sealed bytes) of a whole log file. Raises CorruptedError unless it is exactly the format above."""
    if data[: len(MAGIC)] != MAGIC:
        raise CorruptedError("not a sealed log")
    batches = []
    position = len(MAGIC)
    while position < len(data):
        if len(data) - position < _HEADER.size:
            raise CorruptedError("a sealed log ends in the middle of a batch")
        size, counter = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        if not 16 <= size <= min(_MAX_SEALED_SIZE_BYTES, len(data) - position):
            raise CorruptedError("a batch of a sealed log has an impossible size")
        batches.append((counter, data[position : position + size]))
        position += size
    return batches
