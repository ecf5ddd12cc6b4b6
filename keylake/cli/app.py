"""The tree of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from keylake.cli import (
    audit,
    branches,
    cloud,
    cluster,
    completion,
    console,
    demo,
    drill,
    endpoints,
    history,
    inspect,
    keys,
    links,
    projects,
    psql,
    receipts,
    safekeepers,
    status,
    storage,
    tokens,
)
from keylake.cli.common import KeylakeGroup, examples

_HELP = """A Postgres whose every persistent byte is sealed under a key that the customer holds.

Names and ids are both accepted wherever they are unambiguous. With a token of `keylake token create` in the variable
[bold]KEYLAKE_TOKEN[/bold], commands do what its role may do; without, they are the owner's.

Exit codes: [bold]0[/bold] done, [bold]1[/bold] failed, [bold]2[/bold] wrong command line or no such thing,
[bold]3[/bold] no cluster is running, [bold]4[/bold] refused (no permission, key revoked or shredded),
[bold]5[/bold] unavailable: something is down, try again. `keylake psql` ends with psql's own."""

app = typer.Typer(
    cls=KeylakeGroup,
    help=_HELP,
    epilog=examples(
        "keylake demo  # everything, start to end, in about a minute",
        "keylake up",
        "keylake cloud key create my-key",
        "keylake key-config create main --key my-key",
        "keylake workspace create main",
        "keylake project create shop",
        "keylake psql shop -- -c 'select 1'",
        "keylake down",
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals may hold secrets
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"keylake {version('keylake')}")  # noqa: T201 - this is the command line
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


cluster.register(app)
status.register(app)
console.register(app)
demo.register(app)
app.add_typer(drill.app, name="drill")
app.add_typer(links.app, name="link")
audit.register(app)
receipts.register(app)
inspect.register(app)
psql.register(app)
completion.register(app)
storage.register(app)
app.add_typer(projects.app, name="project", rich_help_panel="Data")
history.register(branches.app)
app.add_typer(branches.app, name="branch", rich_help_panel="Data")
app.add_typer(endpoints.app, name="endpoint", rich_help_panel="Data")
app.add_typer(safekeepers.app, name="safekeeper", rich_help_panel="Data")
app.add_typer(keys.workspaces, name="workspace", rich_help_panel="Keys")
app.add_typer(keys.configurations, name="key-config", rich_help_panel="Keys")
app.add_typer(cloud.app, name="cloud", rich_help_panel="Keys")
app.add_typer(tokens.app, name="token", rich_help_panel="People")
