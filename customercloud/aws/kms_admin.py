"""Management operations of KMS on keys: life cycle, policies, rotation, listings."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Final

from customercloud.aws import arn as arns
from customercloud.aws.access import KeyAccess, kind_conditions
from customercloud.aws.authorization import Binding, authorize
from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError, not_found, unsupported, validation_error
from customercloud.aws.keys import (
    DEFAULT_ROTATION_PERIOD_DAYS,
    MAX_DELETION_WINDOW_DAYS,
    MIN_DELETION_WINDOW_DAYS,
    Key,
    KeyOrigin,
    KeyPolicy,
    KeyState,
)
from customercloud.aws.kms import Operation
from customercloud.aws.kms_steps import KeySteps, new_tags, page, tag_conditions, tag_list
from customercloud.aws.params import Params
from customercloud.aws.patterns import MalformedPolicyError
from customercloud.aws.policy import PolicyKind, parse_policy
from customercloud.aws.state import AwsState

_POLICY_NAME: Final = "default"
_MAX_POLICY_SIZE_CHARACTERS: Final = 131_072
_SPEC: Final = "SYMMETRIC_DEFAULT"
_USAGE: Final = "ENCRYPT_DECRYPT"


def default_policy(account_id: str) -> str:
    """What CreateKey stores when no policy is given: the account decides by its identity policies."""
    statement = {
        "Sid": "Enable IAM User Permissions",
        "Effect": "Allow",
        "Principal": {"AWS": arns.root_arn(account_id)},
        "Action": "kms:*",
        "Resource": "*",
    }
    return json.dumps({"Version": "2012-10-17", "Id": "key-default-1", "Statement": [statement]}, indent=2)


def key_metadata(key: Key) -> dict[str, Any]:
    """KeyMetadata as DescribeKey and CreateKey answer it."""
    metadata: dict[str, Any] = {
        "AWSAccountId": key.account_id,
        "KeyId": key.key_id,
        "Arn": key.arn,
        "CreationDate": key.created_at.timestamp(),
        "Enabled": key.state is KeyState.ENABLED,
        "Description": key.description,
        "KeyUsage": "ENCRYPT_DECRYPT",
        "KeyState": key.state.value,
        "Origin": key.origin.value,
        "KeyManager": "CUSTOMER",
        "CustomerMasterKeySpec": "SYMMETRIC_DEFAULT",
        "KeySpec": "SYMMETRIC_DEFAULT",
        "EncryptionAlgorithms": ["SYMMETRIC_DEFAULT"],
        "MultiRegion": False,
    }
    if key.materials:
        metadata["CurrentKeyMaterialId"] = key.current_material_id
    if key.materials and key.origin is KeyOrigin.EXTERNAL:
        expires = key.material_expires_at
        metadata["ExpirationModel"] = "KEY_MATERIAL_DOES_NOT_EXPIRE" if expires is None else "KEY_MATERIAL_EXPIRES"
        metadata |= {} if expires is None else {"ValidTo": expires.timestamp()}
    if key.deletion_date is not None:
        metadata["DeletionDate"] = key.deletion_date.timestamp()
    return metadata


def _refuse_other_kinds(params: Params) -> None:
    """Only symmetric keys exist here; what makes no sense on AWS either is said in its words."""
    spec, usage = params.optional_string("KeySpec"), params.optional_string("KeyUsage")
    if spec is not None and params.has("CustomerMasterKeySpec"):
        raise validation_error(
            "You cannot specify KeySpec and CustomerMasterKeySpec in the same request. "
            "CustomerMasterKeySpec is deprecated."
        )
    spec = spec or params.optional_string("CustomerMasterKeySpec") or _SPEC
    if spec != _SPEC and usage is None:
        raise validation_error(
            "You must specify a KeyUsage value for all KMS keys except for symmetric encryption keys."
        )
    if spec == _SPEC and usage not in (None, _USAGE):
        raise validation_error(f"KeyUsage {usage} is not compatible with KeySpec {spec}")
    if spec != _SPEC:
        raise unsupported(f"only {_SPEC} keys exist here")
    if params.optional_string("Origin") not in (None, *KeyOrigin):
        raise unsupported("custom key stores do not exist here")
    if params.boolean("MultiRegion") or params.has("CustomKeyStoreId") or params.has("XksKeyId"):
        raise unsupported("multi-Region keys and custom key stores do not exist here")


def _bypass_condition(bypass: bool) -> dict[str, tuple[str, ...]]:
    return {"kms:bypasspolicylockoutsafetycheck": (str(bypass).lower(),)}


class KmsAdmin:
    def __init__(self, state: AwsState, access: KeyAccess, steps: KeySteps) -> None:
        self._state = state
        self._access = access
        self._steps = steps

    @property
    def operations(self) -> dict[str, Operation]:
        return {
            "CreateKey": self.create_key,
            "DescribeKey": self.describe_key,
            "UpdateKeyDescription": self.update_key_description,
            "ListKeys": self.list_keys,
            "EnableKey": self.enable_key,
            "DisableKey": self.disable_key,
            "ScheduleKeyDeletion": self.schedule_key_deletion,
            "CancelKeyDeletion": self.cancel_key_deletion,
            "PutKeyPolicy": self.put_key_policy,
            "GetKeyPolicy": self.get_key_policy,
            "ListKeyPolicies": self.list_key_policies,
            "EnableKeyRotation": self.enable_key_rotation,
            "DisableKeyRotation": self.disable_key_rotation,
            "GetKeyRotationStatus": self.get_key_rotation_status,
            "RotateKeyOnDemand": self.rotate_key_on_demand,
            "ListKeyRotations": self.list_key_rotations,
        }

    # ── keys ───────────────────────────────────────────────────────────────────────────────────────────────────

    def create_key(self, call: Call, params: Params) -> dict[str, Any]:
        account_id = call.caller.caller.account_id
        description = params.optional_string("Description", 0, 8192) or ""
        document = params.optional_string("Policy", 1, _MAX_POLICY_SIZE_CHARACTERS)
        bypass = params.boolean("BypassPolicyLockoutSafetyCheck")
        origin = params.optional_string("Origin") or KeyOrigin.AWS_KMS.value
        call.audit.read_only = False
        call.audit.request_parameters = {
            "description": description,
            "keyUsage": "ENCRYPT_DECRYPT",
            "keySpec": "SYMMETRIC_DEFAULT",
            "origin": origin,
            "multiRegion": False,
            "bypassPolicyLockoutSafetyCheck": bypass,
        } | ({"policy": document} if document is not None else {})
        tags = new_tags({}, params)
        if tags:
            call.audit.request_parameters["tags"] = tag_list(tags)
        _refuse_other_kinds(params)
        more = {**kind_conditions(KeyOrigin(origin)), **_bypass_condition(bypass), **tag_conditions(tags)}
        self._access.authorize_account(call, more=more)
        policy = self._parsed_policy(document or default_policy(account_id))
        key = Key.new(account_id, self._state.region, description, policy, call.now, tags, KeyOrigin(origin))
        if not bypass:
            self._refuse_lockout(call, key, policy)
        self._state.put_key(key)
        self._access.audit(call, key)
        call.audit.response_elements = {
            "keyMetadata": {name[:1].lower() + name[1:]: value for name, value in key_metadata(key).items()}
        }
        return {"KeyMetadata": key_metadata(key)}

    def describe_key(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params, read_only=True, alias=True)
        return {"KeyMetadata": key_metadata(key)}

    def update_key_description(self, call: Call, params: Params) -> None:
        description = params.string("Description", 0, 8192)
        key = self._steps.key(call, params, {"description": description})
        self._steps.change(call, key.described_as(description))

    def list_keys(self, call: Call, params: Params) -> dict[str, Any]:
        call.audit.request_parameters = None
        self._access.authorize_account(call)
        own = {k.key_id: k for k in self._state.snapshot.keys.values() if k.account_id == call.caller.caller.account_id}
        ids, paging = page(sorted(own), call, params)
        return {"Keys": [{"KeyId": key_id, "KeyArn": own[key_id].arn} for key_id in ids]} | paging

    def enable_key(self, call: Call, params: Params) -> None:
        key = self._steps.key(call, params)
        self._steps.change(call, key.enable(call.now, self._steps.delay()))

    def disable_key(self, call: Call, params: Params) -> None:
        key = self._steps.key(call, params)
        self._steps.change(call, key.disable(call.now, self._steps.delay()))

    def schedule_key_deletion(self, call: Call, params: Params) -> dict[str, Any]:
        given = params.integer("PendingWindowInDays", MIN_DELETION_WINDOW_DAYS, MAX_DELETION_WINDOW_DAYS)
        days = MAX_DELETION_WINDOW_DAYS if given is None else given
        conditions = {"kms:schedulekeydeletionpendingwindowindays": (str(days),)}
        key = self._steps.key(call, params, {"pendingWindowInDays": days}, conditions=conditions)
        deleted = key.schedule_deletion(days, call.now, self._steps.delay())
        self._steps.change(call, deleted)
        assert deleted.deletion_date is not None  # noqa: S101 - schedule_deletion sets it
        answer = {
            "KeyId": key.arn,
            "DeletionDate": deleted.deletion_date.timestamp(),
            "KeyState": deleted.state.value,
            "PendingWindowInDays": days,
        }
        call.audit.response_elements = {
            "keyId": key.arn,
            "deletionDate": deleted.deletion_date.isoformat(),
            "keyState": deleted.state.value,
            "pendingWindowInDays": days,
        }
        return answer

    def cancel_key_deletion(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params)
        self._steps.change(call, key.cancel_deletion(call.now, self._steps.delay()))
        return {"KeyId": key.arn}

    # ── policies ───────────────────────────────────────────────────────────────────────────────────────────────

    def put_key_policy(self, call: Call, params: Params) -> None:
        document = params.string("Policy", 1, _MAX_POLICY_SIZE_CHARACTERS)
        bypass = params.boolean("BypassPolicyLockoutSafetyCheck")
        name = self._policy_name(params)
        logged = {"policy": document, "policyName": name, "bypassPolicyLockoutSafetyCheck": bypass}
        key = self._steps.key(call, params, logged, conditions=_bypass_condition(bypass))
        policy = self._parsed_policy(document)
        if not bypass:
            self._refuse_lockout(call, key, policy)
        self._steps.change(call, key.put_policy(policy, call.now, self._steps.delay()))

    def get_key_policy(self, call: Call, params: Params) -> dict[str, Any]:
        name = self._policy_name(params)
        key = self._steps.key(call, params, {"policyName": name}, read_only=True)
        return {"Policy": key.policy.document, "PolicyName": name}

    def list_key_policies(self, call: Call, params: Params) -> dict[str, Any]:
        self._steps.key(call, params, read_only=True)
        names, paging = page([_POLICY_NAME], call, params)
        return {"PolicyNames": names} | paging

    @staticmethod
    def _policy_name(params: Params) -> str:
        name = params.optional_string("PolicyName", 1, 128) or _POLICY_NAME
        if name != _POLICY_NAME:
            raise not_found("No such policy exists")
        return name

    def _parsed_policy(self, document: str) -> KeyPolicy:
        try:
            binding = self._state.bind_principals(parse_policy(document, PolicyKind.KEY))
        except MalformedPolicyError as error:
            raise AwsError("MalformedPolicyDocumentException", str(error)) from None
        return KeyPolicy(document=document, binding=dict(binding))

    def _refuse_lockout(self, call: Call, key: Key, policy: KeyPolicy) -> None:
        """AWS's safety check: the caller must still be able to change the policy under the new one."""
        future = replace(call, action="PutKeyPolicy")
        binding: Binding = policy.binding
        refusal = authorize(
            call.caller.caller,
            "kms:PutKeyPolicy",
            key.arn,
            {**self._access.conditions(future, key), **_bypass_condition(False)},
            owner_account_id=key.account_id,
            resource_policy=parse_policy(policy.document, PolicyKind.KEY),
            binding=binding,
        )
        if refusal is not None:
            raise AwsError(
                "MalformedPolicyDocumentException",
                "The new key policy will not allow you to update the key policy in the future.",
            )

    # ── rotation ───────────────────────────────────────────────────────────────────────────────────────────────

    def enable_key_rotation(self, call: Call, params: Params) -> None:
        given = params.integer("RotationPeriodInDays", 90, 2560)
        days = DEFAULT_ROTATION_PERIOD_DAYS if given is None else given
        conditions = {"kms:rotationperiodindays": (str(days),)}
        key = self._steps.key(call, params, {"rotationPeriodInDays": days}, conditions=conditions)
        self._steps.change(call, key.enable_rotation(days, call.now))

    def disable_key_rotation(self, call: Call, params: Params) -> None:
        key = self._steps.key(call, params)
        self._steps.change(call, key.disable_rotation())

    def get_key_rotation_status(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params, read_only=True)
        # A key that waits for its deletion is not rotated, whatever was set (Developer Guide, "Rotating keys").
        rotates = key.next_rotation is not None and key.state is not KeyState.PENDING_DELETION
        answer: dict[str, Any] = {"KeyRotationEnabled": rotates, "KeyId": key.key_id}
        if rotates and key.next_rotation is not None:
            answer |= {
                "RotationPeriodInDays": key.rotation_period_days,
                "NextRotationDate": key.next_rotation.timestamp(),
            }
        return answer

    def rotate_key_on_demand(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params)
        self._steps.change(call, key.rotate_on_demand(call.now, self._steps.delay()))
        return {"KeyId": key.arn}

    def list_key_rotations(self, call: Call, params: Params) -> dict[str, Any]:
        include = params.choice("IncludeKeyMaterial", ("ALL_KEY_MATERIAL", "ROTATIONS_ONLY"))
        key = self._steps.key(call, params, read_only=True)
        materials = {
            f"{index:06d}": material
            for index, material in enumerate(key.materials)
            if include == "ALL_KEY_MATERIAL" or material.rotation_type is not None
        }
        places, paging = page(sorted(materials), call, params)
        rotations = []
        for place in places:
            material = materials[place]
            rotation: dict[str, Any] = {
                "KeyId": key.key_id,
                "KeyMaterialId": material.material_id,
                "KeyMaterialState": "CURRENT" if material is key.current_material else "NON_CURRENT",
            }
            if material.rotation_type is not None:
                rotation |= {
                    "RotationDate": material.created_at.timestamp(),
                    "RotationType": material.rotation_type,
                }
            rotations.append(rotation)
        return {"Rotations": rotations} | paging
