"""Administration of the simulated AWS: accounts, users, roles, waiting periods, the whole audit log, events.

What in the real cloud somebody clicks together in IAM's console. Changes and deletions are in force after the
propagation delay (`Faults.propagation_delay_s`), as IAM is eventually consistent; what is new, at once.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Annotated, Final

from fastapi import APIRouter, Path, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from customercloud.aws import arn as arns
from customercloud.aws.event_bridge import EventBridge, EventTarget
from customercloud.aws.identity import (
    EXTERNAL_ID_PATTERN,
    MAX_EXTERNAL_ID_SIZE,
    MAX_SESSION_S,
    MIN_EXTERNAL_ID_SIZE,
    NAME_PATTERN,
    PATH_PATTERN,
    AccessKey,
    Rights,
    Role,
    User,
    trust_policy_document,
    unique_id,
)
from customercloud.aws.keys import KeyState
from customercloud.aws.patterns import MalformedPolicyError
from customercloud.aws.policy import PolicyKind, parse_policy
from customercloud.aws.service import AwsEndpoint
from customercloud.aws.state import AwsState
from customercloud.aws.trail import Trail
from customercloud.delayed import Delayed
from shared.clock import Clock
from shared.errors import ConflictError, InvalidInputError, NotFoundError

_ACCOUNT_PATTERN: Final = r"^[0-9]{12}$"
_LINES_PER_CHUNK: Final = 256

AccountId = Annotated[str, Field(pattern=_ACCOUNT_PATTERN)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
AccountPath = Annotated[str, Path(pattern=_ACCOUNT_PATTERN)]
NamePath = Annotated[str, Path(pattern=NAME_PATTERN)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Credentials(_Model):
    account_id: str
    arn: str
    access_key_id: str
    secret_access_key: str = Field(repr=False)


class BootstrapRequest(_Model):
    """The usual cast: a customer, its vendor, and the role through which the vendor uses the customer's keys."""

    customer_account_id: AccountId = "111122223333"
    vendor_account_id: AccountId = "444455556666"
    customer_admin_name: Name = "admin"
    vendor_user_name: Name = "keylake"
    role_name: Name = "keylake-kms"
    external_id: str = Field(
        min_length=MIN_EXTERNAL_ID_SIZE, max_length=MAX_EXTERNAL_ID_SIZE, pattern=EXTERNAL_ID_PATTERN
    )
    max_session_s: int = Field(default=3600, ge=3600, le=MAX_SESSION_S)


class BootstrapAnswer(_Model):
    region: str
    customer: Credentials
    """An IAM user that may do everything in the customer's account, as far as key policies let it."""
    vendor: Credentials
    """May assume the role, and nothing else."""
    role_arn: str
    """Has no identity policy: what it may do with a key, the key's policy alone says."""
    external_id: str


class _IdentityRequest(_Model):
    policies: dict[str, str] = Field(default_factory=dict)
    """Inline identity policies: name → document."""
    tags: dict[str, str] = Field(default_factory=dict)
    """What policies see as `aws:PrincipalTag/…`."""
    path: str = Field(default="/", max_length=512, pattern=PATH_PATTERN)
    """Part of the ARN; that of an identity which exists stays."""


class UserRequest(_IdentityRequest):
    pass


class RoleRequest(_IdentityRequest):
    trust_policy: str
    max_session_s: int = Field(default=3600, ge=3600, le=MAX_SESSION_S)


class RoleAnswer(_Model):
    arn: str
    role_id: str


def _allow(action: str, resource: str) -> str:
    statement = {"Effect": "Allow", "Action": action, "Resource": resource}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


class AwsAdmin:
    def __init__(self, state: AwsState, clock: Clock, delay: Callable[[], dt.timedelta]) -> None:
        """`delay`: how long decisions will still see what was before a change."""
        self._state = state
        self._clock = clock
        self._delay = delay

    def bootstrap(self, request: BootstrapRequest) -> BootstrapAnswer:
        """Idempotent: what exists is kept, with its credentials. Raises ConflictError for another external id."""
        customer = self._user_or_new(request.customer_account_id, request.customer_admin_name, _allow("*", "*"))
        role_arn = arns.role_arn(request.customer_account_id, request.role_name)
        vendor = self._user_or_new(
            request.vendor_account_id, request.vendor_user_name, _allow("sts:AssumeRole", role_arn)
        )
        trust = trust_policy_document([vendor.arn], request.external_id)
        role = self._state.role(request.customer_account_id, request.role_name)
        if role is not None and role.rights.newest.trust_policy != trust:
            raise ConflictError(f"{role_arn} exists with another trust policy")
        if role is None:
            self.put_role(
                request.customer_account_id,
                request.role_name,
                RoleRequest(trust_policy=trust, max_session_s=request.max_session_s),
            )
        return BootstrapAnswer(
            region=self._state.region,
            customer=credentials(customer),
            vendor=credentials(vendor),
            role_arn=role_arn,
            external_id=request.external_id,
        )

    def _user_or_new(self, account_id: str, name: str, policy: str) -> User:
        return self._state.user(account_id, name) or self.put_user(
            account_id, name, UserRequest(policies={"bootstrap": policy})
        )

    def put_user(self, account_id: str, name: str, request: UserRequest) -> User:
        """Makes the user, or gives an existing one these policies; its id and access key stay."""
        _check_identity_policies(request.policies)
        rights = Rights(policies=request.policies, tags=request.tags)
        old = self._state.user(account_id, name)
        user = User(
            account_id=account_id,
            name=name,
            path=old.path if old else request.path,
            user_id=old.user_id if old else unique_id("AIDA"),
            access_key=old.access_key if old else AccessKey.new(account_id),
            rights=self._changed(old, rights),
        )
        self._state.put_user(user)
        return user

    def _changed(self, old: User | Role | None, rights: Rights) -> Delayed[Rights]:
        now = self._clock.now()
        return Delayed[Rights].of(rights, now) if old is None else old.rights.then(rights, now, self._delay())

    def user(self, account_id: str, name: str) -> User:
        user = self._state.user(account_id, name)
        if user is None:
            raise NotFoundError(f"no user {name} in account {account_id}")
        return user

    def delete_user(self, user: User) -> None:
        self._state.put_user(user.model_copy(update={"ends_at": self._clock.now() + self._delay()}))

    def put_role(self, account_id: str, name: str, request: RoleRequest) -> Role:
        """Makes the role, or changes an existing one; its id, and with it its sessions, stay."""
        _check_identity_policies(request.policies)
        try:
            binding = self._state.bind_principals(parse_policy(request.trust_policy, PolicyKind.TRUST))
        except MalformedPolicyError as error:
            raise InvalidInputError(f"trust policy: {error}") from None
        rights = Rights(
            policies=request.policies, tags=request.tags, trust_policy=request.trust_policy, trust_binding=binding
        )
        old = self._state.role(account_id, name)
        role = Role(
            account_id=account_id,
            name=name,
            path=old.path if old else request.path,
            role_id=old.role_id if old else unique_id("AROA"),
            rights=self._changed(old, rights),
            max_session_s=request.max_session_s,
        )
        self._state.put_role(role)
        return role

    def role(self, account_id: str, name: str) -> Role:
        role = self._state.role(account_id, name)
        if role is None:
            raise NotFoundError(f"no role {name} in account {account_id}")
        return role

    def delete_role(self, role: Role) -> None:
        self._state.put_role(role.model_copy(update={"ends_at": self._clock.now() + self._delay()}))


