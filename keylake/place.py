"""What commands and the console are about: a cluster of local processes (`keylake.attached`), or the containers of
docker-compose.yml (`keylake.stack`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from keylake.client import KeylakeClient
from keylake.link_control import SHOW, LinkRequest

if TYPE_CHECKING:
    from keylake.attached import ServiceHealth
    from keylake.cluster import Customer
    from keylake.links import LinkState

STACK_VARIABLE: Final = "KEYLAKE_STACK"
"""In the containers of the operator and of the console: where the bundle is. Not set anywhere else."""


def inside() -> Path | None:
    """The bundle's directory when this is one of those containers."""
    value = os.environ.get(STACK_VARIABLE)
    return Path(value) if value else None


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

    async def links(self, request: LinkRequest = SHOW) -> list[LinkState]:
        """Cut the network between two services, or heal it. Raises ConflictError where that is not to be had,
        InvalidInputError."""
        ...


def find_place(home: Path) -> Place:
    """The cluster that runs in `home`; in the operator's container, the containers. Makes no connection.

    Raises NotRunningError, CorruptedError.
    """
    if (bundle := inside()) is not None:
        from keylake.stack import Stack

        return Stack(bundle, home)
    from keylake.attached import Attached

    return Attached.to(home)
