"""From a KeyId in a request to a key that the caller may use: resolution and authorisation, as all operations need."""

from __future__ import annotations

import datetime as dt
import hmac
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from customercloud.aws import arn as arns
from customercloud.aws.authorization import Caller, Refusal, authorize, message
from customercloud.aws.cloudtrail import KEY_RESOURCE_TYPE, Call, Resource
from customercloud.aws.errors import AwsError, access_denied, not_found
from customercloud.aws.grants import Grant
from customercloud.aws.keys import Key, KeyOrigin
from customercloud.aws.patterns import Context
from customercloud.aws.policy import PolicyKind, Verdict, identity_verdict, parse_policy
from customercloud.aws.state import AwsState
from customercloud.faults import Service

_FOREIGN_SENTENCE: Final = (
    "because the resource does not exist in this Region, no resource-based policies allow access, "
    "or a resource-based policy explicitly denies access"
)
_FOREIGN_CIPHERTEXT: Final = (
    "The ciphertext refers to a customer master key that does not exist, does not exist in this region, "
    "or you are not allowed to access."
)


def kind_conditions(origin: KeyOrigin) -> dict[str, tuple[str, ...]]:
    """What policies can test of a key here, and of a request that makes one."""
    return {
        "kms:keyspec": ("SYMMETRIC_DEFAULT",),
        "kms:customermasterkeyspec": ("SYMMETRIC_DEFAULT",),
        "kms:keyusage": ("ENCRYPT_DECRYPT",),
        "kms:customermasterkeyusage": ("ENCRYPT_DECRYPT",),
        "kms:keyorigin": (origin.value,),
        "kms:multiregion": ("false",),
    }


def condition_context(call: Call, resource_account_id: str) -> dict[str, tuple[str, ...]]:
    """The global condition keys of a call, in lower case (`conditions._GIVEN`)."""
    caller, session = call.caller.caller, call.caller.session
    context: dict[str, tuple[str, ...]] = {
        "aws:principalarn": (caller.issuer_arn,),
        "aws:principalaccount": (caller.account_id,),
        "aws:principaltype": (call.caller.principal_type,),
        "aws:principalisawsservice": ("false",),
        "aws:viaawsservice": ("false",),
        "aws:userid": (call.caller.user_id,),
        "aws:requestedregion": (call.region,),
        "aws:resourceaccount": (resource_account_id,),
        "aws:currenttime": (call.now.isoformat(),),
        "aws:epochtime": (str(int(call.now.timestamp())),),
        "aws:securetransport": (str(call.secure_transport).lower(),),
        "aws:sourceip": (call.source_ip,),
        "aws:useragent": (call.user_agent,),
    }
    context |= {f"aws:principaltag/{name.lower()}": (value,) for name, value in caller.tags.items()}
    if call.caller.principal_type == "User":
        context["aws:username"] = (call.caller.user_name,)
    if session is not None:
        context["aws:tokenissuetime"] = (session.issued_at.isoformat(),)
        # Only temporary credentials say it: a long-term access key carries neither true nor false.
        context["aws:multifactorauthpresent"] = ("false",)
        if session.source_identity is not None:
            context["aws:sourceidentity"] = (session.source_identity,)
    return context


