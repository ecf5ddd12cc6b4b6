"""REST: from method, path, query and JSON body to a request message, and back (google.api.http).

Bounds: the body's size is the shell's; nesting is limited by the JSON parser; a query has at most 64 parameters.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from customercloud.google.call import Api
from customercloud.google.errors import bad_request, invalid_argument, unimplemented

_SYSTEM_PARAMETERS: Final = frozenset(
    {"$alt", "alt", "$.xgafv", "$prettyPrint", "prettyPrint", "$userProject", "key", "quotaUser", "uploadType"}
)
_MAX_QUERY_PARAMETERS: Final = 64
_MAX_QUERY_SIZE_CHARACTERS: Final = 16_384
_WHOLE: Final = "*"
_ENUM_AS_INT: Final = "json;enum-encoding=int"
_BASE64: Final = re.compile(r"(?:[A-Za-z0-9+/]*|[A-Za-z0-9_-]*)={0,2}")
_UNKNOWN_FIELD: Final = re.compile(r'has no field named "([A-Za-z0-9_.]{1,64})"')


@dataclass(frozen=True, slots=True)
class Route:
    """One binding. `field` (dotted) takes the resource in the path; `body` is a field's name, `*`, or None."""

    http_method: str
    path: re.Pattern[str]
    api: Api
    operation: str
    field: str
    body: str | None


@dataclass(frozen=True, slots=True)
class Match:
    route: Route
    resource: str


_LOCATION: Final = "projects/*/locations/*"
_RING: Final = f"{_LOCATION}/keyRings/*"
_KEY: Final = f"{_RING}/cryptoKeys/*"
_VERSION: Final = f"{_KEY}/cryptoKeyVersions/*"
_JOB: Final = f"{_RING}/importJobs/*"
_ACCOUNT: Final = "projects/*/serviceAccounts/*"


def _route(api: Api, operation: str, method: str, resource: str, rest: str = "", **more: str) -> Route:
    pattern = re.escape(resource).replace(r"\*", "[^/:]+")
    path = re.compile(f"/v1/({pattern}){re.escape(rest)}")
    field = more.get("field") or ("parent" if rest.startswith("/") else "name")
    return Route(method, path, api, operation, field, more.get("body", _WHOLE if method == "POST" else None))


def _kms(*binding: str, **more: str) -> Route:
    return _route(Api.KMS, *binding, **more)


def _policy_routes(api: Api, resource: str, get: str) -> list[Route]:
    return [
        _route(api, "GetIamPolicy", get, resource, ":getIamPolicy", field="resource"),
        _route(api, "SetIamPolicy", "POST", resource, ":setIamPolicy", field="resource"),
        _route(api, "TestIamPermissions", "POST", resource, ":testIamPermissions", field="resource"),
    ]


