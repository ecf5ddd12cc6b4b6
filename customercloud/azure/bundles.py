"""Keys, items of lists and rotation policies as Key Vault's JSON has them. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from customercloud.azure import errors
from customercloud.azure.bodies import Body, base64url
from customercloud.azure.durations import DurationError, approximate_days
from customercloud.azure.keys import KEY_OPERATIONS, Attributes, Key, KeyVersion, RotationAction, RotationPolicy
from customercloud.azure.state import Vault

_MIN_EXPIRY_DAYS = 28
_MIN_ROTATION_DAYS = 7
_DEFAULT_NOTICE = "P30D"


def key_id(origin: str, name: str, version: str | None = None) -> str:
    """`origin` is scheme://host:port of the request: SDKs take the vault's URL out of the kid."""
    base = f"{origin}/keys/{name}"
    return base if version is None else f"{base}/{version}"


def _seconds(moment: dt.datetime) -> int:
    return int(moment.timestamp())


def _attributes(vault: Vault, version: KeyVersion, attributes: Attributes) -> dict[str, Any]:
    members: dict[str, Any] = {"enabled": attributes.enabled}
    if attributes.not_before is not None:
        members["nbf"] = _seconds(attributes.not_before)
    if attributes.expires is not None:
        members["exp"] = _seconds(attributes.expires)
    return members | {
        "created": _seconds(version.created),
        "updated": _seconds(attributes.updated),
        "recoveryLevel": vault.recovery_level,
        "recoverableDays": vault.recoverable_days,
        "exportable": False,
    }


def _deletion(origin: str, key: Key) -> dict[str, Any]:
    if key.deleted_at is None or key.purge_at is None:
        return {}
    return {
        "recoveryId": f"{origin}/deletedkeys/{key.name}",
        "deletedDate": _seconds(key.deleted_at),
        "scheduledPurgeDate": _seconds(key.purge_at),
    }


def key_bundle(
    origin: str, vault: Vault, key: Key, version: KeyVersion, public: Mapping[str, str | bytes]
) -> dict[str, Any]:
    attributes = key.attributes[version.version]
    jwk = {
        "kid": key_id(origin, key.name, version.version),
        "kty": version.kty,
        "key_ops": list(attributes.key_ops),
    } | {name: value if isinstance(value, str) else base64url(value) for name, value in public.items()}
    members = {"key": jwk, "attributes": _attributes(vault, version, attributes), "tags": dict(attributes.tags)}
    return _deletion(origin, key) | members


def key_item(origin: str, vault: Vault, key: Key, version: KeyVersion | None = None) -> dict[str, Any]:
    """One line of a list: of keys (without a version in the kid), or of a key's versions."""
    shown = version or key.current
    attributes = key.attributes[shown.version]
    return _deletion(origin, key) | {
        "kid": key_id(origin, key.name, None if version is None else version.version),
        "attributes": _attributes(vault, shown, attributes),
        "tags": dict(attributes.tags),
    }


def changed_attributes(
    body: Body, old: Attributes, now: dt.datetime, known: tuple[str, ...] = KEY_OPERATIONS
) -> Attributes:
    """What a create or PATCH body says, over `old`; `known`: operations of this kind of key. Raises AzureError."""
    given = body.object("attributes") or Body({})
    update: dict[str, object] = {"updated": now}
    if (enabled := given.boolean("enabled")) is not None:
        update["enabled"] = enabled
    if (not_before := given.timestamp("nbf")) is not None:
        update["not_before"] = not_before
    if (expires := given.timestamp("exp")) is not None:
        update["expires"] = expires
    if (key_ops := body.words("key_ops", known)) is not None:
        update["key_ops"] = key_ops
    if (tags := body.tags("tags")) is not None:
        update["tags"] = tags
    exportable, policy = bool(given.boolean("exportable")), body.object("release_policy") is not None
    if exportable or policy:
        raise errors.not_exportable(exportable=exportable, policy=policy)
    changed = old.model_copy(update=update)
    if changed.not_before is not None and changed.expires is not None and changed.not_before > changed.expires:
        raise errors.bad_parameter("Not before date must be before the expiration date.")
    return changed


# ── rotation policies ──────────────────────────────────────────────────────────────────────────────────────────────


def rotation_policy(origin: str, key: Key) -> dict[str, Any]:
    """Without a policy of its own a key has the service's default: a notice 30 days before the expiry."""
    policy = key.rotation_policy
    members: dict[str, Any] = {"id": f"{key_id(origin, key.name)}/rotationpolicy"}
    if policy is None:
        notice = {"trigger": {"timeBeforeExpiry": _DEFAULT_NOTICE}, "action": {"type": "Notify"}}
        return members | {"lifetimeActions": [notice], "attributes": {}}
    attributes: dict[str, Any] = {"created": _seconds(policy.created), "updated": _seconds(policy.updated)}
    if policy.expiry_time is not None:
        attributes["expiryTime"] = policy.expiry_time
    actions = [
        {
            "trigger": (
                {"timeAfterCreate": action.time_after_create}
                if action.time_after_create is not None
                else {"timeBeforeExpiry": action.time_before_expiry}
            ),
            "action": {"type": action.type},
        }
        for action in policy.actions
    ]
    return members | {"lifetimeActions": actions, "attributes": attributes}


def parsed_rotation_policy(body: Body, old: RotationPolicy | None, now: dt.datetime) -> RotationPolicy:
    """Raises AzureError; minima as "Configure cryptographic key auto-rotation" has them, wording [assumed]."""
    try:
        expiry = (body.object("attributes") or Body({})).optional_text("expiryTime")
        if expiry is not None and approximate_days(expiry) < _MIN_EXPIRY_DAYS:
            raise errors.bad_parameter(f"Property 'expiryTime' must be at least P{_MIN_EXPIRY_DAYS}D.\r\n")
        actions = tuple(_action(given, expiry) for given in body.objects("lifetimeActions"))
    except DurationError:
        raise errors.invalid_value() from None
    if len({action.type for action in actions}) != len(actions):
        raise errors.bad_parameter("A lifetime action of each type can be given once.\r\n")
    created = now if old is None else old.created
    return RotationPolicy(actions=actions, expiry_time=expiry, created=created, updated=now)


def _action(given: Body, expiry: str | None) -> RotationAction:
    kind = (given.object("action") or Body({})).text("type").capitalize()
    trigger = given.object("trigger") or Body({})
    after, before = trigger.optional_text("timeAfterCreate"), trigger.optional_text("timeBeforeExpiry")
    if kind not in ("Rotate", "Notify") or (after is None) == (before is None):
        raise errors.invalid_value()
    if kind == "Notify" and before is None:
        raise errors.invalid_value()
    if kind == "Rotate" and before is not None and expiry is None:
        raise errors.bad_parameter("Property 'timeBeforeExpiry' needs 'expiryTime'.\r\n")
    days = approximate_days(after if after is not None else before or "")
    if days < _MIN_ROTATION_DAYS:
        raise errors.bad_parameter(f"The trigger must be at least P{_MIN_ROTATION_DAYS}D.\r\n")
    if expiry is not None and days >= approximate_days(expiry):
        raise errors.bad_parameter("The trigger must be shorter than 'expiryTime'.\r\n")
    return RotationAction(
        type="Rotate" if kind == "Rotate" else "Notify", time_after_create=after, time_before_expiry=before
    )
