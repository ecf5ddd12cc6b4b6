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

from customercloud.azure import ec, errors, pairs, rsa
from customercloud.azure.backups import MAX_BACKUP_SIZE_BYTES, Backups
from customercloud.azure.bodies import Body, base64url, unbase64url
from customercloud.azure.bundles import (
    changed_attributes,
    key_bundle,
    key_id,
    key_item,
    parsed_rotation_policy,
    rotation_policy,
)
from customercloud.azure.errors import AzureError
from customercloud.azure.keys import Attributes, Key, KeySpec, KeyVersion
from customercloud.azure.pairs import KeyPair
from customercloud.azure.routes import Route
from customercloud.azure.state import AzureState, Vault

MAX_PAGE_SIZE: Final = 25
_MAX_VALUE_SIZE_BYTES: Final = 512
"""Of a 4096-bit key: no operation takes or gives more."""


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
def _loaded(version: str, spec: KeySpec, private_key: bytes) -> KeyPair:
    return pairs.load(spec, private_key)


def loaded(version: KeyVersion) -> KeyPair:
    return _loaded(version.version, version.spec, version.private_key)


def forget_loaded_keys() -> None:
    """After a purge no private key stays in the cache."""
    _loaded.cache_clear()


class KeyOperations:
    """`delay` is the propagation delay of changes made now, `takes` how long a deletion or recovery is in progress."""

    def __init__(self, state: AzureState, delay: Callable[[], dt.timedelta], takes: Callable[[], dt.timedelta]) -> None:
        self._state = state
        self._delay = delay
        self._takes = takes
        self._backups = Backups(state.snapshot.signing_key.private_key)
        self.handlers: dict[str, Callable[[KeyCall], Awaitable[Answer]]] = {
            "KeyCreate": self._create,
            "KeyRotate": self._rotate,
            "KeyImport": self._import,
            "KeyGetAttestation": self._unsupported,
            "RandomBytesGet": self._unsupported,
        } | {
            name: _at_once(handler)
            for name, handler in {
                "KeyBackup": self._backup,
                "KeyRestore": self._restore,
                "KeyRelease": self._release,
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
        spec = pairs.asked_spec(call.body)
        attributes = self._attributes(call, call.body, spec)
        self._refuse_name(call)
        version = KeyVersion.new(spec, await asyncio.to_thread(pairs.generate, spec), call.now)
        return self._added(call, version, attributes)

    async def _import(self, call: KeyCall) -> Answer:
        jwk = call.body.object("key")
        if jwk is None:
            raise errors.required("key")
        # The library tests the numbers, which takes as long as making a key.
        hsm = bool(call.body.boolean("Hsm"))
        spec, private_key = await asyncio.to_thread(lambda: pairs.imported(jwk, hsm=hsm))
        attributes = self._attributes(call, call.body.with_member("key_ops", jwk), spec)
        return self._added(call, KeyVersion.new(spec, private_key, call.now), attributes)

    @staticmethod
    def _attributes(call: KeyCall, body: Body, spec: KeySpec) -> Attributes:
        operations = pairs.operations_of(spec)
        return changed_attributes(body, Attributes(updated=call.now, key_ops=operations), call.now, operations)

    def _added(self, call: KeyCall, version: KeyVersion, attributes: Attributes) -> Answer:
        """A new key, or a new version of the one that has the name."""
        self._refuse_name(call)
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
        spec = key.current.spec
        version = KeyVersion.new(spec, await asyncio.to_thread(pairs.generate, spec), now)
        latest = self._state.key(vault, key.name)  # others may have changed it meanwhile
        if latest is None or not latest.is_seen(now, deleted=False):
            raise errors.key_not_found(key.name)
        return latest.add_version(version, latest.rotated_attributes(now), self._delay())

    async def _unsupported(self, call: KeyCall) -> Answer:
        """What only a managed HSM can do. Wording [assumed]."""
        raise errors.bad_parameter(f"Operation {call.route.operation} is not supported by this vault.\r\n")

    def _release(self, call: KeyCall) -> Answer:
        """No key here is exportable: those need a release policy."""
        self._key(call).version(call.route.version)
        raise errors.operation_not_permitted("release")

    def _backup(self, call: KeyCall) -> Answer:
        return {"value": base64url(self._backups.seal(call.vault.tenant_id, self._key(call)))}

    def _restore(self, call: KeyCall) -> Answer:
        key = self._backups.open(call.vault.tenant_id, call.body.binary("value", MAX_BACKUP_SIZE_BYTES))
        self._refuse_name(call, key.name)
        if self._state.key(call.vault, key.name) is not None:
            message = f"Key {key.name} already exists in this vault, and cannot be restored over."
            raise AzureError(409, "Conflict", message)
        return self._stored(call, key.restored(call.now))

    # ── reading and changing ───────────────────────────────────────────────────────────────────────────────────

    def _get(self, call: KeyCall) -> Answer:
        key = self._key(call)
        return self._bundle(call, key, key.version(call.route.version))

    def _update(self, call: KeyCall) -> Answer:
        key = self._key(call)
        version = key.version(call.route.version)
        operations = pairs.operations_of(version.spec)
        attributes = changed_attributes(call.body, key.attributes[version.version], call.now, operations)
        return self._stored(call, key.update(version.version, attributes, call.now, self._delay()), version)

    def _delete(self, call: KeyCall) -> Answer:
        key = self._key(call)
        return self._stored(call, key.delete(call.vault.recoverable_days, call.now, self._delay(), self._takes()))

    def _get_deleted(self, call: KeyCall) -> Answer:
        key = self._deleted_key(call)
        if not key.is_settled(call.now):
            raise errors.deleted_key_not_found(call.name)
        return self._bundle(call, key, key.current)

    def _recover(self, call: KeyCall) -> Answer:
        key = self._deleted_key(call)
        key.refuse_unsettled(call.now)
        return self._stored(call, key.recover(call.now, self._delay(), self._takes()))

    def _purge(self, call: KeyCall) -> Answer:
        key = self._deleted_key(call)
        key.refuse_unsettled(call.now)
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
        all_keys = self._state.keys_of(call.vault)
        keys = {key.name.lower(): key for key in all_keys if key.is_seen(call.now, deleted=False)}
        return _page(call, "/keys", {name: key_item(call.origin, call.vault, key) for name, key in keys.items()})

    def _list_versions(self, call: KeyCall) -> Answer:
        key = self._key(call)
        items = {v.version: key_item(call.origin, call.vault, key, v) for v in key.versions}
        return _page(call, f"/keys/{key.name}/versions", items)

    def _list_deleted(self, call: KeyCall) -> Answer:
        all_keys = self._state.keys_of(call.vault)
        keys = {key.name.lower(): key for key in all_keys if key.is_seen(call.now, deleted=True)}
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
        self._check_algorithm(call, version, algorithm)
        return self._result(call, version, loaded(version).sign(algorithm, digest))

    def _verify(self, call: KeyCall) -> Answer:
        algorithm = call.body.text("alg")
        digest = call.body.binary("digest", _MAX_VALUE_SIZE_BYTES)
        signature = call.body.binary("value", _MAX_VALUE_SIZE_BYTES)
        version = self._usable(call, algorithm)
        self._check_algorithm(call, version, algorithm)
        return {"value": loaded(version).verify(algorithm, digest, signature)}

    def _input(self, call: KeyCall) -> tuple[str, bytes]:
        algorithm = call.body.text("alg")
        signatures = rsa.SIGNATURE_ALGORITHMS + ec.SIGNATURE_ALGORITHMS
        known = signatures if call.route.operation == "KeySign" else rsa.ENCRYPTION_ALGORITHMS
        if algorithm not in known:
            raise errors.invalid_value()
        return algorithm, call.body.binary("value", _MAX_VALUE_SIZE_BYTES)

    @staticmethod
    def _check_algorithm(call: KeyCall, version: KeyVersion, algorithm: str) -> None:
        if algorithm in loaded(version).signature_algorithms:
            return
        if algorithm not in rsa.SIGNATURE_ALGORITHMS + ec.SIGNATURE_ALGORITHMS:
            raise errors.invalid_value()
        raise errors.incompatible_algorithm(key_id(call.origin, call.name, version.version), version.kty, algorithm)

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
        if key is not None and not key.deleted and call.route.operation == "KeyDelete":
            key.refuse_unsettled(call.now)
        if key is None or not key.is_seen(call.now, deleted=False):
            raise errors.key_not_found(f"{call.name}/{call.route.version}".rstrip("/"))
        call.used.key_id = key_id(call.origin, key.name)
        return key

    def _deleted_key(self, call: KeyCall) -> Key:
        key = self._state.key(call.vault, call.name)
        if key is None or not key.deleted:
            raise errors.deleted_key_not_found(call.name)
        call.used.key_id = key_id(call.origin, key.name)
        return key

    def _refuse_name(self, call: KeyCall, name: str | None = None) -> None:
        """Of a key that is deleted, or on its way there or back. `name`: the request's own unless given."""
        key = self._state.key(call.vault, name or call.name)
        if key is None:
            return
        key.refuse_unsettled(call.now)
        if key.deleted:
            raise errors.deleted_but_recoverable(key.name)

    def _stored(self, call: KeyCall, key: Key, version: KeyVersion | None = None) -> Answer:
        self._state.put_key(call.vault, key)
        return self._bundle(call, key, version or key.current)

    def _bundle(self, call: KeyCall, key: Key, version: KeyVersion) -> Answer:
        call.used.key_id = key_id(call.origin, key.name, version.version)
        return key_bundle(call.origin, call.vault, key, version, loaded(version).public_members())


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
