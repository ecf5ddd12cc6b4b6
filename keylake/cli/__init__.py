"""The `keylake` command line. Everything heavy is imported by the command that needs it, so that help and completion
are quick.

    app.py        the commands' tree              common.py     options, exit codes, errors → one line and a code
    cluster.py    up, down                        output.py     tables and JSON
    status.py     status                          lookup.py     names or ids → what they mean
    cloud.py      cloud key                       session.py    a client for the time of one command
    faults.py     cloud fault                     audit.py      audit, doctor
    keys.py       key-config, workspace           demo.py       demo
    projects.py   project                         psql.py       psql
    endpoints.py  endpoint                        tokens.py     token
    storage.py    scrub, inspect layer, index     inspect.py    inspect wal, control
    completion.py completion
"""

from __future__ import annotations


def main() -> None:
    """Console script."""
    from keylake.cli.app import app

    app(prog_name="keylake")
