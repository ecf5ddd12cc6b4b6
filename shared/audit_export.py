"""Exported audit records: JSON lines, and how they are read back without trusting them (docs/formats/audit-export.md).

One record is one line: a JSON object with exactly the members below, in UTF-8, ended by "\\n". Hashes are over the
canonical encoding of `shared.audit_chain`, never over this text, so that order and spacing of members do not matter.

    member        | type
    --------------+-------------------------------------------------------------------
    sequence      | integer, 1 to 2^63 - 1
    at            | "YYYY-MM-DDTHH:MM:SS.ffffffZ", UTC
    actor, action, outcome | string
    project_id    | "prj-…" or null
    details       | object of strings
    previous_hash, record_hash | 64 lower-case hexadecimal digits

This file is a core: no I/O and no clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from shared.audit_chain import HASH_SIZE_BYTES, AuditEntry, ChainHead, ChainVerifier, Link
from shared.errors import CorruptedError
from shared.ids import ProjectId

MAX_LINE_SIZE_BYTES: Final = 1 << 20
_MEMBERS: Final = frozenset(
    {"sequence", "at", "actor", "action", "outcome", "project_id", "details", "previous_hash", "record_hash"}
)
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z", re.ASCII)
_HASH: Final = re.compile(rf"[0-9a-f]{{{2 * HASH_SIZE_BYTES}}}", re.ASCII)
_MAX_SEQUENCE: Final = (1 << 63) - 1


class MalformedRecordError(CorruptedError):
    """A line that is no audit record."""

    code = "malformed_audit_record"


def format_time(at: datetime) -> str:
    """UTC with microseconds: what the chain hashes, and nothing less."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: object) -> datetime:
    """Raises ValueError."""
    if not isinstance(text, str) or not _TIME.fullmatch(text):
        raise ValueError("not a time in UTC with microseconds")
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)


def write_line(link: Link) -> bytes:
    """One record with its newline."""
    entry = link.entry
    members = {
        "sequence": link.sequence,
        "at": format_time(link.at),
        "actor": entry.actor,
        "action": entry.action,
        "outcome": entry.outcome,
        "project_id": None if entry.project_id is None else str(entry.project_id),
        "details": dict(sorted(entry.details.items())),
        "previous_hash": link.previous_hash.hex(),
        "record_hash": link.record_hash.hex(),
    }
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse_line(line: bytes) -> Link:
    """One record, with or without its newline. Raises MalformedRecordError, which repeats nothing of the line."""
    if len(line) > MAX_LINE_SIZE_BYTES:
        raise MalformedRecordError(f"longer than {MAX_LINE_SIZE_BYTES} bytes")
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, _DuplicateError) else "not a JSON object in UTF-8"
        raise MalformedRecordError(why) from None
    if not isinstance(value, dict) or value.keys() != _MEMBERS:
        raise MalformedRecordError("not an object with the members of an audit record")
    try:
        return _link(value)
    except ValueError as error:
        raise MalformedRecordError(str(error)) from None


class _DuplicateError(ValueError):
    """A member stands twice: two readers could see two different records."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _DuplicateError("a member stands in it twice")
    return value


def _no_constant(_: str) -> None:
    raise ValueError("NaN and infinities are not JSON")


def _link(value: Mapping[str, Any]) -> Link:
    sequence, project, details = value["sequence"], value["project_id"], value["details"]
    if type(sequence) is not int or not 1 <= sequence <= _MAX_SEQUENCE:
        raise ValueError("sequence is not a number from 1")
    if not isinstance(details, dict):
        raise ValueError("details are not an object")  # noqa: TRY004 - of a file, not of a program
    try:
        project_id = None if project is None else ProjectId.parse(_text(project))
    except ValueError:
        raise ValueError("project_id is not an id of a project") from None
    entry = AuditEntry(
        _text(value["actor"]),
        _text(value["action"]),
        _text(value["outcome"]),
        project_id,
        {name: _text(text) for name, text in ((_text(name), text) for name, text in details.items())},
    )
    return Link(sequence, parse_time(value["at"]), entry, _hash(value["previous_hash"]), _hash(value["record_hash"]))


def _text(value: object) -> str:
    if not isinstance(value, str) or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)):
        raise ValueError("a text is none, or cannot be written in UTF-8")
    return value


def _hash(value: object) -> bytes:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError("a hash is not 64 hexadecimal digits")
    return bytes.fromhex(value)


class ExportVerifier:
    """Walks the lines of an exported chain. What is beyond its first problem is not looked at.

    An export may begin after record N; that its first record follows the N before it is then for a head or an anchor
    to say.
    """

    def __init__(self) -> None:
        self._verifier: ChainVerifier | None = None
        self._lines = 0
        self.first: int | None = None
        """Sequence number of the first record."""
        self.problem: str | None = None

    @property
    def head(self) -> ChainHead:
        """The last record that was good."""
        return ChainHead() if self._verifier is None else self._verifier.head

    def feed(self, line: bytes) -> Link | None:
        """The record, or None when the chain is broken here: `problem` says where and how."""
        if self.problem is not None:
            return None
        self._lines += 1
        try:
            link = parse_line(line)
        except MalformedRecordError as error:
            self.problem = f"line {self._lines} is no audit record: {error}"
            return None
        if self._verifier is None:
            self.first = link.sequence
            before = ChainHead() if link.sequence == 1 else ChainHead(link.sequence - 1, link.previous_hash)
            self._verifier = ChainVerifier(before)
        if not self._verifier.feed(link):
            self.problem = self._verifier.problem
            return None
        return link


def verified(lines: Iterable[bytes], verifier: ExportVerifier) -> Iterator[Link]:
    """The records of an export up to its end or first problem, which `verifier` keeps."""
    for line in lines:
        link = verifier.feed(line)
        if link is None:
            return
        yield link
