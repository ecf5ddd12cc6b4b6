"""One call as operations see it, and what it learns about itself for the audit log."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TypeVar

import proto
from google.protobuf.message import Message

from customercloud.faults import Service
from customercloud.google.names import LocationName, PolicyTarget, VersionName

Resource = PolicyTarget | VersionName | LocationName

Q = TypeVar("Q", bound=proto.Message)
R = TypeVar("R", bound=Resource)


class Api(Enum):
    """(domain, whose faults hit it, OAuth scope that opens it besides cloud-platform)."""

    KMS = ("cloudkms.googleapis.com", Service.GOOGLE_KMS, "cloudkms")
    IAM = ("iam.googleapis.com", Service.GOOGLE_IAM, "iam")
    CREDENTIALS = ("iamcredentials.googleapis.com", Service.GOOGLE_IAM, "iam")
    RESOURCE_MANAGER = ("cloudresourcemanager.googleapis.com", Service.GOOGLE_IAM, "cloudplatformprojects")

    @property
    def domain(self) -> str:
        return self.value[0]

    @property
    def service(self) -> Service:
        return self.value[1]

    @property
    def scopes(self) -> frozenset[str]:
        base = "https://www.googleapis.com/auth/"
        return frozenset((f"{base}cloud-platform", f"{base}{self.value[2]}"))


class LogType(StrEnum):
    """`ADMIN_WRITE` goes to the activity log, which is always on; the others to data_access."""

    ADMIN_READ = "ADMIN_READ"
    ADMIN_WRITE = "ADMIN_WRITE"
    DATA_READ = "DATA_READ"


@dataclass(frozen=True, slots=True)
class Principal:
    """A verified caller."""

    email: str
    unique_id: str
    project_id: str
    delegate: str | None

    @property
    def member(self) -> str:
        return f"serviceAccount:{self.email}"


@dataclass(frozen=True, slots=True)
class Authorization:
    resource: str
    permission: str
    granted: bool


@dataclass(slots=True)
class Audit:
    """Filled as the operation goes, so that a refusal is logged with it."""

    resource: Resource | None = None
    """None: the call cannot be attributed to anybody's project, and is in nobody's log."""
    authorizations: list[Authorization] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Call:
    principal: Principal
    now: dt.datetime
    delay: dt.timedelta
    """Propagation delay of changes that this call makes."""
    routed_to: str
    """The location that the request was sent to."""
    admit: Callable[[], None]
    """Called once the caller is authorised; raises what the service's bad day has in store for this call."""
    audit: Audit = field(default_factory=Audit)

    def about(self, resource: R) -> R:
        """What the record of this call is to name, when it is not what the caller must have a right to."""
        self.audit.resource = resource
        return resource


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one API. `run` raises GoogleError."""

    api: Api
    name: str
    """As in the audit log: `Encrypt`."""
    log: LogType | None
    """None: the method leaves no record (the documentation lists those)."""
    request: Callable[[], Message]
    """The protobuf class of the request."""
    run: Callable[[Call, Message], Message]


def operation(
    api: Api, name: str, log: LogType | None, request: type[Q], run: Callable[[Call, Q], proto.Message]
) -> Operation:
    """Of a method whose messages are kms_v1's."""

    def call(context: Call, message: Message) -> Message:
        answer = run(context, request.wrap(message))
        return type(answer).pb(answer)

    return Operation(api, name, log, request.pb(), call)


def target_of(resource: Resource) -> PolicyTarget | LocationName:
    """What carries the policy that decides about a resource: a version is decided by its key."""
    return resource.key if isinstance(resource, VersionName) else resource
