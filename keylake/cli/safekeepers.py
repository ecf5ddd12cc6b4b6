"""`keylake safekeeper`: the members of the quorum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli.common import AsJson, ExitCode, Home, Yes, examples, group

if TYPE_CHECKING:
    from keylake.client import KeylakeClient
    from shared.api.compute import ReplacedTimeline

app = group("Safekeepers: who holds the WAL that is committed. See docs/consensus.md.")


@app.command("replace", epilog=examples("keylake safekeeper replace safekeeper-2", "keylake status"))
def replace(
    node: Annotated[
        str, typer.Argument(metavar="NODE", help="Its name in the settings: safekeeper-2.", show_default=False)
    ],
    yes: Yes = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let the empty disk that a safekeeper has now take the place of one that is lost for good.

    First start it with an empty data directory, under the same name. All the others have to be up. Each timeline's
    endpoints stop while the new disk copies its WAL, and start with the next connection. The old disk is never taken
    again. Again after an error: goes on with what is left.
    """
    from keylake.cli import session
    from keylake.cli.output import emit, table

    if not yes:
        typer.confirm(f"Endpoints stop while {node} copies their WAL. Is its old disk lost?", abort=True, err=True)

    async def work(client: KeylakeClient) -> list[ReplacedTimeline]:
        return await client.replace_safekeeper(node)

    found = session.ask(home, work)
    emit(
        found,
        as_json,
        lambda: table(
            ("project", "timeline", "outcome", "why"),
            [(each.project_id, each.timeline_id, each.outcome, each.problem) for each in found],
            empty="it had no timelines",
        ),
    )
    if any(each.outcome == "failed" for each in found):
        raise typer.Exit(ExitCode.FAILED)
