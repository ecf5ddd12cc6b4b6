"""The buttons: what each hat can do, by name. The services decide whether it may."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel, ConfigDict, Field

from customercloud.faults import Outage
from keylake.cli.session import build, cloud_error
from keylake.client import KeylakeClient
from keylake.cluster import Customer
from keylake.connections import forget_connection
from keylake.console.hats import Hat
from keylake.link_control import LinkRequest
from keylake.place import Place
from shared.api.shredding import ApproveShred, AskShred
from shared.errors import InvalidInputError, UnavailableError
from shared.ids import EndpointId, ProjectId

REASON: Final = "the console's button"


class Request(BaseModel):
    """`target`: the ARN of a key, the id of a project or endpoint, or two services, `one/other`; none for the cloud or
    the network as a whole. `typed`: the project's name, for what cannot be taken back; `shred_id`: what is approved."""

    model_config = ConfigDict(extra="forbid")
    hat: Hat
    action: str = Field(max_length=40)
    target: str = Field(default="", max_length=300)
    typed: str = Field(default="", max_length=100)
    shred_id: str = Field(default="", max_length=40)


Act = Callable[[Place, KeylakeClient, Request], Awaitable[object]]


def _project(act: Callable[[KeylakeClient, ProjectId], Awaitable[object]]) -> Act:
    return lambda _, client, request: act(client, _parse(ProjectId, request.target))


def _endpoint(act: Callable[[KeylakeClient, EndpointId], Awaitable[object]]) -> Act:
    return lambda _, client, request: act(client, _parse(EndpointId, request.target))


def _parse(kind: Any, text: str) -> Any:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


async def _ask_shred(_: Place, client: KeylakeClient, request: Request) -> None:
    asked = build(AskShred, project_name=request.typed, reason=REASON)
    await client.ask_shred(_parse(ProjectId, request.target), asked.project_name, asked.reason)


async def _approve_shred(_: Place, client: KeylakeClient, request: Request) -> None:
    approved = build(ApproveShred, project_name=request.typed, shred_id=request.shred_id)
    await client.approve_shred(_parse(ProjectId, request.target), approved.project_name, approved.shred_id)


async def _delete_endpoint(place: Place, client: KeylakeClient, request: Request) -> None:
    endpoint = _parse(EndpointId, request.target)
    await client.delete_endpoint(endpoint)
    forget_connection(place.home, endpoint)


KEYLAKE: Final[dict[str, Act]] = {
    "project.revoke": _project(lambda client, project: client.revoke(project, REASON)),
    "project.restore": _project(lambda client, project: client.restore(project)),
    "project.revalidate": _project(lambda client, project: client.revalidate(project)),
    "project.rotate-kek": _project(lambda client, project: client.rotate_kek(project)),
    "project.ask-shred": _ask_shred,
    "project.approve-shred": _approve_shred,
    "project.cancel-shred": _project(lambda client, project: client.cancel_shred(project)),
    "endpoint.start": _endpoint(lambda client, endpoint: client.start_endpoint(endpoint)),
    "endpoint.stop": _endpoint(lambda client, endpoint: client.stop_endpoint(endpoint)),
    "endpoint.kill": _endpoint(lambda client, endpoint: client.kill_endpoint(endpoint)),
    "endpoint.delete": _delete_endpoint,
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
    "cloud.cut": lambda customer, _: customer.simulation.set_faults(customer.trouble_for_keylake(outage=Outage.HANG)),
    "cloud.recover": lambda customer, _: customer.simulation.clear_faults(),
}


async def act_on_network(place: Place, request: Request) -> None:
    """As who runs the machines. Raises InvalidInputError, ConflictError where there are no links."""
    one, _, other = request.target.partition("/")
    match request.action:
        case "link.cut":
            await place.links(build(LinkRequest, do="cut", one=one, other=other))
        case "link.heal":
            await place.links(LinkRequest(do="heal"))
        case _:
            raise InvalidInputError("the operator has no such button")


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


async def act_in_keylake(place: Place, client: KeylakeClient, request: Request) -> None:
    """Raises InvalidInputError and what the services raise, PermissionDeniedError among it."""
    act = KEYLAKE.get(request.action)
    if act is None:
        raise InvalidInputError("there is no such button")
    await act(place, client, request)
