"""Contract of a safekeeper: elections and control over HTTP. WAL itself goes over `shared.wire.walstream`."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr

from shared.api.common import PRINTABLE, ApiModel
from shared.api.pageserver import Findings
from shared.config import Address
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn

MAX_TERM: Final = (1 << 63) - 1
"""The highest that the compute manager's database can remember: with a higher one nobody could be elected any more."""
Term = Annotated[int, Field(ge=1, le=MAX_TERM)]
MAX_SEAT: Final = (1 << 11) - 1
"""A node's piece numbers begin at its seat number times 2^20 (`safekeeper.acceptor`)."""
Seat = Annotated[int, Field(ge=0, le=MAX_SEAT)]
"""Which disk: the first one of a node has 0; each that takes the place of a lost one has a number of its own."""
Generation = Annotated[int, Field(ge=0, lt=1 << 31)]
"""Of the membership: one more for each attempt to replace a member's disk."""


class TermStart(ApiModel):
    """From `start_lsn` on, the log was written in `term` (until the next entry's start)."""

    term: int = Field(ge=0, le=MAX_TERM)
    start_lsn: Lsn


class CreateTimeline(ApiModel):
    """Idempotent for equal values; ConflictError for other ones."""

    system_identifier: int = Field(ge=0, lt=1 << 64)
    start_lsn: Lsn
    seat: Seat = 0


class TimelineStatus(ApiModel):
    project_id: ProjectId
    timeline_id: TimelineId
    system_identifier: int
    term: int
    last_log_term: int
    term_history: list[TermStart]
    timeline_start_lsn: Lsn
    flush_lsn: Lsn
    commit_lsn: Lsn
    streaming: bool
    wal_size_bytes: int
    seat: int = 0
    generation: int = 0
    """Of the membership in which it last promised a term."""
    held_back_size_bytes: int = 0
    """WAL that is durable here and not acknowledged, because the pageserver lags: who commits behind it waits."""


class VoteRequest(ApiModel):
    """`term` is higher than any that the candidate has seen. `seat` is the member that is asked: another disk than that
    does not vote. Neither does one that has voted in a later membership than `generation`."""

    term: Term
    candidate: str = Field(min_length=1, max_length=64)
    seat: Seat = 0
    generation: Generation = 0


class VoteResponse(ApiModel):
    granted: bool
    term: int
    last_log_term: int
    flush_lsn: Lsn
    commit_lsn: Lsn
    term_history: list[TermStart]


class EndOfWal(ApiModel):
    """Where the last complete record starts and ends. `end_lsn` is where the next term begins."""

    last_record_lsn: Lsn
    end_lsn: Lsn


class Donor(ApiModel):
    """A safekeeper whose log reaches `start_lsn`; `address` is its WAL port."""

    node_id: str
    address: Address


class Elected(ApiModel):
    """The vote for `term` is won. Adopt `term_history` (whose last entry is {term, start_lsn}), clip the own log at the
    common point, copy what is missing below `start_lsn` from `donor`."""

    term: Term
    term_history: list[TermStart] = Field(min_length=1, max_length=100_000)
    donor: Donor


class ComputeAddress(ApiModel):
    """How to reach a compute's Postgres: a Unix socket (`host` is its directory), or TLS through the agent's tunnel
    with the certificate that the agent made at boot."""

    host: str = Field(min_length=1, max_length=512)
    port: int = Field(ge=1, le=65535)
    certificate_pem: str | None = None


class StreamFrom(ApiModel):
    """Start to receive WAL of `term` from this compute, beginning at `start_lsn`."""

    term: Term
    start_lsn: Lsn
    compute: ComputeAddress
    user: str = Field(max_length=63)
    password: SecretStr


class StopStream(ApiModel):
    """Drop the stream of `term` (a compute was stopped); WAL and term stay."""

    term: Term


class InspectWal(ApiModel):
    """A sealed piece: of a safekeeper's disk or of the object store."""

    name: str = Field(min_length=1, max_length=200, pattern=PRINTABLE)
    """Of its file, or of its object behind the timeline's prefix."""
    sealed_size_bytes: int = Field(ge=1, le=1 << 30)
    """Header and frames that are meant: to one that is open more may come."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of those bytes."""


class WalBlock(ApiModel):
    tablespace: int
    database: int
    relfilenumber: int
    fork: int
    block: int
    has_image: bool


class WalRecord(ApiModel):
    """A record's header, and the blocks that it is about."""

    start_lsn: Lsn
    end_lsn: Lsn
    resource_manager: str
    info: int
    xid: int
    size_bytes: int
    blocks: list[WalBlock]


class WalContent(ApiModel):
    records: list[WalRecord]
    more: bool
    """There are more than were listed: ask from the last one's end."""


class WalScrubReport(Findings):
    """Offloaded WAL against a safekeeper's log: every piece read, every frame opened."""

    pieces: int
    size_bytes: int
    """Of pieces that were read."""


class SafekeeperStatus(ApiModel):
    node_id: str
    timelines: list[TimelineStatus]
    state: Literal["running", "fenced"]
    fault: str = ""
