"""What MkDocs calls while it builds the site (`hooks` in mkdocs.yml). It is not installed with Keylake: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from keylake.site.links import ROOT_PAGES, rewrite

_ROOT: Final = Path(__file__).parents[2]
_FETCHED: Final = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|url\(["']?(?:https?:)?//|@import\s+["'](?:https?:)?//"""
)
"""What a browser would fetch from elsewhere without being asked."""


def on_config(config: Any) -> Any:
    """An entry of the navigation may be a pattern, for folders that grow."""
    docs = Path(config["docs_dir"])

    def expand(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            return [{title: _expanded(value) if isinstance(value, list) else value for title, value in entry.items()}]
        if "*" in entry:
            return sorted(str(path.relative_to(docs)) for path in docs.glob(entry))
        return [entry]

    def _expanded(entries: list[Any]) -> list[Any]:
        return [each for entry in entries for each in expand(entry)]

    config["nav"] = _expanded(config["nav"])
    return config


def on_files(files: Any, config: Any) -> Any:
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(_ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    try:
        return rewrite(markdown, page.file.src_uri, _ROOT)
    except ValueError as error:
        raise PluginError(str(error)) from None


def on_post_build(config: Any) -> None:
    """The site is whole: nothing of it is fetched from anywhere else."""
    for path in Path(config["site_dir"]).rglob("*"):
        if path.suffix in {".html", ".css"} and (found := _FETCHED.search(path.read_text())):
            raise PluginError(f"{path.name} fetches something from elsewhere: {found[0]}")
