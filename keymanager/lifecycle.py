"""The life of a project's keys: one table of states and events, which all code goes through (docs/lifecycle.md).

A *standing* is all that decides what comes next: what the KMS said of the key, whether an operator holds the project,
whether its KEKs were destroyed, and whether that was proved to be the end. People and instances see the `KeyState` that
it comes to. The switches are independent, so that lifting one never lifts another: a project that an operator holds
does not come back because its KMS does.

    standing      state       what the KMS said of the key    an operator holds    KEKs
    ------------  ----------  ------------------------------  -------------------  ---------------------------
    ALLOWED       ACTIVE      yes                             no                   there
    OUTAGE        SUSPENDED   nothing, for over the grace     no                   there
    DENIED        REVOKED     no, twice                       no                   there
    HELD          REVOKED     yes                             yes                  there
    HELD_OUTAGE   REVOKED     nothing, for over the grace     yes                  there
    HELD_DENIED   REVOKED     no, twice                       yes                  there
    SHREDDED      SHREDDED    (does not matter any more)                           destroyed
    ERASED        ERASED      the CMK is destroyed                                 destroyed; no copy can be opened

A key configuration has no operator and no KEKs: it moves among the first three by the events of the KMS.

This file is a core: no I/O and no clock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.api.keymanager import KeyState
from shared.errors import ConflictError


class KmsAccess(enum.StrEnum):
    """What is known of a key configuration."""

    ALLOWED = "ALLOWED"
    OUTAGE = "OUTAGE"
    DENIED = "DENIED"


class KeyEvent(enum.StrEnum):
    KMS_ALLOWED = "kms-allowed"
    KMS_OUTAGE = "kms-outage"  # no answer for longer than the grace
    KMS_DENIED = "kms-denied"  # two definitive denials in a row
    OPERATOR_REVOKED = "operator-revoked"
    OPERATOR_RESTORED = "operator-restored"
    SHREDDED = "shredded"  # asked for and approved by two people
    ERASED = "erased"  # every precondition was checked


class Standing(enum.StrEnum):
    ALLOWED = "ALLOWED"
    OUTAGE = "OUTAGE"
    DENIED = "DENIED"
    HELD = "HELD"
    HELD_OUTAGE = "HELD_OUTAGE"
    HELD_DENIED = "HELD_DENIED"
    SHREDDED = "SHREDDED"
    ERASED = "ERASED"


STATE_OF: Final[Mapping[Standing, KeyState]] = {
    Standing.ALLOWED: KeyState.ACTIVE,
    Standing.OUTAGE: KeyState.SUSPENDED,
    Standing.DENIED: KeyState.REVOKED,
    Standing.HELD: KeyState.REVOKED,
    Standing.HELD_OUTAGE: KeyState.REVOKED,
    Standing.HELD_DENIED: KeyState.REVOKED,
    Standing.SHREDDED: KeyState.SHREDDED,
    Standing.ERASED: KeyState.ERASED,
}


@dataclass(frozen=True, slots=True)
class Refused:
    """Somebody wished for what makes no sense in this standing. Nothing changes, and they are told why."""

    why: str


_NOT_HELD: Final = Refused("no operator's revocation is in force on this project")
_NOTHING_TO_REVOKE: Final = Refused("the project is shredded: there is nothing left to revoke")
_NOTHING_RESTORES: Final = Refused("the project is shredded: nothing restores it")
_SHRED_FIRST: Final = Refused("only a shredded project can be erased")

_S, _E = Standing, KeyEvent
_BY_STANDING: Final[Mapping[Standing, Mapping[KeyEvent, Standing | Refused]]] = {
    _S.ALLOWED: {
        _E.KMS_ALLOWED: _S.ALLOWED,
        _E.KMS_OUTAGE: _S.OUTAGE,
        _E.KMS_DENIED: _S.DENIED,
        _E.OPERATOR_REVOKED: _S.HELD,
        _E.OPERATOR_RESTORED: _NOT_HELD,
        _E.SHREDDED: _S.SHREDDED,
        _E.ERASED: _SHRED_FIRST,
    },
    _S.OUTAGE: {
        _E.KMS_ALLOWED: _S.ALLOWED,
        _E.KMS_OUTAGE: _S.OUTAGE,
        _E.KMS_DENIED: _S.DENIED,
        _E.OPERATOR_REVOKED: _S.HELD_OUTAGE,
        _E.OPERATOR_RESTORED: _NOT_HELD,
        _E.SHREDDED: _S.SHREDDED,
        _E.ERASED: _SHRED_FIRST,
    },
    _S.DENIED: {
        _E.KMS_ALLOWED: _S.ALLOWED,
        _E.KMS_OUTAGE: _S.DENIED,  # no answer is not a yes: what was denied stays denied
        _E.KMS_DENIED: _S.DENIED,
        _E.OPERATOR_REVOKED: _S.HELD_DENIED,
        _E.OPERATOR_RESTORED: _NOT_HELD,
        _E.SHREDDED: _S.SHREDDED,
        _E.ERASED: _SHRED_FIRST,
    },
    _S.HELD: {
        _E.KMS_ALLOWED: _S.HELD,
        _E.KMS_OUTAGE: _S.HELD_OUTAGE,
        _E.KMS_DENIED: _S.HELD_DENIED,
        _E.OPERATOR_REVOKED: _S.HELD,
        _E.OPERATOR_RESTORED: _S.ALLOWED,
        _E.SHREDDED: _S.SHREDDED,
        _E.ERASED: _SHRED_FIRST,
    },
    _S.HELD_OUTAGE: {
        _E.KMS_ALLOWED: _S.HELD,
        _E.KMS_OUTAGE: _S.HELD_OUTAGE,
        _E.KMS_DENIED: _S.HELD_DENIED,
        _E.OPERATOR_REVOKED: _S.HELD_OUTAGE,
        _E.OPERATOR_RESTORED: _S.OUTAGE,
        _E.SHREDDED: _S.SHREDDED,
        _E.ERASED: _SHRED_FIRST,
    },
    _S.HELD_DENIED: {
        _E.KMS_ALLOWED: _S.HELD,
        _E.KMS_OUTAGE: _S.HELD_DENIED,
        _E.KMS_DENIED: _S.HELD_DENIED,
        _E.OPERATOR_REVOKED: _S.HELD_DENIED,
        _E.OPERATOR_RESTORED: _S.DENIED,
        _E.SHREDDED: _S.SHREDDED,
        _E.ERASED: _SHRED_FIRST,
    },
    _S.SHREDDED: {  # nothing comes back from here
        _E.KMS_ALLOWED: _S.SHREDDED,
        _E.KMS_OUTAGE: _S.SHREDDED,
        _E.KMS_DENIED: _S.SHREDDED,
        _E.OPERATOR_REVOKED: _NOTHING_TO_REVOKE,
        _E.OPERATOR_RESTORED: _NOTHING_RESTORES,
        _E.SHREDDED: _S.SHREDDED,
        _E.ERASED: _S.ERASED,
    },
    _S.ERASED: {
        _E.KMS_ALLOWED: _S.ERASED,
        _E.KMS_OUTAGE: _S.ERASED,
        _E.KMS_DENIED: _S.ERASED,
        _E.OPERATOR_REVOKED: _NOTHING_TO_REVOKE,
        _E.OPERATOR_RESTORED: _NOTHING_RESTORES,
        _E.SHREDDED: _S.ERASED,
        _E.ERASED: _S.ERASED,
    },
}
LIFECYCLE: Final[Mapping[tuple[Standing, KeyEvent], Standing | Refused]] = {
    (standing, event): after for standing, row in _BY_STANDING.items() for event, after in row.items()
}
"""Every event in every standing."""


def step(standing: Standing, event: KeyEvent) -> Standing:
    """The standing after `event`. Raises ConflictError for a wish that makes no sense in this one."""
    after = LIFECYCLE[standing, event]
    if isinstance(after, Refused):
        raise ConflictError(after.why)
    return after


def kms_step(access: KmsAccess, event: KeyEvent) -> KmsAccess:
    """The same for a key configuration: `event` is one of the KMS's."""
    return KmsAccess(step(Standing(access.value), event).value)


KMS_STATE: Final[Mapping[KmsAccess, KeyState]] = {access: STATE_OF[Standing(access.value)] for access in KmsAccess}
"""What a key configuration's access means to a project that nobody holds."""

KMS_EVENT: Final[Mapping[KmsAccess, KeyEvent]] = {
    KmsAccess.ALLOWED: KeyEvent.KMS_ALLOWED,
    KmsAccess.OUTAGE: KeyEvent.KMS_OUTAGE,
    KmsAccess.DENIED: KeyEvent.KMS_DENIED,
}
"""The event that brings a project up to date with what is known of its key configuration."""
