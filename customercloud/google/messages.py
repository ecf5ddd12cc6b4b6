"""From our records to the messages of kms_v1."""

from __future__ import annotations

from typing import Final

from google.cloud import kms_v1

from customercloud.google.keys import Key, ProtectionLevel, Ring, State, Version
from customercloud.google.names import KeyName, VersionName

_STATES: Final = {
    State.ENABLED: kms_v1.CryptoKeyVersion.CryptoKeyVersionState.ENABLED,
    State.DISABLED: kms_v1.CryptoKeyVersion.CryptoKeyVersionState.DISABLED,
    State.DESTROY_SCHEDULED: kms_v1.CryptoKeyVersion.CryptoKeyVersionState.DESTROY_SCHEDULED,
    State.DESTROYED: kms_v1.CryptoKeyVersion.CryptoKeyVersionState.DESTROYED,
}
_LEVELS: Final = {
    ProtectionLevel.SOFTWARE: kms_v1.ProtectionLevel.SOFTWARE,
    ProtectionLevel.HSM: kms_v1.ProtectionLevel.HSM,
}
_ALGORITHM: Final = kms_v1.CryptoKeyVersion.CryptoKeyVersionAlgorithm.GOOGLE_SYMMETRIC_ENCRYPTION


def protection_level(level: ProtectionLevel) -> kms_v1.ProtectionLevel:
    return kms_v1.ProtectionLevel(_LEVELS[level])


def ring_message(ring: Ring) -> kms_v1.KeyRing:
    return kms_v1.KeyRing(name=ring.name, create_time=ring.created_at)


def version_message(key: Key, version: Version) -> kms_v1.CryptoKeyVersion:
    return kms_v1.CryptoKeyVersion(
        name=str(VersionName(KeyName.parse(key.name), str(version.number))),
        state=_STATES[version.state],
        protection_level=protection_level(version.protection_level),
        algorithm=_ALGORITHM,
        create_time=version.created_at,
        generate_time=version.created_at,
        destroy_time=version.destroy_at,
        destroy_event_time=version.destroyed_at,
    )


def key_message(key: Key) -> kms_v1.CryptoKey:
    primary = key.find(key.primary)
    return kms_v1.CryptoKey(
        name=key.name,
        primary=None if primary is None else version_message(key, primary),
        purpose=kms_v1.CryptoKey.CryptoKeyPurpose.ENCRYPT_DECRYPT,
        create_time=key.created_at,
        labels=key.labels,
        rotation_period=key.rotation_period,
        next_rotation_time=key.next_rotation,
        destroy_scheduled_duration=key.destroy_scheduled,
        version_template=kms_v1.CryptoKeyVersionTemplate(
            protection_level=protection_level(key.protection_level), algorithm=_ALGORITHM
        ),
    )
