"""What a KMS's refusal means, in words for the person who can do something about it. A core.

Which permission is missing is told by the refusal itself, or else by the operation that was refused; its name is the
provider's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from keymanager.kms.base import DenialReason, KmsError
from keymanager.providers import kind_of
from shared.cmk import CmkKey

_STATES: Final[Mapping[DenialReason, str]] = {
    DenialReason.DISABLED: "the key is disabled: enable it",
    DenialReason.PENDING_DELETION: "the key is waiting for its deletion: cancel that and enable the key",
    DenialReason.INVALID_STATE: "the key is in a state that allows no use",
}


def explain(error: KmsError, key: CmkKey) -> str:
    """One line: what was refused, and what to change. Names no secret."""
    if error.reason is None:
        return f"the KMS gave no usable answer ({error.operation}: {error.verdict}, {error.provider_code})"
    if error.reason is DenialReason.ACCESS_DENIED:
        to_do = f"{key.principal} may not use the key: allow it {kind_of(key).permission(error, key)}"
    elif error.reason is DenialReason.PRINCIPAL_DENIED:
        to_do = kind_of(key).principal(key)
    elif error.reason is DenialReason.NOT_FOUND:
        to_do = f"there is no key {key.identifier}, or not any more"
    else:
        to_do = _STATES[error.reason]
    return f"the KMS refuses ({error.operation}: {error.provider_code}); {to_do}"
