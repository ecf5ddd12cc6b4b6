"""Administrative methods of Cloud KMS: key rings, crypto keys, versions."""

from __future__ import annotations

import datetime as dt
import re
from typing import Final

from google.cloud import kms_v1
from google.protobuf import field_mask_pb2

from customercloud.google.access import Access
from customercloud.google.call import Api, Call, LogType, Operation, operation
from customercloud.google.errors import (
    already_exists,
    bad_request,
    invalid_argument,
    unimplemented,
)
from customercloud.google.keys import (
    DEFAULT_DESTROY_SCHEDULED,
    MAX_DESTROY_SCHEDULED,
    MAX_ROTATION_PERIOD,
    MIN_DESTROY_SCHEDULED,
    MIN_ROTATION_PERIOD,
    Key,
    ProtectionLevel,
    Ring,
    State,
    not_enabled,
)
from customercloud.google.messages import key_message, ring_message, version_message
from customercloud.google.names import KeyName, LocationName, RingName, VersionName
from customercloud.google.paging import page_of
from customercloud.google.state import GoogleState

_LABEL_KEY: Final = re.compile(r"[^\W\d_A-Z][\w-]{0,62}")
_LABEL_VALUE: Final = re.compile(r"[\w-]{0,63}")
_MAX_LABELS: Final = 64
_SYMMETRIC: Final = kms_v1.CryptoKeyVersion.CryptoKeyVersionAlgorithm.GOOGLE_SYMMETRIC_ENCRYPTION
_STATES: Final = kms_v1.CryptoKeyVersion.CryptoKeyVersionState
_KEY_FIELDS: Final = frozenset({"labels", "rotation_period", "next_rotation_time", "version_template"})


