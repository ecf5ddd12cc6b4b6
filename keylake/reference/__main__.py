"""`python -m keylake.reference DIRECTORY`"""

from __future__ import annotations

import sys
from pathlib import Path

from keylake.reference import PAGES

for name, page in PAGES.items():
    Path(sys.argv[1], name).write_text(page())
