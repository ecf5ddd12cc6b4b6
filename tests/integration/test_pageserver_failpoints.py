"""A pageserver dies by SIGKILL at every step that persists, and the next one has all that was told, and leaves nothing
over."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = [
    "create-stored:1",
    "layer-put:1",
    "index-key-put:1",
    "slot-closed:1",  # by the next one, which finds the envelope of an index that is not there
    "index-put:2",
    "index-counts:1",
    "flush-listed:2",
    "old-index-deleted:3",
    "local-copy-written:1",
    "object-durable:3",
    "object-named:4",
    "bulk-stored:1",
    "compaction-stored:1",
    "compaction-listed:1",
    "gc-listed:1",
    "rekey-listed:2",
    "branch-noted:1",
    "removal-marked:1",
    "removal-objects-deleted:1",
    "branch-removed:1",
]
ALL_STEPS = [
    *STEPS,
    "layer-key-put:1",
    "flush-stored:1",
    "index-remembered:1",
    "orphans-deleted:1",
    "local-copy-renamed:1",
    "object-written:2",
    "object-unlinked:1",
    "layers-deleted:1",
    "gc-decided:1",
    "layers-rewrapped:1",
    "rekey-stored:1",
    "removal-index-deleted:1",
    "removal-before-end:1",
    "project-purged:1",  # the end: nothing may follow
]
SENDS = ["feedback-sent:2"]
"""Steps of tests/cluster/test_durability.py: somebody has to be there who is sent something."""
MORE_SENDS = [
    "feedback-before-send:2",
    "page-before-send:1",
    "page-sent:3",
    "basebackup-before-send:1",
    "basebackup-before-send:2",  # the archive is torn
    "basebackup-sent:1",
]
EVERY_STEP = os.environ.get("KEYLAKE_ALL_FAILPOINTS") == "1"  # make crash-anywhere


@pytest.mark.integration
def test_it_dies_at_every_step_and_nothing_is_lost_or_left_over(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fixtures.dying_pageserver", str(tmp_path), *(ALL_STEPS if EVERY_STEP else STEPS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_step_that_has_a_name_is_among_them() -> None:
    sources = [*(REPOSITORY / "pageserver").rglob("*.py"), REPOSITORY / "shared/storage/local.py"]
    named = {name for path in sources for name in re.findall(r'failpoint\("([a-z-]+)"\)', path.read_text())}
    assert named == {step.partition(":")[0] for step in (*ALL_STEPS, *SENDS, *MORE_SENDS)}
