"""The log of the simulated Google Cloud: JSON lines, durable before the call they tell of is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from customercloud.durable import AppendLog
from shared.errors import CorruptedError


class Entries:
    def __init__(self, path: Path) -> None:
        """Raises CorruptedError when a whole line of the file is not an entry."""
        self._log = AppendLog(path)
        for line in self._log:
            _parse(line)

    async def append(self, entry: dict[str, Any]) -> None:
        """Durable when it returns. Raises OSError when the disk refuses."""
        await self._log.append([json.dumps(entry, separators=(",", ":")).encode()])

    def of_project(self, project: str | None, until: str) -> Iterator[bytes]:
        """Lines of one project's logs (None: of all), oldest first, received up to `until` (a timestamp). Blocks."""
        for line in self._log:
            entry = _parse(line)
            if entry["receiveTimestamp"] <= until and project in (None, entry["logName"].split("/")[1]):
                yield line

    async def close(self) -> None:
        await self._log.close()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not {"logName", "insertId", "receiveTimestamp", "protoPayload"} <= entry.keys():
        raise CorruptedError("the audit log holds a line that is not an entry")
    return entry
