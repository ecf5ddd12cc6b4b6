"""Words that occur nowhere else, put into every place where a database keeps user data, and looked for afterwards.

All words of one run begin with the same random *stem*, followed by where they were planted and a number: `k4f0…9a`
+ `gist` + `012`. So a search looks for one string in all its spellings, and the bytes that follow say what
it has found.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

CHUNK_SIZE_BYTES = 8 * 1024 * 1024
KIND_LENGTH_MAX = 16
ROWS = 40
TOAST_VALUE_CHARS = 40_000


def spellings(secret: bytes) -> dict[str, bytes]:
    """How `secret` may stand in a file: as it is, as UTF-16, in hexadecimal, in base64 at any offset."""
    return {
        "plain": secret,
        "UTF-16LE": b"".join(bytes((byte, 0)) for byte in secret),
        "UTF-16BE": b"".join(bytes((0, byte)) for byte in secret),
        "hex": secret.hex().encode(),
        "HEX": secret.hex().upper().encode(),
        **{f"base64+{offset}": _base64_at(secret, offset) for offset in range(3)},
        **{f"base64url+{offset}": _base64_at(secret, offset, b"-_") for offset in range(3)},
    }


def _base64_at(secret: bytes, offset: int, altchars: bytes | None = None) -> bytes:
    """What is the same of `secret`'s base64, whatever stands before (`offset` bytes of it in its group) and behind."""
    first = -(-offset * 8 // 6)  # characters that the bytes before have a share in
    whole = (offset + len(secret)) * 8 // 6  # characters that nothing behind has a share in
    return base64.b64encode(bytes(offset) + secret, altchars)[first:whole]


@dataclass(frozen=True, slots=True)
class Finding:
    path: Path
    word: str
    spelling: str

    def __str__(self) -> str:
        return f"{self.word!r} ({self.spelling}) in {self.path}"


@dataclass(slots=True)
class Search:
    """What was found, and how much was looked at."""

    found: set[Finding] = field(default_factory=set)
    files: int = 0
    size_bytes: int = 0

    @property
    def words(self) -> set[str]:
        return {finding.word for finding in self.found}


def search(roots: Iterable[Path], secrets_by_name: Mapping[str, bytes]) -> Search:
    """Every byte of every file below `roots`, for every spelling of the secrets (name → bytes)."""
    needles = [
        (name, spelling, needle)
        for name, secret in secrets_by_name.items()
        for spelling, needle in spellings(secret).items()
    ]
    overlap = max(len(needle) for _, _, needle in needles) - 1
    result = Search()
    for path in files_below(roots):
        for window in _windows(path, overlap, result):
            result.found |= {Finding(path, name, spelling) for name, spelling, needle in needles if needle in window}
    return result


def files_below(roots: Iterable[Path]) -> Iterator[Path]:
    for root in roots:
        if root.is_file():
            yield root  # also a link, in /proc for instance
            continue
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path


def _windows(path: Path, overlap: int, result: Search) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            result.files += 1
            tail = b""
            while chunk := file.read(CHUNK_SIZE_BYTES):
                result.size_bytes += len(chunk)
                yield tail + chunk
                tail = (tail + chunk)[-overlap:]
    except FileNotFoundError:
        return  # it holds nothing any more


@dataclass(frozen=True, slots=True)
class Canaries:
    """The words of one run."""

    stem: str = field(default_factory=lambda: f"k{secrets.token_hex(10)}")

    def word(self, kind: str, number: int | str = "") -> str:
        """Lower case, letters and digits, at most 63 characters: also fit for a name."""
        return f"{self.stem}{kind}0{number}"

    def search(self, roots: Iterable[Path]) -> Search:
        """As `search`, for the stem."""
        return search(roots, {"canary": self.stem.encode()})

    def kinds_in(self, roots: Iterable[Path]) -> set[str]:
        """Which kinds of words stand in plain text in these files."""
        pattern = re.compile(re.escape(self.stem.encode()) + rb"([a-z]{1,%d})" % KIND_LENGTH_MAX)
        found: set[str] = set()
        for path in files_below(roots):
            for window in _windows(path, len(self.stem) + KIND_LENGTH_MAX, Search()):
                found |= {match[1].decode() for match in pattern.finditer(window)}
        return found


# Each index holds a word that its table does not: the table has it backwards.
INDEXES = {
    "btree": "btree ((reverse(body)))",
    "gin": "gin ((array[reverse(body)]))",
    "gist": "gist ((words(reverse(body), reverse(body) || 'z')))",
    "spgist": "spgist ((reverse(body)))",
    "brin": "brin ((reverse(body)))",
    "hash": "hash ((reverse(body)))",
}
STORED = {
    *("row", "updated", "deleted", "copied", "toast", "tablename", "columnname", "comment", "function"),
    *("databasename", "rolename", "otherdatabase"),
    *(INDEXES.keys() - {"hash"}),
}
"""Kinds that are part of the database and reach the object store. A hash index keeps no value, only its hash."""
IN_WAL = STORED | {"message", "rolledback"}
WRITTEN_AGAIN = {"updated", "toast", "message", "unlogged", "temporary", "sorted"}
"""Kinds that are on the volume of a compute after `plant_again`, because it wrote them, whatever was there before."""
IN_LOG = {"error", "warning", "statement"}
"""Kinds that only Postgres's log has."""
VOLATILE = {"unlogged", "temporary", "sorted"}
"""Kinds that are on the compute's volume, and nowhere else."""
ON_REPLICA = {"replicasorted"}
"""Kinds that are on a replica's volume, and nowhere else."""


class Planted:
    """A session that has planted everything, and holds open what ends with a session."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self.connection = connection
        self.application_name = ""

    async def close(self) -> None:
        await self.connection.close()


async def plant(canaries: Canaries, arguments: dict[str, Any]) -> Planted:
    """`arguments`: of asyncpg.connect. Returns with an open cursor over a sort that does not fit into memory."""
    settings = {**arguments["server_settings"], "application_name": canaries.word("application")}
    connection = await asyncpg.connect(**{**arguments, "server_settings": settings}, timeout=60, command_timeout=60)
    planted = Planted(connection)
    await _tables(canaries, connection)
    await _names(canaries, connection, arguments)
    await _log(canaries, connection)
    await connection.execute(f"prepare {canaries.word('prepared')} as select '{canaries.word('preparedtext')}'::text")
    await connection.execute("select pg_logical_emit_message(true, $1, $2)", *[canaries.word("message")] * 2)
    await connection.execute("select pg_notify($1, $2)", canaries.word("channel"), canaries.word("payload"))
    planted.application_name = await connection.fetchval(
        "select application_name from pg_stat_activity where pid = pg_backend_pid()"
    )
    await connection.execute("analyze")
    await _spill(canaries, connection)
    return planted


async def plant_again(canaries: Canaries, arguments: dict[str, Any]) -> Planted:
    """What another compute of the same database writes to its volume, after `plant`; returns as that does."""
    connection = await asyncpg.connect(**arguments, timeout=60, command_timeout=60)
    word = canaries.word
    await connection.execute(f"""
        update rows set body = '{word("updated")}' || id;
        insert into unlogged_rows select '{word("unlogged")}' || n from generate_series(1, 99) n;
        insert into big select repeat('{word("toast")}', {TOAST_VALUE_CHARS // len(word("toast"))});
    """)  # noqa: S608 - our own words
    await _log(canaries, connection)
    await connection.execute("select pg_logical_emit_message(true, $1, $2)", *[word("message")] * 2)
    await connection.execute(f"create database {word('databasename', 'again')} strategy file_copy")  # a checkpoint
    await _spill(canaries, connection)
    return Planted(connection)


async def plant_on_replica(canaries: Canaries, arguments: dict[str, Any]) -> Planted:
    """What one writes of its own; returns as `plant` does."""
    connection = await asyncpg.connect(**arguments, timeout=60, command_timeout=60)
    await _log(canaries, connection)
    await connection.execute("set work_mem = '64kB'")
    await _sort(connection, canaries.word("replicasorted"))
    return Planted(connection)


async def _spill(canaries: Canaries, connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """A temporary table that does not fit into memory, and an open cursor over a sort that does not either."""
    # Last: a cursor that is open ends with its transaction.
    await connection.execute("set work_mem = '64kB'; set temp_buffers = '800kB'")
    numbers = "from generate_series(1, 40000) n"
    word = canaries.word
    await connection.execute(f"create temp table temporaries as select '{word('temporary')}' || n as body {numbers}")
    await _sort(connection, word("sorted"))


async def _sort(connection: asyncpg.Connection[asyncpg.Record], word: str) -> None:
    query = f"select '{word}' || n from generate_series(1, 40000) n order by md5(n::text)"  # noqa: S608
    await connection.execute(f"begin; declare sorting cursor for {query}")
    await connection.fetch("fetch 10 from sorting")


async def _tables(canaries: Canaries, connection: asyncpg.Connection[asyncpg.Record]) -> None:
    word = canaries.word
    await connection.execute(f"""
        create type words as range (subtype = text);
        create table rows (id int primary key, body text);
        insert into rows select n, '{word("row")}' || n from generate_series(1, {ROWS}) n;
        insert into rows select n, '{word("deleted")}' || n from generate_series(1001, 1000 + {ROWS}) n;
        update rows set body = '{word("updated")}' || id where id % 4 = 0;
        delete from rows where id > 1000;
        create unlogged table unlogged_rows as select '{word("unlogged")}' || n as body from generate_series(1, 99) n;
        create table big (body text);
        alter table big alter body set storage external;
        insert into big select repeat('{word("toast")}', {TOAST_VALUE_CHARS // len(word("toast"))});
        create table copied (body text);
    """)  # noqa: S608 - our own words
    # Not above: there it would roll back what stands before it.
    await connection.execute(f"begin; insert into rows values (0, '{word('rolledback')}'); rollback")  # noqa: S608
    for kind, index in INDEXES.items():
        await connection.execute(f"""
            create table with_{kind} (body text);
            create index on with_{kind} using {index};
            insert into with_{kind} select reverse('{word(kind)}' || n) from generate_series(1, {ROWS}) n;
        """)  # noqa: S608
    await connection.copy_records_to_table("copied", records=[(word("copied", n),) for n in range(ROWS)])
    assert await connection.fetchval("select count(*) from copied") == ROWS


async def _names(canaries: Canaries, connection: asyncpg.Connection[asyncpg.Record], arguments: dict[str, Any]) -> None:
    word = canaries.word
    table, column = word("tablename"), word("columnname")
    await connection.execute(f"""
        create table {table} ({column} int);
        comment on table {table} is '{word("comment")}';
        create function answer() returns text language sql as $$ select '{word("function")}'::text $$;
        create role {word("rolename")} login password '{word("password")}';
    """)
    # A copy of files needs a checkpoint, which writes unlogged tables out, too.
    await connection.execute(f"create database {word('databasename')} strategy file_copy")
    other = await asyncpg.connect(**{**arguments, "database": word("databasename")}, timeout=60)
    await other.execute(f"create table other as select '{word('otherdatabase')}' as body")
    await other.close()
    nobody = {**arguments, "user": word("nobody"), "password": word("wrongpassword")}
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(**nobody, timeout=60)


async def _log(canaries: Canaries, connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Postgres logs errors and warnings, and quotes the statement; what it quotes is user data."""
    word = canaries.word
    await connection.execute(f"do $$ begin raise warning '{word('warning')}'; end $$")
    with pytest.raises(asyncpg.InvalidTextRepresentationError):
        await connection.execute(f"select '{word('error')}'::int")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute(f"select 1/0 as {word('statement')}")
