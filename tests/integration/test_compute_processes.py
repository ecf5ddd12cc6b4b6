"""Killing a tree: all of it, and so that none of it lives to see another one die."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

# A parent with children that say so when they lose it, as Postgres's backends do.
_WATCHER = """
import os, sys
parent = os.getppid()
open(sys.argv[1] + ".up", "w").close()
while os.getppid() == parent:
    pass
open(sys.argv[1] + ".noticed", "w").close()
while True:
    pass
"""
_PARENT = """
import subprocess, sys
# start_new_session: as Postgres's children do.
watchers = [subprocess.Popen([sys.executable, "-c", sys.argv[1], f"{sys.argv[2]}/{n}"], start_new_session=True)
            for n in range(3)]
watchers[0].wait()
"""
_AGENT = """
import pathlib, subprocess, sys, time
from compute.agent.processes import become_subreaper, children, kill_descendants
become_subreaper()
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
directory = pathlib.Path(sys.argv[3])
while len(list(directory.glob("*.up"))) < 3:
    time.sleep(0.01)
print(kill_descendants(), len(children()))
"""


@pytest.mark.parametrize("attempt", range(3))
def test_nobody_lives_to_see_its_parent_die(tmp_path: Path, attempt: int) -> None:
    agent = subprocess.run(
        [sys.executable, "-c", _AGENT, _PARENT, _WATCHER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=50,
        check=True,
    )
    assert agent.stdout.split() == ["4", "0"], "a parent and three children, and nobody is left"
    assert not list(tmp_path.glob("*.noticed"))
