"""Receipts: what a revocation, a restore, a shred or an erasure did, signed, for somebody who was not there
(docs/formats/receipt.md).

A receipt is one JSON object in exactly one form: ASCII, members sorted, no spaces, no newline. Its last word is
`signature`: Ed25519 by the keymanager over the label "keylake/v1/receipt\\0" and the object without that member. So any
flipped byte is found, and so is any other way to write the same.

This file is a core: no I/O and no clock.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shared.deletion import ObjectKind
from shared.errors import CorruptedError, IntegrityError
from shared.ids import AccountId, KekId, KeyConfigurationId, ProjectId, WorkspaceId

MAX_RECEIPT_SIZE_BYTES: Final = 4 * 1024 * 1024
_LABEL: Final = b"keylake/v1/receipt\0"
_SIGNATURE_SIZE_BYTES: Final = 64

_Text = Annotated[str, Field(max_length=4096)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class MalformedReceiptError(CorruptedError):
    """Bytes that are no receipt, or one in another form than the only one."""

    code = "malformed_receipt"


class Signer(Protocol):
    """`shared.auth.TokenIssuer`, as seen from here."""

    kid: str

    def sign(self, label: bytes, message: bytes) -> bytes: ...


class SignatureVerifier(Protocol):
    """`shared.auth.SignatureVerifier`, as seen from here."""

    def verify(self, kid: str, label: bytes, message: bytes, signature: bytes) -> bool: ...


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReceiptKey(_Part):
    """The customer's key at the time of what the receipt is about, and as whom it is used. Of a revocation from before
    that was written down: the key of now, and `not_verified` says so if it came later."""

    key_configuration_id: KeyConfigurationId
    provider: _Text
    identifier: _Text
    principal: _Text


class ReceiptKek(_Part):
    kek_id: KekId
    kek_version: int = Field(gt=0)
    cmk_key_version: _Text
    destroyed: bool


class ReceiptInstance(_Part):
    """What became of one holder of a lease."""

    node_id: _Text
    role: _Text
    generation: int
    outcome: Literal["acknowledged", "fenced"]
    """`fenced`: it did not answer, and its lease has run out."""
    after_s: _Seconds
    """Since the detection."""
    steps_s: dict[str, float]
    """What it said it did, and how long after it was told."""


class ReceiptGrant(_Part):
    """An instance that was given a lease again."""

    node_id: _Text
    role: _Text
    generation: int
    after_s: _Seconds
    """Since the detection."""


class ReceiptObjects(_Part):
    """Of one kind, of a shredded project, on one node."""

    kind: ObjectKind
    objects: _Count
    """Old versions and markers of deletions included."""
    old_versions: _Count
    """How many of them those are."""
    size_bytes: _Count


class ReceiptKept(_Part):
    """What a node that stores data said last that it keeps under one version of the KEK."""

    node_id: _Text
    reported_at: datetime | None
    """None: it was given keys, and has said nothing yet."""
    kek_version: int
    """0 when it has said nothing, or keeps nothing."""
    objects: _Count
    size_bytes: _Count


class ReceiptNode(_Part):
    """What a node that stores data said of a shredded project."""

    node_id: _Text
    looked_at: datetime | None
    """None: it has said nothing yet."""
    deleted_objects: _Count
    """Old versions and orphans included."""
    deleted_size_bytes: _Count
    deleted: list[ReceiptObjects] = Field(default_factory=list)
    """The same by kind; missing in receipts from before this was counted."""
    left_objects: _Count
    remains: list[_Text]
    not_checked: list[_Text]
    holds_keys: bool


class ReceiptDestroyedKey(_Part):
    """What the customer's KMS said of a key that ever wrapped the project's KEKs."""

    key_configuration_id: KeyConfigurationId
    provider: _Text
    identifier: _Text
    principal: _Text
    destroyed: bool
    evidence: _Text
    request_ids: list[_Text]
    """Of the calls by which that was asked, in the customer's own log."""


class ReceiptPrecondition(_Part):
    name: _Text
    outcome: Literal["met", "not met", "not checked", "attested"]
    evidence: list[_Text]


class ReceiptKmsCall(_Part):
    """A call to the customer's key, with the id under which the customer's own log has it."""

    at: datetime
    operation: _Text
    request_id: _Text | None
    verdict: _Text


class ReceiptAudit(_Part):
    """Where the audit chain stood: whoever has this hash can tell later whether the history was rewritten."""

    first_sequence: int = Field(gt=0)
    """The record with which it begins."""
    head_sequence: int = Field(gt=0)
    head_hash: _Hash


