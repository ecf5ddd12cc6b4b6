"""GetPage@LSN at 1,000 random (page, LSN) pairs of a long mixed history, against stock Postgres recovering to that LSN.

Not a figure of speed: every pair has to be the same to the byte. KEYLAKE_POINT_IN_TIME_SEED chooses other pairs.
"""

from __future__ import annotations

import os
import random
from time import perf_counter

from benchmarks.harness import Row
from tests.fixtures.point_in_time import Compared, choose_lsns, compare_at, mixed_history


async def measure(lsns: int = 25, pages: int = 40, rounds: int = 8) -> list[Row]:
    rng = random.Random(int(os.environ.get("KEYLAKE_POINT_IN_TIME_SEED", "1")))
    compared = Compared()
    async with mixed_history(rounds) as history:
        begun = perf_counter()
        for lsn in choose_lsns(history, lsns, rng):
            await compare_at(history, lsn, pages, rng, compared)
        took = perf_counter() - begun
        records, layers = len(history.record_ends), compared.layers
    return [
        Row(
            f"(page, LSN) pairs equal to a naive replay, over {records} records in {layers} layers",
            f"{compared.pairs} pairs, {compared.slru_pages} pages of the commit log; {took:.0f} s",
            f"{lsns} recoveries by stock Postgres",
            None,
            "1,000, every byte",
            compared.pairs >= 1000,
        )
    ]
