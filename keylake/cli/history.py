"""`keylake branch storage|retain|hold|at|checkpoint|compact|gc`: what a branch keeps of its past, and how."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from keylake.cli.branches import BranchName, OfProject
from keylake.cli.common import AsJson, Home, examples

if TYPE_CHECKING:
    from rich.console import RenderableType

    from keylake.client import KeylakeClient
    from shared.api.compute import Timeline
    from shared.api.pageserver import TimelineInfo

T = TypeVar("T")
_MB: Final = 1_000_000


def _ask(home: Home, project: str | None, branch: str, action: Callable[[KeylakeClient, Timeline], Awaitable[T]]) -> T:
    """`action` on the branch that is meant."""
    from keylake.cli import lookup, session

    async def run(client: KeylakeClient) -> T:
        found = await lookup.project(client, project)
        return await action(client, await lookup.timeline(client, found.project_id, branch))

    return session.ask(home, run)


def _facts(info: TimelineInfo) -> RenderableType:
    from keylake.cli.output import facts

    return facts(
        [
            ("state", info.state.value),
            ("newest record", info.last_record_lsn),
            ("in the object store up to", info.remote_consistent_lsn),
            ("every version kept from", info.oldest_lsn),
            ("kept", f"{info.retention.age_s} s, or {info.retention.lsn_bytes / _MB:.0f} MB of WAL if that is more"),
            ("layers", f"{info.layers}, of them {info.l0_layers} not compacted yet"),
            ("sealed", f"{info.layer_size_bytes / _MB:.1f} MB"),
            ("not sealed yet, in memory", f"{info.in_memory_size_bytes / _MB:.1f} MB"),
            ("branches made from it", len(info.branches)),
            ("fault", info.fault or "none"),
        ]
    )


def storage(branch: BranchName, project: OfProject = None, home: Home = None, as_json: AsJson = False) -> None:
    """What the pageserver holds of a branch: positions, layers, and how much of its past."""
    from keylake.cli.output import emit

    info = _ask(home, project, branch, lambda client, timeline: client.timeline_info(timeline))
    emit(info, as_json, lambda: _facts(info))


def retain(
    branch: BranchName,
    age: Annotated[str, typer.Option("--for", help="How far back: 90s, 30m, 8h, 7d.", show_default=False)],
    wal_mb: Annotated[int, typer.Option(min=0, help="And at least so much WAL, in MB.")] = 0,
    project: OfProject = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """How much history is kept from now on. A shorter time lets go of what is older for good."""
    from keylake.cli.output import emit
    from keylake.cli.tokens import ttl_s
    from shared.api.pageserver import RetentionWindow

    window = RetentionWindow(lsn_bytes=wal_mb * _MB, age_s=ttl_s(age))
    info = _ask(home, project, branch, lambda client, timeline: client.set_retention(timeline, window))
    emit(info, as_json, lambda: _facts(info))


def at(
    branch: BranchName,
    time: Annotated[str, typer.Argument(metavar="TIME", help="With its zone.", show_default=False)],
    project: OfProject = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """The LSN of a time: everything that was committed by then lies at or below it."""
    from keylake.cli.branches import parse_point
    from keylake.cli.output import emit
    from shared.errors import InvalidInputError

    timestamp = parse_point(time).timestamp
    if timestamp is None:
        raise InvalidInputError(f"{time!r} is an LSN already; give a time like 2026-11-26T10:00:00Z")
    found = _ask(home, project, branch, lambda client, timeline: client.lsn_by_timestamp(timeline, timestamp))
    remark = {"past": "before all that is kept", "future": "nothing was committed since", "nodata": "nothing committed"}
    emit(
        found,
        as_json,
        lambda: " ".join([str(found.lsn), *([f"({remark[found.kind]})"] if found.kind in remark else [])]),
    )


def hold(
    branch: BranchName,
    lsn: Annotated[str, typer.Argument(metavar="LSN", show_default=False)],
    ttl: Annotated[
        str, typer.Option("--for", help="How long: 90s, 5m; no longer than the pageserver's lsn_lease_s.")
    ] = "10m",
    project: OfProject = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Keep one version readable for a time, however far the retention window moves on."""
    from keylake.cli.branches import parse_point
    from keylake.cli.output import emit
    from keylake.cli.tokens import ttl_s
    from shared.errors import InvalidInputError

    read_lsn = parse_point(lsn).lsn
    if read_lsn is None:
        raise InvalidInputError(f"{lsn!r} is a time; `keylake branch at` tells its LSN")
    found = _ask(home, project, branch, lambda client, timeline: client.lease_lsn(timeline, read_lsn, ttl_s(ttl)))
    emit(found, as_json, lambda: f"{found.read_lsn} stays readable for {found.ttl_s:g} s")


def checkpoint(branch: BranchName, project: OfProject = None, home: Home = None, as_json: AsJson = False) -> None:
    """Seal and upload everything that has been ingested."""
    from keylake.cli.output import emit

    info = _ask(home, project, branch, lambda client, timeline: client.checkpoint(timeline))
    emit(info, as_json, lambda: _facts(info))


def compact(
    branch: BranchName,
    force: Annotated[
        bool, typer.Option("--force", help="Not only what is due: all that a read would gain from.")
    ] = False,
    project: OfProject = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Merge layers and make images. Goes on by itself in any case."""
    from keylake.cli.output import emit

    info = _ask(home, project, branch, lambda client, timeline: client.compact(timeline, force=force))
    emit(info, as_json, lambda: _facts(info))


def gc(branch: BranchName, project: OfProject = None, home: Home = None, as_json: AsJson = False) -> None:
    """Remove what nobody can read any more. Goes on by itself in any case."""
    from keylake.cli.output import emit

    done = _ask(home, project, branch, lambda client, timeline: client.collect_garbage(timeline))
    emit(
        done,
        as_json,
        lambda: (
            f"{done.layers} layers removed, {done.size_bytes / _MB:.1f} MB; "
            f"every version is kept from {done.oldest_lsn} on"
        ),
    )


def register(branch: typer.Typer) -> None:
    """Add the commands to the group `keylake branch`."""
    branch.command("storage", epilog=examples("keylake branch storage main --project shop"))(storage)
    branch.command(
        "retain",
        epilog=examples(
            "keylake branch retain main --project shop --for 7d",
            "keylake branch retain dev --for 1h --wal-mb 64  # whichever of the two reaches further back",
        ),
    )(retain)
    branch.command("at", epilog=examples("keylake branch at main 2026-11-26T10:00:00Z --project shop"))(at)
    branch.command(
        "hold",
        epilog=examples(
            "keylake branch hold main 0/18915F8 --for 10m  # a backup reads that version; asking again renews"
        ),
    )(hold)
    branch.command("checkpoint", epilog=examples("keylake branch checkpoint main --project shop"))(checkpoint)
    branch.command("compact", epilog=examples("keylake branch compact main --project shop --force"))(compact)
    branch.command("gc", epilog=examples("keylake branch gc main --project shop"))(gc)
