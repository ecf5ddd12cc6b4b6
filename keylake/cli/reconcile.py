"""`keylake audit reconcile`: our record of KMS calls against the customer's own log."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli.common import AsJson, ExitCode, Home, examples

if TYPE_CHECKING:
    from rich.console import RenderableType

    from keylake.client import KeylakeClient
    from keylake.cluster import Customer
    from keylake.reconcile.core import Window
    from keylake.reconcile.run import Report
    from shared.kms_log import LoggedCall, Recorded

_TIMES = ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d"]


def reconcile(
    cloud_log: Annotated[
        Path | None,
        typer.Option(
            help="The customer's log in a file: CloudTrail (lookup-events, or a trail's file), Azure Monitor "
            "AuditEvent, gcloud logging read, or an audit device of OpenBao, as JSON. Without it the local cluster's "
            "cloud is asked, for all three logs.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(help="Our side from an exported file; no service is asked.", show_default=False, dir_okay=False),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="Only this key: its ARN, URL or resource name. May be repeated.", show_default=False),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            help="Judge calls from then on (UTC); a file's first call unless given.", formats=_TIMES, show_default=False
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(help="… and up to then; a file's last call unless given.", formats=_TIMES, show_default=False),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Join our record of KMS calls with the customer's own log, and name every call that stands on one side only.

    Ends with 1 when there is one, when somebody else used the key, or when our audit chain is broken.
    """
    from keylake.cli.output import emit
    from keylake.reconcile.core import Window

    window = Window(*(None if t is None else t.replace(tzinfo=UTC) for t in (since, until)))
    if audit is not None and cloud_log is None:
        raise typer.BadParameter("--audit goes with --cloud-log")
    report = (
        _from_file(cloud_log, audit, key or [], window, home) if cloud_log else _from_customer(key or [], window, home)
    )
    emit(report, as_json, lambda: _shown(report))
    if not report.agrees:
        raise typer.Exit(ExitCode.FAILED)


def _from_file(cloud_log: Path, audit: Path | None, keys: Sequence[str], window: Window, home: Path | None) -> Report:
    from keylake.cli import session
    from keylake.reconcile.logs import read_log
    from keylake.reconcile.run import OurSide, reach

    side = OurSide()
    if audit is None:
        session.ask(home, side.read_on)
    else:
        side.read_file(audit)
    cloud, theirs = read_log(cloud_log, side.ours.recorded)
    return side.compare(theirs, cloud, keys, reach(theirs, window))


def _from_customer(keys: Sequence[str], window: Window, home: Path | None) -> Report:
    from keylake.cli import session
    from keylake.reconcile.run import compare_now

    with session.customer(home) as customer:

        async def read_log(recorded: Recorded) -> list[LoggedCall]:
            return await asyncio.to_thread(live_calls, customer, recorded)

        async def compare(client: KeylakeClient) -> Report:
            return await compare_now(
                client, lambda recorded: asyncio.to_thread(live_calls, customer, recorded), None, keys, window
            )

        return session.ask(home, compare)


def live_calls(customer: Customer, recorded: Recorded) -> list[LoggedCall]:
    """Of all the local cluster's clouds: CloudTrail with the customer's own credentials; Azure's and Google's logs, for
    which it has none of its own, from the cloud's administrator."""
    from keylake.reconcile.logs import calls_of

    logs = {
        "aws": customer.aws.events(),
        "azure": customer.simulation.azure_audit_log(),
        "google": customer.simulation.google_audit_log(),
    }
    return [call for cloud, records in logs.items() for call in calls_of(records, cloud, recorded)]


def _shown(report: Report) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from keylake.cli.output import table

    result = report.result
    judged = f"from {report.window.since or 'the beginning'} to {report.window.until or 'now'}"
    lines = [
        f"{len(report.keys)} keys, {judged}; {report.records} audit records",
        f"{result.joined} calls stand on both sides",
    ]
    if result.maybe or result.explained:
        lines.append(
            f"{result.explained} calls in the customer's log are explained by calls of ours that got no answer; "
            f"{result.maybe} of those may not have got there"
        )
    if result.forgotten:
        lines.append(f"{result.forgotten} calls of ours were never recorded: the database was down for too long")
    lines.append(f"{result.administration} calls of others on these keys did not use them")
    if report.chain_problem is not None:
        lines.append(f"our audit chain is NOT intact: {report.chain_problem}")
    if result.agrees:
        return Group(*map(Text, lines), Text("no call stands on one side only"))
    found = table(
        ("time", "what", "operation", "key", "principal", "outcome", "request id", "remark"),
        [
            (f.at, f.kind.value, f.operation, f.key, f.principal, f.outcome, f.request_id, f.remark)
            for f in result.findings
        ],
    )
    return Group(*map(Text, lines), Text(f"{len(result.findings)} calls do NOT agree:"), found)


def register(audit: typer.Typer) -> None:
    audit.command(
        "reconcile",
        epilog=examples(
            "keylake audit reconcile",
            "keylake audit reconcile --cloud-log events.json --since 2026-11-01",
            "keylake audit reconcile --cloud-log events.json --audit audit.jsonl --json | jq .result.findings",
        ),
    )(reconcile)
