"""Blocks on a disk that is not trusted, sealed under keys that end with the compute.

One local file of slots. A slot holds one block of 8192 bytes, sealed: ciphertext and tag, 8208 bytes, and nothing
else; what stands where is known in memory only. AAD: the context of the whole file, the owner's id, the block's number
within it, and the write counter, big-endian u64 each. The nonce is the write counter, which never repeats in the life
of a `SealedBlocks`. So a slot that was altered, swapped with another, or put back to what it held before does not
open (`IntegrityError`).

The volume's key seals nothing: block key n is what it yields for n, u32 big-endian (HKDF, shared/crypto/derive.py). A
block key seals at most 2^23 blocks, 64 GiB (shared/crypto/limits.py); then the next one is made. All of them stay: a
block that is never written again is opened with the key of its time.

    offset          | size | field
    ----------------+------+------------------------------------
    slot * 8208     | 8192 | ciphertext
    slot * 8208 + … | 16   | tag
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Sequence
from typing import Final

from shared.crypto.aead import TAG_SIZE_BYTES, AeadKey, counter_nonce, default_suite
from shared.crypto.derive import derive_key
from shared.crypto.limits import MAX_BYTES_PER_DEK
from shared.crypto.secret import SecretKey
from shared.errors import IntegrityError, UnavailableError

BLOCK_SIZE_BYTES: Final = 8192
SLOT_SIZE_BYTES: Final = BLOCK_SIZE_BYTES + TAG_SIZE_BYTES
BLOCKS_PER_KEY: Final = MAX_BYTES_PER_DEK // BLOCK_SIZE_BYTES
_BINDING: Final = struct.Struct(">QQQ")
_DOMAIN: Final = b"keylake compute volume 1\0"
_KEY_LABEL: Final = b"keylake/v1/compute-volume-blocks"


def block_key(volume_key: SecretKey, number: int) -> SecretKey:
    """The key of the blocks that are written as [number * BLOCKS_PER_KEY, (number + 1) * BLOCKS_PER_KEY)."""
    return derive_key(volume_key, _KEY_LABEL + number.to_bytes(4, "big"))


class VolumeFullError(UnavailableError):
    """No room for another block: of the disk, or of what one compute may take of it."""


class SealedBlocks:
    """Not thread-safe. Reads and writes block: the file is a local one."""

    def __init__(
        self,
        descriptor: int,
        key: SecretKey,
        context: bytes,
        limit_blocks: int,
        blocks_per_key: int = BLOCKS_PER_KEY,
    ) -> None:
        """`descriptor`: of an empty file. `key`: of this volume and no other, ever. Both are ours from now on.
        `context`: whose blocks these are."""
        self._descriptor = descriptor
        self._key = key
        self._aad = _DOMAIN + context + b"\0"
        self._limit = limit_blocks
        self._blocks_per_key = blocks_per_key
        self._keys: list[AeadKey] = []
        self._counter = 0
        self._counter_of = array("Q")
        """By slot: the write that filled it; 0 when it is free."""
        self._free: list[int] = []

    @property
    def used_blocks(self) -> int:
        return len(self._counter_of) - len(self._free)

    @property
    def limit_blocks(self) -> int:
        return self._limit

    def take(self) -> int:
        """A slot for one block. Raises VolumeFullError."""
        if self._free:
            return self._free.pop()
        if len(self._counter_of) >= self._limit:
            raise VolumeFullError("the volume is full")
        self._counter_of.append(0)
        return len(self._counter_of) - 1

    def give_back(self, slot: int) -> None:
        """What it held cannot be read any more."""
        self._counter_of[slot] = 0
        self._free.append(slot)

    def write(self, slots: Sequence[int], owner: int, first_block: int, data: bytes | memoryview) -> None:
        """Whole consecutive blocks of `owner`, one per slot. Raises VolumeFullError, OSError, KeyWipedError."""
        sealed: list[bytes] = []
        run_start = 0
        for number, slot in enumerate(slots):
            self._counter += 1
            counter = self._counter
            start = number * BLOCK_SIZE_BYTES
            aad = self._aad + _BINDING.pack(owner, first_block + number, counter)
            key = self._key_of(counter)
            block = key.seal(counter_nonce(counter), data[start : start + BLOCK_SIZE_BYTES], aad)
            self._counter_of[slot] = counter
            if number and slot != slots[number - 1] + 1:
                self._put(slots[run_start], sealed)
                run_start, sealed = number, []
            sealed.append(block)
        if sealed:
            self._put(slots[run_start], sealed)

    def read(self, slots: Sequence[int], owner: int, first_block: int) -> bytes:
        """The same back. Raises IntegrityError, OSError, KeyWipedError."""
        opened: list[bytes] = []
        at = 0
        while at < len(slots):
            end = at + 1
            while end < len(slots) and slots[end] == slots[end - 1] + 1:
                end += 1
            sealed = os.pread(self._descriptor, (end - at) * SLOT_SIZE_BYTES, slots[at] * SLOT_SIZE_BYTES)
            view = memoryview(sealed)
            for number in range(at, end):
                counter = self._counter_of[slots[number]]
                if not counter:
                    raise IntegrityError("a block of the volume was never written")
                aad = self._aad + _BINDING.pack(owner, first_block + number, counter)
                start = (number - at) * SLOT_SIZE_BYTES
                opened.append(
                    self._key_of(counter).open(counter_nonce(counter), view[start : start + SLOT_SIZE_BYTES], aad)
                )
            at = end
        return opened[0] if len(opened) == 1 else b"".join(opened)

    def _put(self, slot: int, sealed: list[bytes]) -> None:
        data = sealed[0] if len(sealed) == 1 else b"".join(sealed)
        try:
            written = os.pwrite(self._descriptor, data, slot * SLOT_SIZE_BYTES)
        except OSError as error:
            raise VolumeFullError(f"the volume's file cannot be written: {error.strerror}") from None
        if written != len(data):
            raise VolumeFullError("the disk below the volume is full")

    def _key_of(self, counter: int) -> AeadKey:
        number = counter // self._blocks_per_key
        while number >= len(self._keys):
            self._keys.append(AeadKey(block_key(self._key, len(self._keys)), default_suite()))
        return self._keys[number]

    def wipe(self) -> None:
        """Nothing opens from now on. Idempotent."""
        self._key.wipe()
        for key in self._keys:
            key.wipe()
        self._counter_of = array("Q", bytes(8 * len(self._counter_of)))

    def close(self) -> None:
        self.wipe()
        os.close(self._descriptor)


def make_block_file(directory: str | os.PathLike[str]) -> int:
    """A descriptor of a new file that no directory names: it ends with the process, however that ends.

    Raises OSError."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EOPNOTSUPP):  # a file system without O_TMPFILE (overlayfs, NFS)
            raise
    path = os.path.join(directory, f"{os.getpid()}-{os.urandom(8).hex()}.blocks")
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return descriptor
