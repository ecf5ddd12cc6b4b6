"""Contract of the compute manager: timelines of a project, and endpoints, each with at most one running compute."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from shared.api.common import PRINTABLE, ApiModel
from shared.api.safekeeper import ComputeAddress
from shared.ids import EndpointId, InstanceId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.point_in_time import PointInTime


class EndpointState(enum.StrEnum):
    """STOPPED ──start──► STARTING ──► RUNNING ──stop──► STOPPING ──► STOPPED; a revocation or a crash ends in
    STOPPED."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"


class BranchFrom(ApiModel):
    """Of which timeline, and at which point; without one, as it is now."""

    timeline_id: TimelineId
    project_id: ProjectId | None = None
    """Another project's timeline: the branch keeps what is its own under the keys of its own project, and it takes the
    keys of both to read it."""
    at: PointInTime | None = None


class CreateTimeline(ApiModel):
    """The project's first timeline; or, with `branch_from`, a branch."""

    name: str = Field(default="main", min_length=1, max_length=100, pattern=PRINTABLE)
    branch_from: BranchFrom | None = None


class Timeline(ApiModel):
    timeline_id: TimelineId
    project_id: ProjectId
    name: str
    system_identifier: int
    start_lsn: Lsn
    """Where its log begins: for a branch, where it left its ancestor."""
    ancestor_project_id: ProjectId | None = None
    ancestor_timeline_id: TimelineId | None = None
    """None: it is no branch."""
    created_at: datetime


MAX_SUSPEND_AFTER_S: Final = 30 * 86_400.0
SuspendAfter = Annotated[float, Field(ge=0, le=MAX_SUSPEND_AFTER_S)]
"""Seconds without use after which a compute is stopped; 0: never."""


class EndpointSize(enum.StrEnum):
    """In compute units (CU): what one is, is in compute/sizes.py."""

    QUARTER = "0.25"
    HALF = "0.5"
    ONE = "1"
    TWO = "2"
    FOUR = "4"
    EIGHT = "8"


class CreateEndpoint(ApiModel):
    """With `read_only_at`, an endpoint that shows the timeline as it was then, and refuses writes. With `follows`, a
    read replica: it shows what is committed to the timeline, a little later, and refuses writes; its roles and
    passwords are the timeline's."""

    timeline_id: TimelineId
    name: str = Field(default="main", min_length=1, max_length=100, pattern=PRINTABLE)
    read_only_at: PointInTime | None = None
    follows: bool = False
    suspend_after_s: SuspendAfter | None = None
    """None: as the installation is set."""
    size: EndpointSize | None = None
    """None: as the installation is set."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.follows and self.read_only_at is not None:
            raise ValueError("an endpoint stays at a point in time, or follows")
        return self


class ChangeEndpoint(ApiModel):
    """What is not named stays. None: as the installation is set."""

    suspend_after_s: SuspendAfter | None = None
    """In effect at once."""
    size: EndpointSize | None = None
    """In effect at the next start."""

    @model_serializer(mode="wrap")
    def _named(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}


class StageTiming(ApiModel):
    """One stage of a start (election, basebackup, mount, postgres, …, first_query)."""

    stage: str
    seconds: float


class Endpoint(ApiModel):
    endpoint_id: EndpointId
    project_id: ProjectId
    timeline_id: TimelineId
    name: str
    read_only_lsn: Lsn | None = None
    """Set: it shows the timeline as of there, and refuses writes."""
    follows: bool = False
    """A read replica."""
    replay_lsn: Lsn | None = None
    """Of a replica that runs: what it shows."""
    lag_bytes: int | None = None
    """Of a replica that runs: how much WAL it has still to replay, a second or so ago."""
    state: EndpointState
    reason: str
    """Why it is in this state, for people."""
    term: int
    start_lsn: Lsn | None
    instance_id: InstanceId | None
    volume: str
    boot_key_made_at: datetime | None = None
    """Of a compute that runs: since when it has its boot key, which ends with it."""
    stages: list[StageTiming]
    pages_at_start: int | None = None
    """How many pages came one by one from the pageserver until it was up; None: all came at once."""
    crashes: int = 0
    """In a row, of the computes before."""
    next_start_at: datetime | None = None
    """It crashed too often: no start before this time but by an explicit `:start`."""
    user: str
    database: str
    suspend_after_s: float
    """Its own, or the installation's; 0: never."""
    size: EndpointSize | None = None
    """None: as the installation is set."""
    running_size: EndpointSize | None = None
    """Of the compute that runs, if it has one of its own."""
    created_at: datetime


class CreatedEndpoint(Endpoint):
    """The answer to a create, once: the password is kept only as a SCRAM verifier."""

    password: str
    """Empty for a replica: it has its primary's."""


MAX_STAGE_S: Final = 86_400.0
Seconds = Annotated[float, Field(ge=0, le=MAX_STAGE_S)]


class ConnectTarget(ApiModel):
    """Where the proxy finds a running compute's Postgres."""

    endpoint_id: EndpointId
    project_id: ProjectId
    instance_id: InstanceId
    compute: ComputeAddress
    max_sessions: int | None = Field(default=None, ge=1)
    """How many its Postgres takes, by the compute's size; None: nobody knows."""
    wants_first_query: bool = False
    """Nobody has said yet what its first query took."""


class LogIn(ApiModel):
    """Who wants to log in, and has not proved anything yet. The role's name is in hex: a start-up packet may hold any
    bytes but zero, and Postgres looks at the first 63."""

    user_hex: str = Field(pattern=r"^([1-9a-f][0-9a-f]|0[1-9a-f]){1,63}$")


class Admission(ApiModel):
    """The `target` runs, and asks for the password itself. Or the endpoint does not run, and is to be woken for who
    proves that he knows the password of this `verifier`; of a role that may not log in, or does not exist, it is one
    that nobody passes."""

    target: ConnectTarget | None = None
    verifier: str | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.target is None) == (self.verifier is None):
            raise ValueError("a compute, or a verifier")
        return self


class FirstQuery(ApiModel):
    """The last stages of a start, as the proxy saw them: of the first session that got a row."""

    instance_id: InstanceId
    login_s: Seconds
    """From the compute's being up to a session that may ask."""
    query_s: Seconds
    """From the question to its first row."""


class ReplaceSafekeeper(ApiModel):
    node_id: str = Field(min_length=1, max_length=63, pattern=PRINTABLE)
    """Of the settings. It runs on an empty disk."""


class ReplacedTimeline(ApiModel):
    """What became of one timeline when a safekeeper was replaced."""

    project_id: ProjectId
    timeline_id: TimelineId
    outcome: Literal["replaced", "kept", "failed"]
    """`kept`: the disk that is there has it."""
    problem: str = ""
    """Why it failed; ask again when that is mended."""


class ManagerStatus(ApiModel):
    node_id: str
    endpoints: list[Endpoint]
