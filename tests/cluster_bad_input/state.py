"""Everything observable of a cluster, before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from shared.api.keymanager import AuditRecord
from shared.ids import TimelineId
from tests.cluster_bad_input.listeners import listeners
from tests.cluster_bad_input.logs import LogWatch
from tests.cluster_bad_input.place import Place
from tests.cluster_secrecy.keys import metadata
from tests.fixtures.waiting import wait_until

AUDITED_REFUSALS = {"admin.denied", "session.open", "dek.generate", "dek.unwrap", "key_configuration.create"}
"""Actions that the audit chain records when they are refused, too."""
_VOLATILE_COLUMNS = ["last_probe_at", "last_allowed_at", "wraps_reserved", "last_unwrap_at", "uses", "reported_at"]


@dataclass(frozen=True, slots=True)
class State:
    fixed: dict[str, Any]
    """Stays as it is, whoever works meanwhile."""
    growing: dict[str, int]
    """Positions of the project whose compute runs: the database may write by itself, but nothing is ever taken back."""
    audit_head: int

    def changes(self, later: State) -> list[str]:
        names = self.fixed.keys() | later.fixed.keys()
        changed = [
            f"{name}: {self.fixed.get(name)!r} -> {later.fixed.get(name)!r}"
            for name in sorted(names)
            if self.fixed.get(name) != later.fixed.get(name)
        ]
        shrunk = [
            f"{name}: {value} -> {later.growing.get(name)}"
            for name, value in self.growing.items()
            if later.growing.get(name, -1) < value
        ]
        return changed + shrunk


async def observe(place: Place) -> State:
    client = place.cluster.client
    fixed: dict[str, Any] = {"listeners": sorted(map(str, listeners(place.cluster)))}
    growing: dict[str, int] = {}
    for configuration in await client.key_configurations():
        shown = configuration.model_dump(mode="json", exclude={"last_probe_at"})
        fixed[f"key configuration {configuration.key_configuration_id}"] = shown
    for workspace in await client.workspaces():
        fixed[f"workspace {workspace.workspace_id}"] = workspace.model_dump(mode="json")
    for project in await client.projects():
        fixed[f"project {project.project_id}"] = project.model_dump(
            mode="json", exclude={"keks": {"__all__": {"wraps"}}}
        )
        for timeline in await client.timelines(project.project_id):
            fixed[f"timeline {timeline.timeline_id}"] = timeline.model_dump(mode="json")
    for endpoint in await client.endpoints():
        fixed[f"endpoint {endpoint.endpoint_id}"] = endpoint.model_dump(mode="json")
    leases = (await client.keymanager_status()).leases
    fixed["leases"] = sorted((str(e.project_id), e.node_id, e.role, str(e.instance_id), e.generation) for e in leases)
    await _storage(place, fixed, growing)
    _files(place, fixed)
    fixed |= await _metadata(place)
    fixed["faults of the customer's cloud"] = place.cluster.customer.simulation.faults()
    return State(fixed, growing, (await client.verify_audit()).records)


async def _storage(place: Place, fixed: dict[str, Any], growing: dict[str, int]) -> None:
    client, idle = place.cluster.client, place.idle.timeline.timeline_id

    def positions(where: str, timeline_id: TimelineId, values: dict[str, int]) -> None:
        (fixed if timeline_id == idle else growing).update({f"{where} {timeline_id} {k}": v for k, v in values.items()})

    for index in range(len(client.addresses.safekeepers)):
        status = await client.safekeeper_status(index)
        fixed[f"{status.node_id} state"] = (status.state, status.fault)
        for each in status.timelines:
            moving = {"flush_lsn": each.flush_lsn.value, "commit_lsn": each.commit_lsn.value}
            positions(status.node_id, each.timeline_id, moving | {"wal_size_bytes": each.wal_size_bytes})
            still = each.model_dump(mode="json", exclude={*moving, "wal_size_bytes", "last_log_term"})
            fixed[f"{status.node_id} {each.timeline_id}"] = still
    pageserver = await client.pageserver_status()
    fixed["pageserver fault"] = pageserver.fault
    for info in pageserver.timelines:
        moving = {
            "last_record_lsn": info.last_record_lsn.value,
            "commit_lsn": info.commit_lsn.value,
            "remote_consistent_lsn": info.remote_consistent_lsn.value,
            "layers": info.layers,
        }
        positions("pageserver", info.timeline_id, moving)
        fixed[f"pageserver {info.timeline_id}"] = (info.state, info.system_identifier, info.fault)


def _files(place: Place, fixed: dict[str, Any]) -> None:
    layout, busy = place.cluster.layout, str(place.busy.timeline.timeline_id)
    stores = [layout.objects, *sorted(layout.data.glob("safekeeper-*"))]
    for store in stores:
        names = {str(p.relative_to(store)) for p in store.rglob("*") if p.is_file()}
        fixed[f"files of {store.name}"] = sorted(name for name in names if busy not in name)
    # What it knows of keys, users and roles; its log of calls goes on.
    for path in sorted(layout.customercloud.rglob("*.sealed")):
        fixed[f"customer's cloud {path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()


async def _metadata(place: Place) -> dict[str, Any]:
    """Every row, whatever an API shows of it."""
    found: dict[str, Any] = {}
    async with metadata(place.cluster) as database:
        tables = await database.fetch(
            "select table_schema || '.' || table_name as name from information_schema.tables"
            " where table_schema in ('keymanager', 'compute') and table_name not in ('audit', 'audit_head', 'leader')"
        )
        for table in tables:
            query = f"select (to_jsonb(t) - $1::text[])::text as line from {table['name']} t"  # noqa: S608
            rows = await database.fetch(query, _VOLATILE_COLUMNS)
            found[f"table {table['name']}"] = sorted(row["line"] for row in rows)
    return found


async def _no_lease_of_the_dead(place: Place) -> bool:
    """A service that was killed, by a test before, has leases until they run out."""
    async with metadata(place.cluster) as database:
        query = "select count(*) = count(distinct (role, node_id, project_id)) from keymanager.lease"
        return bool(await database.fetchval(query))


def _is_expected(record: AuditRecord, place: Place) -> bool:
    if record.action.startswith("dek.") and record.project_id == place.busy.project.project_id:
        return True  # what the storage of a database that runs does anyway
    if record.action == "kms.calls":
        return True  # the watcher's probes, told every minute
    return record.action in AUDITED_REFUSALS and record.outcome != "ok"


@asynccontextmanager
async def unchanged(place: Place) -> AsyncIterator[None]:
    """What happens inside leaves state as it was, is audited as refused if at all, and makes no service complain."""
    await wait_until(lambda: _no_lease_of_the_dead(place))
    before, logs = await observe(place), LogWatch(place.cluster)
    yield

    after = before

    async def settled() -> bool:
        # What a dropped connection held, for one, goes away when the service has noticed.
        nonlocal after
        after = await observe(place)
        return not before.changes(after)

    with suppress(TimeoutError):
        await wait_until(settled, 5)
    assert not before.changes(after), "\n".join(before.changes(after))
    records = await place.cluster.client.audit(before.audit_head)
    strange = [json.loads(r.model_dump_json()) for r in records if not _is_expected(r, place)]
    assert not strange, strange
    assert (await place.cluster.client.verify_audit()).intact
    logs.check()