class KeyAccess:
    def __init__(self, state: AwsState) -> None:
        self._state = state

    def resolve(self, call: Call, key_id: str, *, alias: bool = True) -> Key:
        """`key_id` is a key id or key ARN or, where the operation takes an `alias`, an alias name or alias ARN.

        Raises InvalidArnException; NotFoundException; AccessDeniedException for a missing key of another account,
        which does not tell whether it exists.
        """
        region, own_account = self._state.region, call.caller.caller.account_id
        account, resource = own_account, key_id
        if key_id.startswith("arn:"):
            arn = arns.Arn.parse(key_id)
            if arn is None or arn.service != "kms" or not arns.is_account_id(arn.account_id):
                raise AwsError("InvalidArnException", f"Invalid arn {key_id}")
            if arn.region != region:
                raise not_found(f"Invalid arn {arn.region}")
            account, resource = arn.account_id, arn.resource
            if resource.startswith(arns.ALIAS_PREFIX) and not alias:
                raise AwsError("InvalidArnException", f"{key_id} is not a key ARN")
            if not resource.startswith(("key/", arns.ALIAS_PREFIX)):
                raise AwsError("InvalidArnException", f"Invalid arn {key_id}")
        if resource.startswith(arns.ALIAS_PREFIX) and not alias:
            raise not_found(f"Invalid keyId '{resource}'")
        if resource.startswith(arns.ALIAS_PREFIX):
            alias_arn = arns.alias_arn(region, account, resource)
            named = self._state.snapshot.aliases.get(alias_arn)
            target = None if named is None else named.target(call.now)
            key = None if target is None else self._state.snapshot.keys.get(target)
            missing = not_found(f"Alias {alias_arn} is not found.")
        else:
            bare = resource.removeprefix("key/") if key_id.startswith("arn:") else resource
            if not arns.is_key_id(bare):
                raise not_found(f"Invalid keyId '{bare}'")
            key = self._state.snapshot.keys.get(bare)
            missing = not_found(f"Key '{arns.key_arn(region, account, bare)}' does not exist")
        if key is not None and key.account_id == account:
            return key
        if account != own_account:
            raise access_denied(
                f"User: {call.caller.caller.arn} is not authorized to perform: kms:{call.action} "
                f"on this resource {_FOREIGN_SENTENCE}"
            )
        raise missing

    def resolve_blob(self, key_id: str) -> Key:
        """The key that a ciphertext names. A missing one is AccessDenied on AWS, too."""
        key = self._state.snapshot.keys.get(key_id)
        if key is None:
            raise access_denied(_FOREIGN_CIPHERTEXT)
        return key

    def aliases_of(self, key: Key) -> list[str]:
        """As they stand, whether that is seen everywhere or not."""
        aliases = self._state.snapshot.aliases.values()
        return [alias.name for alias in aliases if alias.is_listed and alias.key_id == key.key_id]

    def _seen_aliases_of(self, key: Key, now: dt.datetime) -> tuple[str, ...]:
        aliases = self._state.snapshot.aliases.values()
        return tuple(alias.name for alias in aliases if alias.target(now) == key.key_id)

    def authorize(
        self,
        call: Call,
        key: Key,
        *,
        action: str | None = None,
        encryption_context: Mapping[str, str] | None = None,
        request_alias: str | None = None,
        grant_tokens: Iterable[str] = (),
        more: Context | None = None,
        passes_on: Callable[[Grant], bool] = lambda _: True,
    ) -> None:
        """Raises AccessDeniedException. `action` defaults to the call's. The key enters the call's audit first.

        `more`: condition keys of this operation. `passes_on`: what a grant must satisfy besides allowing the action.
        """
        self.audit(call, key)
        operation = action or call.action
        permission = f"kms:{operation}"
        policy = key.effective(call.now).policy
        caller = call.caller.caller
        conditions = {**self.conditions(call, key, encryption_context, request_alias), **(more or {})}
        tokens = frozenset(self.grant_of_token(token).token for token in grant_tokens)
        refusal = authorize(
            caller,
            permission,
            key.arn,
            conditions,
            owner_account_id=key.account_id,
            resource_policy=parse_policy(policy.document, PolicyKind.KEY),
            binding=policy.binding,
        )
        if refusal is None:
            return
        by_session = caller.session_verdict(permission, key.arn, conditions) is Verdict.ALLOW
        if not refusal.explicit and any(
            self._lends(grant, caller, permission, key, conditions) and (by_session or grant.grantee.is_session(caller))
            for grant in self._state.snapshot.grants.values()
            if grant.key_id == key.key_id
            and grant.in_force(call.now, tokens)
            and grant.allows(operation, encryption_context or {})
            and passes_on(grant)
        ):
            return
        if caller.account_id != key.account_id:
            raise access_denied(
                f"User: {caller.arn} is not authorized to perform: {permission} on this resource {_FOREIGN_SENTENCE}"
            )
        raise access_denied(message(caller, permission, key.arn, refusal))

    @staticmethod
    def _lends(grant: Grant, caller: Caller, permission: str, key: Key, conditions: Context) -> bool:
        """Is the caller the grantee? A foreign one, and one that is only of the account that is the grantee, needs an
        identity policy of its own account besides."""
        by_name = grant.grantee.is_caller(caller)
        if by_name and caller.account_id == key.account_id:
            return True
        by_identity = caller.is_root or (
            identity_verdict(caller.policies, permission, key.arn, conditions) is Verdict.ALLOW
        )
        return by_identity and (by_name or grant.grantee.is_account_of(caller))

    def authorize_retiring(self, call: Call, key: Key, grant: Grant) -> None:
        """The grant says who may retire it: its retiring principal, its grantee if RetireGrant is among its
        operations, and the account that issued it, by its identity policies. Raises AccessDeniedException."""
        self.audit(call, key)
        caller, permission = call.caller.caller, "kms:RetireGrant"
        conditions = self.conditions(call, key)
        refusal = authorize(
            caller,
            permission,
            key.arn,
            conditions,
            owner_account_id=caller.account_id,
            resource_policy=None,
            binding={},
        )
        named = [p for p in (grant.retiring, grant.grantee if "RetireGrant" in grant.operations else None) if p]
        by_session = caller.session_verdict(permission, key.arn, conditions) is Verdict.ALLOW
        if any(p.is_caller(caller) and (by_session or p.is_session(caller)) for p in named) and not (
            refusal and refusal.explicit
        ):
            return
        by_account = grant.issuing_account == caller.account_id or any(p.is_account_of(caller) for p in named)
        if refusal is None and by_account:
            return
        sentence = refusal or Refusal("because no grant allows the kms:RetireGrant action")
        raise access_denied(message(caller, permission, key.arn, sentence))

    def grant_of_token(self, token: str) -> Grant:
        """Raises InvalidGrantTokenException."""
        # A dictionary by token would save the search; tokens are for the first seconds of a grant's life.
        for grant in self._state.snapshot.grants.values():
            if hmac.compare_digest(grant.token.encode(), token.encode()):
                return grant
        raise AwsError("InvalidGrantTokenException", "The grant token is not valid.")

    def authorize_account(
        self, call: Call, resource: str = "*", *, action: str | None = None, more: Context | None = None
    ) -> None:
        """For actions without a key of their own (CreateKey, ListKeys, GenerateRandom): identity policies decide.

        `action` with its service's prefix; the call's own without it. Raises as the call's service words it.
        """
        caller = call.caller.caller
        permission = action or f"{call.service}:{call.action}"
        refusal = authorize(
            caller,
            permission,
            resource,
            {**condition_context(call, caller.account_id), **(more or {})},
            owner_account_id=caller.account_id,
            resource_policy=None,
            binding={},
        )
        if refusal is not None:
            sentence = message(caller, permission, resource, refusal)
            raise AwsError("AccessDenied", sentence, 403) if call.service is Service.STS else access_denied(sentence)

    @staticmethod
    def audit(call: Call, key: Key) -> None:
        call.audit.add_resource(Resource(key.account_id, KEY_RESOURCE_TYPE, key.arn))

    def conditions(
        self,
        call: Call,
        key: Key,
        encryption_context: Mapping[str, str] | None = None,
        request_alias: str | None = None,
    ) -> Context:
        """The condition keys that policies can test in this call."""
        context = condition_context(call, key.account_id)
        context |= {"kms:calleraccount": (call.caller.caller.account_id,), **kind_conditions(key.origin)}
        context |= {f"aws:resourcetag/{name.lower()}": (value,) for name, value in key.effective_tags(call.now).items()}
        if aliases := self._seen_aliases_of(key, call.now):
            context["kms:resourcealiases"] = aliases
        if request_alias is not None:
            context["kms:requestalias"] = (request_alias,)
        if encryption_context:
            context["kms:encryptioncontextkeys"] = tuple(encryption_context)
            for name, value in encryption_context.items():
                # Names that differ only in case are one condition key with several values.
                condition_key = f"kms:encryptioncontext:{name.lower()}"
                context[condition_key] = (*context.get(condition_key, ()), value)
        return context
