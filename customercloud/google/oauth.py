"""Access tokens: for a service account's own assertion (OAuth 2.0 JWT bearer grant, RFC 7523), and by impersonation.

iamcredentials has no types in the SDKs that we use, so its one request is described here as a protobuf message: the
shell reads it, and the audit log writes it, like any other.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory, timestamp_pb2
from google.protobuf.message import Message

from customercloud.google.access import Access
from customercloud.google.call import Api, Call, LogType, Operation
from customercloud.google.errors import bad_request, not_found, unimplemented
from customercloud.google.identity import TOKEN_AUDIENCE, ServiceAccount
from customercloud.google.state import GoogleState
from customercloud.google.tokens import (
    MAX_LIFETIME,
    MAX_SCOPES,
    AccessTokens,
    Claims,
    Problem,
    TokenError,
    verify_assertion,
)

GET_ACCESS_TOKEN: Final = "iam.serviceAccounts.getAccessToken"  # noqa: S105 - a permission
JWT_BEARER: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_SCOPE_PREFIX: Final = "https://www.googleapis.com/auth/"
_WRONG_TIME: Final = (
    "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your iat and exp "
    "values in the JWT claim."
)
_PACKAGE: Final = "google.iam.credentials.v1"


def _messages() -> tuple[type[Message], type[Message]]:
    """GenerateAccessTokenRequest and …Response of google/iam/credentials/v1/common.proto."""
    file = descriptor_pb2.FileDescriptorProto(
        name="customercloud/iamcredentials.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=[duration_pb2.DESCRIPTOR.name, timestamp_pb2.DESCRIPTOR.name],
    )
    field = descriptor_pb2.FieldDescriptorProto
    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    request = file.message_type.add(name="GenerateAccessTokenRequest")
    request.field.add(name="name", number=1, type=field.TYPE_STRING, label=one)
    request.field.add(name="delegates", number=2, type=field.TYPE_STRING, label=many)
    request.field.add(name="scope", number=4, type=field.TYPE_STRING, label=many)
    request.field.add(
        name="lifetime", number=7, type=field.TYPE_MESSAGE, label=one, type_name=".google.protobuf.Duration"
    )
    answer = file.message_type.add(name="GenerateAccessTokenResponse")
    answer.field.add(name="access_token", number=1, type=field.TYPE_STRING, label=one)
    answer.field.add(
        name="expire_time", number=3, type=field.TYPE_MESSAGE, label=one, type_name=".google.protobuf.Timestamp"
    )
    pool = descriptor_pool.DescriptorPool()
    for known in (duration_pb2, timestamp_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    found = [pool.FindMessageTypeByName(f"{_PACKAGE}.{message.name}") for message in (request, answer)]
    return message_factory.GetMessageClass(found[0]), message_factory.GetMessageClass(found[1])


GenerateAccessTokenRequest, GenerateAccessTokenResponse = _messages()


class Impersonation:
    """`lifetime` overrides how long tokens live (`Faults.session_lifetime_s`)."""

    def __init__(
        self, state: GoogleState, access: Access, tokens: AccessTokens, lifetime: Callable[[], dt.timedelta | None]
    ) -> None:
        self._state = state
        self._access = access
        self._tokens = tokens
        self._lifetime = lifetime

    @property
    def operations(self) -> list[Operation]:
        request, log = GenerateAccessTokenRequest, LogType.DATA_READ
        return [Operation(Api.CREDENTIALS, "GenerateAccessToken", log, request, self.generate_access_token)]

    def generate_access_token(self, call: Call, request: Any) -> Message:
        """`expireTime` has whole seconds: google-auth reads no others."""
        email = request.name.rpartition("/")[2]
        name = self._access.account(email)
        account = self._state.snapshot.accounts.get(email)
        if name is None or account is None:
            raise not_found(f"Not found; Gaia id not found for email {email[:256]}")
        self._access.require(call, GET_ACCESS_TOKEN, name)
        if request.delegates:
            raise unimplemented("Delegation chains do not exist here.")
        scopes = tuple(dict.fromkeys(request.scope))
        if not 1 <= len(scopes) <= MAX_SCOPES or not all(s.startswith(_SCOPE_PREFIX) for s in scopes):
            raise bad_request("scope", "scope is a list of one or more OAuth 2.0 scopes.")
        lifetime = request.lifetime.ToTimedelta() if request.HasField("lifetime") else MAX_LIFETIME
        if not dt.timedelta(0) < lifetime <= MAX_LIFETIME:
            raise bad_request("lifetime", "lifetime is at most 3600 seconds.")
        expires_at = (call.now + (self._lifetime() or lifetime)).replace(microsecond=0)
        claims = _claims(account, expires_at, scopes, call.principal.email)
        answer: Any = GenerateAccessTokenResponse(access_token=self._tokens.issue(claims))
        answer.expire_time.FromDatetime(expires_at.replace(tzinfo=None))
        done: Message = answer
        return done


@dataclass(frozen=True, slots=True)
class OAuthAnswer:
    status: int
    body: bytes


class TokenEndpoint:
    """What a credentials file names as its `token_uri`."""

    def __init__(self, state: GoogleState, tokens: AccessTokens) -> None:
        self._state = state
        self._tokens = tokens

    def exchange(self, body: bytes, now: dt.datetime, seen: dt.datetime) -> OAuthAnswer:
        """Form in, JSON out; errors as RFC 6749 has them. `seen`: the time that the assertion is checked with, which a
        skewed clock makes another one."""
        try:
            pairs = parse_qsl(body.decode("ascii"), strict_parsing=True, max_num_fields=16)
        except (UnicodeDecodeError, ValueError):
            return _oauth_error("invalid_request", "The request is not a form.")
        form = dict(pairs)
        if len(form) != len(pairs) or form.get("grant_type") != JWT_BEARER or "assertion" not in form:
            return _oauth_error("unsupported_grant_type", f"Invalid grant_type: {form.get('grant_type', '')[:64]}")
        try:
            find = self._state.snapshot.accounts.get
            assertion = verify_assertion(form["assertion"], TOKEN_AUDIENCE, find, seen)
        except TokenError as error:
            if error.problem is Problem.EXPIRED:
                return _oauth_error("invalid_grant", _WRONG_TIME)
            return _oauth_error("invalid_grant", "Invalid JWT Signature.")
        if not assertion.scopes:
            return _oauth_error("invalid_scope", "Invalid OAuth scope or ID token audience provided.")
        token = self._tokens.issue(_claims(assertion.account, now + MAX_LIFETIME, assertion.scopes, None))
        seconds = int(MAX_LIFETIME.total_seconds())
        answer = {"access_token": token, "expires_in": seconds - 1, "token_type": "Bearer"}
        return OAuthAnswer(200, json.dumps(answer).encode())


def _claims(account: ServiceAccount, expires_at: dt.datetime, scopes: tuple[str, ...], delegate: str | None) -> Claims:
    return Claims(
        email=account.email, unique_id=account.unique_id, expires_at=expires_at, scopes=scopes, delegate=delegate
    )


def _oauth_error(code: str, description: str) -> OAuthAnswer:
    return OAuthAnswer(400, json.dumps({"error": code, "error_description": description}).encode())
