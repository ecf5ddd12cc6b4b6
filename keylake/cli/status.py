"""`keylake status`: everything that a cluster is and does, in one view."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import typer

from keylake.cli.common import AsJson, ExitCode, Home, examples

if TYPE_CHECKING:
    from rich.console import RenderableType

    from keylake.attached import ServiceHealth
    from keylake.client import KeylakeClient
    from keylake.place import Place
    from shared.api.compute import Endpoint
    from shared.api.keymanager import KeyConfiguration, KeymanagerStatus, Project


def status(home: Home = None, as_json: AsJson = False) -> None:
    """Show services, leases, keys, projects and endpoints. Ends with 5 when something is down, 3 when all is."""
    from keylake.attached import Health
    from keylake.cli import session
    from keylake.cli.output import emit

    services, details = _look(session.place(home))
    # That one of the keymanagers leads shows in `problems`: it was asked.
    all_ready = all(s.health in (Health.READY, Health.STANDBY) for s in services) and not details.problems
    value = {"healthy": all_ready, "services": services, "problems": details.problems} | details.as_dict()
    emit(value, as_json, lambda: _render_status(services, details))
    if not all_ready:
        raise typer.Exit(ExitCode.UNAVAILABLE)


class _Details:
    """What the services say about themselves, as far as they answer."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.keys: KeymanagerStatus | None = None
        self.key_configurations: list[KeyConfiguration] = []
        self.projects: list[Project] = []
        self.endpoints: list[Endpoint] = []
        self.notes: dict[str, str] = {}

    def as_dict(self) -> dict[str, Any]:
        return {
            "leader": self.keys.node_id if self.keys else None,
            "leases": self.keys.leases if self.keys else [],
            "lease_ttl_s": self.keys.lease_ttl_s if self.keys else None,
            "anchoring": self.keys.anchoring if self.keys else None,
            "key_configurations": self.key_configurations,
            "projects": self.projects,
            "endpoints": self.endpoints,
        }


def _look(place: Place) -> tuple[list[ServiceHealth], _Details]:
    import asyncio

    from keylake.cli import session
    from shared.errors import KeylakeError

    async def keymanager(client: KeylakeClient, into: _Details) -> None:
        into.keys = keys = await client.keymanager_status()
        into.notes[keys.node_id] = (
            f"leads (epoch {keys.epoch}): {keys.instances} sessions, {len(keys.plaintext_keks)} KEKs in memory"
        )
        if keys.anchoring is not None and keys.anchoring.problem is not None:
            into.problems.append(f"the audit chain is not anchored since record {keys.anchoring.sequence}")
        into.key_configurations = await client.key_configurations()
        into.projects = await client.projects()

    async def compute(client: KeylakeClient, into: _Details) -> None:
        into.endpoints = await client.endpoints()
        running = sum(e.instance_id is not None for e in into.endpoints)
        into.notes["compute"] = f"{running} of {len(into.endpoints)} endpoints have a compute"

    async def pageserver(client: KeylakeClient, into: _Details) -> None:
        status = await client.pageserver_status()
        into.notes["pageserver"] = f"{len(status.timelines)} timelines, {len(status.redo_workers)} redo workers"
        into.problems += [f"pageserver, {t.timeline_id}: {t.fault}" for t in status.timelines if t.fault]

    async def safekeeper(client: KeylakeClient, into: _Details, index: int) -> None:
        status = await client.safekeeper_status(index)
        streaming = sum(t.streaming for t in status.timelines)
        into.notes[status.node_id] = f"{len(status.timelines)} timelines, {streaming} streaming"
        if status.fault or status.state != "running":
            into.problems.append(f"{status.node_id} is {status.state}: {status.fault}")
        into.problems += [
            f"{status.node_id}, {t.timeline_id}: commits wait for the pageserver, which lags"
            for t in status.timelines
            if t.streaming and t.held_back_size_bytes
        ]

    async def noted(part: Awaitable[None], into: _Details) -> None:
        try:
            await part
        except KeylakeError as error:
            into.problems.append(str(error))

    async def look() -> tuple[list[ServiceHealth], _Details]:
        details = _Details()
        async with session.client_of(place) as client:
            parts = [keymanager(client, details), compute(client, details), pageserver(client, details)]
            parts += [safekeeper(client, details, i) for i in range(len(client.addresses.safekeepers))]
            health, _ = await asyncio.gather(place.health(), asyncio.gather(*(noted(part, details) for part in parts)))
        return health, details

    return asyncio.run(look())


def _render_status(services: list[ServiceHealth], details: _Details) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from keylake.cli.common import printable
    from keylake.cli.output import table

    names = {p.project_id: p.name for p in details.projects}
    sections: list[tuple[str, tuple[str, ...], list[tuple[object, ...]]]] = [
        (
            "Services",
            ("service", "state", "pid", "restarts", "address", "what it does"),
            [(s.name, s.health.value, s.pid, s.restarts, s.address, details.notes.get(s.name, "")) for s in services],
        ),
        (
            "Keys",
            ("key configuration", "state", "last verdict", "last probe", "sealed within, s", "KEKs under way", "key"),
            [
                (c.name, c.state.value, c.last_verdict, c.last_probe_at, _sealed_within(c), _work(c), c.key.identifier)
                for c in details.key_configurations
            ],
        ),
        (
            "Projects",
            ("project", "id", "key", "reason"),
            [(p.name, p.project_id, p.state.value, p.state_reason) for p in details.projects],
        ),
        (
            "Endpoints",
            ("endpoint", "id", "state", "volume", "term", "reason"),
            [
                (
                    f"{names.get(e.project_id, e.project_id)}/{e.name}",
                    e.endpoint_id,
                    e.state.value,
                    e.volume,
                    e.term,
                    e.reason,
                )
                for e in details.endpoints
            ],
        ),
        (
            "Leases",
            ("project", "holder", "role", "seconds"),
            [
                (names.get(lease.project_id, lease.project_id), lease.node_id, lease.role.value, lease.remaining_s)
                for lease in (details.keys.leases if details.keys else [])
            ],
        ),
    ]
    parts: list[RenderableType] = [table(columns, rows, title=title) for title, columns, rows in sections if rows]
    parts += [Text(f"problem: {printable(problem)}", style="bold red") for problem in details.problems]
    return Group(*parts)


def register(app: typer.Typer) -> None:
    app.command(epilog=examples("keylake status", "keylake status --json | jq .endpoints"))(status)


def _sealed_within(configuration: KeyConfiguration) -> str:
    """Of a denial, at worst: those who hear of it, and those who are cut off. All of it: `keylake key-config show`."""
    denied = next((case for case in configuration.worst_cases if case.cause.value == "denied"), None)
    if denied is None or denied.reachable_s is None or denied.partitioned_s is None:
        return ""
    return f"{denied.reachable_s:.1f} / {denied.partitioned_s:.1f}"


def _work(configuration: KeyConfiguration) -> str:
    return ", ".join(f"{work.kind.value}: {work.done} of {work.total}" for work in configuration.work)
