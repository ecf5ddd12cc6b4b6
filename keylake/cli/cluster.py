"""`keylake up` and `keylake down`: the local cluster's life."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keylake.cli.common import AsJson, Home, Yes, examples, home_dir

if TYPE_CHECKING:
    from keylake.attached import Attached

_NEXT = """\
Next, the customer makes a key, and Keylake keeps a project under it:
  keylake cloud key create my-key
  keylake key-config create main --key my-key
  keylake workspace create main
  keylake project create shop
  keylake psql shop

`keylake status` shows everything, `keylake down` ends it; the data stays."""


def up(
    home: Home = None,
    proxy_port: Annotated[
        int | None,
        typer.Option(
            help="Where Postgres clients connect, on 127.0.0.1. Otherwise that of last time, or a free one.",
            min=1,
            max=65535,
            show_default=False,
        ),
    ] = None,
    keymanagers: Annotated[
        int, typer.Option(help="Replicas of the keymanager: one leads, the others take over.", min=1, max=9)
    ] = 1,
    links: Annotated[
        bool, typer.Option("--links", help="Let services reach each other over links that `keylake link` can cut.")
    ] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and stop the cluster at Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a local cluster: every service as a process of its own, no Docker and no root needed.

    It goes on when the terminal is closed. The data is kept in --home and is there again at the next start. Its
    certificates last a year; a start in the last third of it issues new ones (`keylake doctor` says when they end).
    """
    from keylake import supervision
    from keylake.attached import Attached
    from keylake.cli.output import notes

    directory = home_dir(home)
    started = monotonic()
    owner = supervision.find(directory)
    already = owner is not None
    if owner is not None:
        with owner, _progress("waiting for the cluster that is starting"):
            supervision.wait_until_ready(directory, owner)
    else:
        port = supervision.choose_proxy_port(directory, proxy_port)
        if foreground:
            _in_foreground(directory, port, keymanagers, links=links)
            return
        with _progress("starting") as progress:
            supervision.start(directory, port, progress, keymanagers, links=links)
    attached = Attached.to(directory)
    seconds = monotonic() - started
    if as_json:
        _emit_up(attached, already)
        return
    say = notes().print
    where = f"Postgres clients connect to 127.0.0.1:{attached.ports.proxy}"
    if already:
        say(f"Keylake is already running in {directory}; {where}", markup=False, soft_wrap=True)
        if proxy_port not in (None, attached.ports.proxy):
            say("For another --proxy-port, stop it first: keylake down", markup=False)
        if links and not attached.has_links:
            say("For --links, stop it first: keylake down", markup=False)
        return
    say(f"Keylake is up after {seconds:.1f} s, in {directory}; {where}", markup=False, soft_wrap=True)
    say(f"\n{_NEXT}", markup=False, soft_wrap=True)


def _emit_up(attached: Attached, already: bool) -> None:
    from keylake import supervision
    from keylake.cli.output import emit

    home = attached.layout.home
    with supervision.find(home) or contextlib.nullcontext() as owner:
        value = {
            "home": str(home),
            "already_running": already,
            "supervisor_pid": owner.pid if owner else None,
            "proxy": {"host": "127.0.0.1", "port": attached.ports.proxy},
            "links": attached.has_links,
            "ca_certificate": str(attached.layout.ca_certificate),
            "logs": str(attached.layout.logs),
        }
    emit(value, True, lambda: "")


def _in_foreground(directory: Path, port: int | None, keymanagers: int, *, links: bool) -> None:
    from keylake import supervision, supervisor
    from keylake.cli.output import notes
    from shared.telemetry import configure_logging

    say = notes().print

    def report(line: supervision.Report) -> None:
        if line.kind == "ready":
            say(f"Keylake is up in {directory}; Ctrl-C ends it.", markup=False, soft_wrap=True)
        else:
            say(f"  {line.text}", markup=False)

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.update(supervision.child_environment())
    os.chdir(directory)
    configure_logging("supervisor", "supervisor", "warning")
    supervisor.run(directory, port, report, keymanagers, links=links)
    say("Keylake has stopped; its data is kept.")


@contextlib.contextmanager
def _progress(first: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal, lines elsewhere; on stderr."""
    from keylake.cli.output import notes

    console = notes()
    if console.is_terminal:
        with console.status(f"{first} …") as status:
            yield lambda text: status.update(f"starting {text} …")
    else:
        yield lambda text: console.print(f"starting {text} …", markup=False)


def down(
    home: Home = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete the cluster's data, keys and certificates, too. Asks first.")
    ] = False,
    yes: Yes = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds for a graceful end, after which it is killed.", min=0.1)
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Stop the local cluster. When none is running, that is fine, too."""
    from keylake import supervision
    from keylake.cli.output import emit, notes

    directory = home_dir(home)
    if purge and not yes:
        _confirm_purge(directory)
    owner = supervision.find(directory)
    graceful = True
    if owner is not None:
        with owner, _stopping():
            graceful = supervision.stop(owner, timeout)
    left: list[str] = []
    purged = purge and directory.is_dir()
    if purged:
        left = purge_home(directory)
    if as_json:
        stopped = owner is not None
        emit({"stopped": stopped, "graceful": graceful, "purged": purged, "left": left}, True, lambda: "")
        return
    say = notes().print
    if owner is None:
        say(f"No Keylake is running in {directory}.", markup=False, soft_wrap=True)
    else:
        say("Keylake has stopped." if graceful else "Keylake did not stop in time and was killed.")
    if left:
        say(f"{directory} is kept: it also holds {', '.join(left)}.", markup=False, soft_wrap=True)
    elif purged:
        say(f"{directory} is deleted.", markup=False, soft_wrap=True)


def _stopping() -> Any:
    from keylake.cli.output import notes

    console = notes()
    return console.status("stopping …") if console.is_terminal else contextlib.nullcontext()


def _confirm_purge(directory: Path) -> None:
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is nobody to ask: say --yes as well", param_hint="--purge")
    typer.confirm(f"Delete {directory} with all its databases and keys, for good?", abort=True, err=True)


def purge_home(directory: Path) -> list[str]:
    """Delete what Keylake put into a home, and the home when that was all. Names what is left.

    Only names that are Keylake's are touched, so a wrong --home loses nothing else. Raises InvalidInputError when it
    is no home at all, ConflictError when a cluster runs in it.
    """
    from keylake.pidlock import pid_lock
    from keylake.supervision import ENTRIES, pid_file
    from shared.errors import InvalidInputError

    if not (directory / "keys" / "trust.json").exists() and not pid_file(directory).exists():
        raise InvalidInputError(f"{directory} is not a Keylake home; nothing was deleted")
    with pid_lock(pid_file(directory)):  # nobody starts it meanwhile
        for name in ENTRIES:
            path = directory / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    left = sorted(path.name for path in directory.iterdir())
    if not left:
        directory.rmdir()
    return left


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "keylake up",
            "keylake up --home /srv/keylake --proxy-port 5433",
            "keylake up --links  # then: keylake link cut pageserver keymanager",
            "keylake up --foreground  # Ctrl-C stops it",
        )
    )(up)
    app.command(
        epilog=examples(
            "keylake down", "keylake down --purge  # asks, then deletes the data", "keylake down --purge -y"
        )
    )(down)
