"""Plaintext keys in memory.

A `SecretKey` lives in an arena of anonymous pages that are locked against swapping where the machine allows it, left
out of core dumps (MADV_DONTDUMP) and zeroed in forked children (MADV_WIPEONFORK). It has no repr, no pickle, no copy,
and compares in constant time. `wipe()` overwrites it; so does garbage collection.

What that does not promise: whoever may read this process's memory (root, ptrace) sees live keys, and the cipher
contexts of OpenSSL hold expanded copies until they are dropped. docs/threat-model.md has the exact words.
"""

from __future__ import annotations

import ctypes
import hmac
import mmap
import os
import threading
from typing import Final, Never

from shared.errors import LeaseExpiredError

KEY_SIZE_BYTES: Final = 32
_ARENA_SIZE_BYTES: Final = 64 * 1024
_SLOTS_PER_ARENA: Final = _ARENA_SIZE_BYTES // KEY_SIZE_BYTES
_MADV_WIPEONFORK: Final = 18  # linux/mman.h; not in the mmap module before Python 3.13

_libc = ctypes.CDLL(None, use_errno=True)


class KeyWipedError(LeaseExpiredError):
    """The key was wiped, because its lease ended, while somebody still held the object. Nothing was opened."""


class _Arena:
    """Fixed slots of 32 bytes in locked memory. Slots are zeroed when freed, so a free slot holds no key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._maps: list[mmap.mmap] = []
        self._free: list[memoryview] = []
        self.locked = True

    def take(self) -> memoryview:
        with self._lock:
            if not self._free:
                self._grow()
            return self._free.pop()

    def give_back(self, slot: memoryview) -> None:
        slot[:] = bytes(KEY_SIZE_BYTES)
        with self._lock:
            self._free.append(slot)

    def _grow(self) -> None:
        pages = mmap.mmap(-1, _ARENA_SIZE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(_ARENA_SIZE_BYTES)) != 0:
            self.locked = False  # RLIMIT_MEMLOCK; reported by shared.hardening
        pages.madvise(mmap.MADV_DONTDUMP)
        pages.madvise(_MADV_WIPEONFORK)
        view = memoryview(pages)
        self._maps.append(pages)
        self._free.extend(view[i * KEY_SIZE_BYTES : (i + 1) * KEY_SIZE_BYTES] for i in range(_SLOTS_PER_ARENA))


_arena = _Arena()


class SecretKey:
    """32 bytes of plaintext key. The owner calls `wipe()` when the key may no longer be used."""

    __slots__ = ("_slot",)
    _slot: memoryview | None

    def __init__(self, source: bytes | bytearray | memoryview) -> None:
        """Copies `source` (exactly 32 bytes). A bytearray is zeroed after the copy; bytes cannot be, so avoid them."""
        self._slot = None
        if len(source) != KEY_SIZE_BYTES:
            raise ValueError(f"a key has {KEY_SIZE_BYTES} bytes, not {len(source)}")
        slot = _arena.take()
        slot[:] = source
        self._slot = slot
        if isinstance(source, bytearray):
            source[:] = bytes(KEY_SIZE_BYTES)

    @classmethod
    def generate(cls) -> SecretKey:
        """A new random key from the kernel's generator."""
        scratch = bytearray(KEY_SIZE_BYTES)
        with open("/dev/urandom", "rb", buffering=0) as source:
            if source.readinto(scratch) != KEY_SIZE_BYTES:
                raise OSError("short read from /dev/urandom")
        return cls(scratch)

    def reveal(self) -> memoryview:
        """The key's own memory, for handing to a cipher. Do not keep it and do not copy it into bytes."""
        if self._slot is None:
            raise KeyWipedError("this key was wiped")
        return self._slot.toreadonly()

    def copied(self) -> bytes:
        """A copy that nobody can wipe, for a library that takes nothing else. Raises KeyWipedError, also when another
        thread wipes the key meanwhile: its memory may hold another key by then."""
        copy = bytes(self.reveal())
        self.reveal()
        return copy

    @property
    def wiped(self) -> bool:
        return self._slot is None

    def wipe(self) -> None:
        """Overwrite the key. Idempotent."""
        slot, self._slot = self._slot, None
        if slot is not None:
            _arena.give_back(slot)

    def matches(self, other: SecretKey) -> bool:
        """Constant-time comparison."""
        return hmac.compare_digest(self.reveal(), other.reveal())

    def __del__(self) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return "SecretKey(wiped)" if self.wiped else "SecretKey(…)"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __reduce__(self) -> Never:
        raise TypeError("a SecretKey is never pickled")

    def __copy__(self) -> Never:
        raise TypeError("a SecretKey is never copied")

    def __deepcopy__(self, memo: object) -> Never:
        raise TypeError("a SecretKey is never copied")


def lock_first_arena() -> bool:
    """Make the arena before there is a key for it. Are keys locked in memory?"""
    SecretKey.generate().wipe()
    return _arena.locked


def random_bytes(size_bytes: int) -> bytes:
    """Random bytes that are not a key: nonces, salts, identifiers."""
    return os.urandom(size_bytes)
