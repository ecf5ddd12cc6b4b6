"""The audit log of the simulated cloud: one file of JSON lines, durable before the call it tells of is answered.

Every authenticated call is in it, the refused ones too. Requests that fail authentication are not, as in the real
CloudTrail: there is nobody to attribute them to; they are counted and stand in the process log.
LookupEvents reaches back MAX_RECORDS_IN_MEMORY records; the file has all of them, and grows without limit.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from customercloud.durable import AppendLog
from shared.errors import CorruptedError

MAX_RECORDS_IN_MEMORY: Final = 20_000
CLOUDTRAIL_MEMBERS: Final = frozenset({"userIdentity", "eventTime", "eventName", "eventID"})


@dataclass(frozen=True, slots=True)
class Entry:
    """`number` counts from 1 in the order of the log and never changes.

    Held as its line of JSON (1-2 KB), which is a quarter of what the parsed record takes.
    """

    number: int
    line: bytes

    @property
    def record(self) -> dict[str, Any]:
        return _parse(self.line)


class Trail:
    def __init__(self, path: Path, members: frozenset[str] = CLOUDTRAIL_MEMBERS) -> None:
        """Raises CorruptedError when a whole line of the file is not a record, which has all these `members`."""
        self._log = AppendLog(path)
        self._entries: deque[Entry] = deque(maxlen=MAX_RECORDS_IN_MEMORY)
        self._count = 0
        for line in self._log:
            if not members <= _parse(line).keys():
                raise CorruptedError("the audit log holds a line that is not a record")
            self._remember(line)

    def _remember(self, line: bytes) -> None:
        self._count += 1
        self._entries.append(Entry(self._count, line))

    async def append(self, records: list[dict[str, Any]]) -> None:
        """Durable when it returns. Raises OSError when the disk refuses."""
        lines = [json.dumps(record, separators=(",", ":")).encode() for record in records]
        await self._log.append(lines)
        for line in lines:
            self._remember(line)

    def newest_first(self) -> Iterator[Entry]:
        return reversed(self._entries)

    def lines(self) -> Iterator[bytes]:
        """The whole log as it stands on disk, oldest first."""
        return iter(self._log)

    async def close(self) -> None:
        await self._log.close()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise CorruptedError("the audit log holds a line that is not a record")
    return record
