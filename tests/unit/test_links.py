"""Links that can be cut: late is late, refused is refused, and nothing is lost or invented."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from keylake.link_control import SHOW, LinkRequest, ask, serving
from keylake.links import Cut, Links, LinkState
from shared.errors import ConflictError, InvalidInputError, UnavailableError
from tests.fixtures.waiting import wait_until

QUIET_S = 0.05


@asynccontextmanager
async def echo_link(links: Links, source: str, target: str) -> AsyncIterator[int]:
    """The port of a link to a server that sends back what it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        yield await links.add_tcp(source, target, server.sockets[0].getsockname()[1])


@asynccontextmanager
async def running_links() -> AsyncIterator[Links]:
    links = Links()
    links.start()
    try:
        yield links
    finally:
        await links.stop()


async def test_what_is_sent_into_a_silent_cut_arrives_when_it_is_healed() -> None:
    async with running_links() as links, echo_link(links, "a", "b") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        await links.cut("b", "a", Cut.SILENT)
        writer.write(b"during")
        fresh_reader, fresh = await asyncio.open_connection("127.0.0.1", port)
        fresh.write(b"fresh")
        for silent in (reader, fresh_reader):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(silent.read(1), QUIET_S)
        await links.heal()
        assert await reader.readexactly(6) == b"during"
        assert await fresh_reader.readexactly(5) == b"fresh"
        writer.write(bytes(1_000_000))
        writer.write_eof()
        assert await reader.read(-1) == bytes(1_000_000)
        for each in (writer, fresh):
            each.close()


async def test_a_refused_cut_resets_and_heals_at_the_same_port() -> None:
    async with running_links() as links, echo_link(links, "a", "b") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        await links.cut("a", None, Cut.REFUSED)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await links.heal()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"y")
        assert await reader.readexactly(1) == b"y"
        writer.close()


