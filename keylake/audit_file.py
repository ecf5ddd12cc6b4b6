"""An audit chain in a file: written from a running keymanager, verified without one."""

from __future__ import annotations

import contextlib
import hmac
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from shared.api.keymanager import AuditRecord
from shared.audit_anchor import (
    MAX_ANCHOR_SIZE_BYTES,
    AnchorComparison,
    NamedAnchor,
    SignatureVerifier,
    anchored_sequence,
    read_anchor,
)
from shared.audit_chain import AuditEntry, Link
from shared.audit_export import MAX_LINE_SIZE_BYTES, ExportVerifier, write_line
from shared.errors import InvalidInputError

PAGE_RECORDS: Final = 1000
_PROGRESS_EVERY_RECORDS: Final = 10_000

Page = Callable[[int, int], Awaitable[list[AuditRecord]]]
"""(after, limit) → records, oldest first."""


# --- writing ---


def link_of(record: AuditRecord) -> Link:
    """Raises ValueError for hashes that are none."""
    entry = AuditEntry(record.actor, record.action, record.outcome, record.project_id, record.details)
    return Link(
        record.sequence, record.at, entry, bytes.fromhex(record.previous_hash), bytes.fromhex(record.record_hash)
    )


async def records_after(page: Page, after: int) -> AsyncIterator[Link]:
    """Every record after `after`, up to the newest when the last page is read. One page is in memory."""
    while records := await page(after, PAGE_RECORDS):
        for record in records:
            yield link_of(record)
        after = records[-1].sequence
        if len(records) < PAGE_RECORDS:
            return


async def export(page: Page, after: int, out: BinaryIO, progress: Callable[[int], None]) -> int:
    """Write the records as JSON lines. Returns how many; `progress` hears of it now and then."""
    count = 0
    async for link in records_after(page, after):
        out.write(write_line(link))
        count += 1
        if count % _PROGRESS_EVERY_RECORDS == 0:
            progress(count)
    return count


@contextlib.contextmanager
def output(path: Path | None) -> Iterator[BinaryIO]:
    """stdout, or a file of mode 0600 that is there as a whole or not at all."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# --- verifying ---


@dataclass(frozen=True, slots=True)
class FileVerification:
    """What is known of an exported chain. `intact` is about what was asked to be compared, too."""

    intact: bool
    first: int | None
    """Sequence number of the first record; None: there is none."""
    last: int
    """Of the last record that is good."""
    head_hash: str
    problem: str | None
    kept_head: int | None
    """Which record has the hash that was kept."""
    anchors: int | None
    """How many agree; None: they were not asked for."""
    signatures_checked: bool


def lines_of(path: Path) -> Iterator[bytes]:
    """Lines of a file, none longer than one byte more than is allowed. Raises InvalidInputError."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_SIZE_BYTES + 1):
                yield line
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None


def anchors_in(directory: Path, verifier: SignatureVerifier | None) -> Iterator[NamedAnchor]:
    """A copy of the anchors' prefix, or of the whole bucket, in order. Raises InvalidInputError."""
    if not directory.is_dir():
        raise InvalidInputError(f"{directory} is not a directory")
    found = {sequence: p for p in directory.rglob("*.json") if (sequence := anchored_sequence(p.name)) is not None}
    if not found:
        raise InvalidInputError(f"there are no anchors in {directory}")
    for _, path in sorted(found.items()):
        try:
            with path.open("rb") as file:
                data = file.read(MAX_ANCHOR_SIZE_BYTES + 1)
        except OSError as error:
            raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
        yield read_anchor(path.name, data, verifier)


def verify_file(
    path: Path,
    *,
    head: bytes | None = None,
    anchors: Path | None = None,
    signatures: SignatureVerifier | None = None,
) -> FileVerification:
    """Walk an exported chain: does each record follow the one before, does it hold the record whose hash is `head`,
    and does it agree with the anchors? Raises InvalidInputError when a file cannot be read."""
    chain, comparison, kept_head = ExportVerifier(), AnchorComparison(), None
    stored = iter(()) if anchors is None else anchors_in(anchors, signatures)

    def offer_next() -> bool:
        anchor = next(stored, None)
        if anchor is not None:
            comparison.offer(anchor)
        return anchor is not None

    for line in lines_of(path):
        link = chain.feed(line)
        if link is None:
            break
        if head is not None and hmac.compare_digest(head, link.record_hash):
            kept_head = link.sequence
        while comparison.wants(link.sequence) and offer_next():
            pass
        comparison.feed(link)
    problem = chain.problem
    if problem is None:
        while offer_next():
            pass
        comparison.finish()
        if head is not None and kept_head is None:
            problem = "no record has the hash that was kept as the chain's head: history was rewritten or cut off"
        if chain.first is None:
            problem = problem or "there is no record in it"
    problem = comparison.problem or problem
    return FileVerification(
        problem is None,
        chain.first,
        chain.head.sequence,
        chain.head.record_hash.hex(),
        problem,
        kept_head,
        None if anchors is None else comparison.compared,
        anchors is not None and signatures is not None,
    )
