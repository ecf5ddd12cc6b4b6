"""The policy language: parsing, matching, and the verdict of one set of policies.

Source: IAM User Guide, "IAM JSON policy elements reference". Kept small on purpose; what is not implemented is refused
when the policy is stored (MalformedPolicyError), never skipped when it is evaluated.

    Statement   one or a list; Sid, Effect, Action | NotAction, Resource | NotResource, Principal | NotPrincipal,
                Condition
    Principal   "*", {"AWS": …} with account ids and ARNs of root, users, roles and sessions; {"Service": …} and
                {"Federated": …} match nobody here
    NotPrincipal  in key policies, to deny
    Wildcards   `*` and `?` in actions (any case), resources and …Like operators; never inside a principal
    Variables   `${aws:username}` and the like, in resources and conditions of version 2012-10-17 (`patterns`)
    Condition   operators of `conditions`, each also with ForAllValues:/ForAnyValue: and …IfExists; Null.
                Several operators and keys are ANDed, the values of one key are ORed (for negated operators: none
                may match). A key that the request does not carry fails the condition, except that a negated operator
                and IfExists then hold.

Semantics of `verdict`: an applicable Deny beats every Allow, the order of statements does not matter, and no applicable
statement means NONE (the implicit deny).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from customercloud.aws.arn import Arn, is_account_id, root_arn
from customercloud.aws.conditions import Condition, checked_text, parsed_conditions
from customercloud.aws.patterns import Context, MalformedPolicyError, expand, glob_matches

_MAX_POLICY_SIZE_CHARACTERS: Final = 32_768  # the quota of a key policy document


_NAME: Final = "[A-Za-z0-9_+=,.@-]+"
_PATH: Final = r"(?:[!-.0-~]+/){0,64}"
_PRINCIPAL_ARNS: Final = {
    "iam": rf"root|user/{_PATH}{_NAME}|role/{_PATH}{_NAME}",
    "sts": rf"assumed-role/{_NAME}/{_NAME}|federated-user/{_NAME}",
}
_FEDERATED: Final = re.compile(
    r"[a-z0-9-]+(\.[a-z0-9-]+)+(/[A-Za-z0-9_./-]*)?|arn:aws:iam::[0-9]{12}:(saml|oidc)-provider/[A-Za-z0-9_./:-]+"
)


class Effect(StrEnum):
    ALLOW = "Allow"
    DENY = "Deny"


class Verdict(StrEnum):
    ALLOW = "allow"
    DENY = "explicit deny"
    NONE = "implicit deny"


class PolicyKind(StrEnum):
    IDENTITY = "identity"
    """Attached to a user or role: no Principal."""
    KEY = "key"
    """A key policy: Principal and Resource."""
    TRUST = "trust"
    """A role's trust policy: Principal, no Resource."""


@dataclass(frozen=True, slots=True)
class Principals:
    """Who a statement speaks of. `everyone` is "*"; services and federated identities are dropped: none calls here."""

    everyone: bool
    arns: frozenset[str]
    """Root (account), user, role and session ARNs; bare account ids are stored as root ARNs."""
    negated: bool = False
    """NotPrincipal: everybody but these."""


