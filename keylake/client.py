"""Everything that people do with Keylake, as one Python client: key configurations, workspaces, projects, endpoints,
audit.

The client speaks to the keymanager and the compute manager; the local cluster and the containers offer the same APIs,
so the CLI, the demo and the tests use this class for both.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter

from keylake.encryption import Encryption, NodeKeys, join
from keymanager import providers  # noqa: F401 - so that keys of every kind can be read
from shared.api import compute as compute_api
from shared.api import keymanager as key_api
from shared.api import shredding
from shared.api.key_upkeep import KeyUpkeepStatus
from shared.api.pageserver import (
    Compact,
    FindLsn,
    Garbage,
    InspectObject,
    LeaseLsn,
    LsnByTimestamp,
    LsnLease,
    ObjectContent,
    PageserverStatus,
    RetentionWindow,
    ScrubReport,
    Strays,
    TimelineInfo,
)
from shared.api.safekeeper import InspectWal, SafekeeperStatus, WalContent, WalScrubReport
from shared.auth import BearerToken, PersonRole, Service, TokenIssuer
from shared.cmk import CmkKey
from shared.config import Address
from shared.errors import KeylakeError, NotFoundError, PermissionDeniedError, ShreddedError, UnavailableError
from shared.http import ServiceClient
from shared.ids import EndpointId, KeyConfigurationId, ProjectId, TimelineId, TokenId, WorkspaceId
from shared.lsn import Lsn
from shared.point_in_time import PointInTime
from shared.roles import OWNER_SCOPES
from shared.tls import client_context

START_TIMEOUT_S: Final = 120.0
_REWRAP_TIMEOUT_S: Final = 300.0
_SCRUB_TIMEOUT_S: Final = 3600.0
_INSPECT_TIMEOUT_S: Final = 120.0
_REPLACE_TIMEOUT_S: Final = 3600.0
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a Keylake listens."""

    keymanager: Address | tuple[Address, ...]
    """Several: replicas, of which one leads."""
    manager: Address
    pageserver: Address
    safekeepers: tuple[Address, ...]
    proxy: Address


