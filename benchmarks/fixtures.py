"""How long a test session waits for its cluster, and a test for its project: what the pytest plugin's fixtures do.

The peer is what a suite without Keylake does: initdb and a stock Postgres, all in memory.
"""

from __future__ import annotations

import asyncio
import statistics
from time import perf_counter

from benchmarks.harness import Row, percentile, stock_primary
from keylake.testing import LocalCluster

SESSIONS = 5
PROJECTS = 4
"""In each session."""
CLUSTER_TARGET_S = 10.0
PROJECT_TARGET_S = 2.0


async def measure() -> list[Row]:
    clusters_s: list[float] = []
    projects_s: list[float] = []
    stock_s: list[float] = []
    for _ in range(SESSIONS):
        begun = perf_counter()
        async with stock_primary():
            stock_s.append(perf_counter() - begun)
        await asyncio.to_thread(_session, clusters_s, projects_s)
    peer = statistics.median(stock_s)
    return [
        _row("start of a cluster in a test session", clusters_s, peer, CLUSTER_TARGET_S),
        _row("a project under a CMK of its own, in that session", projects_s, peer, PROJECT_TARGET_S),
    ]


def _session(clusters_s: list[float], projects_s: list[float]) -> None:
    """LocalCluster has an event loop of its own, so that tests need none."""
    begun = perf_counter()
    with LocalCluster() as cluster:
        clusters_s.append(perf_counter() - begun)
        for _ in range(PROJECTS):
            begun = perf_counter()
            cluster.create_project()
            projects_s.append(perf_counter() - begun)


def _row(what: str, values_s: list[float], peer_s: float, target_s: float) -> Row:
    median_s, worst_s = statistics.median(values_s), percentile(values_s, 1.0)
    return Row(
        what,
        f"{median_s:.2f} s, at most {worst_s:.2f} s of {len(values_s)}",
        f"{peer_s:.2f} s, initdb and start of a stock Postgres",
        median_s / peer_s,
        f"<= {target_s:g} s",
        worst_s <= target_s,
    )
