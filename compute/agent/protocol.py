"""What the manager and an agent say to each other: JSON lines over the agent's stdin and stdout.

    manager                              agent
      │ ── Boot, Tokens ───────────────►  │  boot key, lease, volume
      │ ◄───────────────── Prepared ────  │
      │ ── Start ──────────────────────►  │  basebackup, roles, Postgres        (Tokens again, every now and then)
      │ ◄────────────────── Running ────  │
      │ ◄──── Alive, Idle, Replayed ────  │  every few seconds
      │ ── ReadLog ────────────────────►  │
      │ ◄─────────────── LogContent ────  │
      │ ── Stop, or end of file ───────►  │  Postgres down, key and volume gone
      │ ◄──────────────────── InUse ────  │  or not: it was to stop only if nobody uses it
      │ ◄────────────────── Cleared ────  │  key sessions end
      │ ◄──────────────────── Ended ────  │  exits

Secrets (tokens, the safekeepers' password) pass through this pipe only: nothing secret is in the agent's argv,
environment or files. A line is at most MAX_LINE_SIZE_BYTES; anything else on the pipe is the end of it.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from shared.api.common import ApiModel
from shared.api.compute import StageTiming
from shared.api.keymanager import KeyState
from shared.api.safekeeper import ComputeAddress
from shared.config import Address, Addresses
from shared.errors import InvalidInputError
from shared.ids import EndpointId, InstanceId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.wire.scram import ScramVerifier

MAX_LINE_SIZE_BYTES: Final = 1024 * 1024
MAX_LOG_CONTENT_SIZE_BYTES: Final = 128 * 1024
NO_TERM: Final = 0
BEATS_PER_TIMEOUT: Final = 6

SAFEKEEPER_ROLE: Final = "keylake_safekeeper"
"""May only replicate. Its password is made anew for every boot and known to the safekeepers alone."""

IDENTIFIER_PATTERN: Final = r"^[a-z_][a-z0-9_]{0,62}$"
"""Role and database names that need no quoting anywhere."""
SCRAM_VERIFIER_PATTERN: Final = (
    r"^SCRAM-SHA-256\$[0-9]{1,7}:[A-Za-z0-9+/=]{4,64}\$[A-Za-z0-9+/=]{44}:[A-Za-z0-9+/=]{44}$"
)
MAX_LOGIN_ROLES: Final = 1000
"""So that they fit into a line."""
_HEX_OF_32_BYTES: Final = r"^[0-9a-f]{64}$"


class PostgresOptions(ApiModel):
    """What differs between computes. Everything else of postgresql.conf is in postgres_conf.py."""

    standby_names: list[str] = Field(min_length=0, max_length=9)
    """The safekeepers. A majority of them makes a commit durable; empty (tests only): nobody is waited for."""
    guard: Path
    """The library that guards what a commit means (compute/guard). Without it Postgres does not start."""
    read_only: bool = False
    """It shows what was at its start, and refuses writes."""
    shared_buffers_mb: int = Field(default=64, ge=1)
    max_connections: int = Field(default=100, ge=1, le=10_000)
    work_mem_mb: int = Field(default=4, ge=1)
    maintenance_work_mem_mb: int = Field(default=64, ge=1)
    max_parallel_workers: int = Field(default=8, ge=0, le=8)
    superuser_owner: bool = False
    """The owner's role is a superuser: for conformance runs by operators, see docs/conformance.md."""


class Follow(ApiModel):
    """A read replica: where its WAL comes from."""

    safekeepers: list[Address] = Field(min_length=1, max_length=9)
    """Their WAL ports."""
    log_start_lsn: Lsn
    """Where the timeline's log begins."""


class Boot(ApiModel):
    """Everything the agent has to know before it may start anything."""

    op: Literal["boot"] = "boot"
    instance_id: InstanceId
    endpoint_id: EndpointId
    project_id: ProjectId
    ancestor_projects: list[ProjectId] = Field(default_factory=list, max_length=64)
    """Whose keys are needed, too: other projects that the timeline was branched off."""
    timeline_id: TimelineId
    system_identifier: int = Field(ge=0, lt=1 << 64)
    log_level: str = "info"

    keymanager: Addresses
    pages: Address
    ca_certificate: Path

    socket_dir: Path
    """Where Postgres's Unix socket goes; mode 0700, outside of the private mount."""
    sealed_log: Path
    log_size_bytes: int = Field(ge=4096)

    owner: str = Field(pattern=IDENTIFIER_PATTERN)
    owner_verifier: str = Field(pattern=SCRAM_VERIFIER_PATTERN, repr=False)
    database: str = Field(pattern=IDENTIFIER_PATTERN)
    safekeeper_password: str = Field(min_length=16, max_length=256, repr=False)
    postgres: PostgresOptions
    follow: Follow | None = None
    """Set, and `postgres.read_only` with it: a read replica."""
    idle_poll_interval_s: float = Field(default=5.0, gt=0)
    """How often to look for how long Postgres has been idle."""
    liveness_timeout_s: float = Field(default=30.0, gt=0)
    """A Postgres, a volume's server or an agent that has not answered for as long is killed."""
    tunnel: Address | None = None
    tunnel_advertised_host: str | None = None


class Tokens(ApiModel):
    """Short-lived tokens, each good for one project only. Sent again before they expire."""

    op: Literal["tokens"] = "tokens"
    keymanager: str = Field(repr=False)
    pageserver: str = Field(repr=False)
    safekeeper: str = Field(default="", repr=False)
    """For the project's WAL; replicas only."""
    ancestors: dict[ProjectId, str] = Field(default_factory=dict, repr=False)
    """For the keymanager, by project of `Boot.ancestor_projects`."""


