"""`keylake demo`: the product's main job, start to end, with every claim checked.

The exit code is 0 only if all of them held.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

import asyncpg
from rich.console import Console

from shared.errors import UnavailableError

if TYPE_CHECKING:
    from keylake.compose import Requests


def main(*, compose: bool = False, keep: bool = False, as_json: bool = False) -> int:
    """Run the demo against a temporary local cluster, or against the containers. Returns the exit code.

    `as_json`: the story goes to stderr, and what came of it to stdout.

    Raises UnavailableError when it comes to no end: something did not answer, or not in time.
    """
    from keylake.cli.output import emit
    from keylake.demo.report import Report

    requests = None
    if compose:
        from keylake.compose import Requests
        from keylake.place import inside

        if inside() is None:
            from keylake.compose_host import Host

            return Host.of_this_checkout().run_operator(["keylake", "demo", "--compose"])
        requests = Requests()  # takes stdout, so before anything is printed
    console = Console(highlight=False, stderr=as_json)
    report = Report(console)
    console.print("[bold]Keylake demo[/bold]: a Postgres whose only home is storage sealed under the customer's key")
    try:
        asyncio.run(_local(report, keep=keep) if requests is None else _compose(report, requests))
    except KeyboardInterrupt:
        console.print("\ninterrupted; everything that was started is ended")
        return 130
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:  # TimeoutError is an OSError
        what = "no answer in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
        look = "`make logs`" if compose else "`keylake demo --keep`, which keeps the services' logs"
        raise UnavailableError(
            f"the demo broke off in {report.at!r}: {what}. A machine with too much else to do (`uptime`) is the usual "
            f"cause: try once more. If it happens again, look at {look}, and let `keylake doctor` look at the machine"
        ) from error
    report.close()
    if as_json:
        emit(report.as_dict(), True, lambda: "")
    return 1 if report.failed else 0


async def _local(report: object, *, keep: bool) -> None:
    from pathlib import Path
    from tempfile import mkdtemp

    from keylake.cluster import Cluster
    from keylake.demo.report import Report
    from keylake.demo.story import Story
    from keylake.demo.target import LocalTarget

    assert isinstance(report, Report)  # noqa: S101 - imports are late, so that `keylake --help` is fast
    home = Path(mkdtemp(prefix="keylake-demo-")) if keep else None
    begun = monotonic()
    with report.chapter("0. A local cluster, every service a process"):
        cluster = Cluster(home, progress=report.say)
        await cluster.__aenter__()
    try:
        report.time("cluster up", monotonic() - begun, f"{len(cluster.services)} services and a metadata database")
        await Story(LocalTarget(cluster), report).run()
    finally:
        await cluster.__aexit__()
        if home is not None:
            report.say(f"kept: {home}")


async def _compose(report: object, requests: Requests) -> None:
    """In the operator's container; `requests` goes to the process on the host that started it."""
    from keylake.compose import StackTarget
    from keylake.demo.report import Report
    from keylake.demo.story import Story
    from keylake.place import inside

    assert isinstance(report, Report)  # noqa: S101 - imports are late, so that `keylake --help` is fast
    bundle = inside()
    assert bundle is not None  # noqa: S101 - main() has looked
    async with await StackTarget.open(bundle, requests) as target:
        await Story(target, report).run()
