"""The first project, made as people would make it: the customer a key, the account admin what uses it, the workspace
admin what lies under it."""

from __future__ import annotations

import asyncio
from typing import Final

from botocore.exceptions import BotoCoreError, ClientError

from keylake.cli.endpoints import make_endpoint
from keylake.cli.session import cloud_error
from keylake.cluster import Customer
from keylake.console.hats import Hat, Wardrobe
from keylake.place import Place
from shared.api.keymanager import AwsKey, CreateKeyConfiguration
from shared.errors import ConflictError, UnavailableError

NAME: Final = "demo"


async def make_project(place: Place, wardrobe: Wardrobe, customer: Customer) -> None:
    """A key, a key configuration, a workspace, a project and an endpoint, all called `demo`.

    Raises ConflictError when there is a project of that name.
    """
    account_admin = await wardrobe.client(Hat.ACCOUNT_ADMIN)
    if any(project.name == NAME for project in await account_admin.projects()):
        raise ConflictError("there is a project called demo already")
    bootstrap = customer.bootstrap
    try:
        arn = await asyncio.to_thread(customer.aws.create_key, NAME, role_arn=bootstrap.role_arn)
    except ClientError as error:
        raise cloud_error(error.response.get("Error", {})) from None
    except BotoCoreError as error:
        raise UnavailableError(f"the customer's cloud cannot be reached: {type(error).__name__}") from None
    key = AwsKey(key_arn=arn, role_arn=bootstrap.role_arn, external_id=bootstrap.external_id)
    configuration = await account_admin.create_key_configuration(CreateKeyConfiguration(name=NAME, key=key))
    workspace = await account_admin.create_workspace(NAME, configuration.key_configuration_id)
    workspace_admin = await wardrobe.client(Hat.WORKSPACE_ADMIN)
    project = await workspace_admin.create_project(workspace.workspace_id, NAME)
    timeline = await workspace_admin.create_timeline(project.project_id)
    await make_endpoint(workspace_admin, place.home, project, timeline, "main")
