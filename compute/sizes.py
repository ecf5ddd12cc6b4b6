"""Sizes of computes: what one gets of memory, connections and workers. A core.

A compute unit (CU) is 4 GiB of memory and one processor's worth of parallel workers, as in Neon. It is what Postgres is
configured for; nothing takes the machine's memory away from it (docs/compute.md).

    memory              4 GiB per CU
    volume              3/4 of it: all files, the whole database among them, are in memory here
    shared_buffers      1/32: the files are in memory anyway
    max_connections     200 sessions per CU, at least 100 and at most 1000; those that Postgres keeps back on top
    work_mem            1/4 of the memory, shared by all sessions
    maintenance_work_mem  1/64
    parallel workers    one per CU in all, at most two for one query; none below 1 CU
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from shared.api.compute import EndpointSize

_CU_MIB: Final = 4096
_MAX_SESSIONS: Final = 1000
RESERVED_CONNECTIONS: Final = 3
"""Postgres keeps them for superusers: the agent (superuser_reserved_connections)."""
MAX_CONNECTIONS: Final = _MAX_SESSIONS + RESERVED_CONNECTIONS
"""Of the largest: no read-only endpoint may allow less than any primary of its branch has."""


@dataclass(frozen=True, slots=True)
class Resources:
    volume_mb: int
    shared_buffers_mb: int
    max_connections: int
    work_mem_mb: int
    maintenance_work_mem_mb: int
    max_parallel_workers: int


def resources(size: EndpointSize) -> Resources:
    units = float(size.value)
    memory_mb = int(_CU_MIB * units)
    sessions = min(_MAX_SESSIONS, max(100, int(200 * units)))
    return Resources(
        volume_mb=memory_mb * 3 // 4,
        shared_buffers_mb=memory_mb // 32,
        max_connections=sessions + RESERVED_CONNECTIONS,
        work_mem_mb=memory_mb // 4 // sessions,
        maintenance_work_mem_mb=memory_mb // 64,
        max_parallel_workers=math.floor(units),
    )
