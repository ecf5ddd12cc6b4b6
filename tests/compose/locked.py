"""A part of a lock file: one distribution and what it needs, with their hashes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import requires
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_ENTRY: Final = re.compile(r"^([A-Za-z0-9._-]+)(?:==[^\n]*\n(?:[ \t]+[^\n]*\n)*)", re.MULTILINE)


def needed(name: str, extras: Iterable[str] = ()) -> set[str]:
    """Names of the distribution and of all that it needs here, by what is installed. Raises PackageNotFoundError."""
    found: set[str] = set()
    todo: list[tuple[str, frozenset[str]]] = [(canonicalize_name(name), frozenset(extras))]
    done = set[tuple[str, frozenset[str]]]()
    while todo:
        entry = todo.pop()
        if entry in done:
            continue
        done.add(entry)
        one, wanted = entry
        found.add(one)
        for requirement in map(Requirement, requires(one) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *wanted}):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def excerpt(lock: str, names: set[str]) -> str:
    """The lock's entries of these names. Raises KeyError when one is missing."""
    entries: defaultdict[str, str] = defaultdict(str)  # one name may have several, with markers
    for match in _ENTRY.finditer(lock):
        entries[canonicalize_name(match[1])] += match[0]
    if missing := names - entries.keys():
        raise KeyError(", ".join(sorted(missing)))
    return "".join(entries[name] for name in sorted(names))