class _Receipt(_Part):
    """Everything but the signature, as far as all kinds have it."""

    format: Literal["keylake/receipt/1"] = "keylake/receipt/1"
    issued_at: datetime
    account_id: AccountId
    workspace_id: WorkspaceId
    project_id: ProjectId
    project_name: _Text
    state: _Text
    """What the project was put into."""
    reason: _Text
    key: ReceiptKey
    keks: list[ReceiptKek]
    kept: list[ReceiptKept] = Field(default_factory=list)
    """What is stored of it, by node and version of the KEK, by the nodes' last reports before the receipt was made;
    missing in receipts from before this was counted, empty when everything was deleted."""
    detected_at: datetime
    """Of the event: of a shred, when it was approved; of an erasure, when everything had been looked at."""
    kms_calls: list[ReceiptKmsCall]
    audit: ReceiptAudit
    verified: list[_Text]
    not_verified: list[_Text]
    kid: _Text
    """Id of the key that signs."""

    def sign(self, signer: Signer) -> SignedReceipt:
        """`kid` must be the signer's. Raises ValueError otherwise."""
        if self.kid != signer.kid:
            raise ValueError("a receipt names the key that signs it")
        receipt = RECEIPT.validate_python(self.model_dump())  # every member is there, and said
        return SignedReceipt(receipt, signer.sign(_LABEL, _canonical(_members(receipt))))


class _Sealing(_Receipt):
    """A fan-out: `kms_calls` are those that were refused."""

    revocation_id: _Text
    keks_dropped_after_s: _Seconds
    sealed_after_s: _Seconds
    """When the last instance had acknowledged, or its lease had run out."""
    instances: list[ReceiptInstance]


class RevocationReceipt(_Sealing):
    """REVOKED or SUSPENDED."""

    kind: Literal["revocation"] = "revocation"


class RestoreReceipt(_Receipt):
    """ACTIVE again: `kms_calls` are those that were allowed."""

    kind: Literal["restore"] = "restore"
    restoration_id: _Text
    revocation_id: _Text | None
    """The newest that it ended."""
    restored_after_s: _Seconds
    instances: list[ReceiptGrant]


class ShredReceipt(_Sealing):
    """SHREDDED."""

    kind: Literal["shred"] = "shred"
    shred_id: _Text
    asked_by: _Text
    asked_at: datetime
    approved_by: _Text
    keks_destroyed: _Count
    staged_destroyed: _Count
    """Wraps by a CMK that was on its way in."""
    nodes: list[ReceiptNode]
    left: list[_Text]


class ErasureReceipt(_Receipt):
    """ERASED."""

    kind: Literal["erasure"] = "erasure"
    shred_id: _Text
    checked_by: _Text
    keys: list[ReceiptDestroyedKey]
    preconditions: list[ReceiptPrecondition]
    nodes: list[ReceiptNode]


Receipt = Annotated[RevocationReceipt | RestoreReceipt | ShredReceipt | ErasureReceipt, Field(discriminator="kind")]
RECEIPT: Final[TypeAdapter[Receipt]] = TypeAdapter(Receipt)


class SignedReceipt:
    """A receipt with its signature. `parse` says nothing about who signed: `check` does."""

    def __init__(self, receipt: Receipt, signature: bytes) -> None:
        self.receipt = receipt
        self._signature = signature

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises MalformedReceiptError unless `data` is exactly what `serialize` writes."""
        if len(data) > MAX_RECEIPT_SIZE_BYTES:
            raise MalformedReceiptError("it is too long for a receipt")
        try:
            members = json.loads(data.decode("ascii"))
            signature = base64.b64decode(str(members.pop("signature")), validate=True)
            parsed = cls(RECEIPT.validate_python(members), signature)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            # Not the error's own text: it repeats the input.
            kind = "its members are others" if isinstance(error, ValidationError) else "it is not such a JSON object"
            raise MalformedReceiptError(f"this is no receipt: {kind}") from None
        if len(signature) != _SIGNATURE_SIZE_BYTES or parsed.serialize() != data:
            raise MalformedReceiptError("this is not in the one form that a receipt has: it was changed")
        return parsed

    def check(self, verifier: SignatureVerifier) -> None:
        """Raises IntegrityError unless a trusted key signed exactly this."""
        message = _canonical(_members(self.receipt))
        if not verifier.verify(self.receipt.kid, _LABEL, message, self._signature):
            raise IntegrityError("the receipt is not signed by a key that is trusted here, or was changed since")

    def serialize(self) -> bytes:
        signature = base64.b64encode(self._signature).decode("ascii")
        return _canonical({**_members(self.receipt), "signature": signature})


def _members(receipt: Receipt) -> dict[str, Any]:
    """Those that it has: one from before there was some member is what it was."""
    return receipt.model_dump(mode="json", exclude_unset=True)


def _canonical(members: dict[str, Any]) -> bytes:
    return json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode(
        "ascii"
    )
