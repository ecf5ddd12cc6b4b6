"""Models that every HTTP contract shares."""

from __future__ import annotations

import enum
from typing import Final

from pydantic import BaseModel, ConfigDict
from pydantic_core import ErrorDetails

from shared.ids import WorkspaceId

PRINTABLE: Final = r"^[^\x00-\x1f\x7f]*$"
"""Of names that people give: every database and log can hold them."""


class ApiModel(BaseModel):
    """Unknown fields are refused; instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyState(enum.StrEnum):
    """State of a project's key access. Only what was checked is said."""

    ACTIVE = "ACTIVE"
    SUSPENDED = "SUSPENDED"  # KMS unreachable for longer than the outage grace
    REVOKED = "REVOKED"  # the KMS, or an operator, said no; comes back
    SHREDDED = "SHREDDED"  # our KEKs are destroyed; never comes back
    ERASED = "ERASED"  # ... and it was checked that no copy of them can be opened: the CMK is destroyed

    @property
    def final(self) -> bool:
        """Nothing comes back from here."""
        return self in (KeyState.SHREDDED, KeyState.ERASED)


class ErrorBody(ApiModel):
    """Body of every answer that is not 2xx. `code` is stable and names a class of `shared.errors`."""

    code: str
    message: str
    retryable: bool
    workspace_id: WorkspaceId | None = None
    """When it is the key: whose, where that is known."""
    hint: str | None = None
    """When it is the key: what to do."""


class ArmFailpoints(ApiModel):
    """Of a process of a test, `shared.failpoints`."""

    order: str
    """name:count, separated by commas; empty: none."""


def problem(error: ErrorDetails) -> str:
    """Where a validation failed and why, without any value: it may be a secret. Pydantic's own text holds one when a
    tagged union has no such tag."""
    why = "an unknown tag" if error["type"] == "union_tag_invalid" else error["msg"]
    return f"{'.'.join(str(part) for part in error['loc'])}: {why}"