def ancestor_node_id(endpoint_id: EndpointId, project_id: ProjectId) -> str:
    """As whom a compute holds the lease of an ancestor's project: a token is good for one project and one name."""
    return f"{endpoint_id}-{project_id}"


class Start(ApiModel):
    """The election is won: start Postgres at `start_lsn`. A read-only one needs none: NO_TERM."""

    op: Literal["start"] = "start"
    term: int = Field(ge=NO_TERM)
    start_lsn: Lsn


class Stop(ApiModel):
    """Stop gracefully: a shutdown checkpoint, streamed to the safekeepers."""

    op: Literal["stop"] = "stop"
    timeout_s: float = Field(gt=0)
    unused_for_s: float | None = Field(default=None, ge=0)
    """Set: only if nobody has used it for as long. That was so when it was last told, which may be a while ago."""


class ReadLog(ApiModel):
    """The end of Postgres's log, in the clear: only the agent can read it, and only while it lives."""

    op: Literal["read_log"] = "read_log"


class Prepared(ApiModel):
    op: Literal["prepared"] = "prepared"
    boot_key_made_at: datetime
    volume: str
    lazy: bool = False
    """It reads at the start LSN for as long as it lives: keep that readable."""
    stages: list[StageTiming]


class Running(ApiModel):
    op: Literal["running"] = "running"
    compute: ComputeAddress
    pages_fetched: int | None = None
    """One by one from the pageserver, up to here; None: it came with the basebackup."""
    stages: list[StageTiming]


class Alive(ApiModel):
    """The agent itself does not hang. Sent BEATS_PER_TIMEOUT times in each `liveness_timeout_s` once it is Running."""

    op: Literal["alive"] = "alive"


class Idle(ApiModel):
    """For how long nobody has used Postgres: no statement, no open transaction, no autovacuum. See idle.py."""

    op: Literal["idle"] = "idle"
    idle_s: float = Field(ge=0)


class Replayed(ApiModel):
    """How far a replica is."""

    op: Literal["replayed"] = "replayed"
    replay_lsn: Lsn | None
    """None: it has not begun."""
    end_lsn: Lsn
    """Of the log, as far as a safekeeper has said."""
    problem: str = ""
    """Why no WAL comes."""


class InUse(ApiModel):
    """It does not stop: somebody uses it, or it cannot be seen whether anybody does."""

    op: Literal["in_use"] = "in_use"


class LogContent(ApiModel):
    op: Literal["log_content"] = "log_content"
    text: str = Field(repr=False)
    problem: str = ""
    """Why there is none: what lies on the disk is not what was written."""


class Cleared(ApiModel):
    """Nothing of the project is left in this process tree, and no other process. The keymanager is being told."""

    op: Literal["cleared"] = "cleared"


class LoginRole(ApiModel):
    verifier: str = Field(pattern=SCRAM_VERIFIER_PATTERN, repr=False)
    valid_until: datetime | None = None

    @field_validator("verifier")
    @classmethod
    def _is_one(cls, verifier: str) -> str:
        ScramVerifier.parse(verifier)
        return verifier


class LoginRoles(ApiModel):
    """Whoever could log in when Postgres ended: all of them, and nobody else."""

    roles: dict[Annotated[str, Field(pattern=_HEX_OF_32_BYTES)], LoginRole] = Field(
        max_length=MAX_LOGIN_ROLES, repr=False
    )
    """By `role_digest`: a name is its user's, and leaves the compute as little as a row does."""
    mock_nonce: str = Field(pattern=_HEX_OF_32_BYTES, repr=False)
    """In hex: what Postgres makes salts of for roles that do not exist."""


def role_digest(mock_nonce: bytes, name: bytes) -> str:
    return hashlib.sha256(mock_nonce + name).hexdigest()


class Ended(ApiModel):
    """The last message, after `Cleared`: the keymanager has been told, and the process may be killed."""

    op: Literal["ended"] = "ended"
    reason: str
    key_state: KeyState | None = None
    """Set when it ended because the keys were lost."""
    asked_for: bool = False
    """True when the manager wanted it."""
    crashed: bool = False
    """Nobody wanted it, and nothing outside of the compute explains it."""
    steps_s: dict[str, float] = Field(default_factory=dict)
    login_roles: LoginRoles | None = None
    """None: not known for certain, as after anything but a graceful stop."""


ToAgent = Annotated[Boot | Tokens | Start | Stop | ReadLog, Field(discriminator="op")]
FromAgent = Annotated[
    Prepared | Running | Alive | Idle | Replayed | InUse | LogContent | Cleared | Ended, Field(discriminator="op")
]
_TO_AGENT: TypeAdapter[ToAgent] = TypeAdapter(ToAgent)
_FROM_AGENT: TypeAdapter[FromAgent] = TypeAdapter(FromAgent)


def pack_line(message: ApiModel) -> bytes:
    return message.model_dump_json().encode() + b"\n"


def parse_to_agent(line: bytes) -> ToAgent:
    """Raises InvalidInputError, without repeating what was in the line."""
    try:
        return _TO_AGENT.validate_json(line)
    except ValidationError as error:
        raise InvalidInputError(f"not a message to an agent: {_fields(error)}") from None


def parse_from_agent(line: bytes) -> FromAgent:
    """Raises InvalidInputError, without repeating what was in the line."""
    try:
        return _FROM_AGENT.validate_json(line)
    except ValidationError as error:
        raise InvalidInputError(f"not a message of an agent: {_fields(error)}") from None


def _fields(error: ValidationError) -> str:
    return "; ".join(".".join(map(str, e["loc"])) or e["type"] for e in error.errors(include_input=False)[:5])
