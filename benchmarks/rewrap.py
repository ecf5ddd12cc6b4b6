"""100,000 DEKs wrapped again under a new KEK, over a real key session, against bare AES-GCM of the same envelopes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.harness import Row
from keylake.cluster import Cluster
from shared.api.keymanager import ObjectName, Role
from shared.auth import Service, TokenIssuer
from shared.config import Identity
from shared.crypto.context import KeyScope
from shared.crypto.envelope import Envelope
from shared.crypto.secret import random_bytes
from shared.errors import KeylakeError
from shared.ids import ProjectId, TimelineId
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.lease import KeyLoss

ENVELOPES = 100_000
_BATCH = 4096


async def _nothing(loss: KeyLoss) -> dict[str, float]:
    return {}


def _peak_mb(pid: int) -> float:
    """Of a process's resident memory since its start."""
    found = re.search(r"VmHWM:\s+([0-9]+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found is not None else 0.0


def _bare(scope: KeyScope, names: Sequence[ObjectName]) -> float:
    """Seconds to open and to seal 32 bytes for each of these objects, with their contexts as AAD and nothing else."""
    aads = [scope.object_context(name.timeline_id, name.object_name, name.kind).to_aad() for name in names]
    old, new, nonce = AESGCM(random_bytes(32)), AESGCM(random_bytes(32)), random_bytes(12)
    wrapped = [old.encrypt(nonce, bytes(32), aad) for aad in aads]
    begun = perf_counter()
    for aad, sealed in zip(aads, wrapped, strict=True):
        new.encrypt(nonce, old.decrypt(nonce, sealed, aad), aad)
    return perf_counter() - begun


async def _rewrap(keys: KeyClient, project_id: ProjectId, items: Sequence[tuple[ObjectName, Envelope]]) -> float:
    begun = perf_counter()
    for start in range(0, len(items), _BATCH):
        for envelope in await keys.rewrap(project_id, items[start : start + _BATCH]):
            if (envelope.kek_version, envelope.dek_version) != (2, 1):
                raise KeylakeError("an envelope was not wrapped again")
    return perf_counter() - begun


async def measure(envelopes: int = ENVELOPES) -> list[Row]:
    async with Cluster() as cluster:
        workspace = await cluster.create_workspace()
        project_id = (await cluster.client.create_project(workspace.workspace_id, "bench")).project_id
        identity = Identity.model_validate(cluster.layout.identity(Service.PAGESERVER, "pageserver"))
        async with KeyClient(
            cluster.ports.addresses().keymanager,
            cluster.layout.ca_certificate,
            session_tokens(TokenIssuer.load(identity.signing_key)),
            role=Role.PAGESERVER,
            node_id="bench",
        ) as keys:
            lease = await keys.acquire(project_id, _nothing)
            timeline_id = TimelineId.new()
            prefix = f"projects/{project_id}/timelines/{timeline_id}/layers/"
            names = [
                ObjectName(timeline_id=timeline_id, object_name=f"{prefix}{n:016x}", kind="delta-layer/1")
                for n in range(envelopes)
            ]
            items: list[tuple[ObjectName, Envelope]] = []
            for start in range(0, envelopes, _BATCH):
                batch = names[start : start + _BATCH]
                made = await keys.generate(project_id, batch)
                items += [(name, envelope) for name, (_, envelope) in zip(batch, made, strict=True)]
                del made
            await cluster.client.rotate_kek(project_id)
            pid = cluster.service("keymanager").pid
            before_mb = _peak_mb(pid)
            took_s = await _rewrap(keys, project_id, items)
            after_mb = _peak_mb(pid)
            bare_s = _bare(lease.scope, names)
    return [
        Row(
            f"{envelopes:,} DEK envelopes wrapped again, over TLS, counted and audited",
            f"{envelopes / took_s:,.0f}/s; keymanager's peak memory {after_mb:.0f} MB (+{after_mb - before_mb:.0f})",
            f"{envelopes / bare_s:,.0f}/s bare AES-GCM open and seal",
            bare_s / took_s,
            "report",
            None,
        )
    ]
