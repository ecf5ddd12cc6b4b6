"""docs/reference/metrics.md, out of what the services of a local cluster answer, which is started for it.

    python -m keylake.reference.metrics docs/reference/metrics.md

What a metric is called, and its help, is only known when it is scraped: most are computed then.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
import httpx
from prometheus_client.parser import text_string_to_metric_families

from keylake.attached import Attached
from keylake.cluster import Cluster
from keylake.reference.text import table
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.http import ServiceClient
from shared.ids import EndpointId
from shared.tls import client_context

CUSTOMERCLOUD: Final = "customercloud"
_HEAD: Final = """\
# Metrics

Scraped from a cluster by `make docs-metrics`; a test scrapes another one and compares.

Each service answers `GET /metrics` in Prometheus's text format to a token with `status:read` (an auditor's for one:
labels have ids of projects and timelines in them, and nothing that people made). How to scrape, a dashboard, and
traces: [Metrics and traces](../how-to/observe.md). Units are seconds and bytes; LSNs are positions in bytes.
"""


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    """As in queries: of a counter with `_total`."""
    kind: str
    help: str
    labels: frozenset[str]
    """Of the samples that there are; without `le`."""


def families(text: str) -> Iterator[Family]:
    """Of one scrape."""
    for each in text_string_to_metric_families(text):
        name = f"{each.name}_total" if each.type == "counter" else each.name
        labels = frozenset(label for sample in each.samples for label in sample.labels) - {"le"}
        yield Family(name, each.type, each.documentation, labels)


async def scrape(attached: Attached) -> dict[str, str]:
    """Service → its answer."""
    addresses = attached.ports.addresses()
    owner = TokenIssuer.load(attached.layout.admin_key)
    places = {
        Service.KEYMANAGER: addresses.keymanager,
        Service.SAFEKEEPER: addresses.safekeepers[0],
        Service.PAGESERVER: addresses.pageserver,
        Service.COMPUTE: addresses.manager,
        Service.PROXY: Address(port=attached.ports.proxy_http),
    }
    found = {}
    for service, address in places.items():
        scopes = frozenset({Scope.STATUS_READ})
        async with ServiceClient(service, address, attached.layout.ca_certificate, owner, scopes) as client:
            found[service.value] = (await client.request("GET", "/metrics")).text
    context = client_context(attached.layout.ca_certificate)
    async with httpx.AsyncClient(verify=context, trust_env=False) as http:
        answer = await http.get(f"https://127.0.0.1:{attached.ports.customercloud}/metrics")
        found[CUSTOMERCLOUD] = answer.text
    return found


def page(scraped: Mapping[str, str]) -> str:
    """The whole document."""
    parts = [_HEAD]
    for service, text in scraped.items():
        rows = [
            (f"`{each.name}`", each.kind, ", ".join(f"`{label}`" for label in sorted(each.labels)), each.help)
            for each in sorted(families(text), key=lambda family: family.name)
        ]
        parts += [f"## {service}\n", table(("metric", "type", "labels", "what"), rows)]
    return "\n".join(parts)


async def _of_a_new_cluster() -> dict[str, str]:
    """With a session, and one that was refused: some labels are only there with a sample."""
    async with Cluster() as cluster:
        project = await cluster.create_project()
        arguments = project.connection.asyncpg_arguments()
        with contextlib.suppress(asyncpg.PostgresError):
            await asyncpg.connect(**arguments | {"server_settings": {"options": f"endpoint={EndpointId.new()}"}})
        connection = await asyncpg.connect(**arguments, timeout=60)
        try:
            return await scrape(Attached(cluster.layout, cluster.ports, None))
        finally:
            await connection.close()


if __name__ == "__main__":
    written = page(asyncio.run(_of_a_new_cluster()))
    Path(sys.argv[1]).write_text(written, encoding="utf-8")