class KmsAdmin:
    def __init__(self, state: GoogleState, access: Access) -> None:
        self._state = state
        self._access = access

    @property
    def operations(self) -> list[Operation]:
        kms, read, write = Api.KMS, LogType.ADMIN_READ, LogType.ADMIN_WRITE
        v = kms_v1
        return [
            operation(kms, "CreateKeyRing", write, v.CreateKeyRingRequest, self.create_key_ring),
            operation(kms, "GetKeyRing", read, v.GetKeyRingRequest, self.get_key_ring),
            operation(kms, "ListKeyRings", read, v.ListKeyRingsRequest, self.list_key_rings),
            operation(kms, "CreateCryptoKey", write, v.CreateCryptoKeyRequest, self.create_crypto_key),
            operation(kms, "GetCryptoKey", read, v.GetCryptoKeyRequest, self.get_crypto_key),
            operation(kms, "ListCryptoKeys", read, v.ListCryptoKeysRequest, self.list_crypto_keys),
            operation(kms, "UpdateCryptoKey", write, v.UpdateCryptoKeyRequest, self.update_crypto_key),
            operation(
                kms, "UpdateCryptoKeyPrimaryVersion", write, v.UpdateCryptoKeyPrimaryVersionRequest, self.update_primary
            ),
            operation(kms, "CreateCryptoKeyVersion", write, v.CreateCryptoKeyVersionRequest, self.create_version),
            operation(kms, "GetCryptoKeyVersion", read, v.GetCryptoKeyVersionRequest, self.get_version),
            operation(kms, "ListCryptoKeyVersions", read, v.ListCryptoKeyVersionsRequest, self.list_versions),
            operation(kms, "UpdateCryptoKeyVersion", write, v.UpdateCryptoKeyVersionRequest, self.update_version),
            operation(kms, "DestroyCryptoKeyVersion", write, v.DestroyCryptoKeyVersionRequest, self.destroy_version),
            operation(kms, "RestoreCryptoKeyVersion", write, v.RestoreCryptoKeyVersionRequest, self.restore_version),
        ]

    # ── key rings ──────────────────────────────────────────────────────────────────────────────────────────────

    def create_key_ring(self, call: Call, request: kms_v1.CreateKeyRingRequest) -> kms_v1.KeyRing:
        location = LocationName.parse(request.parent)
        name = call.about(location.ring(request.key_ring_id))
        self._access.require(call, "cloudkms.keyRings.create", location)
        if self._state.ring(name) is not None:
            raise already_exists("KeyRing", name)
        ring = Ring(name=str(name), created_at=call.now)
        self._state.put_ring(ring)
        return ring_message(ring)

    def get_key_ring(self, call: Call, request: kms_v1.GetKeyRingRequest) -> kms_v1.KeyRing:
        name = RingName.parse(request.name)
        self._access.require(call, "cloudkms.keyRings.get", name)
        return ring_message(self._access.ring(name))

    def list_key_rings(self, call: Call, request: kms_v1.ListKeyRingsRequest) -> kms_v1.ListKeyRingsResponse:
        location = LocationName.parse(request.parent)
        self._access.require(call, "cloudkms.keyRings.list", location)
        rings = [ring for ring in self._state.snapshot.rings.values() if ring.name.startswith(f"{location}/")]
        page = page_of(kms_v1.KeyRing, map(ring_message, rings), request)
        return kms_v1.ListKeyRingsResponse(
            key_rings=page.items, next_page_token=page.next_token, total_size=page.total_size
        )

    # ── crypto keys ────────────────────────────────────────────────────────────────────────────────────────────

    def create_crypto_key(self, call: Call, request: kms_v1.CreateCryptoKeyRequest) -> kms_v1.CryptoKey:
        ring = RingName.parse(request.parent)
        name = call.about(ring.key(request.crypto_key_id))
        self._access.require(call, "cloudkms.cryptoKeys.create", ring)
        asked = request.crypto_key
        _check_purpose(asked)
        self._access.ring(ring)
        if self._state.key(name) is not None:
            raise already_exists("CryptoKey", name)
        rotation_period = _rotation_period(asked)
        if rotation_period is not None and asked.next_rotation_time is None:
            raise bad_request("crypto_key.next_rotation_time", "next_rotation_time is required with rotation_period.")
        key = Key.new(
            name,
            call.now,
            level=_level(asked.version_template),
            labels=_labels(asked),
            with_version=not request.skip_initial_version_creation,
            destroy_scheduled=_destroy_scheduled(asked),
            rotation_period=rotation_period,
            next_rotation=_next_rotation(asked, call.now),
        )
        self._state.put_keys(key)
        return key_message(key)

    def get_crypto_key(self, call: Call, request: kms_v1.GetCryptoKeyRequest) -> kms_v1.CryptoKey:
        name = KeyName.parse(request.name)
        self._access.require(call, "cloudkms.cryptoKeys.get", name)
        return key_message(self._access.key(name))

    def list_crypto_keys(self, call: Call, request: kms_v1.ListCryptoKeysRequest) -> kms_v1.ListCryptoKeysResponse:
        ring = RingName.parse(request.parent)
        self._access.require(call, "cloudkms.cryptoKeys.list", ring)
        self._access.ring(ring)
        keys = [key for key in self._state.snapshot.keys.values() if key.name.startswith(f"{ring}/")]
        page = page_of(kms_v1.CryptoKey, map(key_message, keys), request)
        return kms_v1.ListCryptoKeysResponse(
            crypto_keys=page.items, next_page_token=page.next_token, total_size=page.total_size
        )

    def update_crypto_key(self, call: Call, request: kms_v1.UpdateCryptoKeyRequest) -> kms_v1.CryptoKey:
        asked = request.crypto_key
        name = KeyName.parse(asked.name)
        self._access.require(call, "cloudkms.cryptoKeys.update", name)
        paths = _paths(request.update_mask)
        key = self._access.key(name)
        for path in sorted(paths):
            if path.split(".", 1)[0] not in _KEY_FIELDS:
                raise bad_request("update_mask", f"The field {path[:64]} cannot be updated.")
        if "labels" in paths:
            key = key.model_copy(update={"labels": _labels(asked)})
        templated = any(path.startswith("version_template") for path in paths)
        if templated and _level(asked.version_template) is not key.protection_level:
            raise bad_request("version_template.protection_level", "The protection level cannot be changed.")
        if "rotation_period" in paths:
            key = key.model_copy(update={"rotation_period": _rotation_period(asked)})
        if "next_rotation_time" in paths:
            key = key.model_copy(update={"next_rotation": _next_rotation(asked, call.now)})
        if key.rotation_period is not None and key.next_rotation is None:
            raise bad_request("crypto_key.next_rotation_time", "next_rotation_time is required with rotation_period.")
        self._state.put_keys(key)
        return key_message(key)

    def update_primary(self, call: Call, request: kms_v1.UpdateCryptoKeyPrimaryVersionRequest) -> kms_v1.CryptoKey:
        name = KeyName.parse(request.name)
        self._access.require(call, "cloudkms.cryptoKeys.update", name)
        version_name = VersionName.parse(f"{name}/cryptoKeyVersions/{request.crypto_key_version_id}")
        key = self._access.key(name)
        version = key.version(version_name)
        if version.state is not State.ENABLED:
            raise not_enabled(version_name, version.state)
        key = key.with_primary(version.number, call.now, call.delay)
        self._state.put_keys(key)
        return key_message(key)

    # ── versions ───────────────────────────────────────────────────────────────────────────────────────────────

    def create_version(self, call: Call, request: kms_v1.CreateCryptoKeyVersionRequest) -> kms_v1.CryptoKeyVersion:
        """The new version is not primary."""
        name = KeyName.parse(request.parent)
        self._access.require(call, "cloudkms.cryptoKeyVersions.create", name)
        key, version = self._access.key(name).add_version(call.now)
        self._state.put_keys(key)
        return version_message(key, version)

    def get_version(self, call: Call, request: kms_v1.GetCryptoKeyVersionRequest) -> kms_v1.CryptoKeyVersion:
        name = VersionName.parse(request.name)
        key = self._key_of(call, "cloudkms.cryptoKeyVersions.get", name)
        return version_message(key, key.version(name))

    def list_versions(
        self, call: Call, request: kms_v1.ListCryptoKeyVersionsRequest
    ) -> kms_v1.ListCryptoKeyVersionsResponse:
        name = KeyName.parse(request.parent)
        self._access.require(call, "cloudkms.cryptoKeyVersions.list", name)
        key = self._access.key(name)
        versions = (version_message(key, version) for version in key.versions)
        page = page_of(kms_v1.CryptoKeyVersion, versions, request, lambda v: f"{int(v.name.rpartition('/')[2]):09}")
        return kms_v1.ListCryptoKeyVersionsResponse(
            crypto_key_versions=page.items, next_page_token=page.next_token, total_size=page.total_size
        )

    def update_version(self, call: Call, request: kms_v1.UpdateCryptoKeyVersionRequest) -> kms_v1.CryptoKeyVersion:
        """Enable or disable."""
        asked = request.crypto_key_version
        name = VersionName.parse(asked.name)
        key = self._key_of(call, "cloudkms.cryptoKeyVersions.update", name)
        paths = _paths(request.update_mask)
        if paths != {"state"}:
            raise bad_request("update_mask", "Only the state of a software or HSM version can be updated.")
        version = key.version(name)
        if asked.state is _STATES.ENABLED:
            version = version.enable(name, call.now)
        elif asked.state is _STATES.DISABLED:
            version = version.disable(name, call.now, call.delay)
        else:
            raise bad_request("crypto_key_version.state", "The state can be changed to ENABLED or DISABLED only.")
        key = key.with_version(version)
        self._state.put_keys(key)
        return version_message(key, version)

    def destroy_version(self, call: Call, request: kms_v1.DestroyCryptoKeyVersionRequest) -> kms_v1.CryptoKeyVersion:
        name = VersionName.parse(request.name)
        key = self._key_of(call, "cloudkms.cryptoKeyVersions.destroy", name)
        version = key.version(name).schedule_destruction(name, key.destroy_scheduled, call.now, call.delay)
        key = key.with_version(version)
        self._state.put_keys(key)
        return version_message(key, version)

    def restore_version(self, call: Call, request: kms_v1.RestoreCryptoKeyVersionRequest) -> kms_v1.CryptoKeyVersion:
        name = VersionName.parse(request.name)
        key = self._key_of(call, "cloudkms.cryptoKeyVersions.restore", name)
        version = key.version(name).restore(name, call.now, call.delay)
        key = key.with_version(version)
        self._state.put_keys(key)
        return version_message(key, version)

    def _key_of(self, call: Call, permission: str, name: VersionName) -> Key:
        self._access.require(call, permission, name)
        return self._access.key(name.key)


