"""Looking for what must not be there: canaries in every byte that a directory tree holds, and how random those bytes
look.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiofiles

_CHUNK_SIZE_BYTES: Final = 4 * 1024 * 1024


@dataclass(slots=True)
class Findings:
    """Where canaries were found (path, canary), and how much was looked at."""

    found: list[tuple[str, str]] = field(default_factory=list)
    files: int = 0
    size_bytes: int = 0


def variants(canary: str) -> list[bytes]:
    """The canary as Postgres, JSON, base64 alignments aside, or UTF-16 would store it."""
    return [canary.encode(), canary.encode("utf-16-le"), canary.encode().hex().encode()]


def files_below(roots: Iterable[Path]) -> Iterator[Path]:
    for root in roots:
        if root.is_file():
            yield root
        else:
            yield from (path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink())


async def search(roots: Iterable[Path], canaries: Sequence[str]) -> Findings:
    """Every byte of every file below `roots`. A file that vanishes meanwhile is one that holds nothing any more."""
    needles = [(canary, needle) for canary in canaries for needle in variants(canary)]
    overlap = max(len(needle) for _, needle in needles)
    findings = Findings()
    for path in files_below(roots):
        try:
            async with aiofiles.open(path, "rb") as file:
                findings.files += 1
                tail = b""
                while chunk := await file.read(_CHUNK_SIZE_BYTES):
                    findings.size_bytes += len(chunk)
                    window = tail + chunk
                    findings.found += ((str(path), canary) for canary, needle in needles if needle in window)
                    tail = window[-overlap:]
        except FileNotFoundError:
            continue
    return findings


def entropy_bits_per_byte(data: bytes) -> float:
    """Shannon entropy of the byte histogram: near 8 for ciphertext, 3 to 6 for pages and text."""
    counts, total = Counter(data), len(data)
    return -sum(n / total * math.log2(n / total) for n in counts.values()) if total else 0.0


def hex_lines(data: bytes, lines: int = 4) -> list[str]:
    """The first bytes as `offset  hex  text`."""
    shown = []
    for offset in range(0, min(len(data), lines * 16), 16):
        row = data[offset : offset + 16]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        shown.append(f"{offset:08x}  {row.hex(' '):<47}  {text}")
    return shown
