"""What a hat sees at one moment: all parts are asked with its credentials, and a refusal is part of the picture."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel

from keylake.cli.cloud import keylake_may
from keylake.client import KeylakeClient
from keylake.cluster import Customer
from keylake.console.hats import Hat, Wardrobe
from keylake.place import Place
from shared.api.keymanager import AuditRecord
from shared.api.shredding import Shred
from shared.errors import KeylakeError, NotFoundError, PermissionDeniedError, UnavailableError
from shared.ids import ProjectId

AUDIT_TAIL: Final = 60
CLOUD_TAIL: Final = 40
COUNT_INTERVAL_S: Final = 5.0
"""For what lies under each KEK every storage node looks through all that it keeps."""
PATIENCE_S: Final = 0.5
"""With a service that has answered before. Who is cut off from the keymanager cannot know a person's token, and takes
its time to say so; what happens elsewhere is to be seen meanwhile."""
_PAGE: Final = 1000
_LOOKS: Final = frozenset({"ListKeys", "DescribeKey", "GetKeyPolicy"})


class Viewer:
    """One browser's view with one hat. Remembers how far it has read the audit chain."""

    def __init__(self, place: Place, wardrobe: Wardrobe, customer: Customer, hat: Hat) -> None:
        self._place = place
        self._wardrobe = wardrobe
        self._customer = customer
        self._hat = hat
        self._audit: list[AuditRecord] = []
        self._counts: dict[str, Any] = {}
        self._counted_at = -COUNT_INTERVAL_S
        self._asked: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._seen: dict[str, dict[str, Any]] = {}

    async def aclose(self) -> None:
        """What is still asked for is given up."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    async def look(self) -> dict[str, Any]:
        """JSON. A part that the hat may not see is {"denied": why}; one that cannot be had, {"error": why}."""
        health = asyncio.create_task(self._place.health())
        parts: dict[str, Any]
        match self._hat:
            case Hat.CUSTOMER:
                parts = {"cloud": await self._part("cloud", self._cloud)}
            case Hat.OPERATOR:
                parts = {}
            case _:
                parts = await self._keylake(await self._wardrobe.client(self._hat))
        return {
            "hat": self._hat,
            "at": datetime.now(UTC).isoformat(),
            # The picture is everybody's: who is up, and who is cut off from whom.
            "health": [_plain(each) for each in await health],
            "links": await self._part("links", self._place.links),
            "parts": parts,
        }

    async def _keylake(self, client: KeylakeClient) -> dict[str, Any]:
        wanted: dict[str, Callable[[], Awaitable[Any]]] = {
            "projects": client.projects,
            "workspaces": client.workspaces,
            "key_configurations": client.key_configurations,
            "keymanager": client.keymanager_status,
            "audit": lambda: self._audit_tail(client),
        }
        parts = await _all({name: self._part(name, ask) for name, ask in wanted.items()})
        projects = [ProjectId.parse(each["project_id"]) for each in parts["projects"].get("value", [])]
        of_each: dict[str, Callable[[], Awaitable[Any]]] = {
            "keks": lambda: _of_each(projects, client.key_status),
            "revocations": lambda: _of_each(projects, client.revocations),
            "shreds": lambda: _of_each(projects, lambda each: _shred(client, each)),
        }
        others: dict[str, Callable[[], Awaitable[Any]]] = {
            "endpoints": client.endpoints,
            "pageserver": client.pageserver_status,
            "safekeepers": lambda: self._safekeepers(client),
            "deks": lambda: self._deks(client, projects),
        }
        return parts | await _all(
            {name: self._part(name, ask) for name, ask in of_each.items()}
            | {name: self._late_part(name, ask) for name, ask in others.items()}
        )

    async def _late_part(self, name: str, ask: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        """As `_part`. When it does not come soon, what was seen last; a later look has it."""
        task = self._asked.get(name) or asyncio.create_task(self._part(name, ask))
        self._asked[name] = task
        await asyncio.wait({task}, timeout=PATIENCE_S if name in self._seen else None)
        if task.done():
            self._seen[name] = self._asked.pop(name).result()
        return self._seen[name]

    async def _part(self, name: str, ask: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        denied = self._wardrobe.denied.get((self._hat, name))
        if denied is not None:
            return {"denied": denied}
        try:
            return {"value": _plain(await ask())}
        except PermissionDeniedError as error:
            self._wardrobe.denied[self._hat, name] = str(error)
            return {"denied": str(error)}
        except KeylakeError as error:
            return {"error": str(error), "code": error.code}

    async def _deks(self, client: KeylakeClient, projects: Sequence[ProjectId]) -> dict[str, Any]:
        """{project: how many objects, each with a DEK of its own, lie under each KEK version}"""
        if self._counts.keys() != set(map(str, projects)) or monotonic() - self._counted_at > COUNT_INTERVAL_S:
            found = {str(each): await client.encryption(each) for each in projects}
            self._counts = {
                project: {
                    "complete": each.complete,
                    "keks": {kek.kek_version: [kek.objects, kek.size_bytes] for kek in each.keks},
                }
                for project, each in found.items()
            }
            self._counted_at = monotonic()
        return self._counts

    async def _safekeepers(self, client: KeylakeClient) -> list[Any]:
        found = []
        for index in range(len(client.addresses.safekeepers)):
            try:
                found.append(_plain(await client.safekeeper_status(index)))
            except UnavailableError:
                found.append(None)
        return found

    async def _audit_tail(self, client: KeylakeClient) -> list[AuditRecord]:
        while True:
            after = self._audit[-1].sequence if self._audit else 0
            page = await client.audit(after, _PAGE)
            self._audit = (self._audit + page)[-AUDIT_TAIL:]
            if len(page) < _PAGE:
                return self._audit

    async def _cloud(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._ask_cloud)

    def _ask_cloud(self) -> dict[str, Any]:
        try:
            kms = self._customer.aws.kms
            arns = [key["KeyArn"] for page in kms.get_paginator("list_keys").paginate() for key in page["Keys"]]
            keys = sorted((self._key(arn) for arn in arns), key=lambda key: str(key["created"]))
        except (BotoCoreError, ClientError) as error:
            raise UnavailableError(f"the customer's cloud does not answer: {type(error).__name__}") from None
        log = story_of(self._customer.simulation.audit_log())[-CLOUD_TAIL:]
        faults = self._customer.simulation.faults()
        return {"keys": keys, "log": log, "faults": faults.model_dump(mode="json", exclude_defaults=True)}

    def _key(self, arn: str) -> dict[str, Any]:
        key = self._customer.aws.describe(arn)
        role_arn = self._customer.bootstrap.role_arn
        return {
            "arn": arn,
            "description": key["Description"],
            "state": key["KeyState"],
            "created": key["CreationDate"].isoformat(),
            "deletion": key["DeletionDate"].isoformat() if "DeletionDate" in key else None,
            "material": key.get("CurrentKeyMaterialId"),
            "keylake": keylake_may(self._customer.aws.policy(arn), role_arn),
        }


def story_of(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """CloudTrail's records, oldest first, for people: without the console's own looks at the keys, and with what
    repeats itself, as a watcher's probe of each second, told once, with how often. Or there would be little else."""
    told: list[dict[str, Any]] = []
    for record in log:
        who: Mapping[str, Any] = record.get("userIdentity") or {}
        if who.get("type") == "IAMUser" and record["eventName"] in _LOOKS:
            continue
        line = {
            "who": str(who.get("arn") or who.get("type") or "").rpartition("/")[2],
            "what": record["eventName"],
            "outcome": record.get("errorCode") or "ok",
        }
        if told and all(told[-1][name] == value for name, value in line.items()):
            told[-1] |= {"at": record["eventTime"], "times": told[-1]["times"] + 1}
        else:
            told.append({"at": record["eventTime"], "times": 1, **line})
    return told


async def _all(asked: Mapping[str, Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """All at once."""
    return dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))


async def _of_each(projects: Sequence[ProjectId], ask: Callable[[ProjectId], Awaitable[Any]]) -> dict[str, Any]:
    """{project: answer}; refused as a whole by the first that is."""
    return {str(each): _plain(await ask(each)) for each in projects}


async def _shred(client: KeylakeClient, project_id: ProjectId) -> Shred | None:
    """None: nobody has asked for it."""
    try:
        return await client.shred(project_id)
    except NotFoundError:
        return None


def _plain(value: Any) -> Any:
    """JSON of models, lists of them, and dataclasses."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if hasattr(value, "__slots__") and hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
