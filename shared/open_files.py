"""How many files and sockets a process may have open at once."""

from __future__ import annotations

import resource


def allow_open_files(wanted: int) -> int:
    """Let this process have `wanted` file descriptors, or as many as its hard limit allows; returns its limit now.

    The soft limit is 1024 on most machines, for the sake of select(2), which nobody here uses. Programs that this
    process starts inherit what it has. A limit that is higher already stays.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted if soft == resource.RLIM_INFINITY else soft
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
