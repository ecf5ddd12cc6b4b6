"""The policy language: parsing, matching, and the verdict of one set of policies.

Source: IAM User Guide, "IAM JSON policy elements reference". Kept small on purpose; what is not implemented is refused
when the policy is stored (MalformedPolicyError), never skipped when it is evaluated.

    Statement   one or a list; Sid, Effect, Action | NotAction, Resource | NotResource, Principal, Condition
    Principal   "*", {"AWS": …} with account ids and root, user, role and session ARNs; {"Service": …} matches nobody
                here; NotPrincipal is refused
    Wildcards   `*` and `?` in actions (any case), resources and …Like operators; never inside a principal
    Condition   operators of `_OPERATORS`, each also with ForAllValues:/ForAnyValue: and …IfExists; Null.
                Several operators and keys are ANDed, the values of one key are ORed (for negated operators: none
                may match). A key that the request does not carry fails the condition, except that a negated operator
                and IfExists then hold.

Semantics of `verdict`: an applicable Deny beats every Allow, the order of statements does not matter, and no applicable
statement means NONE (the implicit deny).
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal

from customercloud.aws.arn import Arn, is_account_id, root_arn

_MAX_POLICY_SIZE_CHARACTERS: Final = 32_768  # the quota of a key policy document


_NAME: Final = "[A-Za-z0-9_+=,.@-]+"


class MalformedPolicyError(ValueError):
    """The document is not a policy of this language; the message says why."""


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


Context = Mapping[str, tuple[str, ...]]
"""Condition keys in lower case → their values. A key that is not there was not in the request."""


@functools.lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern), re.DOTALL)


def glob_matches(pattern: str, text: str) -> bool:
    """`*` is any run of characters, `?` is exactly one; everything else is itself."""
    return _glob(pattern).fullmatch(text) is not None


def _date(text: str) -> dt.datetime | None:
    try:
        value = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return value if value.tzinfo else value.replace(tzinfo=dt.UTC)


def _dates(compare: Callable[[dt.datetime, dt.datetime], bool]) -> Callable[[str, str], bool]:
    def matches(wanted: str, actual: str) -> bool:
        left, right = _date(actual), _date(wanted)
        return left is not None and right is not None and compare(left, right)

    return matches


# Operator name in lower case → (does (policy value, request value) match, is the operator negated).
_OPERATORS: Final[dict[str, tuple[Callable[[str, str], bool], bool]]] = {
    "stringequals": (lambda wanted, actual: wanted == actual, False),
    "stringnotequals": (lambda wanted, actual: wanted == actual, True),
    "stringequalsignorecase": (lambda wanted, actual: wanted.lower() == actual.lower(), False),
    "stringnotequalsignorecase": (lambda wanted, actual: wanted.lower() == actual.lower(), True),
    "stringlike": (glob_matches, False),
    "stringnotlike": (glob_matches, True),
    "arnequals": (glob_matches, False),
    "arnlike": (glob_matches, False),
    "arnnotequals": (glob_matches, True),
    "arnnotlike": (glob_matches, True),
    "bool": (lambda wanted, actual: wanted.lower() == actual.lower(), False),
    "datelessthan": (_dates(lambda actual, wanted: actual < wanted), False),
    "datelessthanequals": (_dates(lambda actual, wanted: actual <= wanted), False),
    "dategreaterthan": (_dates(lambda actual, wanted: actual > wanted), False),
    "dategreaterthanequals": (_dates(lambda actual, wanted: actual >= wanted), False),
}


@dataclass(frozen=True, slots=True)
class Condition:
    operator: str
    """Lower case, without qualifier and IfExists; `null` or a key of `_OPERATORS`."""
    quantifier: Literal["", "forallvalues", "foranyvalue"]
    if_exists: bool
    key: str
    """Lower case: condition keys have no case."""
    values: tuple[str, ...]

    def holds(self, context: Context) -> bool:
        actual = context.get(self.key)
        if self.operator == "null":
            return any((actual is None) == (value.lower() == "true") for value in self.values)
        matches, negated = _OPERATORS[self.operator]
        if not actual:
            # "ForAllValues also returns true if there are no keys in the request" (IAM User Guide).
            return self.if_exists or self.quantifier == "forallvalues" or (negated and self.quantifier == "")

        def one(value: str) -> bool:
            return any(matches(wanted, value) for wanted in self.values) != negated

        return any(map(one, actual)) if self.quantifier == "foranyvalue" else all(map(one, actual))


@dataclass(frozen=True, slots=True)
class Principals:
    """Who a statement speaks of. `everyone` is "*"; Service principals are dropped (none calls here)."""

    everyone: bool
    arns: frozenset[str]
    """Root (account), user, role and session ARNs; bare account ids are stored as root ARNs."""


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
            and any(glob_matches(pattern, resource) for pattern in self.resources) != self.not_resource
            and all(condition.holds(context) for condition in self.conditions)
        )


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
    return Policy(tuple(_statement(item, kind) for item in statements))


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


def _statement(value: Any, kind: PolicyKind) -> Statement:
    if not isinstance(value, dict):
        raise MalformedPolicyError("a statement is a JSON object")
    allowed = {"Sid", "Effect", "Action", "NotAction", "Condition"}
    allowed |= {"Principal"} if kind is not PolicyKind.IDENTITY else set()
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
        principals=None if kind is PolicyKind.IDENTITY else _principals(value.get("Principal")),
        actions=actions,
        not_action=not_action,
        resources=resources,
        not_resource=not_resource,
        conditions=tuple(_conditions(value.get("Condition", {}))),
    )


def _principals(value: Any) -> Principals:
    if value == "*":
        return Principals(everyone=True, arns=frozenset())
    if not isinstance(value, dict) or not value:
        raise MalformedPolicyError('Principal must be "*" or an object')
    _only(value, {"AWS", "Service"}, "Principal")
    if "Service" in value:
        _strings(value["Service"], "Principal.Service")
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
    kinds = {"iam": rf"root|user/{_NAME}|role/{_NAME}", "sts": rf"assumed-role/{_NAME}/{_NAME}"}
    if (
        arn is None
        or arn.region
        or not is_account_id(arn.account_id)
        or not re.fullmatch(kinds.get(arn.service, "(?!)"), arn.resource)
    ):
        raise MalformedPolicyError("Policy contains a statement with one or more invalid principals.")
    return text


def _conditions(value: Any) -> Iterable[Condition]:
    if not isinstance(value, dict):
        raise MalformedPolicyError("Condition must be an object")
    for name, keys in value.items():
        quantifier, _, operator = name.lower().rpartition(":")
        if_exists = operator.endswith("ifexists")
        operator = operator.removesuffix("ifexists")
        if quantifier not in ("", "forallvalues", "foranyvalue") or (
            operator not in _OPERATORS and (operator != "null" or if_exists or quantifier)
        ):
            raise MalformedPolicyError(f"unknown condition operator {name[:64]}")
        if not isinstance(keys, dict) or not keys:
            raise MalformedPolicyError(f"the operator {name[:64]} needs condition keys")
        for key, wanted in keys.items():
            # JSON booleans are allowed where AWS allows them: Bool and Null.
            values = [str(v).lower() if isinstance(v, bool) else v for v in _as_list(wanted)]
            texts = _strings(values, f"the value of {key[:64]}")
            if operator.startswith("date") and any(_date(text) is None for text in texts):
                raise MalformedPolicyError(f"the value of {key[:64]} is not a date")
            yield Condition(operator, quantifier, if_exists, key.lower(), texts)
