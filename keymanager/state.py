"""May a project's keys be used? One small value per project; what changes it is the table of `lifecycle.py`.

This file is a core: no I/O and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from keymanager.lifecycle import KMS_STATE, STATE_OF, KeyEvent, KmsAccess, Standing, step
from shared.api.keymanager import KeyState

__all__ = ["KMS_STATE", "KeyAccess", "KeyEvent", "KmsAccess", "Standing"]

_KMS: Final = {
    Standing.HELD: KmsAccess.ALLOWED,
    Standing.HELD_OUTAGE: KmsAccess.OUTAGE,
    Standing.HELD_DENIED: KmsAccess.DENIED,
    Standing.ALLOWED: KmsAccess.ALLOWED,
    Standing.OUTAGE: KmsAccess.OUTAGE,
    Standing.DENIED: KmsAccess.DENIED,
}
_HELD: Final = {
    KmsAccess.ALLOWED: Standing.HELD,
    KmsAccess.OUTAGE: Standing.HELD_OUTAGE,
    KmsAccess.DENIED: Standing.HELD_DENIED,
}


@dataclass(frozen=True, slots=True)
class KeyAccess:
    """Where one project stands."""

    standing: Standing = Standing.ALLOWED

    @classmethod
    def of(cls, kms: KmsAccess, *, held: bool = False, shredded: bool = False, erased: bool = False) -> Self:
        """From what is stored: of its key configuration, and of itself."""
        if erased:
            return cls(Standing.ERASED)
        if shredded:
            return cls(Standing.SHREDDED)
        return cls(_HELD[kms] if held else Standing(kms.value))

    @property
    def state(self) -> KeyState:
        return STATE_OF[self.standing]

    @property
    def kms(self) -> KmsAccess | None:
        """What the KMS said; None when that does not matter any more."""
        return _KMS.get(self.standing)

    @property
    def held(self) -> bool:
        return self.standing in _HELD.values()

    @property
    def shredded(self) -> bool:
        return self.state.final

    def step(self, event: KeyEvent) -> KeyAccess:
        """The access after `event`. Raises ConflictError for a wish that makes no sense in this state."""
        return KeyAccess(step(self.standing, event))
