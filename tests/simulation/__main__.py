"""`python -m tests.simulation`: many seeds, or one again.

examples:
  python -m tests.simulation --seeds 10000 --jobs 2    what `make bench-simulation` runs
  python -m tests.simulation --seed 4711               one run, with its history
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

from tests.simulation.world import run, run_briefly


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="run this one and print what happened")
    parser.add_argument("--seeds", type=int, default=500, help="how many, from --first on (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        result = run(arguments.seed)
        _say("\n".join(result.history))
        _say(f"seed {result.seed}: {result.violation or 'every promise was kept'}")
        return 0 if result.violation is None else 1
    begun = time.monotonic()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    served = sealed = simulated_s = failed = 0.0
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for result in pool.imap_unordered(run_briefly, seeds, chunksize=20):
            served += result.served
            sealed += result.sealed
            simulated_s += result.simulated_s
            if result.violation is not None:
                failed += 1
                _say(f"seed {result.seed}: {result.violation}")
                _say(f"  again: python -m tests.simulation --seed {result.seed}")
    _say(
        f"{arguments.seeds} seeds, {simulated_s / 3600:.1f} h simulated in {time.monotonic() - begun:.0f} s: "
        f"{served:.0f} answers, {sealed:.0f} revocations sealed, {failed:.0f} promises broken"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
