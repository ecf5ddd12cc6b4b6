"""The policy engine: AWS's documented rules one by one, and the laws that must hold for any policies."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customercloud.aws.authorization import Caller, Refusal, authorize
from customercloud.aws.patterns import Context, MalformedPolicyError, expand, glob_matches, plain, without_variables
from customercloud.aws.policy import PolicyKind, Verdict, identity_verdict, parse_policy

OWNER, STRANGER = "111122223333", "444455556666"
KEY = f"arn:aws:kms:eu-central-1:{OWNER}:key/k"
ROLE = f"arn:aws:iam::{OWNER}:role/r"
SESSION = f"arn:aws:sts::{OWNER}:assumed-role/r/s"
ROOT = f"arn:aws:iam::{OWNER}:root"


def document(*statements: dict[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def statement(effect: str = "Allow", action: Any = "kms:*", principal: Any = None, **more: Any) -> dict[str, Any]:
    result = {"Effect": effect, "Action": action, "Resource": "*", **more}
    return result if principal is None else result | {"Principal": principal}


def caller(account_id: str = OWNER, *identity: dict[str, Any]) -> Caller:
    policies = tuple(parse_policy(document(item), PolicyKind.IDENTITY) for item in identity)
    if account_id == OWNER:
        return Caller(account_id, SESSION, ROLE, "AROA1", policies)
    arn = f"arn:aws:iam::{account_id}:user/u"
    return Caller(account_id, arn, arn, "AIDA1", policies)


def decide(
    who: Caller,
    *key_statements: dict[str, Any],
    action: str = "kms:Decrypt",
    context: Context | None = None,
    binding: dict[str, str] | None = None,
) -> Refusal | None:
    return authorize(
        who,
        action,
        KEY,
        context or {},
        owner_account_id=OWNER,
        resource_policy=parse_policy(document(*key_statements), PolicyKind.KEY),
        binding=binding or {},
    )


IDENTITY_ALLOW = {"Effect": "Allow", "Action": "kms:*", "Resource": "*"}
IDENTITY_DENY = {"Effect": "Deny", "Action": "kms:Decrypt", "Resource": "*"}


# ── key policy and identity policies together ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("principal", [{"AWS": ROLE}, {"AWS": SESSION}, "*", {"AWS": "*"}, {"AWS": [ROOT, ROLE]}])
def test_a_key_policy_that_names_the_caller_suffices(principal: Any) -> None:
    assert decide(caller(), statement(principal=principal)) is None


@pytest.mark.parametrize("principal", [{"AWS": ROOT}, {"AWS": OWNER}])
def test_the_account_as_principal_lends_the_decision_to_identity_policies(principal: Any) -> None:
    refusal = decide(caller(), statement(principal=principal))
    assert refusal == Refusal("because no identity-based policy allows the kms:Decrypt action")
    assert decide(caller(OWNER, IDENTITY_ALLOW), statement(principal=principal)) is None
    assert decide(replace(caller(), is_root=True), statement(principal=principal)) is None


def test_identity_policies_alone_do_not_open_a_key() -> None:
    for principal in ({"AWS": f"arn:aws:iam::{OWNER}:role/other"}, {"Service": "ec2.amazonaws.com"}):
        refusal = decide(caller(OWNER, IDENTITY_ALLOW), statement(principal=principal))
        assert refusal == Refusal("because no resource-based policy allows the kms:Decrypt action")


def test_across_accounts_both_sides_must_allow() -> None:
    for principal in ({"AWS": STRANGER}, {"AWS": f"arn:aws:iam::{STRANGER}:user/u"}, "*"):
        assert decide(caller(STRANGER), statement(principal=principal)) is not None
        assert decide(caller(STRANGER, IDENTITY_ALLOW), statement(principal=principal)) is None
    assert decide(caller(STRANGER, IDENTITY_ALLOW), statement(principal={"AWS": OWNER})) is not None


@pytest.mark.parametrize("denied", [{"AWS": ROLE}, {"AWS": SESSION}, {"AWS": ROOT}, "*"])
def test_an_explicit_deny_beats_every_allow(denied: Any) -> None:
    allow, deny = statement(principal={"AWS": ROLE}), statement("Deny", principal=denied)
    for order in ((allow, deny), (deny, allow)):
        assert decide(caller(OWNER, IDENTITY_ALLOW), *order) == Refusal(
            "with an explicit deny in a resource-based policy", explicit=True
        )


def test_an_identity_deny_beats_the_key_policy() -> None:
    refusal = decide(caller(OWNER, IDENTITY_DENY), statement(principal={"AWS": ROLE}))
    assert refusal == Refusal("with an explicit deny in an identity-based policy", explicit=True)


def test_a_role_made_again_under_the_old_name_inherits_nothing() -> None:
    allow = statement(principal={"AWS": ROLE})
    assert decide(caller(), allow, binding={ROLE: "AROA1"}) is None
    assert decide(caller(), allow, binding={ROLE: "AROA0"}) is not None


# ── matching ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("action", "matches"),
    [("kms:Decrypt", True), ("KMS:decrypt", True), ("kms:De*", True), ("*", True), ("kms:Encrypt", False),
     ("kms:Decrypt?", False), ("kms:Dec?ypt", True), (["kms:Encrypt", "kms:Decrypt"], True), ("s3:*", False)],
)  # fmt: skip
def test_actions(action: Any, matches: bool) -> None:
    assert (decide(caller(), statement(action=action, principal="*")) is None) is matches


def test_not_action_and_not_resource() -> None:
    assert decide(caller(), {"Effect": "Allow", "Principal": "*", "NotAction": "kms:Encrypt", "Resource": "*"}) is None
    assert decide(caller(), {"Effect": "Allow", "Principal": "*", "NotAction": "kms:De*", "Resource": "*"}) is not None
    assert decide(caller(), {"Effect": "Allow", "Principal": "*", "Action": "*", "NotResource": KEY}) is not None


def test_resource_patterns() -> None:
    assert decide(caller(), statement(principal="*", Resource=KEY[:-1] + "?")) is None
    assert decide(caller(), statement(principal="*", Resource=KEY + "x")) is not None
    assert decide(caller(), statement(principal="*", Resource=KEY.upper())) is not None


CONTEXT_T1: Context = {"kms:encryptioncontext:tenant": ("t1",), "kms:encryptioncontextkeys": ("tenant",)}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"StringEquals": {"kms:EncryptionContext:tenant": "t1"}}, True),
        ({"StringEquals": {"kms:EncryptionContext:Tenant": ["t0", "t1"]}}, True),
        ({"StringEquals": {"kms:EncryptionContext:tenant": "T1"}}, False),
        ({"StringEqualsIgnoreCase": {"kms:EncryptionContext:tenant": "T1"}}, True),
        ({"StringEquals": {"kms:EncryptionContext:branch": "t1"}}, False),
        ({"StringEqualsIfExists": {"kms:EncryptionContext:branch": "b1"}}, True),
        ({"StringEqualsIfExists": {"kms:EncryptionContext:tenant": "b1"}}, False),
        ({"StringNotEquals": {"kms:EncryptionContext:tenant": ["t0", "t1"]}}, False),
        ({"StringNotEquals": {"kms:EncryptionContext:tenant": ["t0", "t2"]}}, True),
        ({"StringNotEquals": {"kms:EncryptionContext:branch": "b1"}}, True),
        ({"StringLike": {"kms:EncryptionContext:tenant": "t?"}}, True),
        ({"StringLike": {"kms:EncryptionContext:tenant": "?"}}, False),
        ({"StringNotLike": {"kms:EncryptionContext:tenant": "t*"}}, False),
        ({"Null": {"kms:EncryptionContext:branch": "true"}}, True),
        ({"Null": {"kms:EncryptionContext:tenant": True}}, False),
        ({"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["tenant", "branch"]}}, True),
        ({"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["branch"]}}, False),
        ({"ForAllValues:StringEquals": {"kms:ViaService": ["s3"]}}, True),
        ({"ForAnyValue:StringEquals": {"kms:EncryptionContextKeys": ["tenant", "x"]}}, True),
        ({"ForAnyValue:StringEquals": {"kms:ViaService": ["s3"]}}, False),
        ({"StringEquals": {"kms:EncryptionContext:tenant": "t1", "kms:EncryptionContext:branch": "b1"}}, False),
        ({"StringEquals": {"kms:EncryptionContext:tenant": "t1"}, "Null": {"kms:ViaService": "true"}}, True),
        ({"Bool": {"aws:SecureTransport": True}}, False),
    ],
)
def test_conditions(condition: Any, holds: bool) -> None:
    refusal = decide(caller(), statement(principal="*", Condition=condition), context=CONTEXT_T1)
    assert (refusal is None) is holds


REQUEST: Context = {
    "aws:epochtime": ("1000",),
    "aws:sourceip": ("10.1.2.3",),
    "aws:userid": ("AIDA1:bob",),
    "aws:principaltag/team": ("a*",),
    "aws:principaltag/bytes": ("QUJD",),
    "kms:encryptioncontext:tenant": ("t1", "t2"),
    "kms:encryptioncontext:owner": ("AIDA1:bob",),
    "kms:requestalias": ("alias/a*",),
}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"NumericLessThan": {"aws:EpochTime": "1000.5"}}, True),
        ({"NumericLessThan": {"aws:EpochTime": 1000}}, False),
        ({"NumericGreaterThanEquals": {"aws:EpochTime": "1e3"}}, True),
        ({"NumericNotEquals": {"aws:EpochTime": ["999", "1000"]}}, False),
        ({"NumericEquals": {"aws:userid": "1"}}, False),
        ({"DateEquals": {"aws:EpochTime": "1970-01-01T00:16:40Z"}}, True),
        ({"DateNotEquals": {"aws:EpochTime": "1970-01-01T00:16:40Z"}}, False),
        ({"IpAddress": {"aws:SourceIp": ["192.0.2.0/24", "10.0.0.0/8"]}}, True),
        ({"IpAddress": {"aws:SourceIp": "10.1.2.4"}}, False),
        ({"IpAddress": {"aws:SourceIp": "::/0"}}, False),
        ({"NotIpAddress": {"aws:SourceIp": "10.0.0.0/8"}}, False),
        ({"NotIpAddress": {"aws:SourceIp": "192.0.2.0/24"}}, True),
        ({"BinaryEquals": {"aws:PrincipalTag/bytes": "QUJD"}}, True),
        ({"BinaryEquals": {"aws:PrincipalTag/bytes": "QUJE"}}, False),
        ({"StringEquals": {"kms:EncryptionContext:owner": "${aws:userid}"}}, True),
        ({"StringNotEquals": {"kms:EncryptionContext:owner": "${aws:userid}"}}, False),
        ({"StringLike": {"kms:EncryptionContext:owner": "${aws:username, 'AIDA*'}"}}, False),
        ({"StringEquals": {"kms:EncryptionContext:owner": "${aws:username, 'AIDA1:bob'}"}}, True),
        ({"StringEquals": {"kms:EncryptionContext:owner": "${aws:username}"}}, False),
        # What a caller put into a tag is no wildcard.
        ({"StringLike": {"kms:RequestAlias": "alias/${aws:PrincipalTag/team}"}}, True),
        ({"StringLike": {"kms:EncryptionContext:owner": "${aws:PrincipalTag/team}"}}, False),
        ({"StringLike": {"kms:RequestAlias": "alias/a${*}"}}, True),
        ({"StringLike": {"aws:userid": "AIDA${*}"}}, False),
        ({"StringEquals": {"kms:RequestAlias": "alias/a${*}"}}, True),
        # Two values without a quantifier: both must match to allow.
        ({"StringEquals": {"kms:EncryptionContext:tenant": "t1"}}, False),
        ({"StringEquals": {"kms:EncryptionContext:tenant": ["t1", "t2"]}}, True),
    ],
)
def test_all_operators_and_variables(condition: Any, holds: bool) -> None:
    refusal = decide(caller(), statement(principal="*", Condition=condition), context=REQUEST)
    assert (refusal is None) is holds


def test_of_two_values_one_suffices_to_deny() -> None:
    deny = statement("Deny", principal="*", Condition={"StringEquals": {"kms:EncryptionContext:tenant": "t1"}})
    refusal = decide(caller(), statement(principal="*"), deny, context=REQUEST)
    assert refusal is not None
    assert refusal.explicit


def test_variables_in_resources_and_not_in_the_older_version() -> None:
    context: Context = {"aws:principaltag/key": ("k",), "aws:principaltag/star": ("*",)}
    base = KEY.rpartition("/")[0]
    for resource, allowed in (("${aws:PrincipalTag/key}", True), ("${aws:PrincipalTag/star}", False)):
        allow = statement(principal="*", Resource=f"{base}/{resource}")
        assert (decide(caller(), allow, context=context) is None) is allowed
    older = json.dumps({"Statement": [statement(principal="*", Resource=f"{base}/${{aws:PrincipalTag/key}}")]})
    assert parse_policy(older, PolicyKind.KEY).statements[0].resources == (f"{base}/${{$}}{{aws:PrincipalTag/key}}",)
    unfilled = {"Effect": "Allow", "Principal": "*", "Action": "*", "NotResource": "${aws:PrincipalTag/none}"}
    assert decide(caller(), unfilled, context=context) is not None


def test_everybody_but_some_is_denied() -> None:
    """Whoever is excepted is named with session, role and account."""
    allow = statement(principal="*")
    for excepted, allowed in (([SESSION, ROLE, ROOT], True), ([SESSION, ROLE], False), ([ROOT], False)):
        deny = {"Effect": "Deny", "NotPrincipal": {"AWS": excepted}, "Action": "kms:*", "Resource": "*"}
        assert (decide(caller(), allow, deny) is None) is allowed
        assert decide(caller(), allow, deny, binding={ROLE: "AROA0"}) is not None


def test_paths_services_and_federated_identities_are_principals() -> None:
    for principal in (
        {"AWS": f"arn:aws:iam::{OWNER}:role/aws-service-role/x.amazonaws.com/r"},
        {"AWS": f"arn:aws:sts::{OWNER}:federated-user/bob"},
        {"Federated": "cognito-identity.amazonaws.com"},
        {"Federated": f"arn:aws:iam::{OWNER}:oidc-provider/token.actions.githubusercontent.com"},
    ):
        assert decide(caller(OWNER, IDENTITY_ALLOW), statement(principal=principal)) is not None


# ── session policies ───────────────────────────────────────────────────────────────────────────────────────────────


def narrowed(to: dict[str, Any], *identity: dict[str, Any]) -> Caller:
    return replace(caller(OWNER, *identity), session_policies=(parse_policy(document(to), PolicyKind.IDENTITY),))


ENCRYPT_ONLY = {"Effect": "Allow", "Action": "kms:Encrypt", "Resource": "*"}
NO_SESSION = Refusal("because no session policy allows the kms:Decrypt action")


@pytest.mark.parametrize("principal", [{"AWS": ROOT}, {"AWS": ROLE}, "*"])
def test_a_session_policy_narrows(principal: Any) -> None:
    who = narrowed(ENCRYPT_ONLY, IDENTITY_ALLOW)
    assert decide(who, statement(principal=principal), action="kms:Encrypt") is None
    assert decide(who, statement(principal=principal)) == NO_SESSION


def test_a_session_policy_does_not_limit_what_the_key_gives_to_the_session_itself() -> None:
    assert decide(narrowed(ENCRYPT_ONLY), statement(principal={"AWS": SESSION})) is None
    denied = Refusal("with an explicit deny in a session policy", explicit=True)
    assert decide(narrowed(IDENTITY_DENY), statement(principal={"AWS": SESSION})) == denied
    assert decide(narrowed(IDENTITY_ALLOW), statement(principal={"AWS": ROOT})) is not None, "it gives nothing"


@given(st.text(alphabet="a*?${}:,' ", max_size=12))
def test_an_older_text_means_itself(text: str) -> None:
    pattern = without_variables(text)
    assert expand(pattern, {}) == pattern
    assert plain(pattern) == text
    assert glob_matches(pattern, text)


def test_date_conditions_cut_off_older_sessions() -> None:
    """How IAM's "revoke active sessions" works: a Deny on sessions that are older than the click."""
    older = {"DateLessThan": {"aws:TokenIssueTime": "2026-11-22T02:00:00Z"}}
    deny = {"Effect": "Deny", "Action": "*", "Resource": "*", "Condition": older}
    for issued, verdict in (("2026-11-22T01:59:59+00:00", Verdict.DENY), ("2026-11-22T02:00:00+00:00", Verdict.NONE)):
        policies = [parse_policy(document(deny), PolicyKind.IDENTITY)]
        assert identity_verdict(policies, "kms:Decrypt", KEY, {"aws:tokenissuetime": (issued,)}) is verdict


