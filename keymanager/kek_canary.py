"""A KEK's canary: a DEK that seals nothing, wrapped by the KEK when that is made, and kept beside it.

Whoever opens it has the KEK. So it shows what names and ids cannot: that what the KMS unwrapped is the KEK that was
made (one that does not open its canary does not enter memory); and, when the project is shredded, whether its KEK is
still to be had under another name (every live KEK is tried on it). It is as public as any envelope. A core.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from keymanager.kms.base import GeneratedKek
from keymanager.records import StoredKek
from shared.crypto.aead import AeadKey
from shared.crypto.context import KeyScope
from shared.crypto.envelope import Envelope, unwrap_dek, wrap_dek
from shared.crypto.secret import SecretKey
from shared.errors import IntegrityError
from shared.ids import KekId

_PAIR: Final = {"keylake:canary": "kek"}


def make_canary(cipher: AeadKey, scope: KeyScope, kek_id: KekId, kek_version: int) -> bytes:
    """An envelope. One more wrap than `wraps_reserved` counts."""
    dek = SecretKey.generate()
    try:
        context = scope.context().with_pairs(**_PAIR)
        return wrap_dek(cipher, kek_id, kek_version, dek, context).serialize()
    finally:
        dek.wipe()


def opens(cipher: AeadKey, scope: KeyScope, canary: bytes) -> bool:
    """Whether this is the KEK that the canary was made with. Raises KeyWipedError."""
    try:
        envelope = Envelope.parse(canary)
        context = scope.context().with_pairs(**_PAIR)
        unwrap_dek(cipher, envelope, context).wipe()
    except IntegrityError:
        return False
    return True


def new_kek(scope: KeyScope, kek_id: KekId, kek_version: int, made: GeneratedKek, now: datetime) -> StoredKek:
    """The row of a KEK that the KMS has just made. Raises KeyWipedError."""
    canary = make_canary(AeadKey(made.plaintext), scope, kek_id, kek_version)
    return StoredKek(scope.project_id, kek_id, kek_version, made.wrapped, made.key_version, 0, now, canary=canary)


@dataclass(frozen=True, slots=True)
class CanaryScan:
    """Every live KEK that could be had, tried on the canaries of one project's KEKs."""

    canaries: int
    missing: tuple[int, ...]
    """Versions without a canary: nothing could be tried on those."""
    tried: int
    opened: tuple[str, ...]
    """In words: which KEK opened which."""
    not_tried: tuple[str, ...]
    """In words: which live KEKs nobody could get at, and why."""
    not_live: tuple[str, ...]
    """In words: which KEKs of projects that are stopped. Nobody has them now, and they may come back."""
