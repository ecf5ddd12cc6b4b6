"""Anchors: signed copies of the audit chain's head, kept where whoever can rewrite the chain cannot rewrite them
(docs/formats/audit-anchor.md).

The chain alone finds a change only if somebody kept a later hash. Whoever owns the metadata database can rewrite all of
it, head included, so that every hash fits. An anchor is that kept hash: the keymanager puts one into object storage,
under a key that is written once, and signs it with its Ed25519 key.

An anchor is an object of at most MAX_ANCHOR_SIZE_BYTES, one JSON object in exactly this form: members in this order,
no spaces, ASCII, no newline::

    {"at":"…Z","kid":"…","record_hash":"<64 hex>","sequence":N,"version":1,"signature":"<base64url, no padding>"}

`at` is when it was made (not when the record was). `signature` is Ed25519 over the label
"keylake/v1/audit-anchor\\0" and the object's bytes without the member `signature`. Its key: `anchor_key`.

This file is a core: no I/O and no clock.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from shared.audit_chain import HASH_SIZE_BYTES, ChainHead, Link
from shared.audit_export import format_time, parse_time
from shared.errors import CorruptedError

MAX_ANCHOR_SIZE_BYTES: Final = 1024
ANCHOR_PREFIX: Final = "audit/anchors/"
_LABEL: Final = b"keylake/v1/audit-anchor\0"
_VERSION: Final = 1
_SEQUENCE_DIGITS: Final = 20
_KID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_KEY: Final = re.compile(rf"(?:.*/)?([0-9]{{{_SEQUENCE_DIGITS}}})\.json", re.ASCII)
_SIGNATURE_SIZE_BYTES: Final = 64


class MalformedAnchorError(CorruptedError):
    """An object that is no anchor, or not the one that its key names."""

    code = "malformed_anchor"


class Signer(Protocol):
    """`shared.auth.TokenIssuer`, as seen from here."""

    kid: str

    def sign(self, label: bytes, message: bytes) -> bytes: ...


class SignatureVerifier(Protocol):
    """`shared.auth.SignatureVerifier`, as seen from here."""

    def verify(self, kid: str, label: bytes, message: bytes, signature: bytes) -> bool:
        """False for an unknown key, too."""
        ...


@dataclass(frozen=True, slots=True)
class Anchor:
    """The head of the chain as somebody signed it."""

    head: ChainHead
    at: datetime
    kid: str
    signature: bytes

    @classmethod
    def sign(cls, head: ChainHead, at: datetime, signer: Signer) -> Anchor:
        """Raises ValueError for a chain without records."""
        if head.sequence < 1:
            raise ValueError("an empty chain has nothing to anchor")
        signature = signer.sign(_LABEL, _statement(head, at, signer.kid) + b"}")
        return cls(head, at, signer.kid, signature)

    def is_signed_by(self, verifier: SignatureVerifier) -> bool:
        return verifier.verify(self.kid, _LABEL, _statement(self.head, self.at, self.kid) + b"}", self.signature)

    def encode(self) -> bytes:
        return _statement(self.head, self.at, self.kid) + b',"signature":"' + _base64(self.signature) + b'"}'

    @classmethod
    def parse(cls, data: bytes) -> Anchor:
        """Says nothing about the signature. Raises MalformedAnchorError unless `data` is what `encode` writes."""
        if len(data) > MAX_ANCHOR_SIZE_BYTES:
            raise MalformedAnchorError("it is too long")
        try:
            value = json.loads(data.decode("ascii"))
            anchor = cls(
                ChainHead(_sequence(value["sequence"]), _hash(value["record_hash"])),
                parse_time(value["at"]),
                _kid(value["kid"]),
                base64.urlsafe_b64decode(str(value["signature"]) + "=="),
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            raise MalformedAnchorError("it is not an anchor") from None
        if len(anchor.signature) != _SIGNATURE_SIZE_BYTES or anchor.encode() != data:
            raise MalformedAnchorError("it is not in the one form that an anchor has")
        return anchor

    @property
    def key(self) -> str:
        return anchor_key(self.head.sequence)


def anchor_key(sequence: int) -> str:
    """Object key of the anchor of record `sequence`: there can be one, and listing gives them in order."""
    return f"{ANCHOR_PREFIX}{sequence:0{_SEQUENCE_DIGITS}}.json"


def anchored_sequence(key: str) -> int | None:
    """Of an object key or a file name; None when it is not that of an anchor."""
    match = _KEY.fullmatch(key)
    return None if match is None else int(match[1])


def _statement(head: ChainHead, at: datetime, kid: str) -> bytes:
    members = {
        "at": format_time(at),
        "kid": kid,
        "record_hash": head.record_hash.hex(),
        "sequence": head.sequence,
        "version": _VERSION,
    }
    return json.dumps(members, separators=(",", ":")).encode("ascii")[:-1]


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _sequence(value: object) -> int:
    if type(value) is not int or not 1 <= value < 1 << 63:
        raise ValueError("not a sequence number")
    return value


def _hash(value: object) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * HASH_SIZE_BYTES:
        raise ValueError("not a hash")
    return bytes.fromhex(value)


def _kid(value: object) -> str:
    if not isinstance(value, str) or not _KID.fullmatch(value):
        raise ValueError("not the id of a key")
    return value


@dataclass(frozen=True, slots=True)
class NamedAnchor:
    """An object below the prefix, and what it holds; `problem` when that is no anchor to be believed."""

    name: str
    anchor: Anchor | None
    problem: str | None = None


def read_anchor(name: str, data: bytes, verifier: SignatureVerifier | None) -> NamedAnchor:
    """`name`: object key or file name. Without a verifier signatures are not looked at."""
    try:
        anchor = Anchor.parse(data)
    except MalformedAnchorError as error:
        return NamedAnchor(name, None, f"anchor {name} cannot be read: {error}")
    if anchored_sequence(name) != anchor.head.sequence:
        return NamedAnchor(name, None, f"anchor {name} is about record {anchor.head.sequence}, which is not its name")
    if verifier is not None and not anchor.is_signed_by(verifier):
        return NamedAnchor(name, None, f"anchor {name} is not signed by a key that is trusted here")
    return NamedAnchor(name, anchor)


class AnchorComparison:
    """A chain beside its anchors, both in order, in one pass. Keeps the first contradiction.

    For each record: `offer` the next anchor as long as there are any and the record `wants` one, then `feed` the
    record. When the chain has ended whole: `offer` what is left, then `finish`. Anchors of records before the first one
    are passed over: a chain that is known from later on says nothing about them.
    """

    def __init__(self) -> None:
        self.compared = 0
        self.problem: str | None = None
        self._last_good = 0
        self._first: int | None = None
        self._waiting: NamedAnchor | None = None

    def wants(self, sequence: int) -> bool:
        """Before `feed` of record `sequence`: is the next anchor needed?"""
        if self._first is None:
            self._first = sequence
            self._last_good = sequence - 1
        return self._waiting is None or _sequence_in(self._waiting) < sequence

    def offer(self, anchor: NamedAnchor) -> None:
        """The next anchor, in order of their names."""
        self._settle_waiting()
        self._waiting = anchor
        if anchor.anchor is None:
            self.problem = self.problem or anchor.problem

    def feed(self, link: Link) -> None:
        waiting = self._waiting
        if waiting is None or _sequence_in(waiting) != link.sequence:
            return
        self._waiting = None
        if waiting.anchor is None:
            return
        if hmac.compare_digest(waiting.anchor.head.record_hash, link.record_hash):
            self.compared += 1
            self._last_good = link.sequence
            return
        self.problem = self.problem or (
            f"anchor {waiting.name} contradicts the chain: record {link.sequence} had another hash when it was "
            f"anchored at {format_time(waiting.anchor.at)}; history was rewritten somewhere in records "
            f"{self._last_good + 1} to {link.sequence}"
        )

    def finish(self) -> None:
        self._settle_waiting()

    def _settle_waiting(self) -> None:
        """An anchor that no record answered to."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.anchor is None:
            return
        sequence = waiting.anchor.head.sequence
        if self._first is None or sequence >= self._first:
            self.problem = self.problem or (
                f"anchor {waiting.name} contradicts the chain: there is no record {sequence}, which was anchored "
                f"at {format_time(waiting.anchor.at)}: it was cut off, or is newer than this copy of the chain"
            )


def _sequence_in(anchor: NamedAnchor) -> int:
    return anchored_sequence(anchor.name) or 0