@dataclass(frozen=True, slots=True)
class Connection:
    """How a Postgres client reaches an endpoint through the proxy."""

    endpoint_id: EndpointId
    host: str
    port: int
    user: str
    password: str
    database: str
    ca_certificate: Path

    @property
    def dsn(self) -> str:
        """For libpq and everything built on it. The proxy's certificate is verified against the cluster's own CA."""
        options = quote(f"endpoint={self.endpoint_id}", safe="")
        return (
            f"postgresql://{self.user}:{quote(self.password, safe='')}@{self.host}:{self.port}/{self.database}"
            f"?sslmode=verify-full&sslrootcert={quote(str(self.ca_certificate), safe='/')}&options={options}"
        )

    def asyncpg_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `asyncpg.connect`."""
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "database": self.database,
            "ssl": self.ssl_context(),
            "server_settings": {"options": f"endpoint={self.endpoint_id}"},
        }

    def ssl_context(self) -> ssl.SSLContext:
        return client_context(self.ca_certificate)

    def __repr__(self) -> str:
        return f"Connection({self.endpoint_id}, {self.user}@{self.host}:{self.port}/{self.database})"


class KeylakeClient:
    """Async context manager. Every method raises the service's own error (`shared.errors`)."""

    def __init__(self, addresses: Addresses, ca_certificate: Path, credentials: TokenIssuer | BearerToken) -> None:
        """As the owner, with the installation's signing key, or as a person, with the token that they were given."""
        self.addresses = addresses
        self.ca_certificate = ca_certificate
        self._issuer = credentials if isinstance(credentials, TokenIssuer) else None
        scopes = frozenset() if self._issuer is None else OWNER_SCOPES & self._issuer.scopes

        def client(service: Service, address: Address | tuple[Address, ...]) -> ServiceClient:
            return ServiceClient(service, address, ca_certificate, credentials, scopes)

        self._keymanager = client(Service.KEYMANAGER, addresses.keymanager)
        self._manager = client(Service.COMPUTE, addresses.manager)
        self._pageserver = client(Service.PAGESERVER, addresses.pageserver)
        self._safekeepers = [client(Service.SAFEKEEPER, address) for address in addresses.safekeepers]

    async def __aenter__(self) -> KeylakeClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        for client in (self._keymanager, self._manager, self._pageserver, *self._safekeepers):
            await client.aclose()

    # --- keys ---

    async def create_key_configuration(self, request: key_api.CreateKeyConfiguration) -> key_api.KeyConfiguration:
        return await self._keymanager.call(
            key_api.KeyConfiguration, "POST", "/v1/key-configurations", body=request, timeout_s=30
        )

    async def key_configurations(self) -> list[key_api.KeyConfiguration]:
        return await self._list(self._keymanager, key_api.KeyConfiguration, "/v1/key-configurations")

    async def key_configuration(self, key_configuration_id: KeyConfigurationId) -> key_api.KeyConfiguration:
        path = f"/v1/key-configurations/{key_configuration_id}"
        return await self._keymanager.call(key_api.KeyConfiguration, "GET", path)

    async def change_key_configuration(
        self, key_configuration_id: KeyConfigurationId, request: key_api.ChangeKeyConfiguration
    ) -> key_api.KeyConfiguration:
        """Name, outage grace, probe interval: in effect at once."""
        path = f"/v1/key-configurations/{key_configuration_id}"
        return await self._keymanager.call(key_api.KeyConfiguration, "PATCH", path, body=request)

    async def delete_key_configuration(self, key_configuration_id: KeyConfigurationId) -> None:
        await self._keymanager.request("DELETE", f"/v1/key-configurations/{key_configuration_id}")

    async def create_workspace(self, name: str, key_configuration_id: KeyConfigurationId) -> key_api.Workspace:
        body = key_api.CreateWorkspace(name=name, key_configuration_id=key_configuration_id)
        return await self._keymanager.call(key_api.Workspace, "POST", "/v1/workspaces", body=body)

    async def change_workspace(self, workspace_id: WorkspaceId, request: key_api.ChangeWorkspace) -> key_api.Workspace:
        """Its name, and the key of projects that are made from now on. `move_project` takes those that are there."""
        path = f"/v1/workspaces/{workspace_id}"
        return await self._keymanager.call(key_api.Workspace, "PATCH", path, body=request)

    async def delete_workspace(self, workspace_id: WorkspaceId) -> None:
        """Raises ConflictError while a project is in it."""
        await self._keymanager.request("DELETE", f"/v1/workspaces/{workspace_id}")

    async def workspaces(self) -> list[key_api.Workspace]:
        return await self._list(self._keymanager, key_api.Workspace, "/v1/workspaces")

    async def create_project(
        self, workspace_id: WorkspaceId, name: str, key_configuration_id: KeyConfigurationId | None = None
    ) -> key_api.Project:
        """The project and its first KEK, under its workspace's key or one of its own; its storage is made by
        `create_timeline`."""
        path = f"/v1/workspaces/{workspace_id}/projects"
        body = key_api.CreateProject(name=name, key_configuration_id=key_configuration_id)
        return await self._keymanager.call(key_api.Project, "POST", path, body=body, timeout_s=30)

    async def projects(self) -> list[key_api.Project]:
        return await self._list(self._keymanager, key_api.Project, "/v1/projects")

    async def project(self, project_id: ProjectId) -> key_api.Project:
        return await self._keymanager.call(key_api.Project, "GET", f"/v1/projects/{project_id}")

    async def revalidate(self, project_id: ProjectId) -> key_api.Project:
        """Ask the customer's KMS now, instead of at the next probe."""
        return await self._keymanager.call(
            key_api.Project, "POST", f"/v1/projects/{project_id}:revalidate", timeout_s=30
        )

    async def revalidate_workspace(self, workspace_id: WorkspaceId) -> list[key_api.Project]:
        """As `revalidate`, for all that a workspace has."""
        path = f"/v1/workspaces/{workspace_id}:revalidate"
        response = await self._keymanager.request("POST", path, timeout_s=30)
        return TypeAdapter(list[key_api.Project]).validate_json(response.content)

    async def move_project(self, project_id: ProjectId, key_configuration_id: KeyConfigurationId) -> key_api.Project:
        """All of a project's KEKs under another CMK. Takes two KMS calls for each version."""
        body = key_api.MoveProject(key_configuration_id=key_configuration_id)
        path = f"/v1/projects/{project_id}:move-key"
        return await self._keymanager.call(key_api.Project, "POST", path, body=body, timeout_s=_REWRAP_TIMEOUT_S)

    async def rotate_kek(
        self, project_id: ProjectId, from_version: int | None = None, *, dry_run: bool = False
    ) -> key_api.Project:
        """A new KEK version for all DEKs from now on. With the version that it is to follow it is safe to ask again:
        when there is a newer one already, nothing is changed. `dry_run`: the KMS makes a KEK, which is thrown away."""
        params = {"dry_run": dry_run} | ({} if from_version is None else {"from_version": from_version})
        path = f"/v1/projects/{project_id}/keks:rotate"
        return await self._keymanager.call(key_api.Project, "POST", path, params=params, timeout_s=30)

    async def encryption(self, project_id: ProjectId) -> Encryption:
        """The project's keys, and what every storage node keeps under them, by a look that begins now.

        A node that does not answer is in it, with the reason. Raises what the keymanager raises.
        """
        keys = await self.key_status(project_id)
        return join(keys, await self._of_nodes(project_id, "GET", ""))

    async def key_status(self, project_id: ProjectId) -> key_api.KeyStatus:
        """KEK versions, who holds what under them, as the keymanager knows it."""
        return await self._keymanager.call(key_api.KeyStatus, "GET", f"/v1/projects/{project_id}/keks")

    async def start_key_upkeep(self, project_id: ProjectId) -> None:
        """Have every storage node look at its keys now; by itself it does so a little later."""
        await self._of_nodes(project_id, "POST", ":upkeep")

    async def rekey(self, project_id: ProjectId) -> key_api.KeyStatus:
        """Have all data sealed anew under new DEKs. Goes on by itself; `encryption` says how far it is."""
        return await self._keymanager.call(key_api.KeyStatus, "POST", f"/v1/projects/{project_id}:rekey", timeout_s=30)

    async def retire_keks(self, project_id: ProjectId, *, dry_run: bool = False) -> key_api.RetiredKeks:
        """Destroy KEK versions that nothing is left under. Raises ConflictError that says who keeps what."""
        path = f"/v1/projects/{project_id}/keks:retire"
        return await self._keymanager.call(key_api.RetiredKeks, "POST", path, params={"dry_run": dry_run}, timeout_s=30)

    async def _of_nodes(self, project_id: ProjectId, method: str, verb: str) -> list[NodeKeys]:
        path = f"/v1/projects/{project_id}/keys{verb}"

        async def ask(node: str, client: ServiceClient) -> NodeKeys:
            try:
                return NodeKeys(node=node, status=await client.call(KeyUpkeepStatus, method, path, timeout_s=30))
            except NotFoundError:
                return NodeKeys(node=node, status=None)
            except KeylakeError as error:
                return NodeKeys(node=node, status=None, problem=str(error) or error.code)

        names = [f"safekeeper-{number}" for number in range(1, len(self._safekeepers) + 1)]
        nodes = [("pageserver", self._pageserver), *zip(names, self._safekeepers, strict=True)]
        return await asyncio.gather(*(ask(name, client) for name, client in nodes))

    async def rewrap(self, key_configuration_id: KeyConfigurationId, *, dry_run: bool = False) -> key_api.Rewrap:
        """Wrap every KEK of a key configuration under the CMK's current version. Takes one KMS call for each; `work` of
        `key_configuration` says how far it is."""
        path = f"/v1/key-configurations/{key_configuration_id}:rewrap"
        return await self._keymanager.call(
            key_api.Rewrap, "POST", path, params={"dry_run": dry_run}, timeout_s=_REWRAP_TIMEOUT_S
        )

    async def replace_key(
        self, key_configuration_id: KeyConfigurationId, key: CmkKey, *, dry_run: bool = False
    ) -> key_api.Replacement:
        """Begin to move to another CMK, or only try it. `replacement` says how far it is."""
        return await self._keymanager.call(
            key_api.Replacement,
            "POST",
            f"/v1/key-configurations/{key_configuration_id}:replace",
            params={"dry_run": dry_run},
            body=key_api.ReplaceKey(key=key),
            timeout_s=30,
        )

    async def replacement(self, key_configuration_id: KeyConfigurationId) -> key_api.Replacement | None:
        """None when none is under way."""
        path = f"/v1/key-configurations/{key_configuration_id}/replacement"
        try:
            return await self._keymanager.call(key_api.Replacement, "GET", path)
        except NotFoundError:
            return None

    async def abort_replacement(self, key_configuration_id: KeyConfigurationId) -> None:
        await self._keymanager.request("DELETE", f"/v1/key-configurations/{key_configuration_id}/replacement")

    async def revoke(self, project_id: ProjectId, reason: str) -> key_api.Project:
        """Revoke by an operator's word, without the KMS. Lifted by `restore`."""
        body = key_api.RevokeRequest(reason=reason)
        return await self._keymanager.call(
            key_api.Project, "POST", f"/v1/projects/{project_id}:revoke", body=body, timeout_s=30
        )

    async def restore(self, project_id: ProjectId) -> key_api.Project:
        return await self._keymanager.call(key_api.Project, "POST", f"/v1/projects/{project_id}:restore", timeout_s=30)

    # --- the end of a project: two people, each with a client of their own ---

    async def ask_shred(self, project_id: ProjectId, project_name: str, reason: str) -> shredding.Shred:
        """Ask for the end of a project, for good. Nothing happens until another person approves."""
        body = shredding.AskShred(project_name=project_name, reason=reason)
        return await self._keymanager.call(shredding.Shred, "POST", f"/v1/projects/{project_id}/shred", body=body)

    async def approve_shred(self, project_id: ProjectId, project_name: str, shred_id: str) -> shredding.Shred:
        """Its KEKs are destroyed when this returns; nothing brings it back. `shred` says how far the rest is."""
        body = shredding.ApproveShred(project_name=project_name, shred_id=shred_id)
        path = f"/v1/projects/{project_id}/shred:approve"
        return await self._keymanager.call(shredding.Shred, "POST", path, body=body, timeout_s=120)

    async def cancel_shred(self, project_id: ProjectId) -> shredding.Shred:
        return await self._keymanager.call(shredding.Shred, "DELETE", f"/v1/projects/{project_id}/shred")

    async def shred(self, project_id: ProjectId) -> shredding.Shred:
        """The newest request, how far it is, and exactly what is left."""
        return await self._keymanager.call(shredding.Shred, "GET", f"/v1/projects/{project_id}/shred")

    async def verify_erasure(
        self, project_id: ProjectId, attestations: Sequence[shredding.Attestation] = ()
    ) -> shredding.ErasureReport:
        """Check every precondition of the word ERASED now, and use it if they all hold."""
        body = shredding.VerifyErasure(attestations=list(attestations))
        path = f"/v1/projects/{project_id}:verify-erasure"
        return await self._keymanager.call(shredding.ErasureReport, "POST", path, body=body, timeout_s=120)

    async def revocations(self, project_id: ProjectId) -> list[key_api.Revocation]:
        params = {"project_id": str(project_id)}
        return await self._list(self._keymanager, key_api.Revocation, "/v1/revocations", params)

    async def receipt(
        self,
        project_id: ProjectId,
        revocation_id: str | None = None,
        *,
        restoration_id: str | None = None,
        kind: str = "revocation",
    ) -> bytes:
        """Of a revocation that is over, or of another `kind`: a "restore", the "shred", the "erasure". Of revocations
        and restores the newest, unless one is named. See `shared.receipt`."""
        ids = {"revocation_id": revocation_id, "restoration_id": restoration_id}
        params = {"kind": kind} | {name: value for name, value in ids.items() if value is not None}
        path = f"/v1/projects/{project_id}/receipt"
        return (await self._keymanager.request("GET", path, params=params, timeout_s=60)).content

    async def audit(self, after: int = 0, limit: int = 1000, *, complete: bool = False) -> list[key_api.AuditRecord]:
        """Records after sequence number `after`, oldest first. KMS calls are recorded in groups: `complete` has those
        recorded first that were made until now."""
        params = {"after": after, "limit": limit, "complete": complete}
        return await self._list(self._keymanager, key_api.AuditRecord, "/v1/audit", params)

    async def verify_audit(self) -> key_api.AuditVerification:
        return await self._keymanager.call(key_api.AuditVerification, "GET", "/v1/audit:verify", timeout_s=60)

    # --- tokens for people ---

    async def create_token(
        self,
        role: PersonRole,
        *,
        subject: str,
        ttl_s: int,
        workspace_id: WorkspaceId | None = None,
        project_id: ProjectId | None = None,
    ) -> tuple[str, key_api.IssuedToken]:
        """A token for a person: a secret, given out once. In force everywhere when this returns.

        Raises PermissionDeniedError unless this client has the signing key of the owner.
        """
        if self._issuer is None:
            raise PermissionDeniedError("only the owner of the installation, who has its signing key, issues tokens")
        token = self._issuer.issue_for_person(
            role, subject=subject, ttl_s=ttl_s, workspace_id=workspace_id, project_id=project_id
        )
        return token, await self.register_token(token)

    async def register_token(self, token: str) -> key_api.IssuedToken:
        """Put a token that the owner's key has signed in force."""
        body = key_api.RegisterToken(token=token)
        return await self._keymanager.call(key_api.IssuedToken, "POST", "/v1/tokens", body=body)

    async def tokens(self) -> list[key_api.IssuedToken]:
        """Those that were issued, newest first; the last thousand."""
        return await self._list(self._keymanager, key_api.IssuedToken, "/v1/tokens")

    async def revoke_token(self, token_id: TokenId) -> key_api.IssuedToken:
        return await self._keymanager.call(key_api.IssuedToken, "POST", f"/v1/tokens/{token_id}:revoke")

    # --- compute ---

    async def create_timeline(self, project_id: ProjectId, name: str = "main") -> compute_api.Timeline:
        """Storage of a project: an initdb on the pageserver, an empty log on the safekeepers."""
        return await self._manager.call(
            compute_api.Timeline,
            "POST",
            f"/v1/projects/{project_id}/timelines",
            body=compute_api.CreateTimeline(name=name),
            timeout_s=START_TIMEOUT_S,
        )

    async def create_branch(
        self,
        timeline: compute_api.Timeline,
        name: str,
        at: PointInTime | None = None,
        *,
        project_id: ProjectId | None = None,
    ) -> compute_api.Timeline:
        """A branch of `timeline` as it was at an LSN or a time, or as it is now. Copies no data.

        In another project, `project_id`, it keeps what is its own under the keys of that one, and needs both to be
        read: so it can have a CMK of its own (docs/adr/0017-keys-of-branches.md).
        """
        source = compute_api.BranchFrom(timeline_id=timeline.timeline_id, project_id=timeline.project_id, at=at)
        body = compute_api.CreateTimeline(name=name, branch_from=source)
        path = f"/v1/projects/{project_id or timeline.project_id}/timelines"
        return await self._manager.call(compute_api.Timeline, "POST", path, body=body, timeout_s=START_TIMEOUT_S)

    async def delete_branch(self, branch: compute_api.Timeline) -> None:
        """With its endpoints. Raises ConflictError while other branches were made from it."""
        path = _timeline_path(branch.project_id, branch.timeline_id)
        await self._manager.request("DELETE", path, timeout_s=START_TIMEOUT_S)

    async def timelines(self, project_id: ProjectId) -> list[compute_api.Timeline]:
        return await self._list(self._manager, compute_api.Timeline, f"/v1/projects/{project_id}/timelines")

    async def create_endpoint(
        self,
        timeline: compute_api.Timeline,
        name: str = "main",
        *,
        read_only_at: PointInTime | None = None,
        follows: bool = False,
        suspend_after_s: float | None = None,
        size: compute_api.EndpointSize | None = None,
    ) -> compute_api.CreatedEndpoint:
        """With `read_only_at`, one that shows the timeline as it was then and refuses writes; one that `follows` is a
        read replica, with the password of the endpoint that writes. `suspend_after_s`: its compute is stopped when
        nobody has used it for as long; 0: never. `size`: of its computes. None: as the installation is set."""
        return await self._manager.call(
            compute_api.CreatedEndpoint,
            "POST",
            f"/v1/projects/{timeline.project_id}/endpoints",
            body=compute_api.CreateEndpoint(
                timeline_id=timeline.timeline_id,
                name=name,
                read_only_at=read_only_at,
                follows=follows,
                suspend_after_s=suspend_after_s,
                size=size,
            ),
            timeout_s=START_TIMEOUT_S,
        )

    async def change_endpoint(
        self, endpoint_id: EndpointId, request: compute_api.ChangeEndpoint
    ) -> compute_api.Endpoint:
        """What the request names: a size for the next start, all else at once."""
        return await self._manager.call(compute_api.Endpoint, "PATCH", f"/v1/endpoints/{endpoint_id}", body=request)

    async def endpoints(self) -> list[compute_api.Endpoint]:
        return await self._list(self._manager, compute_api.Endpoint, "/v1/endpoints")

    async def endpoint(self, endpoint_id: EndpointId) -> compute_api.Endpoint:
        return await self._manager.call(compute_api.Endpoint, "GET", f"/v1/endpoints/{endpoint_id}")

    async def start_endpoint(self, endpoint_id: EndpointId) -> compute_api.Endpoint:
        return await self._endpoint_action(endpoint_id, "start")

    async def stop_endpoint(self, endpoint_id: EndpointId) -> compute_api.Endpoint:
        return await self._endpoint_action(endpoint_id, "stop")

    async def kill_endpoint(self, endpoint_id: EndpointId) -> compute_api.Endpoint:
        """SIGKILL its compute, as a crash would."""
        return await self._endpoint_action(endpoint_id, "kill")

    async def delete_endpoint(self, endpoint_id: EndpointId) -> None:
        """For good, its compute with it. What was written stays in its branch."""
        await self._manager.request("DELETE", f"/v1/endpoints/{endpoint_id}", timeout_s=START_TIMEOUT_S)

    async def _endpoint_action(self, endpoint_id: EndpointId, action: str) -> compute_api.Endpoint:
        path = f"/v1/endpoints/{endpoint_id}:{action}"
        return await self._manager.call(compute_api.Endpoint, "POST", path, timeout_s=START_TIMEOUT_S)

    async def replace_safekeeper(self, node_id: str) -> list[compute_api.ReplacedTimeline]:
        """The empty disk that this safekeeper has now takes the place of a lost one. Takes as long as copying the WAL
        of all its timelines; goes on with what is left when it is asked for again."""
        body = compute_api.ReplaceSafekeeper(node_id=node_id)
        response = await self._manager.request(
            "POST", "/v1/safekeepers:replace", body=body, timeout_s=_REPLACE_TIMEOUT_S
        )
        found = TypeAdapter(list[compute_api.ReplacedTimeline])
        return found.validate_json(response.content)

    def connection(self, endpoint: compute_api.CreatedEndpoint) -> Connection:
        """How to reach a new endpoint; its password is known only now."""
        proxy = self.addresses.proxy
        return Connection(
            endpoint.endpoint_id,
            proxy.host,
            proxy.port,
            endpoint.user,
            endpoint.password,
            endpoint.database,
            self.ca_certificate,
        )

    # --- status ---

    async def pageserver_status(self) -> PageserverStatus:
        return await self._pageserver.call(PageserverStatus, "GET", "/v1/status")

    async def timeline_info(self, timeline: compute_api.Timeline) -> TimelineInfo:
        """What the pageserver has of it."""
        path = _timeline_path(timeline.project_id, timeline.timeline_id)
        return await self._pageserver.call(TimelineInfo, "GET", path)

    async def checkpoint(self, timeline: compute_api.Timeline) -> TimelineInfo:
        """Seal and upload everything that was ingested."""
        return await self._of_timeline(TimelineInfo, timeline, "checkpoint")

    async def compact(self, timeline: compute_api.Timeline, *, force: bool = False) -> TimelineInfo:
        """Merge layers and make images: what is due, with `force` all that a read would gain from."""
        return await self._of_timeline(TimelineInfo, timeline, "compact", Compact(force=force))

    async def collect_garbage(self, timeline: compute_api.Timeline) -> Garbage:
        """Remove what nobody can read any more."""
        return await self._of_timeline(Garbage, timeline, "gc")

    async def set_retention(self, timeline: compute_api.Timeline, window: RetentionWindow) -> TimelineInfo:
        """How much history is kept from now on."""
        return await self._of_timeline(TimelineInfo, timeline, "retention", window)

    async def lsn_by_timestamp(self, timeline: compute_api.Timeline, timestamp: datetime) -> LsnByTimestamp:
        """Where it stood at a time, which has a zone."""
        return await self._of_timeline(LsnByTimestamp, timeline, "lsn-by-timestamp", FindLsn(timestamp=timestamp))

    async def lease_lsn(self, timeline: compute_api.Timeline, read_lsn: Lsn, ttl_s: float) -> LsnLease:
        """Keep one version readable for `ttl_s`, however far the retention window moves on."""
        return await self._of_timeline(LsnLease, timeline, "lease-lsn", LeaseLsn(read_lsn=read_lsn, ttl_s=ttl_s))

    async def scrub(self, timeline: TimelineInfo) -> ScrubReport:
        """The object store against a timeline's index, by the pageserver. Takes as long as reading all of it."""
        return await self._of_timeline(ScrubReport, timeline, "scrub")

    async def _of_timeline(
        self,
        model: type[Model],
        timeline: compute_api.Timeline | TimelineInfo,
        action: str,
        body: BaseModel | None = None,
    ) -> Model:
        """Takes as long as reading or writing all of it may take."""
        path = _timeline_path(timeline.project_id, timeline.timeline_id, action)
        return await self._pageserver.call(model, "POST", path, body=body, timeout_s=_SCRUB_TIMEOUT_S)

    async def scrub_project(self, project_id: ProjectId) -> Strays | None:
        """What the object store holds of timelines that the pageserver does not know. None when it holds nothing, as of
        a project that is shredded."""
        path = f"/v1/projects/{project_id}:scrub"
        try:
            return await self._pageserver.call(Strays, "POST", path, timeout_s=_SCRUB_TIMEOUT_S)
        except (NotFoundError, ShreddedError):
            return None

    async def scrub_wal(self, timeline: TimelineInfo) -> WalScrubReport | None:
        """A timeline's offloaded WAL against the log of the first safekeeper that can say it. None when none has one.

        Raises UnavailableError when some have, or may have, and none answers.
        """
        path = _timeline_path(timeline.project_id, timeline.timeline_id, "scrub")
        try:
            return await self._of_some_safekeeper(WalScrubReport, path, None, _SCRUB_TIMEOUT_S)
        except NotFoundError:
            return None

    async def inspect_object(
        self, project_id: ProjectId, timeline_id: TimelineId, name: str, sha256: str
    ) -> ObjectContent:
        """What is in a sealed layer or index, by the pageserver. `sha256`: of the sealed object."""
        path = _timeline_path(project_id, timeline_id, "inspect")
        body = InspectObject(object_name=name, sha256=sha256)
        return await self._pageserver.call(ObjectContent, "POST", path, body=body, timeout_s=_INSPECT_TIMEOUT_S)

    async def inspect_wal(self, project_id: ProjectId, timeline_id: TimelineId, piece: InspectWal) -> WalContent:
        """Which records a sealed piece has, by the first safekeeper that can say it."""
        path = _timeline_path(project_id, timeline_id, "inspect")
        return await self._of_some_safekeeper(WalContent, path, piece, _INSPECT_TIMEOUT_S)

    async def _of_some_safekeeper(
        self, model: type[Model], path: str, body: BaseModel | None, timeout_s: float
    ) -> Model:
        """By the first that can say it. Raises UnavailableError when one does not answer and none can say it,
        NotFoundError when none has it."""
        silent: UnavailableError | None = None
        absent: NotFoundError | None = None
        for client in self._safekeepers:
            try:
                return await client.call(model, "POST", path, body=body, timeout_s=timeout_s)
            except NotFoundError as error:
                absent = error
            except UnavailableError as error:
                silent = error
        raise silent or absent or UnavailableError("there are no safekeepers")

    async def safekeeper_status(self, index: int) -> SafekeeperStatus:
        return await self._safekeepers[index].call(SafekeeperStatus, "GET", "/v1/status")

    async def keymanager_status(self) -> key_api.KeymanagerStatus:
        return await self._keymanager.call(key_api.KeymanagerStatus, "GET", "/v1/status")

    async def _list(
        self, client: ServiceClient, model: type[Model], path: str, params: dict[str, Any] | None = None
    ) -> list[Model]:
        response = await client.request("GET", path, params=params)
        return [model.model_validate(item) for item in TypeAdapter(list[object]).validate_json(response.content)]


def _timeline_path(project_id: ProjectId, timeline_id: TimelineId, action: str = "") -> str:
    """The compute manager's, the pageserver's and the safekeepers' alike."""
    path = f"/v1/projects/{project_id}/timelines/{timeline_id}"
    return f"{path}:{action}" if action else path
