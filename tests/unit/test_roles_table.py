"""docs/roles.md is what the services' routes say, and the routes say something."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import Depends, FastAPI, Request

from keylake.roles_table import CONNECTIONS, document, http_operations
from shared.auth import Service, TokenVerifier, TrustBundle
from shared.authorize import Authorizer, Place, Reach, named_in_path, operations
from shared.errors import InvalidInputError
from shared.ids import ProjectId, WorkspaceId
from shared.roles import PERSON_SCOPES, SERVICE_SCOPES, PersonRole, Scope

DOCUMENT = Path(__file__).parents[2] / "docs" / "roles.md"


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == document(), "make docs-roles"


def test_every_service_is_in_it() -> None:
    assert http_operations().keys() == set(Service)
    assert all(http_operations().values())


def test_a_route_that_demands_nothing_is_found_out() -> None:
    app = FastAPI()

    @app.get("/v1/open", include_in_schema=False)
    async def for_everybody() -> None: ...

    with pytest.raises(ValueError, match="/v1/open"):
        operations(app)


def test_a_route_without_a_place_is_not_for_bound_tokens() -> None:
    app = FastAPI()
    authorize = Authorizer(TokenVerifier(TrustBundle(keys={}), Service.COMPUTE))

    @app.get("/v1/all", dependencies=[Depends(authorize(Scope.STATUS_READ))])
    async def everything() -> None: ...

    @app.get("/v1/{project_id}", dependencies=[Depends(authorize(Scope.STATUS_READ))])
    async def one() -> None: ...

    assert [each.reach for each in operations(app)] == [Reach.NOTHING, Reach.PLACE]


def test_a_security_admin_has_no_way_to_data_and_a_data_user_none_to_keys() -> None:
    """Said here once more, in other words than the scopes': by what the routes are."""
    changes = {
        role: {
            (service, each.method, each.path)
            for service, found in http_operations().items()
            for each in found
            if set(each.any_of) & PERSON_SCOPES[role] and (each.method != "GET" or service is not Service.KEYMANAGER)
        }
        for role in PersonRole
    }
    elsewhere = {path for service, _, path in changes[PersonRole.SECURITY_ADMIN] if service is not Service.KEYMANAGER}
    assert elsewhere == {"/v1/projects/{project_id}/keys", "/v1/projects/{project_id}/keys:upkeep"}
    assert {service for service, _, _ in changes[PersonRole.ACCOUNT_ADMIN]} == {Service.KEYMANAGER}
    assert {service for service, _, _ in changes[PersonRole.DATA_USER]} == {Service.COMPUTE}
    verbs = {path.rpartition(":")[2] for _, method, path in changes[PersonRole.AUDITOR] if method != "GET"}
    assert verbs == {"scrub", "inspect"}, "which read, for long, and say what there is"
    assert {path for _, _, path in changes[PersonRole.KMS_NOTIFIER]} == {"/v1/kms-events"}
    of_keys = {path for service, _, path in changes[PersonRole.WORKSPACE_ADMIN] if service is Service.KEYMANAGER}
    assert of_keys == {"/v1/workspaces/{workspace_id}/projects"}, "and under no key of their choice: see the cluster's"
    for connection in CONNECTIONS:
        assert not any(connection.takes(scopes) for scopes in PERSON_SCOPES.values())


def test_only_the_owner_issues_tokens() -> None:
    [issue] = [
        each for each in http_operations()[Service.KEYMANAGER] if (each.method, each.path) == ("POST", "/v1/tokens")
    ]
    assert [name for name, scopes in SERVICE_SCOPES.items() if scopes & set(issue.any_of)] == ["admin"]
    assert not any(scopes & set(issue.any_of) for scopes in PERSON_SCOPES.values())


async def test_what_a_request_is_about_is_said_by_its_path_alone() -> None:
    project, workspace = ProjectId.new(), WorkspaceId.new()
    query = f"project_id={project}&workspace_id={workspace}".encode()
    scope = {"type": "http", "headers": [], "query_string": query, "path_params": {}}
    assert await named_in_path(Request(scope)) == Place()
    in_path = scope | {"path_params": {"project_id": str(project)}}
    assert await named_in_path(Request(in_path)) == Place(project)
    with pytest.raises(InvalidInputError):
        await named_in_path(Request(scope | {"path_params": {"project_id": str(workspace)}}))
