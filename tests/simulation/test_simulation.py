"""The real keymanager and the real key clients in a simulated world, on many seeds; and that it can fail.

Every run is one of `world.run(seed)`. A failing seed: `python -m tests.simulation --seed N` prints what happened.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.world import run

SEEDS = 500
_BATCH = 50


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: a world that is stopped in the middle stays in memory, hundreds of megabytes after all of
    them, and would slow down whatever runs here next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def _play(first: int) -> tuple[int, int, str]:
    """(answers served, revocations sealed, what was broken) of a batch of seeds."""
    served = sealed = 0
    for seed in range(first, first + _BATCH):
        result = run(seed)
        if result.violation is not None:
            return served, sealed, f"python -m tests.simulation --seed {seed}: {result.violation}"
        served += result.served
        sealed += result.sealed
    return served, sealed, ""


@pytest.mark.parametrize("first", range(0, SEEDS, _BATCH))
def test_every_promise_is_kept(first: int, elsewhere: ProcessPoolExecutor) -> None:
    served, sealed, broken = elsewhere.submit(_play, first).result()
    assert not broken, broken
    assert served > 20 * _BATCH  # a world in which nothing works keeps every promise
    assert sealed > _BATCH / 5


def test_a_seed_replays_exactly_in_another_process() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seed", "7"]
    told = [
        subprocess.run(command, env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True).stdout
        for hash_seed in ("1", "2")
    ]
    assert told[0] == told[1]
    assert told[0].splitlines()[:-1] == run(7).history


def _find(name: str) -> bool:
    known, mutant = MUTANTS[name]
    with mutant():
        return any(run(seed).violation is not None for seed in (known, *range(100)))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_missing_safeguard_is_found(name: str, elsewhere: ProcessPoolExecutor) -> None:
    """By a seed that is known to, unless the code has changed since, or by one of the first hundred."""
    assert elsewhere.submit(_find, name).result()
