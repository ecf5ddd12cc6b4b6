"""May this caller do this to that resource? Identity policies and the resource's own policy, put together.

Source: IAM User Guide, "Policy evaluation logic"; KMS Developer Guide, "Key policies". In order:

1. An explicit Deny anywhere refuses.
2. Caller in the resource's account: the resource policy may allow the caller *directly* (its user, role or session ARN,
   or "*"), and that suffices. Or it may allow the *account* (its root ARN), and that only lends the decision to the
   caller's identity policies; the account's root user itself needs none.
3. Caller of another account: the resource policy must allow (caller or account) *and* an identity policy must.
4. Otherwise refused, unless a grant on a KMS key allows (`access`). So taking a role out of a key policy that does not
   also allow the account takes its access.

A resource policy that names a role means that very role: the unique id is kept when the policy is stored
(`Binding`), and a role that is deleted and made again under the same name does not inherit the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from customercloud.aws.arn import root_arn
from customercloud.aws.policy import Context, Policy, Statement, Verdict, combine, identity_verdict

Binding = Mapping[str, str]
"""Principal ARN → unique id that it had when the policy was stored."""


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated principal, with the policies that are attached to it now."""

    account_id: str
    arn: str
    """What messages and logs show: the user's, or the session's."""
    issuer_arn: str
    """The user's, or the role's behind the session."""
    unique_id: str
    """Of the user or role: AIDA…, AROA…"""
    policies: tuple[Policy, ...]
    is_root: bool = False


class _Reach(StrEnum):
    """How a statement's Principal refers to the caller."""

    DIRECT = "direct"
    ACCOUNT = "account"
    NOT = "not"


def _reach(statement: Statement, caller: Caller, binding: Binding) -> _Reach:
    principals = statement.principals
    if principals is None:
        return _Reach.NOT
    if principals.everyone or caller.arn in principals.arns:
        return _Reach.DIRECT
    if caller.issuer_arn in principals.arns:
        bound = binding.get(caller.issuer_arn)
        return _Reach.DIRECT if bound in (None, caller.unique_id) else _Reach.NOT
    return _Reach.ACCOUNT if root_arn(caller.account_id) in principals.arns else _Reach.NOT


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not; `sentence` ends AWS's message "User: … is not authorized to perform: … on resource: … <sentence>"."""

    sentence: str
    explicit: bool = False
    """By a Deny, which nothing overrules; otherwise only because nothing allows, and a grant may."""


def authorize(
    caller: Caller,
    action: str,
    resource: str,
    context: Context,
    *,
    owner_account_id: str,
    resource_policy: Policy | None,
    binding: Binding,
) -> Refusal | None:
    """None when allowed. `resource_policy` is None for actions without their own resource (CreateKey, ListKeys)."""
    identity = identity_verdict(caller.policies, action, resource, context)
    if identity is Verdict.DENY:
        return Refusal("with an explicit deny in an identity-based policy", explicit=True)
    by_identity = identity is Verdict.ALLOW or caller.is_root
    no_identity = Refusal(f"because no identity-based policy allows the {action} action")
    if resource_policy is None:
        return None if by_identity else no_identity

    applicable = [s for s in resource_policy.statements if s.speaks_of(action, resource, context)]
    reached = {s: _reach(s, caller, binding) for s in applicable}
    everywhere = combine(s.effect for s in applicable if reached[s] is not _Reach.NOT)
    if everywhere is Verdict.DENY:
        return Refusal("with an explicit deny in a resource-based policy", explicit=True)
    no_resource = Refusal(f"because no resource-based policy allows the {action} action")
    if everywhere is Verdict.NONE:
        return no_resource
    directly = combine(s.effect for s in applicable if reached[s] is _Reach.DIRECT) is Verdict.ALLOW
    if directly and caller.account_id == owner_account_id:
        return None
    return None if by_identity else no_identity


def message(caller: Caller, action: str, resource: str, refusal: Refusal) -> str:
    return f"User: {caller.arn} is not authorized to perform: {action} on resource: {resource} {refusal.sentence}"