ROUTES: Final = [
    _kms("ListLocations", "GET", "projects/*", "/locations", field="name"),
    _kms("GetLocation", "GET", _LOCATION),
    _kms("GenerateRandomBytes", "POST", _LOCATION, ":generateRandomBytes", field="location"),
    _kms("ListKeyRings", "GET", _LOCATION, "/keyRings"),
    _kms("CreateKeyRing", "POST", _LOCATION, "/keyRings", body="key_ring"),
    _kms("GetKeyRing", "GET", _RING),
    _kms("ListCryptoKeys", "GET", _RING, "/cryptoKeys"),
    _kms("CreateCryptoKey", "POST", _RING, "/cryptoKeys", body="crypto_key"),
    _kms("GetCryptoKey", "GET", _KEY),
    _kms("UpdateCryptoKey", "PATCH", _KEY, field="crypto_key.name", body="crypto_key"),
    _kms("UpdateCryptoKeyPrimaryVersion", "POST", _KEY, ":updatePrimaryVersion"),
    _kms("Encrypt", "POST", _KEY, ":encrypt"),
    _kms("Encrypt", "POST", _VERSION, ":encrypt"),
    _kms("Decrypt", "POST", _KEY, ":decrypt"),
    _kms("ListCryptoKeyVersions", "GET", _KEY, "/cryptoKeyVersions"),
    _kms("CreateCryptoKeyVersion", "POST", _KEY, "/cryptoKeyVersions", body="crypto_key_version"),
    _kms("GetCryptoKeyVersion", "GET", _VERSION),
    _kms("UpdateCryptoKeyVersion", "PATCH", _VERSION, field="crypto_key_version.name", body="crypto_key_version"),
    _kms("DestroyCryptoKeyVersion", "POST", _VERSION, ":destroy"),
    _kms("RestoreCryptoKeyVersion", "POST", _VERSION, ":restore"),
    _kms("AsymmetricSign", "POST", _VERSION, ":asymmetricSign"),
    _kms("AsymmetricDecrypt", "POST", _VERSION, ":asymmetricDecrypt"),
    _kms("MacSign", "POST", _VERSION, ":macSign"),
    _kms("MacVerify", "POST", _VERSION, ":macVerify"),
    _kms("RawEncrypt", "POST", _VERSION, ":rawEncrypt"),
    _kms("RawDecrypt", "POST", _VERSION, ":rawDecrypt"),
    _kms("GetPublicKey", "GET", _VERSION, "/publicKey", field="name"),
    _kms("ListImportJobs", "GET", _RING, "/importJobs"),
    _kms("CreateImportJob", "POST", _RING, "/importJobs", body="import_job"),
    _kms("GetImportJob", "GET", _JOB),
    _kms("ImportCryptoKeyVersion", "POST", _KEY, "/cryptoKeyVersions:import"),
    _kms(
        "ImportTrustedKeyWrappedCryptoKeyVersion",
        "POST",
        _KEY,
        "/cryptoKeyVersions:importTrustedKeyWrappedCryptoKeyVersion",
    ),
    _kms("ExportTrustedKeyWrappedCryptoKeyVersion", "GET", _VERSION, ":exportTrustedKeyWrappedCryptoKeyVersion"),
    _kms("DeleteCryptoKey", "DELETE", _KEY),
    _kms("DeleteCryptoKeyVersion", "DELETE", _VERSION),
    _kms("Decapsulate", "POST", _VERSION, ":decapsulate"),
    _kms("ListRetiredResources", "GET", _LOCATION, "/retiredResources"),
    _kms("GetRetiredResource", "GET", f"{_LOCATION}/retiredResources/*"),
    _kms("GetOperation", "GET", f"{_LOCATION}/operations/*"),
    *_policy_routes(Api.KMS, _RING, "GET"),
    *_policy_routes(Api.KMS, _KEY, "GET"),
    *_policy_routes(Api.IAM, _ACCOUNT, "POST"),
    *_policy_routes(Api.RESOURCE_MANAGER, "projects/*", "POST"),
    _route(Api.CREDENTIALS, "GenerateAccessToken", "POST", _ACCOUNT, ":generateAccessToken"),
]


def find_route(http_method: str, path: str) -> Match | None:
    for route in ROUTES:
        if route.http_method == http_method and (match := route.path.fullmatch(path)):
            return Match(route, match.group(1))
    return None


def read_request(match: Match, empty: Message, query: str, body: bytes) -> Message:
    """`empty` is filled and returned. Raises INVALID_ARGUMENT; never repeats a value, which may be a secret."""
    route = match.route
    members: dict[str, Any] = {}
    for name, value in _query(query):
        _put(members, empty.DESCRIPTOR, name, value)
    content = _json(body)
    if route.body is None and content:
        raise invalid_argument("This method takes no request body.")
    if route.body == _WHOLE:
        members |= content
    elif route.body is not None:
        members[route.body] = content
    _merge(empty, members)
    *outer, last = route.field.split(".")
    target = empty
    for name in outer:
        target = getattr(target, name)
    setattr(target, last, match.resource)
    return empty


