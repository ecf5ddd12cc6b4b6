"""Signature Version 4 against AWS's published test vectors, and against botocore as the signer."""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import replace

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from customercloud.aws.sigv4 import (
    Authorization,
    HttpRequest,
    SignatureError,
    SignatureProblem,
    parse_authorization,
    signature,
    verify,
)

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    ("method", "query", "more_headers", "body", "expected"),
    [
        ("GET", "", [], b"", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("POST", "", [], b"", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        ("GET", "Param2=value2&Param1=value1", [], b"",
         "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"),
        ("POST", "", [("content-type", "application/x-www-form-urlencoded")], b"Param1=value1",
         "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"),
    ],
)  # fmt: skip
def test_published_vectors(
    method: str, query: str, more_headers: list[tuple[str, str]], body: bytes, expected: str
) -> None:
    """aws-sig-v4-test-suite: get-vanilla, post-vanilla, get-vanilla-query-order-key, post-x-www-form-urlencoded."""
    timestamp = "20150830T123600Z"
    headers = [*more_headers, ("host", "example.amazonaws.com"), ("x-amz-date", timestamp)]
    request = HttpRequest(method, "/", query, headers, body)
    signed = tuple(sorted(name for name, _ in headers))
    authorization = Authorization("AKIDEXAMPLE", "20150830", "us-east-1", "service", signed, "")
    assert signature(request, authorization, SECRET, timestamp) == expected


def signed_by_botocore(body: bytes = b'{"KeyId":"k"}', token: str | None = None) -> HttpRequest:
    request = AWSRequest(
        "POST", "https://127.0.0.1:8440/", data=body,
        headers={"X-Amz-Target": "TrentService.Decrypt", "Content-Type": "application/x-amz-json-1.1"},
    )  # fmt: skip
    SigV4Auth(Credentials("AKIA1", SECRET, token), "kms", "eu-central-1").add_auth(request)
    headers = [(name.lower(), value) for name, value in request.headers.items()] + [("host", "127.0.0.1:8440")]
    return HttpRequest("POST", "/", "", headers, body)


def check(request: HttpRequest, *, shift_s: float = 0, secret: str = SECRET, service: str = "kms") -> None:
    now = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=shift_s)
    verify(request, parse_authorization(request), secret, region="eu-central-1", service=service, now=now)


def changed(request: HttpRequest, name: str, value: str | None) -> HttpRequest:
    headers = [(n, v) for n, v in request.headers if n != name] + ([] if value is None else [(name, value)])
    return HttpRequest(request.method, request.path, request.query, headers, request.body)


@given(st.binary(max_size=200), st.none() | st.text(alphabet="abcXYZ+/=", min_size=1))
def test_what_botocore_signs_verifies(body: bytes, token: str | None) -> None:
    request = signed_by_botocore(body, token)
    check(request)
    assert parse_authorization(request).access_key_id == "AKIA1"


@pytest.mark.parametrize(("shift_s", "fits"), [(-290, True), (290, True), (-310, False), (310, False)])
def test_clock_skew(shift_s: float, fits: bool) -> None:
    request = signed_by_botocore()
    if fits:
        check(request, shift_s=shift_s)
        return
    with pytest.raises(SignatureError) as caught:
        check(request, shift_s=shift_s)
    assert caught.value.problem is SignatureProblem.SKEW


def test_a_wrong_secret_or_service_does_not_verify() -> None:
    with pytest.raises(SignatureError) as caught:
        check(signed_by_botocore(), secret=SECRET + "x")
    assert caught.value.problem is SignatureProblem.MISMATCH
    with pytest.raises(SignatureError) as caught:
        check(signed_by_botocore(), service="sts")
    assert caught.value.problem is SignatureProblem.SCOPE


def test_nothing_that_was_signed_can_be_changed() -> None:
    request = signed_by_botocore(token="token")
    tampered = [
        HttpRequest("POST", "/", "", request.headers, request.body + b" "),
        HttpRequest("GET", "/", "", request.headers, request.body),
        HttpRequest("POST", "/other", "", request.headers, request.body),
        HttpRequest("POST", "/", "a=b", request.headers, request.body),
        changed(request, "x-amz-target", "TrentService.Encrypt"),
        changed(request, "x-amz-security-token", "other"),
        changed(request, "host", "elsewhere"),
        changed(request, "x-amz-extra", "not signed"),
    ]
    for attempt in tampered:
        with pytest.raises(SignatureError) as caught:
            check(attempt)
        assert caught.value.problem is SignatureProblem.MISMATCH


def test_a_claimed_payload_hash_is_not_believed() -> None:
    """Even when the claim itself is signed: the hash that counts is that of the body that came."""
    now = dt.datetime.now(dt.UTC)
    timestamp = now.strftime("%Y%m%dT%H%M%SZ")
    headers = [
        ("host", "127.0.0.1"),
        ("x-amz-content-sha256", hashlib.sha256(b"signed body").hexdigest()),
        ("x-amz-date", timestamp),
    ]
    names = tuple(name for name, _ in headers)
    genuine = HttpRequest("POST", "/", "", headers, b"signed body")
    authorization = Authorization("AKIA1", timestamp[:8], "eu-central-1", "kms", names, "")
    authorization = replace(authorization, signature=signature(genuine, authorization, SECRET, timestamp))
    verify(genuine, authorization, SECRET, region="eu-central-1", service="kms", now=now)
    forged = replace(genuine, body=b"another body")
    with pytest.raises(SignatureError):
        verify(forged, authorization, SECRET, region="eu-central-1", service="kms", now=now)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (None, SignatureProblem.MISSING),
        ("", SignatureProblem.INCOMPLETE),
        ("Bearer x", SignatureProblem.INCOMPLETE),
        ("AWS4-HMAC-SHA256 Credential=a/b/c/d/aws4_request, SignedHeaders=host", SignatureProblem.INCOMPLETE),
        (
            "AWS4-HMAC-SHA256 Credential=a/b/c/aws4_request, SignedHeaders=host, Signature=0",
            SignatureProblem.INCOMPLETE,
        ),
        ("AWS4-HMAC-SHA256 Credential=a/b/c/d/other, SignedHeaders=host, Signature=0", SignatureProblem.INCOMPLETE),
    ],
)
def test_headers_that_cannot_be_used(header: str | None, problem: SignatureProblem) -> None:
    with pytest.raises(SignatureError) as caught:
        check(changed(signed_by_botocore(), "authorization", header))
    assert caught.value.problem is problem


@given(
    st.text(max_size=120)
    | st.text(max_size=60).map(lambda tail: f"AWS4-HMAC-SHA256 Credential=a/b/c/d/aws4_request, {tail}")
)
def test_any_header_is_refused_in_a_documented_way(header: str) -> None:
    with pytest.raises(SignatureError):
        check(changed(signed_by_botocore(), "authorization", header))
