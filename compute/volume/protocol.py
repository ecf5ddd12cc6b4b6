"""What an agent and the process that serves its volume say to each other: JSON lines over stdin and stdout.

    agent                                server
      │ ── Open ───────────────────────►  │  bare basebackup, listing, mount
      │ ◄────────────────── Mounted ────  │
      │ ── LeaseUntil, Token ──────────►  │  every now and then
      │ ── ReadCounts ─────────────────►  │
      │ ◄─────────────────── Counts ────  │
      │ ◄─────────────────── Failed ────  │  could not be mounted, or must not be used any more: it exits

The key that the volume is sealed under comes another way, and so does the order to give it up (key_channel.py). There
is no message to stop: when it has given up its key, it is killed. End of file on its stdin ends it, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from shared.api.common import ApiModel
from shared.api.compute import StageTiming
from shared.config import Address
from shared.errors import InvalidInputError
from shared.ids import InstanceId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.wire.pagestream import StartAs

MAX_LINE_SIZE_BYTES: Final = 64 * 1024


class LeaseUntil(ApiModel):
    """Data may leave until then. On the clock of `shared.clock.SystemClock`, which all processes share."""

    op: Literal["lease_until"] = "lease_until"
    at_s: float


class Token(ApiModel):
    """For the pageserver, when a connection has to be made anew."""

    op: Literal["token"] = "token"
    token: str = Field(repr=False)


class Open(ApiModel):
    """Everything that the server has to know."""

    op: Literal["open"] = "open"
    instance_id: InstanceId
    project_id: ProjectId
    timeline_id: TimelineId
    start_lsn: Lsn
    start_as: StartAs
    pages: Address
    ca_certificate: Path
    token: str = Field(repr=False)
    lease_until_s: float
    mount_point: Path
    owner: tuple[int, int] | None
    """(uid, gid) that all files belong to; None: to us."""
    blocks_dir: Path
    """Where the file of sealed blocks is made."""
    limit_bytes: int = Field(gt=0)
    """How much may be written to it, as plaintext."""
    page_timeout_s: float = Field(default=30.0, gt=0)
    """A page that does not come within that time is an I/O error."""


class ReadCounts(ApiModel):
    op: Literal["read_counts"] = "read_counts"


class Mounted(ApiModel):
    op: Literal["mounted"] = "mounted"
    basebackup_size_bytes: int
    relation_forks: int
    stages: list[StageTiming]


class Counts(ApiModel):
    op: Literal["counts"] = "counts"
    pages_fetched: int
    """From the pageserver, since boot."""
    blocks_written: int
    """Sealed blocks in use."""


class Failed(ApiModel):
    op: Literal["failed"] = "failed"
    code: str
    message: str


ToServer = Annotated[Open | Token | LeaseUntil | ReadCounts, Field(discriminator="op")]
FromServer = Annotated[Mounted | Counts | Failed, Field(discriminator="op")]
_TO_SERVER: Final[TypeAdapter[ToServer]] = TypeAdapter(ToServer)
_FROM_SERVER: Final[TypeAdapter[FromServer]] = TypeAdapter(FromServer)


def pack_line(message: ApiModel) -> bytes:
    return message.model_dump_json().encode() + b"\n"


def parse_to_server(line: bytes) -> ToServer:
    """Raises InvalidInputError, without repeating what was in the line."""
    try:
        return _TO_SERVER.validate_json(line)
    except ValidationError:
        raise InvalidInputError("not a message to a volume's server") from None


def parse_from_server(line: bytes) -> FromServer:
    """Raises InvalidInputError, without repeating what was in the line."""
    try:
        return _FROM_SERVER.validate_json(line)
    except ValidationError:
        raise InvalidInputError("not a message of a volume's server") from None
