"""`python -m tests.simulation_wal --seed N` replays one run and prints what happened; `--seeds FROM:TO` runs many."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor

from tests.simulation_wal.world import FailedRun, run_seed


def _try(seed: int) -> tuple[int, str]:
    try:
        run_seed(seed)
    except FailedRun as error:
        return seed, str(error)
    return seed, ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation_wal", description=__doc__)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--seed", type=int, help="one run, with its history")
    chosen.add_argument("--seeds", metavar="FROM:TO", help="many runs, TO not included")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        try:
            world, failure = run_seed(arguments.seed), ""
        except FailedRun as error:
            world, failure = error.world, str(error)
            traceback.print_exception(error.cause)
        for at_s, who, what in world.history:
            print(f"{at_s:9.4f}  {who:14} {what}")
        print(f"seed {world.seed}: {failure or 'all is well'}; history {world.digest()}")
        return 1 if failure else 0
    first, _, last = arguments.seeds.partition(":")
    began, failed = time.monotonic(), []
    seeds = range(int(first), int(last))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for _, failure in pool.map(_try, seeds, chunksize=50):
            if failure:
                failed.append(failure)
                print(failure, flush=True)
    seconds = time.monotonic() - began
    print(f"{len(seeds)} seeds, {len(failed)} failed, {seconds:.1f} s, {seconds / len(seeds) * 1000:.1f} ms per seed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
