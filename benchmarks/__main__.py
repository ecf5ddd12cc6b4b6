"""`python -m benchmarks [name …]`: every figure as a ratio against its peer in the same run.

    python -m benchmarks chaos --minutes 20 --seed 1      and these two, which take long, only when they are named
    python -m benchmarks memory --gb 10

Machines are noisy, so the ratios are what to look at. Results are printed and written to
benchmarks/results/latest.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from benchmarks import (
    chaos,
    cold_start,
    commits,
    compaction,
    connections,
    fixtures,
    keys,
    memory,
    point_in_time,
    proxy,
    revocation,
    rewrap,
    storage,
    volume,
    written,
)
from benchmarks.harness import Row, show

Benchmark = Callable[[], Coroutine[Any, Any, list[Row]]]
BENCHMARKS: dict[str, Benchmark] = {
    "commits": commits.measure,
    "commits-apart": commits.measure_apart,
    "compaction": compaction.measure,
    "connections": connections.measure,
    "ingest": storage.measure_ingest,
    "written": written.measure,
    "redo": storage.measure_redo,
    "reads": storage.measure_cluster,
    "revocation": revocation.measure,
    "keys": keys.measure,
    "rewrap": rewrap.measure,
    "point-in-time": point_in_time.measure,
    "start": cold_start.measure,
    "volume": volume.measure,
    "volume-tpcb": volume.measure_tpcb,
    "proxy": proxy.measure,
    "fixtures": fixtures.measure,
}
RESULTS = Path(__file__).parent / "results"


async def run_all(names: list[str], known: Mapping[str, Benchmark], console: Console) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        console.print(f"{name} …")
        rows += await known[name]()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which; default: all of {', '.join(BENCHMARKS)}")
    parser.add_argument("--minutes", type=float, default=20.0, help="of chaos")
    parser.add_argument("--seed", type=int, default=1, help="of chaos: what happens in which order")
    parser.add_argument("--gb", type=float, default=10.0, help="of WAL through the pageserver, of memory")
    arguments = parser.parse_args()
    known = BENCHMARKS | {
        "chaos": lambda: chaos.measure(arguments.minutes, arguments.seed),
        "memory": lambda: memory.measure(arguments.gb),
    }
    names = arguments.names or list(BENCHMARKS)
    if unknown := set(names) - set(known):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    console = Console(highlight=False)
    rows = uvloop.run(run_all(names, known, console))
    show(rows, console)
    RESULTS.mkdir(exist_ok=True)
    result = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "python": platform.python_version(),
        "rows": [row.as_dict() for row in rows],
    }
    (RESULTS / "latest.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