@dataclass(frozen=True, slots=True)
class Statement:
    sid: str
    effect: Effect
    principals: Principals | None
    actions: tuple[str, ...]
    not_action: bool
    resources: tuple[str, ...]
    not_resource: bool
    conditions: tuple[Condition, ...]

    def speaks_of(self, action: str, resource: str, context: Context) -> bool:
        """Do action, resource and conditions apply? (The principal is the caller's business.)"""
        lowered = action.lower()
        return (
            any(glob_matches(pattern.lower(), lowered) for pattern in self.actions) != self.not_action
            and self._is_of(resource, context) != self.not_resource
            and all(condition.holds(context, deny=self.effect is Effect.DENY) for condition in self.conditions)
        )

    def _is_of(self, resource: str, context: Context) -> bool:
        patterns = (expand(pattern, context) for pattern in self.resources)
        # A variable that the request does not fill matches nothing; as an exception of an Allow, everything.
        unfilled = self.not_resource and self.effect is Effect.ALLOW
        return any(unfilled if pattern is None else glob_matches(pattern, resource) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Policy:
    statements: tuple[Statement, ...]


def combine(effects: Iterable[Effect]) -> Verdict:
    """Deny over Allow over nothing."""
    seen = frozenset(effects)
    if Effect.DENY in seen:
        return Verdict.DENY
    return Verdict.ALLOW if Effect.ALLOW in seen else Verdict.NONE


def identity_verdict(policies: Iterable[Policy], action: str, resource: str, context: Context) -> Verdict:
    """What the policies attached to the caller say."""
    return combine(
        statement.effect
        for policy in policies
        for statement in policy.statements
        if statement.speaks_of(action, resource, context)
    )


@functools.lru_cache(maxsize=512)
def parse_policy(document: str, kind: PolicyKind) -> Policy:
    """Cached: every authorisation parses the same few documents.

    Raises MalformedPolicyError for whatever is not a policy of `kind`."""
    if len(document) > _MAX_POLICY_SIZE_CHARACTERS:
        raise MalformedPolicyError("the policy document is too long")
    try:
        root = json.loads(document, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise MalformedPolicyError(f"the policy is not JSON: {error}") from None
    if not isinstance(root, dict):
        raise MalformedPolicyError("a policy is a JSON object")
    _only(root, {"Version", "Id", "Statement"}, "policy")
    if root.get("Version", "2012-10-17") not in ("2012-10-17", "2008-10-17"):
        raise MalformedPolicyError("unknown policy version")
    statements = _as_list(root.get("Statement"))
    if not statements:
        raise MalformedPolicyError("a policy has at least one statement")
    with_variables = root.get("Version") == "2012-10-17"
    return Policy(tuple(_statement(item, kind, with_variables=with_variables) for item in statements))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedPolicyError("an element stands twice in one object")
    return members


def _only(members: dict[str, Any], allowed: set[str], where: str) -> None:
    if unknown := sorted(members.keys() - allowed):
        raise MalformedPolicyError(f"unknown element in {where}: {unknown[0][:64]}")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _strings(value: Any, where: str) -> tuple[str, ...]:
    items = _as_list(value)
    if not items or not all(isinstance(item, str) and item for item in items):
        raise MalformedPolicyError(f"{where} must be a string or a list of strings")
    return tuple(items)


def _either(members: dict[str, Any], name: str) -> tuple[tuple[str, ...], bool]:
    """(patterns, negated) of `name` or `Not<name>`, of which exactly one is given."""
    if (name in members) == (f"Not{name}" in members):
        raise MalformedPolicyError(f"a statement has either {name} or Not{name}")
    negated = name not in members
    return _strings(members[f"Not{name}" if negated else name], name), negated


def _statement(value: Any, kind: PolicyKind, *, with_variables: bool) -> Statement:
    if not isinstance(value, dict):
        raise MalformedPolicyError("a statement is a JSON object")
    allowed = {"Sid", "Effect", "Action", "NotAction", "Condition"}
    allowed |= {"Principal"} if kind is not PolicyKind.IDENTITY else set()
    allowed |= {"NotPrincipal"} if kind is PolicyKind.KEY else set()
    allowed |= {"Resource", "NotResource"} if kind is not PolicyKind.TRUST else set()
    _only(value, allowed, f"a statement of a {kind} policy")
    sid = value.get("Sid", "")
    if not isinstance(sid, str):
        raise MalformedPolicyError("Sid must be a string")
    if value.get("Effect") not in ("Allow", "Deny"):
        raise MalformedPolicyError("Effect must be Allow or Deny")
    actions, not_action = _either(value, "Action")
    for action in actions:
        if action != "*" and not re.fullmatch(r"[a-zA-Z0-9-]+:[a-zA-Z0-9*?]+", action):
            raise MalformedPolicyError("an action looks like kms:Decrypt")
    resources, not_resource = (("*",), False) if kind is PolicyKind.TRUST else _either(value, "Resource")
    return Statement(
        sid=sid,
        effect=Effect(value["Effect"]),
        principals=None if kind is PolicyKind.IDENTITY else _principals_of(value),
        actions=actions,
        not_action=not_action,
        resources=tuple(checked_text(text, with_variables=with_variables) for text in resources),
        not_resource=not_resource,
        conditions=tuple(parsed_conditions(value.get("Condition", {}), with_variables=with_variables)),
    )


def _principals_of(statement: dict[str, Any]) -> Principals:
    if "NotPrincipal" not in statement:
        return _principals(statement.get("Principal"))
    if "Principal" in statement:
        raise MalformedPolicyError("a statement has either Principal or NotPrincipal")
    if statement["Effect"] != "Deny":
        raise MalformedPolicyError("NotPrincipal must be used with Deny")
    excepted = _principals(statement["NotPrincipal"])
    return Principals(excepted.everyone, excepted.arns, negated=True)


def _principals(value: Any) -> Principals:
    if value == "*":
        return Principals(everyone=True, arns=frozenset())
    if not isinstance(value, dict) or not value:
        raise MalformedPolicyError('Principal must be "*" or an object')
    _only(value, {"AWS", "Service", "Federated"}, "Principal")
    if "Service" in value:
        _strings(value["Service"], "Principal.Service")
    for provider in _strings(value["Federated"], "Principal.Federated") if "Federated" in value else ():
        if _FEDERATED.fullmatch(provider) is None:
            raise MalformedPolicyError("Federated principals must be valid domain names or SAML metadata ARNs")
    everyone, arns = False, set()
    for item in _strings(value["AWS"], "Principal.AWS") if "AWS" in value else ():
        if item == "*":
            everyone = True
        else:
            arns.add(_principal_arn(item))
    return Principals(everyone, frozenset(arns))


def _principal_arn(text: str) -> str:
    if is_account_id(text):
        return root_arn(text)
    arn = Arn.parse(text)
    if (
        arn is None
        or arn.region
        or not is_account_id(arn.account_id)
        or not re.fullmatch(_PRINCIPAL_ARNS.get(arn.service, "(?!)"), arn.resource)
    ):
        raise MalformedPolicyError("Policy contains a statement with one or more invalid principals.")
    return text
