"""What an attacker with root sees: all writable memory of live processes, searched for keys and for what ciphers make
of them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CHUNK_SIZE_BYTES: Final = 16 * 1024 * 1024
_OVERLAP_BYTES: Final = 2047
"""At least one less than the longest pattern, so that none hides between two chunks."""
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+ \S+ \d+)\s*(.*)")
"""A line of /proc/PID/maps: start, end, permissions, what is mapped (offset, device, inode), its name."""


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    process: str
    key: str
    form: str
    """What of the key was found: a name of `forms`."""
    mapping: str
    address: int


def forms(key: bytes) -> dict[str, bytes]:
    """How a 32-byte AES key can lie in memory.

    A schedule of AES-256 begins with the key itself, so `raw` finds a schedule, too; `schedule` is what follows, in
    case that only the beginning was overwritten. `base64` is how KMSes send keys in JSON.
    """
    return {"raw": key, "schedule": key_schedule(key)[32:64], "base64": base64.b64encode(key).rstrip(b"=")}


def search(pids: Mapping[int, str], patterns: Mapping[tuple[str, str], bytes]) -> list[Finding]:
    """Every place of every pattern, (key, form) → bytes, in the writable memory of these processes, pid → name.

    Needs root. A process that ends meanwhile has no memory any more.
    """
    found = set()
    shared: set[str] = set()
    for pid, process in pids.items():
        with suppress(FileNotFoundError, ProcessLookupError):
            for mapping, address, data in _memory(pid, shared):
                for (key, form), pattern in patterns.items():
                    found |= {
                        Finding(process, key, form, mapping, address + position)
                        for position in _positions(data, pattern)
                    }
    return sorted(found)


@dataclass(frozen=True, slots=True)
class Arena:
    """A mapping that is advised as those of shared.crypto.secret are: key slots of a process."""

    start: int
    end: int
    locked: bool
    """Never in swap."""


def key_arenas(pid: int) -> list[Arena]:
    found: list[Arena] = []
    start = end = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if (match := _MAPPING.fullmatch(line)) is not None:
            start, end = int(match[1], 16), int(match[2], 16)
        elif line.startswith("VmFlags:") and {"dd", "wf"} <= (flags := set(line.split())):
            found.append(Arena(start, end, locked="lo" in flags))
    return found


def key_slots(pid: int) -> set[bytes]:
    """The 32-byte slots in use of the process's key arenas: what a thief would try as keys."""
    slots: set[bytes] = set()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for arena in key_arenas(pid):
            memory.seek(arena.start)
            data = memory.read(arena.end - arena.start)
            slots |= {data[i : i + 32] for i in range(0, len(data), 32)}
    return slots - {bytes(32)}


def _memory(pid: int, shared: set[str]) -> Iterator[tuple[str, int, bytes]]:
    """(name of the mapping, address, bytes) of everything writable that is there, in overlapping chunks.

    Memory that several processes share comes once: `shared` remembers it.
    """
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = _MAPPING.fullmatch(line)
            assert match is not None, line
            start, end, permissions, name = int(match[1], 16), int(match[2], 16), match[3], match[5] or "anonymous"
            if "w" not in permissions:
                continue
            if "s" in permissions:
                if match[4] in shared:
                    continue
                shared.add(match[4])
            while start < end:
                memory.seek(start)
                try:
                    data = memory.read(min(_CHUNK_SIZE_BYTES, end - start))
                except OSError:  # unmapped meanwhile
                    break
                if not data:
                    break
                yield name, start, data
                if start + len(data) >= end:
                    break
                start += len(data) - _OVERLAP_BYTES


def _positions(data: bytes, pattern: bytes) -> Iterator[int]:
    position = data.find(pattern)
    while position >= 0:
        yield position
        position = data.find(pattern, position + 1)


# --- AES ---


def key_schedule(key: bytes) -> bytes:
    """KeyExpansion of FIPS 197, section 5.2, for Nk = 8: 240 bytes."""
    words = [key[i : i + 4] for i in range(0, 32, 4)]
    round_constant = 1
    for i in range(8, 60):
        word = words[i - 1]
        if i % 8 == 0:
            word = _sub_word(word[1:] + word[:1])
            word = bytes([word[0] ^ round_constant]) + word[1:]
            round_constant <<= 1
        elif i % 8 == 4:
            word = _sub_word(word)
        words.append(bytes(a ^ b for a, b in zip(words[i - 8], word, strict=True)))
    return b"".join(words)


def _sub_word(word: bytes) -> bytes:
    return bytes(_S_BOX[byte] for byte in word)


def _s_box() -> bytes:
    """FIPS 197, section 5.1.1: the multiplicative inverse in GF(2^8), then an affine map. p runs through all elements
    but 0 as powers of 3, q beside it through their inverses."""
    box = bytearray(256)
    box[0] = 0x63
    p = q = 1
    while True:
        p ^= (p << 1) ^ (0x11B if p & 0x80 else 0)
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 0xFF
        q ^= 0x09 if q & 0x80 else 0
        rotated = [(q << n | q >> (8 - n)) & 0xFF for n in range(5)]
        box[p] = rotated[0] ^ rotated[1] ^ rotated[2] ^ rotated[3] ^ rotated[4] ^ 0x63
        if p == 1:
            return bytes(box)


_S_BOX: Final = _s_box()
