"""Every key of a cluster in plain text, got as nobody but the customer could: the KMS opens the KEKs, they the DEKs.

So a test can look for the very bytes that must be nowhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from keylake.cluster import Cluster
from keylake.layout import METADATA_SUPERUSER
from keylake.metadata import METADATA_DATABASE
from keymanager.cmk import kek_context
from keymanager.kms.aws import AwsKms, AwsKmsConfig
from pageserver.layer.name import LayerKind
from pageserver.remote_timeline import INDEX_KIND
from safekeeper.remote_wal import RemotePiece
from safekeeper.wal_segment import OBJECT_KIND, PieceId
from shared.crypto.aead import AeadKey
from shared.crypto.context import KeyScope
from shared.crypto.envelope import Envelope, unwrap_dek
from shared.ids import AccountId, KekId, ProjectId, TimelineId, WorkspaceId
from tests.cluster_secrecy.disks import runtime_dir

_KEKS = """
select p.project_id, w.workspace_id, w.account_id, c.key, k.kek_id, k.kek_version, k.wrapped
from kek k join project p using (project_id) join workspace w using (workspace_id)
join key_configuration c on c.key_configuration_id = coalesce(p.key_configuration_id, w.key_configuration_id)
where k.wrapped is not null
"""


@asynccontextmanager
async def metadata(cluster: Cluster) -> Any:
    """The metadata database, as its superuser, in the keymanager's schema."""
    connection = await asyncpg.connect(
        host=str(runtime_dir(cluster) / "m"),
        user=METADATA_SUPERUSER,
        password=cluster.layout.secret(f"metadata-{METADATA_SUPERUSER}.password"),
        database=METADATA_DATABASE,
        server_settings={"search_path": "keymanager"},
    )
    try:
        yield connection
    finally:
        await connection.close()


@dataclass(frozen=True, slots=True)
class _Kek:
    scope: KeyScope
    kek_id: KekId
    kek_version: int
    cipher: AeadKey


async def plaintext_keys(cluster: Cluster, of: ProjectId | None = None) -> dict[str, bytes]:
    """Name → 32 bytes: all versions of all KEKs, and the DEKs of all envelopes that lie on disk or in the object store.
    `of`: of one project."""
    keks = {kek.kek_id: kek async for kek in _keks(cluster) if of in (None, kek.scope.project_id)}
    found = {
        f"KEK of {kek.scope.project_id} version {kek.kek_version}": bytes(kek.cipher.key.reveal())
        for kek in keks.values()
    }
    for path, project_id, timeline_id, name, kind in _envelopes(cluster):
        if of not in (None, project_id):
            continue
        envelope = Envelope.parse(path.read_bytes())
        kek = keks[envelope.kek_id]
        assert kek.scope.project_id == project_id
        dek = unwrap_dek(kek.cipher, envelope, kek.scope.object_context(timeline_id, name, kind))
        found[f"DEK of {name}"] = bytes(dek.reveal())
    return found


async def _keks(cluster: Cluster) -> Any:
    settings = json.loads((cluster.layout.config / "keymanager.json").read_text())["aws"]
    async with metadata(cluster) as connection:
        rows = await connection.fetch(_KEKS)
    for row in rows:
        key = json.loads(row["key"])
        config = AwsKmsConfig(
            key_id=key["key_arn"],
            region=key["key_arn"].split(":")[3],
            role_arn=key["role_arn"],
            external_id=key["external_id"],
            access_key_id=settings["access_key_id"],
            secret_access_key=settings["secret_access_key"],
            kms_endpoint_url=settings["kms_endpoint_url"],
            sts_endpoint_url=settings["sts_endpoint_url"],
            ca_bundle=Path(settings["ca_bundle"]),
        )
        scope = KeyScope(
            AccountId.parse(row["account_id"]),
            WorkspaceId.parse(row["workspace_id"]),
            ProjectId.parse(row["project_id"]),
        )
        kek_id = KekId.parse(row["kek_id"])
        kms = AwsKms(config)
        try:
            plaintext = await kms.unwrap(row["wrapped"], kek_context(scope, kek_id, row["kek_version"]))
        finally:
            await kms.aclose()
        yield _Kek(scope, kek_id, row["kek_version"], AeadKey(plaintext))


def _envelopes(cluster: Cluster) -> Iterator[tuple[Path, ProjectId, TimelineId, str, str]]:
    """(file, project, timeline, object name, kind) of every envelope."""
    for node in sorted(cluster.layout.data.glob("safekeeper-*")):
        for path in sorted(node.glob("timelines/*/*/*.key")):
            piece = PieceId.parse(path.stem)
            assert piece is not None
            project_id, timeline_id = ProjectId.parse(path.parts[-3]), TimelineId.parse(path.parts[-2])
            yield path, project_id, timeline_id, piece.object_name(node.name), OBJECT_KIND
    for path in sorted(cluster.layout.objects.rglob("*.key")):
        if path.relative_to(cluster.layout.objects).parts[0] == "wal@":
            project, timeline = (part.removesuffix("@") for part in path.parts[-3:-1])
            offloaded = RemotePiece.parse(path.stem)
            assert offloaded is not None
            name = offloaded.piece.object_name(offloaded.node_id)
            yield path, ProjectId.parse(project), TimelineId.parse(timeline), name, OBJECT_KIND
            continue
        _, project, _, timeline, folder, name = (part.removesuffix("@") for part in path.parts[-6:])
        key = f"projects/{project}/timelines/{timeline}/{folder}/{name.removesuffix('.key')}"
        kind = INDEX_KIND if folder == "index" else LayerKind(name.partition("-")[0]).object_kind
        yield path, ProjectId.parse(project), TimelineId.parse(timeline), key, kind


def credentials(cluster: Cluster) -> dict[str, bytes]:
    """Name → everything else that opens something: passwords, private keys, access keys, tokens."""
    layout = cluster.layout
    found = {path.name: path.read_bytes().strip() for path in layout.keys.glob("*.password")}
    for path in sorted(layout.keys.glob("*.json")):
        if "private_key_pem" in (stored := json.loads(path.read_text())):
            found[path.name] = _body(stored["private_key_pem"])
    for path in sorted(layout.pki.glob("*.key")):
        found[path.name] = _body(path.read_text())
    bootstrap = cluster.customer.bootstrap
    found["vendor's secret access key"] = bootstrap.vendor.secret_access_key.encode()
    found["customer's secret access key"] = bootstrap.customer.secret_access_key.encode()
    found["cloud's admin token"] = layout.customer_admin_token.read_bytes().strip()
    return found


def _body(pem: str) -> bytes:
    """The key's own bytes at the end of a PKCS #8 file; the structure in front is the same for all keys."""
    return base64.b64decode("".join(line for line in pem.splitlines() if "-----" not in line))[-32:]
