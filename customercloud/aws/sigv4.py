"""Verification of AWS Signature Version 4 in the `Authorization` header.

Source: "AWS Signature Version 4 for API requests" (IAM User Guide). Only what SDKs of these services send: POST to `/`,
the body's hash always part of the signature, host and every `x-amz-` header signed. Presigned queries, chunked
and unsigned payloads are refused.

Pure: the caller looks the secret up and gives the time.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import quote, unquote

MAX_CLOCK_SKEW: Final = dt.timedelta(minutes=5)
_ALGORITHM: Final = "AWS4-HMAC-SHA256"
_TIME_FORMAT: Final = "%Y%m%dT%H%M%SZ"
_FIELD = re.compile(r"(Credential|SignedHeaders|Signature)=([^,\s]+)")


class SignatureProblem(StrEnum):
    MISSING = "no Authorization header"
    INCOMPLETE = "Authorization header cannot be used"
    SCOPE = "credential scope is not for this service, region or day"
    SKEW = "signed too long ago, or in the future"
    MISMATCH = "signature does not match"


class SignatureError(Exception):
    def __init__(self, problem: SignatureProblem, detail: str) -> None:
        super().__init__(detail)
        self.problem = problem
        self.detail = detail


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What was received. `headers` keeps order and repetition; names in lower case."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


@dataclass(frozen=True, slots=True)
class Authorization:
    """The parsed header. Nothing in it is trusted before `verify`."""

    access_key_id: str
    date: str
    region: str
    service: str
    signed_headers: tuple[str, ...]
    signature: str

    @property
    def scope(self) -> str:
        return f"{self.date}/{self.region}/{self.service}/aws4_request"


def parse_authorization(request: HttpRequest) -> Authorization:
    """Raises SignatureError(MISSING | INCOMPLETE)."""
    header = request.header("authorization")
    if header is None:
        raise SignatureError(SignatureProblem.MISSING, "Missing Authentication Token")
    algorithm, _, rest = header.partition(" ")
    fields = dict(_FIELD.findall(rest))
    if algorithm != _ALGORITHM or len(fields) != 3 or len(_FIELD.findall(rest)) != 3:
        raise SignatureError(
            SignatureProblem.INCOMPLETE,
            "Authorization header requires 'Credential' parameter, 'Signature' parameter and 'SignedHeaders' "
            f"parameter under the algorithm {_ALGORITHM}.",
        )
    credential = fields["Credential"].split("/")
    if len(credential) != 5 or credential[4] != "aws4_request" or not all(credential):
        raise SignatureError(
            SignatureProblem.INCOMPLETE,
            "Credential must have exactly 5 slash-delimited elements, e.g. keyid/date/region/service/term.",
        )
    signed = tuple(fields["SignedHeaders"].split(";"))
    return Authorization(credential[0], credential[1], credential[2], credential[3], signed, fields["Signature"])


def verify(
    request: HttpRequest, authorization: Authorization, secret: str, *, region: str, service: str, now: dt.datetime
) -> None:
    """Returns when the request was signed with `secret` for this service, within the allowed clock skew.

    Raises SignatureError otherwise.
    """
    for name, _ in request.headers:
        if (name == "host" or name.startswith("x-amz-")) and name not in authorization.signed_headers:
            raise SignatureError(
                SignatureProblem.MISMATCH, f"'{name}' must be a 'SignedHeader' in the AWS Authorization."
            )
    if "host" not in authorization.signed_headers:
        raise SignatureError(SignatureProblem.MISMATCH, "'host' must be a 'SignedHeader' in the AWS Authorization.")
    timestamp = request.header("x-amz-date") or ""
    try:
        signed_at = dt.datetime.strptime(timestamp, _TIME_FORMAT).replace(tzinfo=dt.UTC)
    except ValueError:
        raise SignatureError(
            SignatureProblem.INCOMPLETE, "Authorization header requires existence of a 'X-Amz-Date' header."
        ) from None
    if (authorization.region, authorization.service) != (region, service) or authorization.date != timestamp[:8]:
        raise SignatureError(
            SignatureProblem.SCOPE,
            f"Credential should be scoped to a valid region and to the service: expected '{region}' and '{service}'.",
        )
    # Order: AWS reports a wrong clock before a wrong signature, which tells the operator what to repair.
    if signed_at < now - MAX_CLOCK_SKEW:
        raise SignatureError(
            SignatureProblem.SKEW,
            f"Signature expired: {timestamp} is now earlier than {(now - MAX_CLOCK_SKEW).strftime(_TIME_FORMAT)} "
            f"({now.strftime(_TIME_FORMAT)} - 5 min.)",
        )
    if signed_at > now + MAX_CLOCK_SKEW:
        raise SignatureError(
            SignatureProblem.SKEW,
            f"Signature not yet current: {timestamp} is still later than "
            f"{(now + MAX_CLOCK_SKEW).strftime(_TIME_FORMAT)} ({now.strftime(_TIME_FORMAT)} + 5 min.)",
        )
    expected = signature(request, authorization, secret, timestamp)
    if not hmac.compare_digest(expected.encode(), authorization.signature.encode()):
        raise SignatureError(
            SignatureProblem.MISMATCH,
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret "
            "Access Key and signing method. Consult the service documentation for details.",
        )


def signature(request: HttpRequest, authorization: Authorization, secret: str, timestamp: str) -> str:
    """The signature that `secret` gives, in hexadecimal."""
    key = f"AWS4{secret}".encode()
    for part in (authorization.date, authorization.region, authorization.service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    digest = hashlib.sha256(canonical_request(request, authorization.signed_headers).encode()).hexdigest()
    to_sign = "\n".join((_ALGORITHM, timestamp, authorization.scope, digest))
    return hmac.new(key, to_sign.encode(), "sha256").hexdigest()


def canonical_request(request: HttpRequest, signed_headers: Sequence[str]) -> str:
    headers = "".join(
        f"{name}:{','.join(' '.join(v.split()) for key, v in request.headers if key == name)}\n"
        for name in signed_headers
    )
    return "\n".join(
        (
            request.method,
            quote(unquote(request.path) or "/", safe="/-_.~"),
            _canonical_query(request.query),
            headers,
            ";".join(signed_headers),
            # Of the body that came, whatever x-amz-content-sha256 claims.
            hashlib.sha256(request.body).hexdigest(),
        )
    )


def _canonical_query(query: str) -> str:
    pairs = [part.partition("=") for part in query.split("&") if part]
    encoded = [(quote(unquote(k), safe="-_.~"), quote(unquote(v), safe="-_.~")) for k, _, v in pairs]
    return "&".join(f"{key}={value}" for key, value in sorted(encoded))
