"""`keylake console`: the cluster as a picture in the browser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli.common import Home, examples, home_dir

if TYPE_CHECKING:
    from keylake.attached import Attached

DEFAULT_PORT = 8470


def register(app: typer.Typer) -> None:
    app.command(
        "console",
        epilog=examples("keylake console", "keylake console --port 0 --no-open  # any port, print the address only"),
        rich_help_panel="Cluster",
    )(console)


def console(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0: one that is free.", min=0, max=65535)] = DEFAULT_PORT,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")] = True,
    home: Home = None,
) -> None:
    """Look at the running cluster in a browser, and handle it, with one role at a time. Ctrl-C ends it."""
    import asyncio

    from keylake.attached import Attached

    attached = Attached.to(home_dir(home))
    asyncio.run(_serve(attached, port, open_browser=open_browser))
    typer.echo("the console has stopped; the cluster goes on", err=True)


async def _serve(attached: Attached, port: int, *, open_browser: bool) -> None:
    import asyncio
    import contextlib
    import webbrowser

    from keylake.console.serve import listen, serve

    async def announce(address: str) -> None:
        typer.echo(f"Keylake console: {address}\nWhoever has this address is the owner. Ctrl-C ends it.")
        if open_browser:
            await asyncio.to_thread(webbrowser.open, address)

    with contextlib.closing(listen("127.0.0.1", port)) as listener:
        await serve(attached, listener, announce)