# ── what a request may ask for ─────────────────────────────────────────────────────────────────────────────────────


def _paths(mask: field_mask_pb2.FieldMask) -> set[str]:
    paths = set(mask.paths)
    if not paths:
        raise bad_request("update_mask", "update_mask is required.")
    return paths


def _check_purpose(asked: kms_v1.CryptoKey) -> None:
    purposes = kms_v1.CryptoKey.CryptoKeyPurpose
    if asked.purpose == purposes.CRYPTO_KEY_PURPOSE_UNSPECIFIED:
        raise bad_request("crypto_key.purpose", "The purpose of a CryptoKey must be specified.")
    if asked.purpose != purposes.ENCRYPT_DECRYPT or asked.import_only or asked.crypto_key_backend:
        raise unimplemented("Only keys of purpose ENCRYPT_DECRYPT with generated material exist here.")


def _level(template: kms_v1.CryptoKeyVersionTemplate) -> ProtectionLevel:
    if template.algorithm not in (0, _SYMMETRIC):
        raise invalid_argument("The algorithm of an ENCRYPT_DECRYPT key must be GOOGLE_SYMMETRIC_ENCRYPTION.")
    match template.protection_level:
        case kms_v1.ProtectionLevel.PROTECTION_LEVEL_UNSPECIFIED | kms_v1.ProtectionLevel.SOFTWARE:
            return ProtectionLevel.SOFTWARE
        case kms_v1.ProtectionLevel.HSM:
            return ProtectionLevel.HSM
        case _:
            raise unimplemented("External key managers do not exist here.")


