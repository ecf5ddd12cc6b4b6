"""What a drill comes to: promises with their measures, times per instance, what clients saw. A core: values only."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final

from pydantic import BaseModel, ConfigDict

from shared.ids import ProjectId

BUCKET_S: Final = 0.25
"""Clients' answers are counted in steps of this size."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Promise(_Part):
    """Something that must hold. `limit` and `measured` are for people; `kept` is the verdict."""

    what: str
    limit: str
    measured: str
    kept: bool


class Mark(_Part):
    """Something happened, so many seconds after the drill's beginning."""

    at_s: float
    what: str


class Sealed(_Part):
    """What became of one lease holder, so many seconds after the revocation was detected."""

    node_id: str
    role: str
    outcome: str
    after_s: float | None
    steps_s: dict[str, float]


class Answers(_Part):
    """What clients were told from `at_s` on, for BUCKET_S."""

    at_s: float
    done: int
    errors: int


class ClientError(_Part):
    """One kind of error, as clients saw it."""

    code: str
    message: str
    count: int
    first_at_s: float
    last_at_s: float


class DrillReport(_Part):
    kind: str
    passed: bool
    project_id: ProjectId
    project_name: str
    started_at: datetime
    duration_s: float
    load: str
    promises: list[Promise]
    marks: list[Mark]
    instances: list[Sealed]
    answers: list[Answers]
    errors: list[ClientError]
    revocation_id: str | None = None
    receipt: str | None = None
    """The signed receipt of the revocation, as `keylake receipt verify` takes it."""


def bucketed(done_s: Iterable[float], errors_s: Iterable[float], duration_s: float) -> list[Answers]:
    """Counts per bucket, empty ones included; times outside of [0, duration_s] are left out."""
    buckets = [[0, 0] for _ in range(int(duration_s / BUCKET_S) + 1)]
    for kind, times_s in enumerate((done_s, errors_s)):
        for at_s in times_s:
            if 0 <= at_s <= duration_s:
                buckets[int(at_s / BUCKET_S)][kind] += 1
    return [Answers(at_s=n * BUCKET_S, done=done, errors=errors) for n, (done, errors) in enumerate(buckets)]


def kinds_of(errors: Iterable[tuple[float, str, str]]) -> list[ClientError]:
    """(when, code, message) of each error → one line per code, by first sight."""
    found: dict[str, ClientError] = {}
    for at_s, code, message in errors:
        known = found.get(code)
        found[code] = (
            ClientError(code=code, message=message[:300], count=1, first_at_s=at_s, last_at_s=at_s)
            if known is None
            else known.model_copy(update={"count": known.count + 1, "last_at_s": at_s})
        )
    return sorted(found.values(), key=lambda each: each.first_at_s)