def enums_as_ints(query: str) -> bool:
    """What SDKs ask for with `$alt=json;enum-encoding=int`."""
    return dict(_query_pairs(query)).get("$alt") == _ENUM_AS_INT


def write_answer(answer: Message, *, enums_as_ints: bool) -> bytes:
    members = json_format.MessageToDict(answer, use_integers_for_enums=enums_as_ints)
    return json.dumps(members, separators=(",", ":")).encode()


def _merge(message: Message, members: dict[str, Any]) -> None:
    _check_bytes(message.DESCRIPTOR, members)
    try:
        json_format.ParseDict(members, message)
    except json_format.ParseError as error:
        if unknown := _UNKNOWN_FIELD.search(str(error)):
            text = f'Invalid JSON payload received. Unknown name "{unknown.group(1)}": Cannot find field.'
            raise bad_request(unknown.group(1), text) from None
        raise invalid_argument("Invalid JSON payload received. A value has the wrong type.") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise invalid_argument("Invalid JSON payload received.") from None


def _check_bytes(descriptor: Descriptor, members: dict[str, Any]) -> None:
    """Bytes are base64 or base64url, with or without padding. The parser below would skip what is neither."""
    for name, value in members.items():
        field = descriptor.fields_by_camelcase_name.get(name) or descriptor.fields_by_name.get(name)
        if field is None or field.is_repeated:
            continue
        if field.type == FieldDescriptor.TYPE_BYTES and isinstance(value, str) and not _BASE64.fullmatch(value):
            raise bad_request(field.name, f"Invalid value at '{field.name}' (TYPE_BYTES), Base64 decoding failed.")
        if field.message_type is not None and isinstance(value, dict):
            _check_bytes(field.message_type, value)


def _json(body: bytes) -> dict[str, Any]:
    if not body:
        return {}
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise invalid_argument("Invalid JSON payload received.") from None
    if not isinstance(content, dict):
        raise invalid_argument("Invalid JSON payload received. The root is no object.")
    return content


def _query_pairs(query: str) -> list[tuple[str, str]]:
    try:
        if len(query) > _MAX_QUERY_SIZE_CHARACTERS:
            raise ValueError
        return parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=_MAX_QUERY_PARAMETERS)
    except ValueError:
        raise invalid_argument("The query string is malformed.") from None


def _query(query: str) -> list[tuple[str, str]]:
    """Parameters that are fields of the request."""
    pairs = _query_pairs(query)
    if any(name in ("fields", "$fields") for name, _ in pairs):
        raise unimplemented("Partial responses do not exist here.")
    return [(name, value) for name, value in pairs if name not in _SYSTEM_PARAMETERS]


def _put(members: dict[str, Any], descriptor: Descriptor, name: str, text: str) -> None:
    """`a.b=text` → `{"a": {"b": text}}`, typed as the field wants it."""
    first, _, rest = name.partition(".")
    field = descriptor.fields_by_camelcase_name.get(first) or descriptor.fields_by_name.get(first)
    if field is None:
        unknown = f'Invalid JSON payload received. Unknown name "{first[:64]}": Cannot bind query parameter. Field '
        raise bad_request(first[:64], f"{unknown}'{first[:64]}' could not be found in request message.")
    if rest:
        if field.message_type is None:
            raise bad_request(name[:64], "Cannot bind query parameter.")
        inner = members.setdefault(field.name, {})
        if not isinstance(inner, dict):
            raise bad_request(name[:64], "Cannot bind query parameter.")
        _put(inner, field.message_type, rest, text)
        return
    value: Any = text
    if field.type == FieldDescriptor.TYPE_BOOL:
        if text not in ("true", "false"):
            raise bad_request(name[:64], "A boolean is true or false.")
        value = text == "true"
    if field.is_repeated:
        members.setdefault(field.name, []).append(value)
    else:
        members[field.name] = value
