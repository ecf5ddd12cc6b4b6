"""What Key Vault does with keys. Every operation is called with the caller authorised, and raises AzureError.

`call` carries what the request says; what an operation learns about the key it used goes into `call.used`, so that a
refusal is logged with it.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote, urlencode

from customercloud.azure import errors, rsa
from customercloud.azure.bodies import Body, base64url, unbase64url
from customercloud.azure.bundles import (
    changed_attributes,
    key_bundle,
    key_id,
    key_item,
    parsed_rotation_policy,
    rotation_policy,
)
from customercloud.azure.keys import RSA_SIZES_BITS, Attributes, Key, KeyType, KeyVersion
from customercloud.azure.routes import Route
from customercloud.azure.rsa import RsaKey
from customercloud.azure.state import AzureState, Vault

MAX_PAGE_SIZE: Final = 25
_MAX_VALUE_SIZE_BYTES: Final = 512
"""Of a 4096-bit key: no operation takes or gives more."""
_KEY_TYPES: Final[dict[str, KeyType]] = {"RSA": "RSA", "RSA-HSM": "RSA-HSM"}


@dataclass(slots=True)
class Used:
    """For the audit record."""

    key_id: str | None = None
    algorithm: str | None = None


@dataclass(frozen=True, slots=True)
class KeyCall:
    """One authorised request."""

    origin: str
    vault: Vault
    route: Route
    query: Mapping[str, str]
    body: Body
    now: dt.datetime
    used: Used = field(default_factory=Used)

    @property
    def name(self) -> str:
        return self.route.name or ""


Answer = dict[str, Any] | None
"""None is 204."""


@lru_cache(maxsize=256)
def _loaded(version: str, private_key: bytes) -> RsaKey:
    return RsaKey(private_key)


def loaded(version: KeyVersion) -> RsaKey:
    return _loaded(version.version, version.private_key)


def forget_loaded_keys() -> None:
    """After a purge no private key stays in the cache."""
    _loaded.cache_clear()


class KeyOperations:
    """`delay` is the propagation delay of changes made now."""

    def __init__(self, state: AzureState, delay: Callable[[], dt.timedelta]) -> None:
        self._state = state
        self._delay = delay
        self.handlers: dict[str, Callable[[KeyCall], Awaitable[Answer]]] = {
            "KeyCreate": self._create,
            "KeyRotate": self._rotate,
            "KeyImport": self._unsupported,
            "KeyBackup": self._unsupported,
            "KeyRestore": self._unsupported,
        } | {
            name: _at_once(handler)
            for name, handler in {
                "KeyGet": self._get,
                "KeyUpdate": self._update,
                "KeyDelete": self._delete,
                "KeyList": self._list,
                "KeyListVersions": self._list_versions,
                "KeyListDeleted": self._list_deleted,
                "KeyGetDeleted": self._get_deleted,
                "KeyRecover": self._recover,
                "KeyPurge": self._purge,
                "KeyRotationPolicyGet": self._get_policy,
                "KeyRotationPolicySet": self._set_policy,
                "KeyEncrypt": self._encrypt,
                "KeyWrap": self._encrypt,
                "KeyDecrypt": self._decrypt,
                "KeyUnwrap": self._decrypt,
                "KeySign": self._sign,
                "KeyVerify": self._verify,
            }.items()
        }

    # ── making keys and versions ───────────────────────────────────────────────────────────────────────────────

    async def _create(self, call: KeyCall) -> Answer:
        kty = call.body.text("kty")
        if kty in ("EC", "EC-HSM", "oct", "oct-HSM"):
            raise errors.bad_parameter(f"Key type '{kty}' is not supported by this vault.\r\n")
        if kty not in _KEY_TYPES:
            raise errors.invalid_value()
        size_bits = call.body.integer("key_size") or RSA_SIZES_BITS[0]
        if size_bits not in RSA_SIZES_BITS:
            raise errors.bad_parameter(f"Key size {size_bits} is not supported for key type {kty}.\r\n")
        if call.body.integer("public_exponent") not in (None, rsa.PUBLIC_EXPONENT):
            raise errors.invalid_value()
        attributes = changed_attributes(call.body, Attributes(updated=call.now), call.now)
        self._refuse_deleted_name(call)
        version = KeyVersion.new(_KEY_TYPES[kty], size_bits, await asyncio.to_thread(rsa.generate, size_bits), call.now)
        self._refuse_deleted_name(call)  # meanwhile
        old = self._state.key(call.vault, call.name)
        if old is None:
            key = Key.new(call.name, version, attributes)
        else:
            key = old.add_version(version, attributes, self._delay())
        return self._stored(call, key, version)

    async def _rotate(self, call: KeyCall) -> Answer:
        key = self._key(call)
        if not key.attributes[key.current.version].enabled:
            raise errors.key_disabled("rotate")  # [assumed]: a new version would be an enabled one
        return self._stored(call, await self.rotated(call.vault, key, call.now))

    async def rotated(self, vault: Vault, key: Key, now: dt.datetime) -> Key:
        """The key as it stands, with a new version like its current one. Not stored yet."""
        kty, size_bits = key.current.kty, key.current.size_bits
        version = KeyVersion.new(kty, size_bits, await asyncio.to_thread(rsa.generate, size_bits), now)
        latest = self._state.key(vault, key.name)  # others may have changed it meanwhile
        if latest is None or latest.deleted:
            raise errors.key_not_found(key.name)
        return latest.add_version(version, latest.rotated_attributes(now), self._delay())

    async def _unsupported(self, call: KeyCall) -> Answer:
        raise errors.bad_parameter(f"Operation {call.route.permission} is not supported by this vault.\r\n")

    # ── reading and changing ───────────────────────────────────────────────────────────────────────────────────

    def _get(self, call: KeyCall) -> Answer:
        key = self._key(call)
        return self._bundle(call, key, key.version(call.route.version))

    def _update(self, call: KeyCall) -> Answer:
        key = self._key(call)
        version = key.version(call.route.version)
        attributes = changed_attributes(call.body, key.attributes[version.version], call.now)
        return self._stored(call, key.update(version.version, attributes, call.now, self._delay()), version)

    def _delete(self, call: KeyCall) -> Answer:
        key = self._key(call)
        return self._stored(call, key.delete(call.vault.recoverable_days, call.now, self._delay()))

    def _get_deleted(self, call: KeyCall) -> Answer:
        key = self._deleted_key(call)
        return self._bundle(call, key, key.current)

    def _recover(self, call: KeyCall) -> Answer:
        return self._stored(call, self._deleted_key(call).recover(call.now, self._delay()))

    def _purge(self, call: KeyCall) -> Answer:
        key = self._deleted_key(call)
        if call.vault.purge_protection:
            raise errors.purge_protected()
        self._state.purge_key(call.vault, key)
        forget_loaded_keys()
        return None

    def _get_policy(self, call: KeyCall) -> Answer:
        return rotation_policy(call.origin, self._key(call))

    def _set_policy(self, call: KeyCall) -> Answer:
        key = self._key(call)
        key = key.with_policy(parsed_rotation_policy(call.body, key.rotation_policy, call.now))
        self._state.put_key(call.vault, key)
        return rotation_policy(call.origin, key)

    # ── lists ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _list(self, call: KeyCall) -> Answer:
        keys = {key.name.lower(): key for key in self._state.keys_of(call.vault) if not key.deleted}
        return _page(call, "/keys", {name: key_item(call.origin, call.vault, key) for name, key in keys.items()})

    def _list_versions(self, call: KeyCall) -> Answer:
        key = self._key(call)
        items = {v.version: key_item(call.origin, call.vault, key, v) for v in key.versions}
        return _page(call, f"/keys/{key.name}/versions", items)

    def _list_deleted(self, call: KeyCall) -> Answer:
        keys = {key.name.lower(): key for key in self._state.keys_of(call.vault) if key.deleted}
        items = {name: key_item(call.origin, call.vault, key) for name, key in keys.items()}
        return _page(call, "/deletedkeys", items)

    # ── cryptography ───────────────────────────────────────────────────────────────────────────────────────────

    def _encrypt(self, call: KeyCall) -> Answer:
        algorithm, value = self._input(call)
        version = self._usable(call, algorithm)
        return self._result(call, version, loaded(version).encrypt(algorithm, value))

    def _decrypt(self, call: KeyCall) -> Answer:
        algorithm, value = self._input(call)
        version = self._usable(call, algorithm)
        return self._result(call, version, loaded(version).decrypt(algorithm, value))

    def _sign(self, call: KeyCall) -> Answer:
        algorithm, digest = self._input(call)
        version = self._usable(call, algorithm)
        return self._result(call, version, loaded(version).sign(algorithm, digest))

    def _verify(self, call: KeyCall) -> Answer:
        algorithm = call.body.text("alg")
        digest = call.body.binary("digest", _MAX_VALUE_SIZE_BYTES)
        signature = call.body.binary("value", _MAX_VALUE_SIZE_BYTES)
        version = self._usable(call, algorithm)
        return {"value": loaded(version).verify(algorithm, digest, signature)}

    def _input(self, call: KeyCall) -> tuple[str, bytes]:
        algorithm = call.body.text("alg")
        known = rsa.SIGNATURE_ALGORITHMS if call.route.operation == "KeySign" else rsa.ENCRYPTION_ALGORITHMS
        if algorithm not in known:
            raise errors.invalid_value()
        return algorithm, call.body.binary("value", _MAX_VALUE_SIZE_BYTES)

    def _usable(self, call: KeyCall, algorithm: str) -> KeyVersion:
        call.used.algorithm = algorithm[:64]
        key = self._state.key(call.vault, call.name)
        if key is None:
            raise errors.key_not_found(f"{call.name}/{call.route.version}".rstrip("/"))
        call.used.key_id = key_id(call.origin, key.name, call.route.version or key.effective(call.now).current)
        return key.usable(
            call.route.version,
            call.route.permission.value,
            call.now,
            public_on_disabled=call.vault.public_operations_on_disabled_keys,
        )

    def _result(self, call: KeyCall, version: KeyVersion, value: bytes) -> Answer:
        return {"kid": key_id(call.origin, call.name, version.version), "value": base64url(value)}

    # ── steps that the operations share ────────────────────────────────────────────────────────────────────────

    def _key(self, call: KeyCall) -> Key:
        key = self._state.key(call.vault, call.name)
        if key is None or key.deleted:
            raise errors.key_not_found(f"{call.name}/{call.route.version}".rstrip("/"))
        call.used.key_id = key_id(call.origin, key.name)
        return key

    def _deleted_key(self, call: KeyCall) -> Key:
        key = self._state.key(call.vault, call.name)
        if key is None or not key.deleted:
            raise errors.deleted_key_not_found(call.name)
        call.used.key_id = key_id(call.origin, key.name)
        return key

    def _refuse_deleted_name(self, call: KeyCall) -> None:
        key = self._state.key(call.vault, call.name)
        if key is not None and key.deleted:
            raise errors.deleted_but_recoverable(key.name)

    def _stored(self, call: KeyCall, key: Key, version: KeyVersion | None = None) -> Answer:
        self._state.put_key(call.vault, key)
        return self._bundle(call, key, version or key.current)

    def _bundle(self, call: KeyCall, key: Key, version: KeyVersion) -> Answer:
        call.used.key_id = key_id(call.origin, key.name, version.version)
        return key_bundle(call.origin, call.vault, key, version, loaded(version).public_numbers())


def _at_once(handler: Callable[[KeyCall], Answer]) -> Callable[[KeyCall], Awaitable[Answer]]:
    async def handle(call: KeyCall) -> Answer:
        return handler(call)

    return handle


def _page(call: KeyCall, path: str, items: dict[str, dict[str, Any]]) -> Answer:
    """One page of `items` by name. A name that is removed between two pages moves nothing."""
    limit = call.query.get("maxresults", str(MAX_PAGE_SIZE))
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:4]) <= MAX_PAGE_SIZE:
        raise errors.bad_parameter(f"Property 'maxresults' must be between 1 and {MAX_PAGE_SIZE}.\r\n")
    token = call.query.get("$skiptoken")
    after = b"" if token is None else unbase64url(token)
    if after is None:
        raise errors.invalid_value("$skiptoken")
    names = sorted(name for name in items if name.encode() > after)
    page = names[: int(limit)]
    next_link = None
    if len(names) > len(page):
        query = {"api-version": call.query["api-version"], "$skiptoken": base64url(page[-1].encode())}
        next_link = f"{call.origin}{quote(path)}?{urlencode(query | {'maxresults': limit}, safe='$')}"
    return {"value": [items[name] for name in page], "nextLink": next_link}
