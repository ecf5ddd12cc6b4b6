"""Links of a checkout → links of the site: a core.

Documents are read in three places: in a checkout, on a code forge, and as a site that has docs/ and some files of the
root. Their links are those of a checkout. In the site, one to another page is made relative to the page; one to source
code becomes its text; one to something that is not there is an error.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT_PAGES: Final = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""File of the root → where the site has it, beside what is in docs/."""
_ELSEWHERE: Final = {
    **ROOT_PAGES,
    "README.md": "index.md",
    "docs/formats": "reference/formats.md",
    "docs/adr": "adr/0001-one-key-session-per-instance.md",
}
_LINK: Final = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE: Final = re.compile(r"^ *(```|~~~).*?^ *\1 *$|`[^`\n]+`", re.M | re.S)


def source_of(page: str) -> str:
    """Where a page of the site lies in the checkout."""
    return next((file for file, there in ROOT_PAGES.items() if there == page), f"docs/{page}")


def rewrite(markdown: str, page: str, root: Path) -> str:
    """`markdown` of the site's `page` with the site's links; links in code are code. Raises ValueError for a link to
    nothing."""

    def link(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), path))
        in_site = _ELSEWHERE.get(there) or (there[5:] if there.startswith("docs/") and (root / there).is_file() else "")
        if in_site:
            relative = posixpath.relpath(in_site, posixpath.dirname(page) or ".")
            return f"{image}[{text}]({relative}{hash_sign}{anchor})"
        if not (root / there).exists():
            raise ValueError(f"{source_of(page)}: a link to {target}, which is not there")
        return text

    return _outside_of_code(markdown, lambda text: _LINK.sub(link, text))


def _outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    """Links whose text has code in it are still links: code spans are put back afterwards."""
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"\x00{len(kept) - 1}\x00"

    changed = change(_CODE.sub(keep, markdown))
    return re.sub(r"\x00(\d+)\x00", lambda found: kept[int(found[1])], changed)
