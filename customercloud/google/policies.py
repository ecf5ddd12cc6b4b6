"""getIamPolicy, setIamPolicy and testIamPermissions of every resource that carries a policy; ListLocations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from google.cloud.location import locations_pb2
from google.iam.v1 import iam_policy_pb2, policy_pb2
from google.protobuf.message import Message

from customercloud.google.access import Access
from customercloud.google.call import Api, Call, LogType, Operation
from customercloud.google.errors import Code, GoogleError, bad_request, invalid_argument, not_found
from customercloud.google.iam import (
    ALL_SERVICES,
    EMPTY_ETAG,
    ROLES,
    AuditConfig,
    AuditConfigs,
    AuditLog,
    Binding,
    Bindings,
    Policy,
    is_member,
)
from customercloud.google.names import (
    LOCATIONS,
    KeyName,
    LocationName,
    PolicyTarget,
    ProjectName,
    RingName,
    ServiceAccountName,
    check_location,
    parse_policy_target,
)
from customercloud.google.state import GoogleState

_MAX_MEMBERS: Final = 1500
_DEFAULT_MASK: Final = {"bindings", "etag"}
"""Of a request without one (google.iam.v1.SetIamPolicyRequest): it leaves the audit configs as they are."""
_LOG_TYPES: Final = {
    policy_pb2.AuditLogConfig.ADMIN_READ: "ADMIN_READ",
    policy_pb2.AuditLogConfig.DATA_WRITE: "DATA_WRITE",
    policy_pb2.AuditLogConfig.DATA_READ: "DATA_READ",
}


class Policies:
    def __init__(self, state: GoogleState, access: Access) -> None:
        self._state = state
        self._access = access

    def operations(self, api: Api) -> list[Operation]:
        """The three methods as `api` has them: each API answers for its own resources."""

        def of_api(run: Callable[[Call, PolicyTarget, Message], Message]) -> Callable[[Call, Message], Message]:
            def checked(call: Call, message: Message) -> Message:
                target = self._target(message.resource)
                if _api_of(target) is not api:
                    raise invalid_argument(f"{target} is no resource of {api.domain}.")
                return run(call, target, message)

            return checked

        get, put, test = (
            iam_policy_pb2.GetIamPolicyRequest,
            iam_policy_pb2.SetIamPolicyRequest,
            iam_policy_pb2.TestIamPermissionsRequest,
        )
        return [
            Operation(api, "GetIamPolicy", LogType.ADMIN_READ, get, of_api(self._get)),
            Operation(api, "SetIamPolicy", LogType.ADMIN_WRITE, put, of_api(self._set)),
            Operation(api, "TestIamPermissions", None, test, of_api(self._test)),
        ]

    def _target(self, name: str) -> PolicyTarget:
        target = parse_policy_target(name)
        if isinstance(target, ServiceAccountName) and target.project == "-":
            return self._access.account(target.email) or target
        return target

    def _get(self, call: Call, target: PolicyTarget, _: Message) -> Message:
        self._access.require(call, f"{_kind(target)}.getIamPolicy", target)
        self._check_exists(target)
        return _message(self._state.policy(target))

    def _set(self, call: Call, target: PolicyTarget, request: Message) -> Message:
        """Read, change, write: an etag that is not the newest one is refused."""
        self._access.require(call, f"{_kind(target)}.setIamPolicy", target)
        self._check_exists(target)
        current = self._state.policy(target)
        asked = request.policy
        if asked.etag and asked.etag != (EMPTY_ETAG if current is None else current.etag):
            raise GoogleError(
                Code.ABORTED,
                "There were concurrent policy changes. Please retry the whole read-modify-write with exponential "
                "backoff.",
            )
        paths = set(request.update_mask.paths) or _DEFAULT_MASK
        if paths - _DEFAULT_MASK - {"version", "audit_configs"}:
            raise bad_request("update_mask", "Only bindings and audit_configs can be updated.")
        configs = self._audit_configs(target, asked) if "audit_configs" in paths else None
        kept = () if current is None else current.bindings
        bindings = self._bindings(asked) if "bindings" in paths else kept
        return _message(self._state.put_policy(target, bindings, call.now, call.delay, configs))

    def _test(self, call: Call, target: PolicyTarget, request: Message) -> Message:
        """Those of the permissions that the caller has; none on what does not exist."""
        if any("*" in permission for permission in request.permissions):
            raise invalid_argument("Permissions with wildcards are not allowed.")
        held = [p for p in dict.fromkeys(request.permissions) if self._access.holds(call, p, target)]
        return iam_policy_pb2.TestIamPermissionsResponse(permissions=held if self._exists(target) else [])

    def _bindings(self, policy: policy_pb2.Policy) -> Bindings:
        if any(binding.HasField("condition") for binding in policy.bindings):
            # What is stored but not obeyed would be a policy that nobody enforces.
            raise invalid_argument("Conditions are not supported on this resource.")
        members: dict[str, set[str]] = {}
        for binding in policy.bindings:
            if binding.role not in ROLES:
                raise invalid_argument(f"Role {binding.role[:128]} is not supported for this resource.")
            for member in binding.members:
                self._check_member(member)
            members.setdefault(binding.role, set()).update(binding.members)
        if sum(len(m) for m in members.values()) > _MAX_MEMBERS:
            raise invalid_argument(f"The number of members in the policy is larger than {_MAX_MEMBERS}.")
        return tuple(Binding(role=role, members=frozenset(m)) for role, m in sorted(members.items()) if m)

    def _audit_configs(self, target: PolicyTarget, policy: policy_pb2.Policy) -> AuditConfigs:
        if policy.audit_configs and not isinstance(target, ProjectName):
            raise invalid_argument("Audit configs are not supported on this resource.")
        return tuple(self._audit_config(config) for config in policy.audit_configs)

    def _audit_config(self, config: policy_pb2.AuditConfig) -> AuditConfig:
        if config.service != ALL_SERVICES and not re.fullmatch(r"[a-z0-9-]{1,63}\.googleapis\.com", config.service):
            raise invalid_argument(f"Invalid service in audit config: {config.service[:128]}")
        if not config.audit_log_configs:
            raise invalid_argument("An audit config must have at least one audit log config.")
        logs = []
        for log in config.audit_log_configs:
            if log.log_type not in _LOG_TYPES:
                raise invalid_argument("The log type of an audit log config must be specified.")
            for member in log.exempted_members:
                self._check_member(member)
            logs.append(AuditLog(log_type=_LOG_TYPES[log.log_type], exempted=frozenset(log.exempted_members)))
        return AuditConfig(service=config.service, logs=tuple(logs))

    def _check_member(self, member: str) -> None:
        if not is_member(member):
            raise invalid_argument(f"Invalid member: {member[:256]}")
        kind, _, email = member.partition(":")
        if kind == "serviceAccount" and email not in self._state.snapshot.accounts:
            raise invalid_argument(f"Service account {email[:256]} does not exist.")

    def _exists(self, target: PolicyTarget) -> bool:
        match target:
            case KeyName():
                return self._state.key(target) is not None
            case RingName():
                return self._state.ring(target) is not None
            case ServiceAccountName():
                return self._access.account(target.email) == target
            case ProjectName():
                return target.project in self._state.snapshot.projects

    def _check_exists(self, target: PolicyTarget) -> None:
        if not self._exists(target):
            raise not_found(f"{target} not found.")


class Locations:
    """google.cloud.location.Locations: needs a permission, leaves no record."""

    def __init__(self, access: Access) -> None:
        self._access = access

    @property
    def operations(self) -> list[Operation]:
        return [
            Operation(Api.KMS, "ListLocations", None, locations_pb2.ListLocationsRequest, self._list),
            Operation(Api.KMS, "GetLocation", None, locations_pb2.GetLocationRequest, self._get),
        ]

    def _list(self, call: Call, request: Message) -> Message:
        target = parse_policy_target(request.name)
        self._access.require(call, "cloudkms.locations.list", target)
        names = [LocationName(target.project, location) for location in sorted(LOCATIONS)]
        return locations_pb2.ListLocationsResponse(locations=[_location(name) for name in names])

    def _get(self, call: Call, request: Message) -> Message:
        name = LocationName.parse(request.name)
        check_location(name.location, call.routed_to)
        self._access.require(call, "cloudkms.locations.get", name)
        return _location(name)


def _location(name: LocationName) -> Message:
    return locations_pb2.Location(name=str(name), location_id=name.location)


def _api_of(target: PolicyTarget) -> Api:
    match target:
        case KeyName() | RingName():
            return Api.KMS
        case ServiceAccountName():
            return Api.IAM
        case ProjectName():
            return Api.RESOURCE_MANAGER


def _kind(target: PolicyTarget) -> str:
    """What permissions on it begin with."""
    match target:
        case KeyName():
            return "cloudkms.cryptoKeys"
        case RingName():
            return "cloudkms.keyRings"
        case ServiceAccountName():
            return "iam.serviceAccounts"
        case ProjectName():
            return "resourcemanager.projects"


def _message(policy: Policy | None) -> policy_pb2.Policy:
    if policy is None:
        return policy_pb2.Policy(etag=EMPTY_ETAG)
    bindings = [policy_pb2.Binding(role=b.role, members=sorted(b.members)) for b in policy.bindings]
    configs = [
        policy_pb2.AuditConfig(
            service=config.service,
            audit_log_configs=[
                policy_pb2.AuditLogConfig(
                    log_type=policy_pb2.AuditLogConfig.LogType.Value(log.log_type),
                    exempted_members=sorted(log.exempted),
                )
                for log in config.logs
            ],
        )
        for config in policy.audit_configs or ()
    ]
    return policy_pb2.Policy(version=1, etag=policy.etag, bindings=bindings, audit_configs=configs)