# ── documents that are none ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "", "zzz", "[]", "{}", "null", '{"Statement": []}', '{"Statement": "x"}',
        '{"Version": "2020-01-01", "Statement": []}',
        document(statement("Maybe", principal="*")),
        document(statement(principal="nobody")),
        document(statement(principal={})),
        document(statement(principal={"AWS": []})),
        document(statement(principal={"AWS": "arn:aws:iam::1:root"})),
        document(statement(principal={"AWS": f"arn:aws:iam::{OWNER}:role/*"})),
        document(statement(principal={"AWS": f"arn:aws:s3::{OWNER}:role/r"})),
        document(statement(principal={"Federated": "x"})),
        document(statement(principal="*", Action="Decrypt")),
        document(statement(principal="*", Action=[])),
        document(statement(principal="*", Action=[1])),
        document(statement(principal="*", NotAction="kms:*")),
        document(statement(principal="*", Unknown=1)),
        document(statement(principal="*", Condition={"StringSounds": {"a": "b"}})),
        document(statement(principal="*", Condition={"StringEquals": {}})),
        document(statement(principal="*", Condition={"StringEquals": {"aws:userid": []}})),
        document(statement(principal="*", Condition={"StringEquals": {"aws:userid": [["x"]]}})),
        document(statement(principal="*", Condition={"DateLessThan": {"aws:CurrentTime": "yesterday"}})),
        document(statement(principal="*", Condition={"NumericEquals": {"aws:EpochTime": "many"}})),
        document(statement(principal="*", Condition={"IpAddress": {"aws:SourceIp": "10.0.0.0/33"}})),
        document(statement(principal="*", Condition={"BinaryEquals": {"aws:userid": "-"}})),
        document(statement(principal="*", Condition={"Bool": {"aws:SecureTransport": "perhaps"}})),
        document(statement(principal="*", Condition={"Bool": {"aws:SecureTransport": "${aws:userid}"}})),
        document(statement(principal="*", Condition={"StringEquals": {"nothing": "x"}})),
        document(statement(principal="*", Condition={"StringEquals": {"kms:EncryptionContxt:a": "x"}})),
        document(statement(principal="*", Condition={"StringEquals": {"aws:userid": "${aws:Nobody}"}})),
        document(statement(principal="*", Resource="${aws:userid")),
        document(statement(principal="*", Resource="${}")),
        document({"Effect": "Allow", "NotPrincipal": "*", "Action": "*", "Resource": "*"}),
        document({"Effect": "Deny", "NotPrincipal": "*", "Principal": "*", "Action": "*", "Resource": "*"}),
        document(statement()),
        '{"Statement": {"Effect": "Allow", "Effect": "Deny", "Action": "*", "Resource": "*", "Principal": "*"}}',
        "[" * 100_000,
        " " * 40_000,
    ],
)  # fmt: skip
def test_malformed_documents(text: str) -> None:
    with pytest.raises(MalformedPolicyError):
        parse_policy(text, PolicyKind.KEY)


