"""May this caller do this to that resource? Identity policies and the resource's own policy, put together.

Source: IAM User Guide, "Policy evaluation logic"; KMS Developer Guide, "Key policies". In order:

1. An explicit Deny anywhere refuses.
2. Caller in the resource's account: the resource policy may allow the caller *directly* (its user, role or session ARN,
   or "*"), and that suffices. Or it may allow the *account* (its root ARN), and that only lends the decision to the
   caller's identity policies; the account's root user itself needs none.
3. Caller of another account: the resource policy must allow (caller or account) *and* an identity policy must.
4. Otherwise refused, unless a grant on a KMS key allows (`access`). So taking a role out of a key policy that does not
   also allow the account takes its access.

A session policy limits all of this to what it allows, too, except what a resource policy allows to the session by its
own ARN.

A resource policy that names a role means that very role: the unique id is kept when the policy is stored
(`Binding`), and a role that is deleted and made again under the same name does not inherit the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from customercloud.aws.arn import root_arn
from customercloud.aws.patterns import Context
from customercloud.aws.policy import Policy, Statement, Verdict, combine, identity_verdict

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
    session_policies: tuple[Policy, ...] | None = None
    """What the session was narrowed to when it was made; None if it was not."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the user or role, and over them those of the session."""

    def session_verdict(self, action: str, resource: str, context: Context) -> Verdict:
        if self.session_policies is None:
            return Verdict.ALLOW
        return identity_verdict(self.session_policies, action, resource, context)


class _Reach(StrEnum):
    """How a statement's Principal refers to the caller."""

    SESSION = "session"
    """By the session's own ARN, which no session policy limits."""
    DIRECT = "direct"
    ACCOUNT = "account"
    NOT = "not"


def _reach(statement: Statement, caller: Caller, binding: Binding) -> _Reach:
    principals = statement.principals
    if principals is None:
        return _Reach.NOT
    if principals.negated:
        # As IAM's guide says: whoever is excepted is named with session, role and account.
        named = {caller.arn, caller.issuer_arn, root_arn(caller.account_id)} <= principals.arns
        is_same = binding.get(caller.issuer_arn) in (None, caller.unique_id)
        return _Reach.NOT if principals.everyone or (named and is_same) else _Reach.DIRECT
    if caller.arn in principals.arns and caller.arn != caller.issuer_arn:
        return _Reach.SESSION if binding.get(caller.arn) in (None, caller.unique_id) else _Reach.NOT
    if principals.everyone:
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
    session = caller.session_verdict(action, resource, context)
    if session is Verdict.DENY:
        return Refusal("with an explicit deny in a session policy", explicit=True)
    by_session = session is Verdict.ALLOW
    no_session = Refusal(f"because no session policy allows the {action} action")
    by_identity = identity is Verdict.ALLOW or caller.is_root
    no_identity = Refusal(f"because no identity-based policy allows the {action} action")
    if resource_policy is None:
        return no_identity if not by_identity else None if by_session else no_session

    applicable = [s for s in resource_policy.statements if s.speaks_of(action, resource, context)]
    reached = {s: _reach(s, caller, binding) for s in applicable}
    everywhere = combine(s.effect for s in applicable if reached[s] is not _Reach.NOT)
    if everywhere is Verdict.DENY:
        return Refusal("with an explicit deny in a resource-based policy", explicit=True)
    no_resource = Refusal(f"because no resource-based policy allows the {action} action")
    if everywhere is Verdict.NONE:
        return no_resource
    own = caller.account_id == owner_account_id
    if own and combine(s.effect for s in applicable if reached[s] is _Reach.SESSION) is Verdict.ALLOW:
        return None
    directly = combine(s.effect for s in applicable if reached[s] is _Reach.DIRECT) is Verdict.ALLOW
    if not (own and directly) and not by_identity:
        return no_identity
    return None if by_session else no_session


def message(caller: Caller, action: str, resource: str, refusal: Refusal) -> str:
    return f"User: {caller.arn} is not authorized to perform: {action} on resource: {resource} {refusal.sentence}"
