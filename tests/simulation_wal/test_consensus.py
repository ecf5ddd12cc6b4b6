"""Seeded runs of the real election code in a bad world; and proof that they would find what is wrong with it.

A seed that fails is replayed, with everything that happened, by `python -m tests.simulation_wal --seed N`. More seeds:
`make sim-consensus`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from tests.simulation_wal.mutations import MUTATIONS
from tests.simulation_wal.world import FailedRun, run_seed

SEEDS = int(os.environ.get("KEYLAKE_SIMULATION_SEEDS", "500"))
MUTATION_SEEDS = 150
FIRST_SEEDS = {
    "the donor is chosen by flush_lsn alone": 45,
    "the vote is not persisted": 130,
    "the pageserver counts positions of any term": 110,
    "a disk that was replaced votes": 70,
    "the others vote for a replacement in the old generation": 420,
    "a new disk is a member before it holds the log": 80,
    "a log goes on behind what it knows as committed": 30,
}
"""Where to begin, for those that not every few seeds find."""


def run_many(first: int, seeds: int) -> None:
    for seed in range(first, first + seeds):
        run_seed(seed)


def test_nothing_that_was_committed_is_lost_or_contradicted() -> None:
    terms = committed = crashes = trimmed = skipped = 0
    for seed in range(SEEDS):
        world = run_seed(seed)
        committed += len(world.oracle.log)
        crashes += sum(what == "crashes" for _, _, what in world.history)
        trimmed += world.objects.removed_lsn > 0
        skipped += world.objects.skipped > 0
        terms += sum(what.startswith("won term") for _, _, what in world.history)
    # These were lives, not standstill.
    assert committed > 100 * SEEDS
    assert crashes > SEEDS
    assert terms > SEEDS
    assert trimmed > SEEDS // 5
    assert skipped > SEEDS // 50


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_defect_is_found(name: str) -> None:
    with contextlib.ExitStack() as patches:
        for patch in MUTATIONS[name]():
            patches.enter_context(patch)
        with pytest.raises(FailedRun):
            run_many(FIRST_SEEDS.get(name, 0), MUTATION_SEEDS)


def test_a_seed_is_the_same_run_in_every_process() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.simulation_wal", "--seed", "11"],
            capture_output=True,
            check=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        digests.add(done.stdout.splitlines()[-1])
        assert "all is well" in done.stdout
        assert "wants to lead" in done.stdout
    assert len(digests) == 1
    assert run_seed(11).digest() in digests.pop()