def test_identity_policies_have_no_principal_and_trust_policies_no_resource() -> None:
    with pytest.raises(MalformedPolicyError):
        parse_policy(document(statement(principal="*")), PolicyKind.IDENTITY)
    with pytest.raises(MalformedPolicyError):
        parse_policy(document(statement(principal="*")), PolicyKind.TRUST)
    trust = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": "*"}
    assert parse_policy(document(trust), PolicyKind.TRUST).statements[0].resources == ("*",)


# ── laws ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_actions = st.sampled_from(["*", "kms:*", "kms:Decrypt", "kms:De*", "kms:Encrypt", "s3:GetObject"])
_principals = st.sampled_from(
    ["*", {"AWS": ROLE}, {"AWS": SESSION}, {"AWS": ROOT}, {"AWS": STRANGER}, {"AWS": [ROOT, ROLE]}, {"Service": "x"}]
)
_conditions = st.sampled_from(
    [
        {},
        {"StringEquals": {"kms:EncryptionContext:tenant": "t1"}},
        {"StringNotEquals": {"kms:EncryptionContext:tenant": "t1"}},
        {"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["tenant"]}},
        {"Null": {"kms:EncryptionContext:tenant": "false"}},
    ]
)
_resources = st.sampled_from(["*", KEY, KEY + "2", "arn:aws:kms:*"])


@st.composite
def _statements(draw: st.DrawFn, effect: st.SearchStrategy[str], *, principal: bool = True) -> dict[str, Any]:
    made = {
        "Effect": draw(effect),
        "Action": draw(_actions),
        "Resource": draw(_resources),
        "Condition": draw(_conditions),
    }
    return made | ({"Principal": draw(_principals)} if principal else {})


_any_effect = st.sampled_from(["Allow", "Deny"])
_key_statements = st.lists(_statements(_any_effect), min_size=1, max_size=4)
_identity_statements = st.lists(_statements(_any_effect, principal=False), max_size=2)
_contexts = st.sampled_from(
    [{}, CONTEXT_T1, {"kms:encryptioncontext:tenant": ("t2",), "kms:encryptioncontextkeys": ("tenant", "x")}]
)
_accounts = st.sampled_from([OWNER, STRANGER])


@given(_accounts, _identity_statements, _key_statements, _contexts, st.randoms(use_true_random=False))
def test_law_order_does_not_matter(
    account: str, identity: list[dict[str, Any]], key: list[dict[str, Any]], context: Context, random: Any
) -> None:
    shuffled = random.sample(key, len(key))
    first = decide(caller(account, *identity), *key, context=context)
    assert (first is None) == (decide(caller(account, *identity), *shuffled, context=context) is None)


@given(_accounts, _identity_statements, _key_statements, _contexts, _statements(st.just("Allow")))
def test_law_an_allow_never_takes_away(
    account: str, identity: list[dict[str, Any]], key: list[dict[str, Any]], context: Context, more: dict[str, Any]
) -> None:
    if decide(caller(account, *identity), *key, context=context) is None:
        assert decide(caller(account, *identity), *key, more, context=context) is None


@given(_accounts, _identity_statements, _key_statements, _contexts, _statements(st.just("Deny")))
def test_law_a_deny_never_gives(
    account: str, identity: list[dict[str, Any]], key: list[dict[str, Any]], context: Context, more: dict[str, Any]
) -> None:
    if decide(caller(account, *identity), *key, context=context) is not None:
        assert decide(caller(account, *identity), *key, more, context=context) is not None


@given(_accounts, _identity_statements, _key_statements, _contexts)
def test_law_a_blanket_deny_refuses_everything(
    account: str, identity: list[dict[str, Any]], key: list[dict[str, Any]], context: Context
) -> None:
    deny = statement("Deny", action="*", principal="*")
    assert decide(caller(account, *identity), *key, deny, context=context) is not None


@given(_accounts, st.lists(_statements(st.just("Deny")), min_size=1, max_size=3), _contexts)
def test_law_without_an_allow_in_the_key_policy_nobody_gets_in(
    account: str, key: list[dict[str, Any]], context: Context
) -> None:
    assert decide(replace(caller(account, IDENTITY_ALLOW), is_root=True), *key, context=context) is not None


@given(st.text(alphabet="ab*?[", max_size=8), st.text(alphabet="ab*[\n", max_size=8))
def test_globs_agree_with_fnmatch(pattern: str, text: str) -> None:
    # fnmatch knows brackets, IAM does not: they are escaped for the comparison.
    assert glob_matches(pattern, text) == bool(re.fullmatch(fnmatch.translate(pattern.replace("[", "[[]")), text))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["Allow", "*", "kms:*", ROLE]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["Version", "Statement", "Effect", "Action", "Resource", "Principal", "AWS", "Condition", "x"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(_json | st.builds(lambda item: {"Statement": item}, _json), st.sampled_from(PolicyKind))
def test_any_document_is_a_policy_or_malformed(value: Any, kind: PolicyKind) -> None:
    try:
        policy = parse_policy(json.dumps(value), kind)
    except MalformedPolicyError:
        return
    assert policy.statements


@given(st.text(max_size=200), st.sampled_from(PolicyKind))
def test_any_text_is_a_policy_or_malformed(text: str, kind: PolicyKind) -> None:
    with pytest.raises(MalformedPolicyError):
        parse_policy(text, kind)
