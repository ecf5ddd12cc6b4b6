"""What STS has and this simulator does not, refused as AWS refuses it in accounts without identity providers,
organizations and outbound federation."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Final, NoReturn

from customercloud.aws.access import KeyAccess
from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError
from customercloud.aws.params import Params
from customercloud.aws.sts import StsOperation

UNSIGNED: Final = frozenset({"AssumeRoleWithWebIdentity", "AssumeRoleWithSAML"})
"""Whoever calls these has no credentials yet."""


def refuse_unsigned(action: str, params: Params) -> NoReturn:
    """Nobody's call, so it stands in nobody's log. Raises AwsError."""
    if action == "AssumeRoleWithSAML":
        raise AwsError("InvalidIdentityToken", _saml_problem(params))
    issuer = _issuer(params.string("WebIdentityToken", maximum=20_000))
    if issuer is None:
        raise AwsError(
            "InvalidIdentityToken",
            "The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)",
        )
    raise AwsError("InvalidIdentityToken", f"No OpenIDConnect provider found in your account for {issuer}")


def _issuer(token: str) -> str | None:
    try:
        _, payload, _ = token.split(".")
        issuer = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["iss"]
    except (binascii.Error, ValueError, KeyError, TypeError, RecursionError):
        return None
    return issuer[:256] if isinstance(issuer, str) else None


def _saml_problem(params: Params) -> str:
    try:
        base64.b64decode(params.string("SAMLAssertion", maximum=100_000), validate=True)
    except (binascii.Error, ValueError):
        return "Invalid base64 SAMLResponse"
    return f"No SAML provider found for {params.string('PrincipalArn')}"


class StsElsewhere:
    def __init__(self, access: KeyAccess) -> None:
        self._access = access

    @property
    def operations(self) -> dict[str, StsOperation]:
        return {
            "DecodeAuthorizationMessage": self.decode_authorization_message,
            "AssumeRoot": self.assume_root,
            "GetDelegatedAccessToken": self.get_delegated_access_token,
            "GetWebIdentityToken": self.get_web_identity_token,
        }

    def decode_authorization_message(self, call: Call, params: Params) -> NoReturn:
        """Refusals here carry no encoded message."""
        self._access.authorize_account(call)
        raise AwsError("InvalidAuthorizationMessageException", "Message is not valid")

    def assume_root(self, call: Call, params: Params) -> NoReturn:
        """There are no organizations, whose management account may."""
        caller = call.caller.caller
        raise AwsError(
            "AccessDenied",
            f"User: {caller.arn} is not authorized to perform: sts:AssumeRoot on resource: "
            f"{params.string('TargetPrincipal')}",
            403,
        )

    def get_delegated_access_token(self, call: Call, params: Params) -> NoReturn:
        raise AwsError("ExpiredTradeInTokenException", "The trade-in token has expired.")

    def get_web_identity_token(self, call: Call, params: Params) -> NoReturn:
        self._access.authorize_account(call)
        raise AwsError(
            "OutboundWebIdentityFederationDisabledException",
            "Outbound web identity federation is not enabled for this account.",
            403,
        )
