"""What psql is told, and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from keylake.cli.psql import psql_environment, split_arguments
from keylake.client import Connection
from shared.ids import EndpointId

CONNECTION = Connection(EndpointId("ep-0123456789abcdef"), "127.0.0.1", 4, "app", "geheim", "db", Path("/ca"))


@pytest.mark.parametrize(
    ("argv", "parsed", "target", "arguments"),
    [
        ("psql", (None, []), None, []),
        ("psql shop", ("shop", []), "shop", []),
        ("psql shop -- -c 1", ("shop", ["-c", "1"]), "shop", ["-c", "1"]),
        ("psql -- -c 1", ("-c", ["1"]), None, ["-c", "1"]),
        ("psql -- shop", ("shop", []), "shop", []),
    ],
)
def test_where_the_target_ends(
    argv: str, parsed: tuple[str | None, list[str]], target: str | None, arguments: list[str]
) -> None:
    assert split_arguments(*parsed, argv.split()) == (target, arguments)


def test_the_environment_says_everything_and_nothing_else_interferes() -> None:
    inherited = {
        "PATH": "/bin",
        "KEYLAKE_TOKEN": "a.b.c",
        "PGHOSTADDR": "10.0.0.1",
        "PGSERVICE": "prod",
        "PGOPTIONS": "-c work_mem=1MB",
    }
    made = psql_environment(CONNECTION, Path("/run/x"), 5432, inherited | {"PGPASSWORD": "other", "PGHOST": "prod"})
    assert made == {
        "PATH": "/bin",
        "PGHOST": "/run/x",
        "PGPORT": "5432",
        "PGUSER": "app",
        "PGDATABASE": "db",
        "PGPASSWORD": "geheim",
        "PGOPTIONS": "endpoint=ep-0123456789abcdef -c work_mem=1MB",
        "PGSSLMODE": "disable",
        "PGGSSENCMODE": "disable",
        "PGCHANNELBINDING": "disable",
    }
