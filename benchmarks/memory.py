"""`python -m benchmarks memory --gb 10`: WAL goes through a pageserver, whose memory stays within its settings.

A table is filled and emptied through an endpoint of a whole cluster, one transaction after the other; backpressure lets
nobody run away. The resident memory of the pageserver's process is looked at all the while.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from time import perf_counter
from typing import Final

from benchmarks.harness import Row
from keylake.cluster import Cluster
from pageserver.timeline import TimelineConfig
from shared.lsn import Lsn
from tests.cluster.primary import Session, caught_up, connect

INGEST_MEMORY_MB: Final = 256
TARGET_MB: Final = 32
_ROWS: Final = 100_000
_FILL: Final = "insert into filled select i, repeat('m', 500) from generate_series(1, $1::int) i"
_LOOK_EVERY_S: Final = 0.2
_MB: Final = 1 << 20


def resident_bytes(pid: int) -> int:
    """VmRSS of proc_pid_status(5)."""
    found = re.search(r"VmRSS:\s+([0-9]+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def allowance_bytes() -> int:
    """What the settings let a pageserver with one timeline hold, above what it has when it does nothing: values that
    are not flushed; the one layer that is being sealed, in plaintext and sealed; caches; what a merge reads and writes
    (three times its target); and WAL that is not committed yet."""
    config = TimelineConfig()
    caches = config.page_cache_bytes + config.chunk_cache_bytes + config.index_cache_bytes
    return (INGEST_MEMORY_MB + 2 * 64 + 3 * TARGET_MB + 32) * _MB + caches


async def measure(gb: float) -> list[Row]:
    settings: dict[str, dict[str, float]] = {
        "keymanager": {"lease_ttl_s": 15},  # whoever leads may be slow on a machine that is busy
        "pageserver": {
            "ingest_memory_mb": INGEST_MEMORY_MB,
            "compaction_target_mb": TARGET_MB,
            # What is behind goes away, on the disk of this machine, too.
            "retention_lsn_mb": 64,
            "retention_age_s": 0,
            "gc_interval_s": 5,
            "lsn_lease_s": 5,
            "cache_size_mb": 512,
        },
        "safekeeper": {"wal_keep_size_bytes": 0, "wal_history_size_bytes": 64 << 20, "offload_interval_s": 1},
    }
    async with Cluster(settings=settings) as cluster:
        project = await cluster.create_project("memory")
        session = await connect(project)
        await session.execute("create table filled (id int, filler text)")
        pid = cluster.service("pageserver").pid
        before = resident_bytes(pid)
        seen: list[int] = []

        async def look() -> None:
            while True:
                seen.append(resident_bytes(pid))
                await asyncio.sleep(_LOOK_EVERY_S)

        looking = asyncio.create_task(look())
        began, start = perf_counter(), await _position(session)
        while (done := await _position(session) - start) < gb * 1e9:
            await session.execute(_FILL, _ROWS)
            await session.execute("truncate filled")
        await caught_up(cluster, project, 600)
        spent_s = perf_counter() - began
        looking.cancel()
        await asyncio.wait([looking])
        await session.close()
    peak, allowed = max(seen), before + allowance_bytes()
    half = len(seen) // 2
    return [
        Row(
            f"memory of the pageserver, {done / 1e9:.1f} GB of WAL",
            f"{peak / _MB:.0f} MB at most ({done / spent_s / 1e6:.1f} MB/s)",
            f"{before / _MB:.0f} MB before",
            peak / before,
            f"<= {allowed / _MB:.0f} MB: before, and what the settings allow",
            peak <= allowed,
        ),
        Row(
            "its peak in the second half of that",
            f"{max(seen[half:]) / _MB:.0f} MB",
            f"{max(seen[:half]) / _MB:.0f} MB in the first",
            max(seen[half:]) / max(seen[:half]),
            "report",
            None,
        ),
    ]


async def _position(session: Session) -> int:
    return Lsn.parse(await session.fetchval("select pg_current_wal_flush_lsn()::text")).value