async def test_only_the_link_that_is_meant_is_cut() -> None:
    async with running_links() as links, echo_link(links, "a", "b") as cut, echo_link(links, "a", "c") as other:
        with pytest.raises(InvalidInputError):
            await links.cut("b", "c", Cut.SILENT)
        await links.cut("a", "b", Cut.SILENT)
        reader, writer = await asyncio.open_connection("127.0.0.1", other)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", cut)
        writer.write(b"x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), QUIET_S)
        writer.close()


async def test_links_are_cut_from_another_process(tmp_path: Path) -> None:
    """What the supervisor serves, and `keylake link` asks for."""

    class Held:
        """A cluster, as far as its links go."""

        def __init__(self, links: Links) -> None:
            self.heal, self.links, self._cut = links.heal, links.state, links.cut

        async def partition(self, one: str, other: str | None = None, *, how: Cut = Cut.SILENT) -> None:
            await self._cut(one, other, how)

    async with (
        running_links() as links,
        echo_link(links, "b", "a"),
        echo_link(links, "a", "b"),
        echo_link(links, "b", "c"),
        serving(Held(links), tmp_path / "links") as at,
    ):
        assert (tmp_path / "links").stat().st_mode & 0o777 == 0o700
        whole = [LinkState(("a", "b"), None), LinkState(("b", "c"), None)]
        assert await ask(at, SHOW) == whole
        cut = await ask(at, LinkRequest(do="cut", one="b", other="a"))
        assert cut == [LinkState(("a", "b"), Cut.SILENT), whole[1]] == await links.state()
        with pytest.raises(InvalidInputError, match="no link of a with c"):
            await ask(at, LinkRequest(do="cut", one="a", other="c"))
        cut = await ask(at, LinkRequest(do="cut", one="b", how=Cut.REFUSED))
        assert {each.cut for each in cut} == {Cut.REFUSED}
        assert await ask(at, LinkRequest(do="heal")) == whole
        reader, writer = await asyncio.open_unix_connection(at)
        writer.write(b"nonsense\n")
        assert b"malformed" in await reader.readline()
        writer.close()
    with pytest.raises(UnavailableError, match="does not answer"):
        await ask(at, SHOW)
    with pytest.raises(ConflictError, match="keylake up --links"):
        await ask(None, SHOW)


async def test_one_process_is_cut_off_and_another_is_not() -> None:
    async with running_links() as links, echo_link(links, "a", "b") as port:
        script = (
            f"exec 3<>/dev/tcp/127.0.0.1/{port}; " + "while read -r a; do echo $a >&3; read -r b <&3; echo $b; done"
        )
        child = await asyncio.create_subprocess_exec(
            "bash", "-c", script, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert child.stdin is not None
        assert child.stdout is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        child.stdin.write(b"one\n")
        assert await child.stdout.readline() == b"one\n"
        await links.cut("a", "b", Cut.SILENT, [child.pid])
        child.stdin.write(b"two\n")
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(child.stdout.readline(), QUIET_S)
        await links.heal()
        assert await child.stdout.readline() == b"two\n"
        await links.cut("a", "b", Cut.SILENT, [os.getpid()])
        child.stdin.write(b"three\n")
        assert await child.stdout.readline() == b"three\n"
        await links.cut("a", "b", Cut.SILENT, [child.pid])  # and still
        fresh_reader, fresh = await asyncio.open_connection("127.0.0.1", port)
        fresh.write(b"x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fresh_reader.read(1), QUIET_S)
        fresh.close()
        await links.heal()
        child.stdin.close()
        await child.wait()
        writer.close()


async def test_a_unix_socket_is_a_link_as_well(tmp_path: Path) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))
        writer.close()

    async with running_links() as links, await asyncio.start_unix_server(once, tmp_path / ".s.PGSQL.5432"):
        await links.add_postgres_socket("a", "metadata", tmp_path, tmp_path / "l")
        for how in Cut:
            await links.cut("a", "metadata", how)
            if how is Cut.REFUSED:
                with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                    await asyncio.open_unix_connection(tmp_path / "l" / ".s.PGSQL.5432")
            await links.heal()
            reader, writer = await asyncio.open_unix_connection(tmp_path / "l" / ".s.PGSQL.5432")
            writer.write(b"x")
            assert await reader.read(2) == b"x"
            writer.close()


async def test_a_socket_in_use_is_taken_over_and_who_comes_is_told_apart(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"x")
        try:
            return await asyncio.wait_for(reader.readexactly(1), 10 * QUIET_S) == b"x"
        except TimeoutError:
            return False

    path, name = tmp_path / ".s.PGSQL.5432", "a"
    ends: list[asyncio.StreamWriter] = []

    async def come() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(path)
        ends.append(writer)
        return reader, writer

    async with running_links() as links, await asyncio.start_unix_server(echo, path):
        early = await come()
        await links.take_over(tmp_path, "c", ("a", "b"), lambda _: name)
        assert [each.between for each in await links.state()] == [("a", "c"), ("b", "c")]
        of_a = await come()
        assert await answers(*of_a)
        name = "b"
        of_b = await come()
        assert await answers(*of_b)
        name = ""
        of_nobody = await come()
        await links.cut("a", "c", Cut.SILENT)
        assert [await answers(*each) for each in (early, of_a, of_b, of_nobody)] == [True, False, True, True]
        name = "a"
        assert not await answers(*await come())
        await links.cut("c", None, Cut.REFUSED)
        for reader, writer in (of_a, of_b, await come()):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await answers(reader, writer)
        assert [await answers(*each) for each in (early, of_nobody)] == [True] * 2
        await links.heal()
        assert await answers(*await come())
        for writer in ends:
            writer.close()


async def test_the_server_hears_that_its_client_was_reset() -> None:
    gone = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            await reader.read(-1)
        gone.set()
        writer.close()

    async with running_links() as links, await asyncio.start_server(wait, "127.0.0.1", 0) as server:
        port = await links.add_tcp("a", "b", server.sockets[0].getsockname()[1])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        await writer.drain()
        writer.transport.abort()
        await wait_until(gone.is_set)
