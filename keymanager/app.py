"""Routes of the keymanager: HTTP and WebSocket to use cases and back, nothing else.

Every route names the scopes that may call it. A call with a good token that lacks them is recorded in the audit chain.
"""

from typing import Annotated, Final

from fastapi import Depends, FastAPI, Path, Query, Request, Response, WebSocket
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry

from keymanager import kms_events
from keymanager.manager import KeyManager
from keymanager.receipts import ReceiptKind
from keymanager.session import SESSION_SCOPE, serve_session
from shared.api.keymanager import (
    AuditRecord,
    AuditVerification,
    ChangeKeyConfiguration,
    ChangeWorkspace,
    CreateKeyConfiguration,
    CreateProject,
    CreateWorkspace,
    IssuedToken,
    KeyConfiguration,
    KeymanagerStatus,
    KeyStatus,
    KmsEventsTaken,
    MoveProject,
    Project,
    RegisterToken,
    ReplaceKey,
    Replacement,
    RetiredKeks,
    Revocation,
    RevokeRequest,
    Rewrap,
    Workspace,
)
from shared.api.shredding import ApproveShred, AskShred, ErasureReport, Shred, VerifyErasure
from shared.audit_chain import AuditEntry
from shared.auth import Principal, Scope, Service, TokenVerifier
from shared.authorize import Authorizer, Place, Reach, authenticate
from shared.errors import (
    InvalidInputError,
    KeylakeError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from shared.ids import KeyConfigurationId, ProjectId, TokenId, WorkspaceId
from shared.service import Readiness, create_service_app, error_response

_ID_CHARACTERS: Final = r"^[a-z]+-[0-9a-f]{16}$"
_RawId = Annotated[str, Path(pattern=_ID_CHARACTERS)]


def _workspace_id(workspace_id: _RawId) -> WorkspaceId:
    try:
        return WorkspaceId.parse(workspace_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


def _key_configuration_id(key_configuration_id: _RawId) -> KeyConfigurationId:
    try:
        return KeyConfigurationId.parse(key_configuration_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


def _project_id(project_id: _RawId) -> ProjectId:
    try:
        return ProjectId.parse(project_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


def _token_id(token_id: _RawId) -> TokenId:
    try:
        return TokenId.parse(token_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


_Token = Annotated[TokenId, Depends(_token_id)]
_Workspace = Annotated[WorkspaceId, Depends(_workspace_id)]
_Configuration = Annotated[KeyConfigurationId, Depends(_key_configuration_id)]
_Project = Annotated[ProjectId, Depends(_project_id)]


def create_app(
    manager: KeyManager, verifier: TokenVerifier, registry: CollectorRegistry, readiness: Readiness
) -> FastAPI:
    """The API of a running keymanager."""

    async def record_refusal(request: Request, principal: Principal, needed: Scope) -> None:
        details = {"method": request.method, "route": request.scope["route"].path, "needs": needed.value}
        denied = AuditEntry(principal.actor, "admin.denied", PermissionDeniedError.code, None, details)
        await manager.audit_log.record(denied)

    app = create_service_app(Service.KEYMANAGER, registry, readiness, verifier, on_refusal=record_refusal)

    async def refused(request: Request, principal: Principal, needed: Scope) -> PermissionDeniedError:
        await record_refusal(request, principal, needed)
        return PermissionDeniedError(f"this token lacks the scope {needed}, or is for another project or workspace")

    async def may_choose_key(request: Request, principal: Principal, wanted: KeyConfigurationId) -> None:
        """Raises PermissionDeniedError. A bound token knows the keys of its place only."""
        elsewhere = principal.bound and wanted not in manager.projects.key_configurations_within(principal)
        if Scope.ACCOUNT_ADMIN not in principal.scopes or elsewhere:
            raise await refused(request, principal, Scope.ACCOUNT_ADMIN)

    async def of_key_configuration(request: Request) -> Place:
        """It is in the caller's place when something there is kept under it."""
        asking = await authenticate(request, verifier)
        used = manager.projects.key_configurations_within(asking)
        found = _key_configuration_id(request.path_params["key_configuration_id"]) in used
        return Place(asking.project_id, asking.workspace_id) if found else Place()

    async def of_token(request: Request) -> Place:
        try:
            return Place(*await manager.people.place(_token_id(request.path_params["token_id"])))
        except NotFoundError:
            return Place()

    guard = Authorizer(verifier, record_refusal)
    # Guards are dependencies of their own, declared before the body, so that a stranger learns nothing about bodies.
    account_admin = Annotated[Principal, Depends(guard(Scope.ACCOUNT_ADMIN))]
    security_admin = Annotated[Principal, Depends(guard(Scope.SECURITY_ADMIN))]
    project_creator = Annotated[Principal, Depends(guard(Scope.WORKSPACE_ADMIN, Scope.ACCOUNT_ADMIN))]
    auditor = Annotated[Principal, Depends(guard(Scope.AUDIT_READ, reach=Reach.LIST))]
    people = (Scope.WORKSPACE_ADMIN, Scope.ACCOUNT_ADMIN, Scope.SECURITY_ADMIN, Scope.AUDIT_READ, Scope.STATUS_READ)
    anybody = Depends(guard(*people, Scope.DATA_USE))
    lister = Annotated[Principal, Depends(guard(*people, Scope.DATA_USE, reach=Reach.LIST))]
    key_admins = (Scope.ACCOUNT_ADMIN, Scope.SECURITY_ADMIN, Scope.STATUS_READ)
    key_lister = Annotated[Principal, Depends(guard(*key_admins, reach=Reach.LIST))]
    key_viewer = Depends(guard(*key_admins, locate=of_key_configuration))
    revocation_lister = Annotated[Principal, Depends(guard(Scope.SECURITY_ADMIN, Scope.AUDIT_READ, reach=Reach.LIST))]
    issuer = Annotated[Principal, Depends(guard(Scope.TOKENS_ISSUE))]
    notifier = Annotated[Principal, Depends(guard(Scope.KMS_NOTIFY))]
    token_revoker = Annotated[Principal, Depends(guard(Scope.TOKENS_ISSUE, Scope.SECURITY_ADMIN, locate=of_token))]
    token_lister = Annotated[
        Principal, Depends(guard(Scope.TOKENS_ISSUE, Scope.SECURITY_ADMIN, Scope.AUDIT_READ, reach=Reach.LIST))
    ]

    @app.post("/v1/key-configurations", status_code=201)
    async def create_key_configuration(caller: account_admin, body: CreateKeyConfiguration) -> KeyConfiguration:
        """Register a CMK. It is tried at once, with every kind of call that is ever made of it."""
        return await manager.key_configurations.create(body, caller.actor)

    @app.get("/v1/key-configurations")
    async def list_key_configurations(caller: key_lister) -> list[KeyConfiguration]:
        used = manager.projects.key_configurations_within(caller)
        return [c for c in manager.key_configurations.all() if not caller.bound or c.key_configuration_id in used]

    @app.get("/v1/key-configurations/{key_configuration_id}", dependencies=[key_viewer])
    async def get_key_configuration(key_configuration_id: _Configuration) -> KeyConfiguration:
        return manager.key_configurations.show(key_configuration_id)

    @app.patch("/v1/key-configurations/{key_configuration_id}")
    async def change_key_configuration(
        caller: account_admin, key_configuration_id: _Configuration, body: ChangeKeyConfiguration
    ) -> KeyConfiguration:
        """Its name, outage grace, probe interval: in effect at once."""
        return await manager.key_configurations.change(key_configuration_id, body, caller.actor)

    @app.delete("/v1/key-configurations/{key_configuration_id}", status_code=204)
    async def delete_key_configuration(caller: account_admin, key_configuration_id: _Configuration) -> None:
        """Only while no workspace and no project is bound to it."""
        await manager.key_configurations.delete(key_configuration_id, caller.actor)

    @app.post("/v1/workspaces", status_code=201)
    async def create_workspace(caller: account_admin, body: CreateWorkspace) -> Workspace:
        return await manager.create_workspace(body, caller.actor)

    @app.get("/v1/workspaces")
    async def list_workspaces(caller: lister) -> list[Workspace]:
        return [each for each in manager.workspaces() if caller.may_touch(None, each.workspace_id)]

    @app.patch("/v1/workspaces/{workspace_id}")
    async def change_workspace(
        request: Request, caller: account_admin, workspace_id: _Workspace, body: ChangeWorkspace
    ) -> Workspace:
        """Its name, and the key configuration of projects that are made from now on. Those that are there stay under
        the one that they have; `:move-key` takes them to another."""
        if body.key_configuration_id is not None:
            await may_choose_key(request, caller, body.key_configuration_id)
        return await manager.change_workspace(workspace_id, body, caller.actor)

    @app.delete("/v1/workspaces/{workspace_id}", status_code=204)
    async def delete_workspace(caller: account_admin, workspace_id: _Workspace) -> None:
        """Only while no project is in it; one that was shredded stays in it."""
        await manager.delete_workspace(workspace_id, caller.actor)

    @app.post("/v1/workspaces/{workspace_id}/projects", status_code=201)
    async def create_project(
        request: Request, caller: project_creator, workspace_id: _Workspace, body: CreateProject
    ) -> Project:
        """Make a project and version 1 of its KEK. Who runs projects does not choose their key: to name one takes an
        account admin."""
        if body.key_configuration_id is not None:
            await may_choose_key(request, caller, body.key_configuration_id)
        elif Scope.WORKSPACE_ADMIN not in caller.scopes:
            raise await refused(request, caller, Scope.WORKSPACE_ADMIN)
        return await manager.create_project(workspace_id, body, caller.actor)

    @app.get("/v1/workspaces/{workspace_id}/projects", dependencies=[anybody])
    async def list_projects_of_workspace(workspace_id: _Workspace) -> list[Project]:
        return manager.projects_of(workspace_id)

    @app.post("/v1/workspaces/{workspace_id}:revalidate")
    async def revalidate_workspace(caller: security_admin, workspace_id: _Workspace) -> list[Project]:
        """Ask the KMS now."""
        return await manager.revalidate_workspace(workspace_id, caller.actor)

    @app.get("/v1/projects")
    async def list_projects(caller: lister) -> list[Project]:
        return list(map(manager.project_model, manager.projects.within(caller)))

    @app.get("/v1/projects/{project_id}", dependencies=[anybody])
    async def get_project(project_id: _Project) -> Project:
        return manager.project(project_id)

    @app.post("/v1/projects/{project_id}:revalidate")
    async def revalidate_project(caller: security_admin, project_id: _Project) -> Project:
        """Ask the KMS now; the answer is the project's state after it."""
        return await manager.revalidate_project(project_id, caller.actor)

    @app.post("/v1/projects/{project_id}:revoke")
    async def revoke_project(caller: security_admin, project_id: _Project, body: RevokeRequest) -> Project:
        """An operator's own revocation, without the KMS. Progress: /v1/revocations."""
        return await manager.revoke_project(project_id, body.reason, caller.actor)

    @app.post("/v1/projects/{project_id}:restore")
    async def restore_project(caller: security_admin, project_id: _Project) -> Project:
        """Lift an operator's revocation."""
        return await manager.restore_project(project_id, caller.actor)

    @app.post("/v1/projects/{project_id}:move-key")
    async def move_project(request: Request, caller: account_admin, project_id: _Project, body: MoveProject) -> Project:
        """All of its KEKs under another CMK, without downtime. Done when it is answered; again: changes nothing."""
        await may_choose_key(request, caller, body.key_configuration_id)
        return (await manager.mover.move(project_id, body.key_configuration_id, caller.actor)).model()

    @app.post("/v1/projects/{project_id}/keks:rotate")
    async def rotate_kek(
        caller: security_admin,
        project_id: _Project,
        from_version: Annotated[int | None, Query(ge=1, lt=1 << 31)] = None,
        *,
        dry_run: Annotated[bool, Query()] = False,
    ) -> Project:
        """A new version of the project's KEK, for all DEKs from now on. The older versions stay. `from_version`: the
        one that it is to follow; when there is a newer one already, nothing is changed, so it is safe to ask again.
        Without it, that is the current one: requests at the same time make one version. `dry_run`: the KMS makes a KEK,
        which is thrown away."""
        entry = await manager.rotator.rotate_kek(project_id, caller.actor, from_version=from_version, dry_run=dry_run)
        return entry.model()

    @app.get("/v1/projects/{project_id}/keks", dependencies=[Depends(guard(*key_admins))])
    async def get_keys(project_id: _Project) -> KeyStatus:
        """The project's keys, and what each node keeps under them."""
        return manager.retirement.status(project_id)

    @app.post("/v1/projects/{project_id}/keks:retire")
    async def retire_keks(
        caller: security_admin, project_id: _Project, *, dry_run: Annotated[bool, Query()] = False
    ) -> RetiredKeks:
        """Destroy KEK versions that nothing is left under; refused while anything may be."""
        return await manager.retirement.retire(project_id, caller.actor, dry_run=dry_run)

    @app.post("/v1/projects/{project_id}:rekey", status_code=202)
    async def rekey(caller: security_admin, project_id: _Project) -> KeyStatus:
        """Have all data sealed anew, under new DEKs. The nodes do it by themselves from here on."""
        return await manager.retirement.rekey(project_id, caller.actor)

    @app.post("/v1/key-configurations/{key_configuration_id}:rewrap")
    async def rewrap(
        caller: security_admin, key_configuration_id: _Configuration, *, dry_run: Annotated[bool, Query()] = False
    ) -> Rewrap:
        """Wrap every KEK under the CMK's current version. Happens by itself, too; this does it now. How far it is:
        `work` of the key configuration."""
        return await manager.rotator.rewrap(key_configuration_id, caller.actor, dry_run=dry_run)

    @app.post("/v1/key-configurations/{key_configuration_id}:replace", status_code=202)
    async def replace_key(
        caller: account_admin,
        key_configuration_id: _Configuration,
        body: ReplaceKey,
        *,
        dry_run: Annotated[bool, Query()] = False,
    ) -> Replacement:
        """Move to another CMK, in any cloud, without downtime. Tried at once; the rest goes on by itself. `dry_run`:
        only tried."""
        return await manager.replacer.begin(key_configuration_id, body.key, caller.actor, dry_run=dry_run)

    @app.get("/v1/key-configurations/{key_configuration_id}/replacement", dependencies=[key_viewer])
    async def get_replacement(key_configuration_id: _Configuration) -> Replacement:
        """How far it is; 404 when none is under way (any more)."""
        return manager.replacer.progress(key_configuration_id)

    @app.delete("/v1/key-configurations/{key_configuration_id}/replacement", status_code=204)
    async def abort_replacement(caller: account_admin, key_configuration_id: _Configuration) -> None:
        """Keep the old CMK."""
        await manager.replacer.abort(key_configuration_id, caller.actor)

    @app.post("/v1/kms-events", status_code=202, response_model=KmsEventsTaken)
    async def take_kms_events(request: Request, caller: notifier) -> KmsEventsTaken | Response:
        """An event of the customer's cloud, as that sent it: AWS EventBridge, Azure Event Grid (its handshake is
        answered, with 200) or Monitor, a Google Pub/Sub push. Nobody believes it: the KMS of each key that it names is
        asked, once a second at most. About an unknown key: `probed` is 0."""
        events = kms_events.parse(await request.body())
        if isinstance(events, kms_events.Handshake):
            return JSONResponse({"validationResponse": events.validation_code})
        return KmsEventsTaken(probed=await manager.key_configurations.take_events(events, caller.actor))

    @app.post("/v1/projects/{project_id}/shred", status_code=201)
    async def ask_shred(caller: security_admin, project_id: _Project, body: AskShred) -> Shred:
        """Ask for the end of a project, for good. Another person approves, or nothing happens."""
        return await manager.shredder.ask(project_id, body, caller)

    @app.get("/v1/projects/{project_id}/shred", dependencies=[Depends(guard(Scope.SECURITY_ADMIN, Scope.AUDIT_READ))])
    async def get_shred(project_id: _Project) -> Shred:
        """Who asked, who approved, what was destroyed, and exactly what is left."""
        return await manager.shredder.status(project_id)

    @app.post("/v1/projects/{project_id}/shred:approve", status_code=202)
    async def approve_shred(caller: security_admin, project_id: _Project, body: ApproveShred) -> Shred:
        """Destroy all KEKs of a project. When this is answered they are gone; the data follows by itself."""
        return await manager.shredder.approve(project_id, body, caller)

    @app.delete("/v1/projects/{project_id}/shred")
    async def cancel_shred(caller: security_admin, project_id: _Project) -> Shred:
        """Take back what nobody has approved yet."""
        return await manager.shredder.cancel(project_id, caller)

    @app.post("/v1/projects/{project_id}:verify-erasure")
    async def verify_erasure(caller: security_admin, project_id: _Project, body: VerifyErasure) -> ErasureReport:
        """Check every precondition of the word ERASED now, with evidence, and use it if they all hold."""
        return await manager.eraser.verify(project_id, body, caller)

    @app.get("/v1/revocations")
    async def list_revocations(
        caller: revocation_lister,
        project_id: Annotated[str | None, Query(pattern=_ID_CHARACTERS)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> list[Revocation]:
        """Newest first, with what became of every lease holder."""
        wanted = manager.projects.ids_within(caller)
        if project_id is not None:
            one = {_project_id(project_id)}
            wanted = one if wanted is None else wanted & one
        return await manager.revocations(wanted, limit)

    @app.get("/v1/projects/{project_id}/receipt", dependencies=[Depends(guard(Scope.SECURITY_ADMIN, Scope.AUDIT_READ))])
    async def get_receipt(
        project_id: _Project,
        revocation_id: Annotated[str | None, Query(pattern=r"^rev-[0-9a-f]{16}$")] = None,
        restoration_id: Annotated[str | None, Query(pattern=r"^res-[0-9a-f]{16}$")] = None,
        kind: Annotated[ReceiptKind, Query()] = "revocation",
    ) -> Response:
        """What a revocation that is over did, or a restore (the newest, unless one is named), the shred or the erasure,
        signed: for whoever was not there."""
        content = await manager.receipts.issue(project_id, kind, revocation_id, restoration_id)
        return Response(content, media_type="application/json")

    @app.get("/v1/audit")
    async def read_audit(
        caller: auditor,
        after: Annotated[int, Query(ge=0, lt=1 << 63)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        *,
        complete: Annotated[bool, Query()] = False,
    ) -> list[AuditRecord]:
        """Records after sequence number `after`, oldest first. Who is bound to a place sees the records that name a
        project there. `complete`: those of all KMS calls so far, too."""
        return await manager.audit(after, limit, manager.projects.ids_within(caller), complete=complete)

    @app.get("/v1/audit:verify", dependencies=[Depends(guard(Scope.AUDIT_READ))])
    async def verify_audit() -> AuditVerification:
        """Walk the whole chain."""
        return await manager.verify_audit()

    @app.post("/v1/tokens", status_code=201)
    async def register_token(caller: issuer, body: RegisterToken) -> IssuedToken:
        """Put a token for a person, signed by the caller, in force."""
        return await manager.people.register(body.token, verifier, caller)

    @app.get("/v1/tokens")
    async def list_tokens(
        caller: token_lister, limit: Annotated[int, Query(ge=1, le=1000)] = 1000
    ) -> list[IssuedToken]:
        """Those that were issued to people, newest first."""
        return (await manager.people.issued(caller))[:limit]

    @app.post("/v1/tokens/{token_id}:revoke")
    async def revoke_token(caller: token_revoker, token_id: _Token) -> IssuedToken:
        """From now on nobody takes it. Again: changes nothing."""
        return await manager.people.revoke(token_id, caller)

    @app.get("/v1/status", dependencies=[Depends(guard(Scope.STATUS_READ, Scope.SECURITY_ADMIN))])
    async def status() -> KeymanagerStatus:
        return manager.status()

    @app.websocket("/v1/session")
    async def session(socket: WebSocket) -> None:
        try:
            principal = verifier.verify(_websocket_token(socket))
            if SESSION_SCOPE not in principal.scopes:
                raise PermissionDeniedError(f"this token lacks the scope {SESSION_SCOPE}")
        except KeylakeError as error:
            await socket.send_denial_response(error_response(error))
            return
        await socket.accept()
        await serve_session(socket, principal, manager.session_deps(verifier), manager.sessions)

    return app


def _websocket_token(socket: WebSocket) -> str:
    scheme, _, token = socket.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise UnauthenticatedError("a key session needs a bearer token")
    return token
