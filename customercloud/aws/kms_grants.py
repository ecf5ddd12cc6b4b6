"""Operations on grants: create, list, retire (by whom it names), revoke (by whom the key's policy allows)."""

from __future__ import annotations

import base64
import os
from typing import Any, Final

from customercloud.aws import arn as arns
from customercloud.aws.access import KeyAccess
from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError, not_found, validation_error
from customercloud.aws.grants import OPERATIONS, Constraints, Grant, Principal
from customercloud.aws.keys import Key
from customercloud.aws.kms import Operation, refuse_dry_run
from customercloud.aws.kms_steps import KeySteps, page
from customercloud.aws.params import Params, member_name
from customercloud.aws.state import AwsState

_MAX_GRANTS_OF_A_KEY: Final = 50_000
_TOKEN_SIZE_BYTES: Final = 96
_BY_NO_SERVICE: Final = {"kms:grantisforawsresource": ("false",)}
"""No service calls here on a user's behalf."""


class KmsGrants:
    def __init__(self, state: AwsState, access: KeyAccess, steps: KeySteps) -> None:
        self._state = state
        self._access = access
        self._steps = steps

    @property
    def operations(self) -> dict[str, Operation]:
        return {
            "CreateGrant": self.create_grant,
            "ListGrants": self.list_grants,
            "RetireGrant": self.retire_grant,
            "RevokeGrant": self.revoke_grant,
            "ListRetirableGrants": self.list_retirable_grants,
        }

    def create_grant(self, call: Call, params: Params) -> dict[str, Any]:
        grantee, retiring = self._principal(params, "Grantee"), self._principal(params, "Retiring")
        operations, constraints = frozenset(params.strings("Operations")), _constraints(params)
        if grantee is None:
            raise validation_error("You must specify either GranteePrincipal or GranteeServicePrincipal.")
        if grantee.is_service and constraints.source_arn is None:
            raise validation_error("You must specify a SourceArn grant constraint with a GranteeServicePrincipal.")
        if grantee.is_service and retiring is None:
            raise validation_error(
                "You must specify a RetiringPrincipal or RetiringServicePrincipal with a GranteeServicePrincipal."
            )
        name = params.optional_string("Name", 1, 256)
        logged: dict[str, Any] = {_member("grantee", grantee): grantee.arn, "operations": sorted(operations)}
        logged |= {} if retiring is None else {_member("retiring", retiring): retiring.arn}
        logged |= {} if name is None else {"name": name}
        shown = _shown(constraints)
        logged |= {"constraints": {member_name(kind): value for kind, value in shown.items()}} if shown else {}
        key = self._key_for_grant(call, params, logged, operations, constraints)
        key.require_enabled(key.state)
        if beyond := sorted(operations - OPERATIONS):
            raise validation_error(f"Grant operation {beyond[0]} is not valid for {key.arn}")
        refuse_dry_run(params)
        grant = self._same_again(key, name, grantee, retiring, operations, constraints)
        if grant is None:
            if sum(g.key_id == key.key_id for g in self._state.snapshot.grants.values()) >= _MAX_GRANTS_OF_A_KEY:
                raise AwsError("LimitExceededException", f"{key.arn} has {_MAX_GRANTS_OF_A_KEY} grants already")
            grant = Grant(
                grant_id=os.urandom(32).hex(),
                token=base64.b64encode(os.urandom(_TOKEN_SIZE_BYTES)).decode("ascii"),
                key_id=key.key_id,
                account_id=key.account_id,
                issuing_account=call.caller.caller.account_id,
                name=name,
                grantee=grantee,
                retiring=retiring,
                operations=tuple(sorted(operations)),
                constraints=constraints,
                created_at=call.now,
                visible_at=call.now + self._steps.delay(),
            )
            self._state.put_grant(grant)
        call.audit.response_elements = {"grantId": grant.grant_id, "keyId": key.arn}
        return {"GrantId": grant.grant_id, "GrantToken": grant.token}

    def list_grants(self, call: Call, params: Params) -> dict[str, Any]:
        grant_id = params.optional_string("GrantId", 1, 128)
        grantee = params.optional_string("GranteePrincipal") or params.optional_string("GranteeServicePrincipal")
        key = self._steps.key(call, params, read_only=True, conditions=_BY_NO_SERVICE)
        if grant_id is not None:
            _check_grant_id(grant_id)
        return self._listed(
            call,
            params,
            lambda grant: (
                grant.key_id == key.key_id
                and grant_id in (None, grant.grant_id)
                and grantee in (None, grant.grantee.arn)
            ),
        )

    def list_retirable_grants(self, call: Call, params: Params) -> dict[str, Any]:
        member = "RetiringServicePrincipal" if params.has("RetiringServicePrincipal") else "RetiringPrincipal"
        retiring = params.optional_string(member)
        if retiring is None:
            raise validation_error("You must specify a retiring principal.")
        call.audit.request_parameters = {member_name(member): retiring}
        self._access.authorize_account(call)
        account_id = call.caller.caller.account_id
        return self._listed(
            call,
            params,
            lambda grant: (
                grant.account_id == account_id and grant.retiring is not None and grant.retiring.arn == retiring
            ),
        )

    def revoke_grant(self, call: Call, params: Params) -> None:
        grant_id = params.string("GrantId", 1, 128)
        key = self._steps.key(call, params, {"grantId": grant_id}, conditions=_BY_NO_SERVICE)
        grant = self._existing(key, grant_id)
        refuse_dry_run(params)
        self._end(call, grant)

    def retire_grant(self, call: Call, params: Params) -> None:
        """By token, or by key and grant id. Who may is in the grant itself; a Deny in a policy still counts."""
        call.audit.read_only = False
        grant, key = self._named(call, params)
        call.audit.request_parameters = {"keyId": key.arn, "grantId": grant.grant_id}
        self._access.authorize_retiring(call, key, grant)
        refuse_dry_run(params)
        self._end(call, grant)

    # ── steps ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _key_for_grant(
        self, call: Call, params: Params, logged: dict[str, Any], operations: frozenset[str], constraints: Constraints
    ) -> Key:
        """The key, with the caller authorised: by policies, or by a grant that lets it pass these operations on."""
        call.audit.read_only = False
        call.audit.request_parameters = {"keyId": params.string("KeyId")} | logged
        key = self._access.resolve(call, params.string("KeyId"), alias=False)
        conditions = {**_BY_NO_SERVICE, "kms:grantoperations": tuple(sorted(operations))}
        conditions |= {f"kms:{member.lower()}": (logged[member],) for member in logged if member.endswith("Principal")}
        if shown := _shown(constraints):
            conditions["kms:grantconstrainttype"] = tuple(shown)
        if constraints.source_arn is not None:
            conditions["kms:grantconstraintsourcearn"] = (constraints.source_arn,)
        self._access.authorize(
            call,
            key,
            grant_tokens=params.strings("GrantTokens"),
            more=conditions,
            passes_on=lambda parent: parent.may_pass_on(operations, constraints),
        )
        call.audit.request_parameters["keyId"] = key.arn
        return key

    def _principal(self, params: Params, role: str) -> Principal | None:
        """Of `<role>Principal` or `<role>ServicePrincipal`."""
        arn, service = params.optional_string(f"{role}Principal"), params.optional_string(f"{role}ServicePrincipal")
        if arn is not None and service is not None:
            raise validation_error(f"You can specify either {role}Principal or {role}ServicePrincipal, but not both.")
        if service is not None:
            return Principal(arn=service, unique_id=None, is_service=True)
        if arn is None:
            return None
        if arns.is_account_id(arn):
            arn = arns.root_arn(arn)
        unique_id = self._state.unique_id(arn)
        parsed = arns.Arn.parse(arn)
        is_account = parsed is not None and arn == arns.root_arn(parsed.account_id)
        known = is_account and parsed is not None and parsed.account_id in self._state.snapshot.accounts
        if unique_id is None and not known:
            raise AwsError("InvalidArnException", f"{arn} is not a valid principal")
        return Principal(arn=arn, unique_id=unique_id)

    def _same_again(
        self,
        key: Key,
        name: str | None,
        grantee: Principal,
        retiring: Principal | None,
        operations: frozenset[str],
        constraints: Constraints,
    ) -> Grant | None:
        """A named request that is repeated makes no second grant."""
        if name is None:
            return None
        wanted = (key.key_id, name, grantee, retiring, operations, constraints)
        return next(
            (
                g
                for g in self._state.snapshot.grants.values()
                if g.is_listed
                and (g.key_id, g.name, g.grantee, g.retiring, frozenset(g.operations), g.constraints) == wanted
            ),
            None,
        )

    def _named(self, call: Call, params: Params) -> tuple[Grant, Key]:
        token, grant_id = params.optional_string("GrantToken", 1, 8192), params.optional_string("GrantId", 1, 128)
        if token is not None and grant_id is None and not params.has("KeyId"):
            grant = self._access.grant_of_token(token)
            return grant, self._state.snapshot.keys[grant.key_id]
        if token is not None or grant_id is None or not params.has("KeyId"):
            raise validation_error("You must specify either a grant token or a key ID and a grant ID.")
        key = self._access.resolve(call, params.string("KeyId"), alias=False)
        return self._existing(key, grant_id), key

    def _existing(self, key: Key, grant_id: str) -> Grant:
        _check_grant_id(grant_id)
        grant = self._state.snapshot.grants.get(grant_id)
        if grant is None or grant.key_id != key.key_id or not grant.is_listed:
            raise not_found(f"Grant ID {grant_id} not found")
        return grant

    def _end(self, call: Call, grant: Grant) -> None:
        """Gone from listings now, and without effect after the propagation delay."""
        delay = self._steps.delay()
        if delay:
            self._state.put_grant(grant.model_copy(update={"ends_at": call.now + delay}))
        else:
            self._state.remove_grant(grant)

    def _listed(self, call: Call, params: Params, wanted: Any) -> dict[str, Any]:
        found = {
            f"{grant.created_at.timestamp():020.6f} {grant.grant_id}": grant
            for grant in self._state.snapshot.grants.values()
            if grant.is_listed and wanted(grant)
        }
        names, paging = page(sorted(found), call, params)
        return {"Grants": [self._entry(found[name]) for name in names]} | paging

    def _entry(self, grant: Grant) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "KeyId": self._state.snapshot.keys[grant.key_id].arn,
            "GrantId": grant.grant_id,
            "Name": grant.name or "",
            "CreationDate": grant.created_at.timestamp(),
            _member("Grantee", grant.grantee): grant.grantee.arn,
            "IssuingAccount": arns.root_arn(grant.issuing_account),
            "Operations": list(grant.operations),
        }
        if grant.retiring is not None:
            entry[_member("Retiring", grant.retiring)] = grant.retiring.arn
        if shown := _shown(grant.constraints):
            entry["Constraints"] = shown
        return entry


def _member(role: str, principal: Principal) -> str:
    return f"{role}{'Service' if principal.is_service else ''}Principal"


def _shown(constraints: Constraints) -> dict[str, Any]:
    given = {
        "EncryptionContextEquals": constraints.equals,
        "EncryptionContextSubset": constraints.subset,
        "SourceArn": constraints.source_arn,
    }
    return {kind: value for kind, value in given.items() if value is not None}


def _constraints(params: Params) -> Constraints:
    given = params.structure("Constraints")
    if given is None:
        return Constraints()
    subset = given.encryption_context("EncryptionContextSubset") or None
    equals = given.encryption_context("EncryptionContextEquals") or None
    if subset is not None and equals is not None:
        raise validation_error("Only one of EncryptionContextSubset and EncryptionContextEquals can be given")
    return Constraints(subset=subset, equals=equals, source_arn=given.optional_string("SourceArn"))


def _check_grant_id(grant_id: str) -> None:
    if len(grant_id) != 64 or not set(grant_id) <= set("0123456789abcdef"):
        raise AwsError("InvalidGrantIdException", f"Grant ID {grant_id} is not valid")