def _labels(asked: kms_v1.CryptoKey) -> dict[str, str]:
    labels = dict(asked.labels)
    for key, value in labels.items():
        if not (_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value) and (key + value).lower() == key + value):
            raise bad_request("crypto_key.labels", "A label has lower case letters, digits, _ and -, at most 63.")
    if len(labels) > _MAX_LABELS:
        raise bad_request("crypto_key.labels", f"A resource has at most {_MAX_LABELS} labels.")
    return labels


def _rotation_period(asked: kms_v1.CryptoKey) -> dt.timedelta | None:
    period: dt.timedelta | None = asked.rotation_period if "rotation_period" in asked else None
    if period is not None and not MIN_ROTATION_PERIOD <= period <= MAX_ROTATION_PERIOD:
        raise bad_request("crypto_key.rotation_period", "rotation_period is at least 24 hours, at most 876,000 hours.")
    return period


def _next_rotation(asked: kms_v1.CryptoKey, now: dt.datetime) -> dt.datetime | None:
    time: dt.datetime | None = asked.next_rotation_time
    if time is not None and time < now:
        raise bad_request("crypto_key.next_rotation_time", "next_rotation_time must be in the future.")
    return None if time is None else dt.datetime.fromtimestamp(time.timestamp(), dt.UTC)


def _destroy_scheduled(asked: kms_v1.CryptoKey) -> dt.timedelta:
    if "destroy_scheduled_duration" not in asked:
        return DEFAULT_DESTROY_SCHEDULED
    wait: dt.timedelta = asked.destroy_scheduled_duration
    if not MIN_DESTROY_SCHEDULED <= wait <= MAX_DESTROY_SCHEDULED:
        raise bad_request(
            "crypto_key.destroy_scheduled_duration", "destroy_scheduled_duration is 24 hours to 120 days."
        )
    return wait
