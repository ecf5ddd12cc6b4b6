"""The buttons: what each hat can do, by name. The services decide whether it may."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel, ConfigDict, Field

from customercloud.faults import Outage
from keylake.cli.session import cloud_error
from keylake.client import KeylakeClient
from keylake.cluster import Customer
from keylake.console.hats import Hat
from shared.errors import InvalidInputError, UnavailableError
from shared.ids import EndpointId, ProjectId


class Request(BaseModel):
    """`target`: the ARN of a key, or the id of a project or endpoint; none for the cloud as a whole."""

    model_config = ConfigDict(extra="forbid")
    hat: Hat
    action: str = Field(max_length=40)
    target: str = Field(default="", max_length=300)


def _project(act: Callable[[KeylakeClient, ProjectId], Awaitable[object]]) -> Any:
    async def do(client: KeylakeClient, target: str) -> None:
        await act(client, _parse(ProjectId, target))

    return do


def _endpoint(act: Callable[[KeylakeClient, EndpointId], Awaitable[object]]) -> Any:
    async def do(client: KeylakeClient, target: str) -> None:
        await act(client, _parse(EndpointId, target))

    return do


def _parse(kind: Any, text: str) -> Any:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


KEYLAKE: Final[dict[str, Callable[[KeylakeClient, str], Awaitable[None]]]] = {
    "project.revoke": _project(lambda client, project: client.revoke(project, "the console's button")),
    "project.restore": _project(lambda client, project: client.restore(project)),
    "project.revalidate": _project(lambda client, project: client.revalidate(project)),
    "project.rotate-kek": _project(lambda client, project: client.rotate_kek(project)),
    "endpoint.start": _endpoint(lambda client, endpoint: client.start_endpoint(endpoint)),
    "endpoint.stop": _endpoint(lambda client, endpoint: client.stop_endpoint(endpoint)),
    "endpoint.kill": _endpoint(lambda client, endpoint: client.kill_endpoint(endpoint)),
}


CLOUD: Final[dict[str, Callable[[Customer, str], object]]] = {
    "key.disable": lambda customer, key: customer.aws.disable(key),
    "key.enable": lambda customer, key: customer.aws.enable(key),
    "key.schedule-deletion": lambda customer, key: customer.aws.schedule_deletion(key),
    "key.cancel-deletion": lambda customer, key: customer.aws.cancel_deletion(key),
    "key.deny": lambda customer, key: customer.aws.deny_role(key, customer.bootstrap.role_arn),
    "key.allow": lambda customer, key: customer.aws.allow_role(key, customer.bootstrap.role_arn),
    "key.rotate": lambda customer, key: customer.aws.rotate(key),
    "cloud.outage": lambda customer, _: customer.simulation.set_faults(
        customer.trouble_for_keylake(outage=Outage.REFUSE)
    ),
    "cloud.recover": lambda customer, _: customer.simulation.clear_faults(),
}


async def act_in_cloud(customer: Customer, request: Request) -> None:
    """As the customer. Raises InvalidInputError and what the cloud's refusals mean (`cloud_error`)."""
    act = CLOUD.get(request.action)
    if act is None:
        raise InvalidInputError("the customer has no such button")
    try:
        await asyncio.to_thread(act, customer, request.target)
    except ClientError as error:
        raise cloud_error(error.response.get("Error", {})) from None
    except BotoCoreError as error:
        raise UnavailableError(f"the customer's cloud cannot be reached: {type(error).__name__}") from None


async def act_in_keylake(client: KeylakeClient, request: Request) -> None:
    """Raises InvalidInputError and what the services raise, PermissionDeniedError among it."""
    act = KEYLAKE.get(request.action)
    if act is None:
        raise InvalidInputError("there is no such button")
    await act(client, request.target)