def credentials(user: User) -> Credentials:
    return Credentials(
        account_id=user.account_id,
        arn=user.arn,
        access_key_id=user.access_key.access_key_id,
        secret_access_key=user.access_key.secret_access_key,
    )


def _check_identity_policies(policies: dict[str, str]) -> None:
    for name, document in policies.items():
        try:
            parse_policy(document, PolicyKind.IDENTITY)
        except MalformedPolicyError as error:
            raise InvalidInputError(f"policy {name}: {error}") from None


def aws_router(
    state: AwsState, trail: Trail, event_bridge: EventBridge, endpoint: AwsEndpoint, clock: Clock
) -> APIRouter:
    router = APIRouter(prefix="/aws", tags=["aws"])
    admin = AwsAdmin(state, clock, endpoint.delay)

    @router.post("/bootstrap")
    async def bootstrap(request: BootstrapRequest) -> BootstrapAnswer:
        return admin.bootstrap(request)

    @router.put("/accounts/{account_id}/users/{name}")
    async def put_user(account_id: AccountPath, name: NamePath, request: UserRequest) -> Credentials:
        return credentials(admin.put_user(account_id, name, request))

    @router.delete("/accounts/{account_id}/users/{name}", status_code=204)
    async def delete_user(account_id: AccountPath, name: NamePath) -> None:
        """Its access key stops working, after the propagation delay."""
        admin.delete_user(admin.user(account_id, name))

    @router.put("/accounts/{account_id}/roles/{name}")
    async def put_role(account_id: AccountPath, name: NamePath, request: RoleRequest) -> RoleAnswer:
        role = admin.put_role(account_id, name, request)
        return RoleAnswer(arn=role.arn, role_id=role.role_id)

    @router.delete("/accounts/{account_id}/roles/{name}", status_code=204)
    async def delete_role(account_id: AccountPath, name: NamePath) -> None:
        """Its sessions stop working, after the propagation delay; a role made again under this name is another one."""
        admin.delete_role(admin.role(account_id, name))

    @router.put("/accounts/{account_id}/event-target", status_code=204)
    async def put_event_target(account_id: AccountPath, target: EventTarget) -> None:
        """From now on, changes to the account's keys are posted there, as EventBridge does it."""
        event_bridge.set_target(account_id, target)

    @router.delete("/accounts/{account_id}/event-target", status_code=204)
    async def delete_event_target(account_id: AccountPath) -> None:
        event_bridge.remove_target(account_id)

    @router.post("/keys/{key_id}/complete-deletion", status_code=204)
    async def complete_deletion(key_id: str) -> None:
        """Let the waiting period of a key that is pending deletion be over now: its material is destroyed."""
        key = state.snapshot.keys.get(key_id)
        if key is None:
            raise NotFoundError("no such key")
        if key.state is not KeyState.PENDING_DELETION:
            raise ConflictError("the key is not pending deletion")
        await endpoint.destroy_key(key_id)

    @router.post("/keys/{key_id}/complete-rotation-period", status_code=204)
    async def complete_rotation_period(key_id: str) -> None:
        """Let the automatic rotation of a key, which is switched on, be due now."""
        key = state.snapshot.keys.get(key_id)
        if key is None:
            raise NotFoundError("no such key")
        if key.rotation_period_days is None:
            raise ConflictError("the key is not rotated automatically")
        state.put_key(key.rotation_due_at(clock.now()))
        await endpoint.housekeeping()

    @router.get("/events")
    async def events() -> Response:
        """The whole audit log of all accounts, oldest first, one JSON record a line."""
        return StreamingResponse(stored_lines(trail), media_type="application/x-ndjson")

    return router


async def stored_lines(trail: Trail) -> AsyncIterator[bytes]:
    """The whole audit log as it stands on disk, oldest first, in chunks of whole lines."""
    lines = trail.lines()
    while chunk := await asyncio.to_thread(lambda: list(islice(lines, _LINES_PER_CHUNK))):
        yield b"".join(line + b"\n" for line in chunk)
