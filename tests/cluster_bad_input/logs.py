"""What services said meanwhile."""

from __future__ import annotations

import json

from keylake.cluster import Cluster
from tests.cluster_bad_input.place import CANARY

_POSTGRES = "metadata.log"


class LogWatch:
    """From its making on."""

    def __init__(self, cluster: Cluster) -> None:
        self._paths = sorted(cluster.layout.logs.glob("*.log"))
        self._from = {path: path.stat().st_size for path in self._paths}

    def check(self) -> None:
        """Raises AssertionError for an error, a stack trace, or a secret. Bad input is no error of the service's."""
        for path in self._paths:
            with path.open("rb") as file:
                file.seek(self._from[path])
                text = file.read().decode()
            assert CANARY not in text, path.name
            assert "Traceback" not in text, f"{path.name}: {text[-6000:]}"
            if path.name == _POSTGRES:
                continue
            for line in text.splitlines():
                assert _level(line) in ("debug", "info", "warning"), f"{path.name}: {line}"


def _level(line: str) -> str:
    try:
        level: str = json.loads(line)["level"]
    except (ValueError, KeyError):
        # Of a library: its text is not escaped.
        return "warning" if line.startswith('{"level":"warning"') else "none"
    return level
