"""Conditions of policy statements: operators, and the keys that they may test.

Source: IAM User Guide, "IAM JSON policy elements: Condition operators", "AWS global condition context keys"; KMS
Developer Guide, "AWS KMS condition keys".

A condition that could not be evaluated must not be stored: a Deny on it would never fire. So a key of `aws:`, `kms:` or
`sts:` is either given to policies by the calls here (`_GIVEN`), or is one that no call here has on AWS either
(`_ABSENT`: there are no VPCs, no organizations, no services that call for somebody), or is refused. Keys of other
services are in no call of these.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal

from customercloud.aws.patterns import (
    Context,
    MalformedPolicyError,
    expand,
    glob_matches,
    plain,
    variables,
    without_variables,
)

# ── keys ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_GIVEN: Final = frozenset(
    {
        "aws:currenttime", "aws:epochtime", "aws:multifactorauthpresent", "aws:principalaccount", "aws:principalarn",
        "aws:principalisawsservice", "aws:principaltype", "aws:requestedregion", "aws:resourceaccount",
        "aws:securetransport", "aws:sourceidentity", "aws:sourceip", "aws:tagkeys", "aws:tokenissuetime",
        "aws:useragent", "aws:userid", "aws:username", "aws:viaawsservice", "kms:bypasspolicylockoutsafetycheck",
        "kms:calleraccount", "kms:customermasterkeyspec", "kms:customermasterkeyusage", "kms:datakeypairspec",
        "kms:encryptionalgorithm", "kms:encryptioncontextkeys", "kms:expirationmodel", "kms:grantconstraintsourcearn",
        "kms:grantconstrainttype", "kms:granteeprincipal", "kms:granteeserviceprincipal", "kms:grantisforawsresource",
        "kms:grantoperations", "kms:keyagreementalgorithm", "kms:keyorigin", "kms:keyspec", "kms:keyusage",
        "kms:macalgorithm", "kms:messagetype", "kms:multiregion", "kms:primaryregion", "kms:reencryptonsamekey",
        "kms:replicaregion", "kms:requestalias", "kms:resourcealiases", "kms:retiringprincipal",
        "kms:retiringserviceprincipal", "kms:rotationperiodindays", "kms:schedulekeydeletionpendingwindowindays",
        "kms:signingalgorithm", "kms:validto", "kms:wrappingalgorithm", "kms:wrappingkeyspec", "sts:durationseconds",
        "sts:externalid", "sts:rolesessionname", "sts:sourceidentity", "sts:transitivetagkeys",
    }
)  # fmt: skip
_ABSENT: Final = frozenset(
    {
        "aws:assumedroot", "aws:calledvia", "aws:calledviafirst", "aws:calledvialast",
        "aws:ec2instancesourceprivateipv4", "aws:ec2instancesourcevpc", "aws:federatedprovider",
        "aws:multifactorauthage", "aws:principalorgid", "aws:principalorgpaths", "aws:principalservicename",
        "aws:principalservicenameslist", "aws:resourceorgid", "aws:resourceorgpaths", "aws:sourceaccount",
        "aws:sourcearn", "aws:sourceorgid", "aws:sourceorgpaths", "aws:sourcevpc", "aws:sourcevpcarn", "aws:sourcevpce",
        "aws:vpceaccount", "aws:vpceorgid", "aws:vpceorgpaths", "aws:vpcsourceip", "kms:multiregionkeytype",
        "kms:viaservice",
    }
)  # fmt: skip
_GIVEN_FAMILIES: Final = ("aws:principaltag/", "aws:requesttag/", "aws:resourcetag/", "kms:encryptioncontext:")
_ABSENT_FAMILIES: Final = ("kms:recipientattestation:",)


def check_key(key: str) -> None:
    """`key` in lower case. Raises MalformedPolicyError for one that cannot be evaluated here."""
    service, colon, _ = key.partition(":")
    if not colon:
        raise MalformedPolicyError(f"{key[:64]} is not a condition key: it has no service prefix")
    if service not in ("aws", "kms", "sts") or key in _GIVEN | _ABSENT:
        return
    if not key.startswith((*_GIVEN_FAMILIES, *_ABSENT_FAMILIES)):
        raise MalformedPolicyError(f"the condition key {key[:64]} cannot be evaluated here")


# ── operators ──────────────────────────────────────────────────────────────────────────────────────────────────────

Matches = Callable[[str, str], bool]
"""Does the value of a policy (first) match that of a request?"""


def _date(text: str) -> dt.datetime | None:
    """ISO 8601, UTC unless it says otherwise, or seconds since the epoch."""
    try:
        if text.isascii() and text.isdecimal():
            return dt.datetime.fromtimestamp(int(text), dt.UTC)
        value = dt.datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        return None
    return value if value.tzinfo else value.replace(tzinfo=dt.UTC)


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _binary(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _truth(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


def _in_network(wanted: str, actual: str) -> bool:
    outer, inner = _network(wanted), _network(actual)
    if isinstance(outer, ipaddress.IPv4Network) and isinstance(inner, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(outer, ipaddress.IPv6Network) and isinstance(inner, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False


def _parsed(parse: Callable[[str], Any], compare: Callable[[Any, Any], bool]) -> Matches:
    """Compares the request's value (first) with the policy's."""

    def matches(wanted: str, actual: str) -> bool:
        left, right = parse(actual), parse(wanted)
        return left is not None and right is not None and compare(left, right)

    return matches


@dataclass(frozen=True, slots=True)
class _Operator:
    matches: Matches
    negated: bool = False
    parse: Callable[[str], object] | None = None
    """What a value in a policy must be; None for texts, which may hold variables."""


_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "equals": lambda actual, wanted: bool(actual == wanted),
    "lessthan": lambda actual, wanted: bool(actual < wanted),
    "lessthanequals": lambda actual, wanted: bool(actual <= wanted),
    "greaterthan": lambda actual, wanted: bool(actual > wanted),
    "greaterthanequals": lambda actual, wanted: bool(actual >= wanted),
}


def _ordered(kind: str, parse: Callable[[str], object]) -> dict[str, _Operator]:
    equal = _parsed(parse, _COMPARISONS["equals"])
    return {
        f"{kind}{name}": _Operator(_parsed(parse, compare), parse=parse) for name, compare in _COMPARISONS.items()
    } | {f"{kind}notequals": _Operator(equal, negated=True, parse=parse)}


def _same(wanted: str, actual: str) -> bool:
    return plain(wanted) == actual


def _same_in_any_case(wanted: str, actual: str) -> bool:
    return plain(wanted).lower() == actual.lower()


_OPERATORS: Final[Mapping[str, _Operator]] = {
    "stringequals": _Operator(_same),
    "stringnotequals": _Operator(_same, negated=True),
    "stringequalsignorecase": _Operator(_same_in_any_case),
    "stringnotequalsignorecase": _Operator(_same_in_any_case, negated=True),
    "stringlike": _Operator(glob_matches),
    "stringnotlike": _Operator(glob_matches, negated=True),
    "arnequals": _Operator(glob_matches),
    "arnlike": _Operator(glob_matches),
    "arnnotequals": _Operator(glob_matches, negated=True),
    "arnnotlike": _Operator(glob_matches, negated=True),
    "bool": _Operator(_parsed(_truth, _COMPARISONS["equals"]), parse=_truth),
    "binaryequals": _Operator(_parsed(_binary, _COMPARISONS["equals"]), parse=_binary),
    "ipaddress": _Operator(_in_network, parse=_network),
    "notipaddress": _Operator(_in_network, negated=True, parse=_network),
    **_ordered("numeric", _number),
    **_ordered("date", _date),
}


# ── conditions ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Condition:
    operator: str
    """Lower case, without qualifier and IfExists; `null` or a key of `_OPERATORS`."""
    quantifier: Literal["", "forallvalues", "foranyvalue"]
    if_exists: bool
    key: str
    """Lower case: condition keys have no case."""
    values: tuple[str, ...]

    def holds(self, context: Context, *, deny: bool) -> bool:
        """`deny`: in a statement that denies. Several values under an operator without quantifier (two names of an
        encryption context that differ in case only) are decided against the caller: all must match to allow, one to
        deny."""
        actual = context.get(self.key)
        if self.operator == "null":
            return any((actual is None) == (value.lower() == "true") for value in self.values)
        operator = _OPERATORS[self.operator]
        if not actual:
            # "ForAllValues also returns true if there are no keys in the request" (IAM User Guide).
            return self.if_exists or self.quantifier == "forallvalues" or (operator.negated and self.quantifier == "")
        wanted = self.values
        if operator.parse is None:
            wanted = tuple(value for value in (expand(text, context) for text in wanted) if value is not None)

        def one(value: str) -> bool:
            return any(operator.matches(text, value) for text in wanted) != operator.negated

        one_is_enough = self.quantifier == "foranyvalue" or (self.quantifier == "" and deny)
        return any(map(one, actual)) if one_is_enough else all(map(one, actual))


def parsed_conditions(value: Any, *, with_variables: bool) -> Iterable[Condition]:
    """Of a statement's Condition element. Raises MalformedPolicyError."""
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
            check_key(key.lower())
            texts = _values(operator, key, wanted, with_variables=with_variables)
            yield Condition(operator, quantifier, if_exists, key.lower(), texts)


def _values(operator: str, key: str, wanted: Any, *, with_variables: bool) -> tuple[str, ...]:
    parse = _truth if operator == "null" else _OPERATORS[operator].parse
    texts = []
    for value in wanted if isinstance(wanted, list) else [wanted]:
        # JSON booleans and numbers stand for their text, as on AWS.
        text = (
            str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value
        )
        if not isinstance(text, str) or not text:
            raise MalformedPolicyError(f"the value of {key[:64]} must be a string or a list of strings")
        if parse is None:
            texts.append(checked_text(text, with_variables=with_variables))
        elif parse(text) is None:
            raise MalformedPolicyError(f"the value of {key[:64]} is none that {operator} can compare")
        else:
            texts.append(text)
    if not texts:
        raise MalformedPolicyError(f"the value of {key[:64]} must be a string or a list of strings")
    return tuple(texts)


def checked_text(text: str, *, with_variables: bool) -> str:
    """As a pattern. Raises MalformedPolicyError for a variable that cannot be filled in."""
    if not with_variables:
        return without_variables(text)
    for key in variables(text):
        check_key(key)
    return text
