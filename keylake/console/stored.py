"""What is really stored: the files of the object store and of the safekeepers' disks, as bytes.

Nothing is opened: the console has no key, and shows what somebody sees who has stolen the disks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from keylake.demo.evidence import search
from shared.errors import InvalidInputError, NotFoundError

MAX_LISTED: Final = 200
WINDOW_SIZE_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class StoredFile:
    name: str
    """`<store>/<path below its root>`."""
    size_bytes: int
    modified_at: float
    """Unix time."""


class StoredFiles:
    def __init__(self, roots: Mapping[str, Path]) -> None:
        """`roots`: store → directory."""
        self._roots = roots

    def listing(self) -> list[dict[str, Any]]:
        """The newest MAX_LISTED, newest first. Blocking."""
        return [asdict(each) for each in heapq.nlargest(MAX_LISTED, self._all(), key=lambda each: each.modified_at)]

    def _all(self) -> Iterator[StoredFile]:
        for store, root in self._roots.items():
            for path in root.rglob("*"):
                try:
                    state = path.lstat()
                    if path.is_symlink() or not path.is_file():
                        continue
                except FileNotFoundError:
                    continue  # replaced meanwhile
                yield StoredFile(f"{store}/{path.relative_to(root)}", state.st_size, state.st_mtime)

    async def find(self, word: str) -> dict[str, Any]:
        """In how many of all files a word stands in the clear: as UTF-8, UTF-16, or hexadecimal."""
        findings = await search(self._roots.values(), [word])
        return {
            "files": findings.files,
            "bytes": findings.size_bytes,
            "hits": [self._name(p) for p, _ in findings.found],
        }

    def _name(self, path: str) -> str:
        for store, root in self._roots.items():
            if Path(path).is_relative_to(root):
                return f"{store}/{Path(path).relative_to(root)}"
        return "?"

    def window(self, name: str, offset: int) -> dict[str, Any]:
        """WINDOW_SIZE_BYTES from `offset`, in hexadecimal. Blocking. Raises InvalidInputError, NotFoundError."""
        store, _, relative = name.partition("/")
        root = self._roots.get(store)
        if root is None or not relative or "\0" in relative:
            raise InvalidInputError("no such store")
        path = root / relative
        try:
            if path.is_symlink() or not path.resolve(strict=True).is_relative_to(root.resolve()):
                raise InvalidInputError("that is outside of the store")
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(offset)
                content = file.read(WINDOW_SIZE_BYTES)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFoundError("no such file: it may have been replaced; list again") from None
        except OSError:
            raise InvalidInputError("that is no name of a file") from None
        return {"name": name, "size_bytes": size, "offset": offset, "hex": content.hex()}
