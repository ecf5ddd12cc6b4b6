"""The agent's end of the control pipe: stdin and stdout."""

from __future__ import annotations

import asyncio
import sys
from typing import Self

from compute.agent.protocol import MAX_LINE_SIZE_BYTES, ToAgent, pack_line, parse_to_agent
from shared.api.common import ApiModel
from shared.errors import InvalidInputError


class ControlPipe:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls) -> Self:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_LINE_SIZE_BYTES)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
        return cls(reader, asyncio.StreamWriter(transport, protocol, None, loop))

    async def receive(self) -> ToAgent | None:
        """The next message; None at end of file, and for anything that is not a message: there is no second try."""
        try:
            line = await self._reader.readuntil(b"\n")
            return parse_to_agent(line)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, InvalidInputError, OSError):
            return None

    async def send(self, message: ApiModel) -> None:
        """A manager that is gone does not hear it; the end of file on the other pipe says so."""
        try:
            self._writer.write(pack_line(message))
            await self._writer.drain()
        except OSError:
            return
