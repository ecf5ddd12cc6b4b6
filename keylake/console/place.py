"""What the console looks at: a cluster of local processes (`keylake.attached`), or containers (`console.container`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from keylake.attached import ServiceHealth
from keylake.client import KeylakeClient
from keylake.cluster import Customer


class Place(Protocol):
    @property
    def home(self) -> Path:
        """Where the passwords of endpoints that are made here are kept (`keylake.connections`)."""
        ...

    @property
    def trust_bundle(self) -> Path:
        """Public keys, with which receipts are checked."""
        ...

    def stored(self) -> Mapping[str, Path]:
        """Where sealed data lies: store → directory."""
        ...

    def client(self, token: str | None = None) -> KeylakeClient:
        """As the owner, or as the person with this token."""
        ...

    def customer(self) -> Customer:
        """To be closed. Blocks for one request. Raises UnavailableError."""
        ...

    async def health(self) -> list[ServiceHealth]: ...
