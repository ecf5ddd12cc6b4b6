"""Cutting links of a cluster that another process runs: `keylake up --links`, then `keylake link` or the console.

The supervisor listens on a Unix socket for its own user, which `supervisor.json` names. One line of JSON asks, one line
answers, and then it is done: nothing passes a link that was cut any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keylake.links import Cut, LinkState
from shared.errors import ConflictError, InvalidInputError, KeylakeError, UnavailableError

WITHOUT_LINKS: Final = "its services speak with each other directly: keylake down, then keylake up --links"
_MAX_LINE_SIZE_BYTES: Final = 64 * 1024
_TIMEOUT_S: Final = 10.0


class LinkRequest(BaseModel):
    """`cut`: `one` from `other`, or from everybody; `heal`: everything."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    do: Literal["cut", "heal", "show"]
    one: str = Field(default="", max_length=40)
    other: str | None = Field(default=None, max_length=40)
    how: Cut = Cut.SILENT


SHOW: Final = LinkRequest(do="show")


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    links: list[LinkState] = []
    error: str = ""


class CanBeCut(Protocol):
    """What is needed of a `Cluster`."""

    async def partition(self, one: str, other: str | None = None, *, how: Cut = Cut.SILENT) -> None: ...

    async def heal(self) -> None: ...

    async def links(self) -> list[LinkState]: ...


@contextlib.asynccontextmanager
async def serving(cluster: CanBeCut, directory: Path) -> AsyncIterator[Path]:
    """The socket, in `directory`, which is made here with mode 0700. Its path must be short."""
    directory.mkdir(mode=0o700)
    path = directory / "control"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):  # they have gone, or sent a line without an end
            reply = await _done(cluster, await reader.readline())
            writer.write(reply.model_dump_json().encode() + b"\n")
            await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(answer, path, limit=_MAX_LINE_SIZE_BYTES):
        yield path


async def _done(cluster: CanBeCut, line: bytes) -> _Reply:
    try:
        request = LinkRequest.model_validate_json(line)
        match request.do:
            case "cut":
                await cluster.partition(request.one, request.other, how=request.how)
            case "heal":
                await cluster.heal()
        return _Reply(links=await cluster.links())
    except ValidationError:
        return _Reply(error="the request is malformed")
    except KeylakeError as error:
        return _Reply(error=str(error))


async def ask(socket: Path | None, request: LinkRequest) -> list[LinkState]:
    """All links as they are afterwards. `socket`: None when the cluster was started without links.

    Raises ConflictError then, InvalidInputError for two that do not speak with each other, UnavailableError.
    """
    if socket is None:
        raise ConflictError(WITHOUT_LINKS)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(socket, limit=_MAX_LINE_SIZE_BYTES)
            with contextlib.closing(writer):
                writer.write(request.model_dump_json().encode() + b"\n")
                reply = _Reply.model_validate_json(await reader.readline())
    except (OSError, ValueError):
        raise UnavailableError("the supervisor, which holds the links, does not answer") from None
    if reply.error:
        raise InvalidInputError(reply.error)
    return reply.links
