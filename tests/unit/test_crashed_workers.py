"""A run of tests ends, though a test ends the process that it runs in each time that it is tried."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUITE = """
import os
import pytest

@pytest.mark.parametrize("number", range(4))
def test_one(number):
    if number == 1:
        os._exit(1)
"""


def test_a_test_that_ends_its_worker_is_not_tried_for_ever(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    plugins = ["-p", "xdist", "-p", "tests.fixtures.crashes", "-p", "no:cacheprovider"]
    options = ["--numprocesses", "1", "--dist", "loadfile", "-rf", "--basetemp", str(tmp_path / "base")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *options, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert "3 passed" in done.stdout
    assert "crashed while running 'test_suite.py::test_one[1]'" in done.stdout
    assert done.stdout.count("replacing crashed worker") == 1
