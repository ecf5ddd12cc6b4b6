"""Reference pages that are made of the code: cores, text out.

    python -m keylake.reference DIRECTORY     writes them; `make docs-reference`

A test holds each page of docs/reference/ against what the code says now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from keylake.reference import cli, http, settings

PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "cli.md": cli.page,
    "settings.md": settings.page,
    "http.md": http.page,
}
"""File name → its whole text."""
