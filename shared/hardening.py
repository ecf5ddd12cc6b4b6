"""Memory that was freed is overwritten, and cipher state stays off the stack: by the C library, before any of our code.

Python can overwrite a key that it holds (`shared.crypto.secret`), but not the copies that libraries make and free: the
JSON and the base64 text that a KMS's SDK parsed, pages, TLS records. glibc can. It reads the variables below when a
process starts, so whoever starts a service sets them (`hardened_environment`), and the service says whether it worked
(`harden_process`).

`perturb` makes free(3) fill what it takes back (malloc's M_PERTURB, mallopt(3)), small blocks only if they do not go
into the per-thread cache (glibc.malloc.tcache_count). Python takes objects of up to 512 bytes from arenas of its own
and never clears them; PYTHONMALLOC=malloc gives them to glibc, too. That costs twice the CPU where many small objects
are made, so only the keymanager, the one process that sees keys as text, does without arenas and caches. Its objects
then lie between those that a TLS connection needs: gigabytes with 10,000 sessions, of which each message touches a few
hundred places. So it is also the one that asks for huge pages (glibc.malloc.hugetlb), which says nothing about secrets:
a renewal costs an eighth less with 2,000 sessions.

LD_BIND_NOW: a symbol that is bound when it is first called saves all vector registers on the stack
(`_dl_runtime_resolve_xsavec`), and AES-NI leaves round keys in them. They lay there until the thread got as deep again.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping
from typing import Final

from shared.crypto.secret import lock_first_arena

_TUNABLES: Final = "GLIBC_TUNABLES"
_BIND_NOW: Final = "LD_BIND_NOW"
_PYTHON_ALLOCATOR: Final = "PYTHONMALLOC"
_PERTURB: Final = "glibc.malloc.perturb=165"
_NO_CACHE: Final = "glibc.malloc.tcache_count=0"
_HUGE_PAGES: Final = "glibc.malloc.hugetlb=1"
_PR_SET_DUMPABLE: Final = 4


def hardened_environment(environment: Mapping[str, str], *, small_objects: bool = False) -> dict[str, str]:
    """`environment` with the variables that a service is to be started with.

    `small_objects`: for the keymanager, where everything that is freed is overwritten, however small.
    """
    tunables = [tunable for tunable in environment.get(_TUNABLES, "").split(":") if tunable]
    tunables += [_PERTURB, _NO_CACHE, _HUGE_PAGES] if small_objects else [_PERTURB]
    hardened = {**environment, _BIND_NOW: "1", _TUNABLES: ":".join(dict.fromkeys(tunables))}
    if small_objects:
        hardened[_PYTHON_ALLOCATOR] = "malloc"
    return hardened


def harden_process() -> dict[str, bool]:
    """Switch core dumps and ptrace by peers off for this process, and make its new files private to its user. Returns
    what was achieved, for the status page.

    Called once, at the start of every process that may hold a key, before it holds one.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    return {
        "core_dumps_off": True,
        "undumpable": libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0,
        "keys_locked_in_memory": lock_first_arena(),
        "freed_memory_overwritten": _freed_memory_is_overwritten(libc),
        "registers_off_the_stack": os.environ.get(_BIND_NOW) == "1",
    }


def _freed_memory_is_overwritten(libc: ctypes.CDLL) -> bool:
    """Tried, not believed: a variable says nothing to a C library that does not know it."""
    if not hasattr(libc, "gnu_get_libc_version"):
        return False  # another library may have given the memory back: not to be looked at
    size, mark = 64 * 1024, 0x3C
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    # The second block keeps the first from going back to the system, where we could not look at it any more.
    block, neighbour = libc.malloc(size), libc.malloc(size)
    if not block or not neighbour:
        return False
    ctypes.memset(block, mark, size)
    libc.free(block)
    overwritten = ctypes.c_ubyte.from_address(block + size // 2).value != mark
    libc.free(neighbour)
    return overwritten
