"""Which operation a method and a path of Key Vault mean. Pure.

A version may be left out (`/keys/n/wrapkey`) or empty (`/keys/n//wrapkey`, `/keys/n/`): then it is the current one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from customercloud.azure import errors
from customercloud.azure.access import Permission
from customercloud.azure.errors import AzureError

_NAME: Final = re.compile(r"[0-9A-Za-z-]{1,127}")
_VERSION: Final = re.compile(r"[0-9A-Za-z]{0,64}")
_P = Permission

CRYPTO_OPERATIONS: Final = {
    "encrypt": ("KeyEncrypt", _P.ENCRYPT),
    "decrypt": ("KeyDecrypt", _P.DECRYPT),
    "wrapkey": ("KeyWrap", _P.WRAP),
    "unwrapkey": ("KeyUnwrap", _P.UNWRAP),
    "sign": ("KeySign", _P.SIGN),
    "verify": ("KeyVerify", _P.VERIFY),
    "release": ("KeyRelease", _P.RELEASE),
}
COLLECTIONS: Final = ("keys", "deletedkeys", "rng")
ABSENT_COLLECTIONS: Final = {
    "secrets": "secrets",
    "deletedsecrets": "secrets",
    "certificates": "certificates",
    "deletedcertificates": "certificates",
    "storage": "managed storage accounts",
    "deletedstorage": "managed storage accounts",
}
"""What begins with these is for a vault, too."""
_NAMED: Final = {
    ("POST", "create"): ("KeyCreate", _P.CREATE),
    ("POST", "rotate"): ("KeyRotate", _P.ROTATE),
    ("GET", "versions"): ("KeyListVersions", _P.LIST),
    ("GET", "rotationpolicy"): ("KeyRotationPolicyGet", _P.GET_ROTATION_POLICY),
    ("PUT", "rotationpolicy"): ("KeyRotationPolicySet", _P.SET_ROTATION_POLICY),
    ("POST", "backup"): ("KeyBackup", _P.BACKUP),
}
_VERSIONED: Final = {"GET": ("KeyGet", _P.GET), "PATCH": ("KeyUpdate", _P.UPDATE)}
_DELETED: Final = {"GET": ("KeyGetDeleted", _P.GET), "DELETE": ("KeyPurge", _P.PURGE)}
_FIXED_WORDS: Final = frozenset({word for _, word in _NAMED} | CRYPTO_OPERATIONS.keys())


@dataclass(frozen=True, slots=True)
class Route:
    operation: str
    """The audit record's operationName, which also names the handler."""
    permission: Permission
    name: str | None = None
    version: str = ""
    """Empty for the current one."""


def route(method: str, path: str) -> Route:
    """Raises AzureError for what Key Vault does not have."""
    collection, _, rest = path.strip("/").partition("/")
    if collection in ABSENT_COLLECTIONS:
        raise errors.not_here(ABSENT_COLLECTIONS[collection])
    if (method, collection, rest) == ("POST", "rng", ""):
        return Route("RandomBytesGet", _P.GET)
    parts = rest.split("/") if rest else []
    if path.endswith("/") and parts:
        parts.append("")
    if not parts:
        if method == "GET" and collection in ("keys", "deletedkeys"):
            return Route("KeyList" if collection == "keys" else "KeyListDeleted", _P.LIST)
        raise _not_allowed(method)
    name, *tail = parts
    if (method, collection, rest) == ("POST", "keys", "restore"):
        return Route("KeyRestore", _P.RESTORE)
    if _NAME.fullmatch(name) is None:
        raise errors.bad_parameter(f"The request URI contains an invalid name: {name[:127]}")
    found = _key_route(method, name, tail) if collection == "keys" else _deleted_route(method, name, tail)
    if found is None:
        raise _not_allowed(method)
    if _VERSION.fullmatch(found.version) is None:
        raise errors.bad_parameter(f"The request URI contains an invalid version: {found.version[:64]}")
    return found


def _key_route(method: str, name: str, tail: list[str]) -> Route | None:
    match tail:
        case [] | [""] if method == "DELETE":
            return Route("KeyDelete", _P.DELETE, name)
        case [] if method == "PUT":
            return Route("KeyImport", _P.IMPORT, name)
        case [word] if (method, word) in _NAMED:
            return Route(*_NAMED[method, word], name)
        case [word] | ["", word] if method == "POST" and word in CRYPTO_OPERATIONS:
            return Route(*CRYPTO_OPERATIONS[word], name)
        case [version, word] if method == "POST" and word in CRYPTO_OPERATIONS:
            return Route(*CRYPTO_OPERATIONS[word], name, version)
        case [version, "attestation"] if method == "GET":
            return Route("KeyGetAttestation", _P.GET, name, version)
        case [] if method in _VERSIONED:
            return Route(*_VERSIONED[method], name)
        case [version] if method in _VERSIONED and version not in _FIXED_WORDS:
            return Route(*_VERSIONED[method], name, version)
        case _:
            return None


def _deleted_route(method: str, name: str, tail: list[str]) -> Route | None:
    match tail:
        case [] | [""] if method in _DELETED:
            return Route(*_DELETED[method], name)
        case ["recover"] if method == "POST":
            return Route("KeyRecover", _P.RECOVER, name)
        case _:
            return None


def _not_allowed(method: str) -> AzureError:
    return AzureError(405, "MethodNotAllowed", f"The requested resource does not support http method '{method[:16]}'.")
