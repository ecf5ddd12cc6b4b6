"""Contract of the keymanager: the admin API (HTTP, JSON) and the key session (WebSocket, JSON text messages).

**Key session.** Every service instance keeps one WebSocket to `/v1/session`, opened with a token of scope
`keys:session`. Over it it gets leases and revocations and, when the token also has the scope `keys:use`, DEKs. The
first message is `Hello`, the answer `Welcome`; then requests (each with a `request_id`, answered in any order) and
pushes. Answers about leases and pushes are in order: a `Renewed` that arrives after a `Revoke` knows of it. A `Hello`
with the same `node_id` anywhere ends the older session: the newer generation wins, and the older *instance* is
refused from then on (close code 4001). Plaintext DEKs are sealed once more for the session
(`shared.crypto.transport`). A service that is shown a person's token asks whether it is good (`ConfirmToken`), and is
told when one is revoked (`TokenRevoked`). A session lives as long as its own token: send `Authenticate` with a fresh
one before it expires. An instance that comes back gets the `Revoke`s that it has not acknowledged again.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Annotated, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from shared.api.common import PRINTABLE, ApiModel
from shared.api.common import KeyState as KeyState
from shared.cmk import CmkKey, CustomerKey
from shared.deletion import ObjectKind
from shared.ids import (
    AccountId,
    InstanceId,
    KekId,
    KeyConfigurationId,
    ProjectId,
    TimelineId,
    TokenId,
    WorkspaceId,
)
from shared.roles import PersonRole

MAX_KEYS_PER_REQUEST: Final = 1024
MAX_PROJECTS_PER_REQUEST: Final = 10_000
MAX_MESSAGE_SIZE_BYTES: Final = 1024 * 1024

CLOSE_REPLACED: Final = 4001
"""A newer instance of the same node has said Hello. Whoever gets this is fenced for good: it must not come back."""
CLOSE_PROTOCOL: Final = 4400
"""The client sent something that is not this protocol."""
CLOSE_UNAUTHENTICATED: Final = 4401
"""The session's token ran out, or its replacement was not good. Come back with a fresh one."""
CLOSE_PERMISSION_DENIED: Final = 4403
"""A good token that may not do this: another node's name, or a role that its scopes do not allow."""
CLOSE_SLOW: Final = 4408
"""The client did not read, or did not finish the handshake, in time."""


class Role(enum.StrEnum):
    """What kind of instance holds a lease."""

    SAFEKEEPER = "safekeeper"
    PAGESERVER = "pageserver"
    COMPUTE = "compute"
    MANAGER = "manager"
    PROXY = "proxy"


StepName = Annotated[str, Field(pattern=r"^[ -~]{1,64}$")]
"""Name of a step of getting rid of plaintext: printable ASCII, so that every database and log can hold it."""
FreeText = Annotated[str, Field(pattern=r"^[ -~]{1,300}$")]
"""A node's own words, for people; as `StepName`."""


class _Message(ApiModel):
    """A message of the key session: `bytes` fields are base64 in JSON."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


# --- key session: instance → keymanager ---


class Hello(_Message):
    op: Literal["hello"] = "hello"
    role: Role
    node_id: str = Field(min_length=1, max_length=64, pattern=r"^[a-z0-9-]+$")
    instance_id: InstanceId
    transport_public: bytes = Field(min_length=32, max_length=32)


class Authenticate(_Message):
    op: Literal["authenticate"] = "authenticate"
    token: str = Field(max_length=4096)


class Renew(_Message):
    """Ask for, or renew, leases. Every lease is asked for by name: there is no lease on everything."""

    op: Literal["renew"] = "renew"
    request_id: int
    project_ids: list[ProjectId] = Field(max_length=MAX_PROJECTS_PER_REQUEST)


class Release(_Message):
    op: Literal["release"] = "release"
    project_ids: list[ProjectId] = Field(max_length=MAX_PROJECTS_PER_REQUEST)


class ObjectName(ApiModel):
    """What a DEK is for; goes into the wrap's AAD (`KeyScope.object_context`)."""

    timeline_id: TimelineId
    object_name: str = Field(min_length=1, max_length=512)
    kind: str = Field(min_length=1, max_length=64)


class Generate(_Message):
    """New DEKs, one per object."""

    op: Literal["generate"] = "generate"
    request_id: int
    project_id: ProjectId
    objects: list[ObjectName] = Field(min_length=1, max_length=MAX_KEYS_PER_REQUEST)


class WrappedObject(_Message):
    object: ObjectName
    envelope: bytes = Field(max_length=256)


class Unwrap(_Message):
    op: Literal["unwrap"] = "unwrap"
    request_id: int
    project_id: ProjectId
    items: list[WrappedObject] = Field(min_length=1, max_length=MAX_KEYS_PER_REQUEST)


class RewrapKeys(_Message):
    """These DEKs wrapped again under the KEK version in force, without being handed out. Answer: `Envelopes`."""

    op: Literal["rewrap"] = "rewrap"
    request_id: int
    project_id: ProjectId
    items: list[WrappedObject] = Field(min_length=1, max_length=MAX_KEYS_PER_REQUEST)


class KeyUse(ApiModel):
    """What a service keeps under one KEK version and of one age of DEKs."""

    kek_version: int = Field(ge=1, lt=1 << 31)
    """Of the envelopes."""
    dek_version: int = Field(ge=1, lt=1 << 31)
    """The KEK version in force when the DEKs were made."""
    objects: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    """Sealed, envelopes not counted."""
    superseded: bool = False
    """Old versions of objects that were replaced or deleted: a bucket with versioning keeps them, a re-key removes
    them."""


class ReportUses(_Message):
    """Everything of a project that this node keeps. The node says: what is not in here does not exist, no key that was
    given to me before this report is still on its way to a disk, and `kek_version` was in force before I looked.

    So nothing under a version older than all of them will ever be written by this node again. Answer: `Recorded`.
    """

    op: Literal["report"] = "report"
    request_id: int
    project_id: ProjectId
    kek_version: int = Field(ge=1, lt=1 << 31)
    uses: list[KeyUse] = Field(max_length=1024)


class NoteBranch(_Message):
    """This project gets, or has, a branch of another one, whose data it then keeps copies of under its own keys. To be
    said before there is any. Answer: `Recorded`."""

    op: Literal["note-branch"] = "note-branch"
    request_id: int
    project_id: ProjectId
    ancestor_project_id: ProjectId


class DeletedObjects(ApiModel):
    """Of one kind, of a shredded project, on one node."""

    kind: ObjectKind
    objects: int = Field(ge=0, lt=1 << 62)
    """Old versions and markers of deletions included."""
    old_versions: int = Field(ge=0, lt=1 << 62)
    """How many of them those are."""
    size_bytes: int = Field(ge=0, lt=1 << 62)


class ReportDeletion(_Message):
    """What this node deleted of a shredded project since it was told to, and what it found left afterwards. Answer:
    `Recorded`."""

    op: Literal["report-deletion"] = "report-deletion"
    request_id: int
    project_id: ProjectId
    deleted: list[DeletedObjects] = Field(max_length=len(ObjectKind))
    """Orphans included."""
    left_objects: int = Field(ge=0, lt=1 << 62)
    """What the store would not delete."""
    remains: list[FreeText] = Field(default_factory=list, max_length=16)
    """In words: which, and why."""
    not_checked: list[FreeText] = Field(default_factory=list, max_length=16)
    """In words: where nobody could look."""
    holds_keys: bool
    """Whether this instance still has a plaintext key of the project."""


class Acknowledge(_Message):
    """This instance holds no key and no plaintext of the project any more, and did these steps (name → seconds)."""

    op: Literal["acknowledge"] = "acknowledge"
    revocation_id: str = Field(max_length=64)
    project_id: ProjectId
    steps_s: dict[StepName, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, max_length=32
    )


class ConfirmToken(_Message):
    """Is this token for a person registered, and not revoked? Answered by TokenConfirmed or by Failed."""

    op: Literal["confirm-token"] = "confirm-token"
    request_id: int
    token_id: TokenId
    digest: bytes = Field(min_length=32, max_length=32)
    """SHA-256 of the token's text: the token itself goes nowhere."""


class Locate(_Message):
    """Which workspaces are these projects in?"""

    op: Literal["locate"] = "locate"
    request_id: int
    project_ids: list[ProjectId] = Field(max_length=MAX_PROJECTS_PER_REQUEST)


# --- key session: keymanager → instance ---


class Welcome(_Message):
    op: Literal["welcome"] = "welcome"
    generation: int
    lease_ttl_s: float
    transport_public: bytes = Field(min_length=32, max_length=32)


class Grant(ApiModel):
    """One lease, or the reason why there is none. `ttl_s` counts from when the instance *sent* its request."""

    project_id: ProjectId
    state: KeyState
    ttl_s: float = 0.0
    account_id: AccountId | None = None
    workspace_id: WorkspaceId | None = None
    reason: str = ""
    kek_version: int = 0
    """In force now: envelopes of older versions are to be wrapped again."""
    dek_floor: int = 0
    """DEKs made under an older KEK version than this are to be replaced, by sealing their data anew."""


class Renewed(_Message):
    op: Literal["renewed"] = "renewed"
    request_id: int
    grants: list[Grant]


class KeyItem(_Message):
    envelope: bytes = Field(max_length=256)
    sealed_dek: bytes = Field(max_length=256)
    """`KeyTransport.seal_key` of the DEK with the envelope's bytes as AAD."""


class Keys(_Message):
    op: Literal["keys"] = "keys"
    request_id: int
    items: list[KeyItem]


class Envelopes(_Message):
    """In the order of the request."""

    op: Literal["envelopes"] = "envelopes"
    request_id: int
    items: list[Annotated[bytes, Field(max_length=256)]]


class Recorded(_Message):
    op: Literal["recorded"] = "recorded"
    request_id: int


class Failed(_Message):
    op: Literal["failed"] = "failed"
    request_id: int
    code: str
    message: str


class Revoke(_Message):
    """Stop now: drop keys and plaintext of the project, then acknowledge."""

    op: Literal["revoke"] = "revoke"
    revocation_id: str
    project_id: ProjectId
    state: KeyState
    reason: str


class TokenConfirmed(_Message):
    """The token is good for `ttl_s` from when the question was sent, unless a TokenRevoked comes before."""

    op: Literal["token-confirmed"] = "token-confirmed"
    request_id: int
    token_id: TokenId
    digest: bytes = Field(min_length=32, max_length=32)
    ttl_s: float


class TokenRevoked(_Message):
    """A token for a person is good no longer. To every session."""

    op: Literal["token-revoked"] = "token-revoked"
    token_id: TokenId


class Located(_Message):
    """Projects that do not exist, or that this session may not know of, are left out."""

    op: Literal["located"] = "located"
    request_id: int
    workspaces: dict[ProjectId, WorkspaceId]


class DeleteData(_Message):
    """These projects are shredded: delete everything that this node stores of them, whether or not anything refers to
    it, and say so (`ReportDeletion`, one for each). Comes again until nothing is left, and whenever somebody wants a
    fresh look."""

    op: Literal["delete-data"] = "delete-data"
    project_ids: list[ProjectId] = Field(max_length=MAX_PROJECTS_PER_REQUEST)


class Restored(_Message):
    """The project is ACTIVE again: leases may be asked for."""

    op: Literal["restored"] = "restored"
    project_id: ProjectId


ClientMessage = Annotated[
    Hello
    | Authenticate
    | Renew
    | Release
    | Generate
    | Unwrap
    | Acknowledge
    | ConfirmToken
    | Locate
    | RewrapKeys
    | ReportUses
    | NoteBranch
    | ReportDeletion,
    Field(discriminator="op"),
]
ServerMessage = Annotated[
    Welcome
    | Renewed
    | Keys
    | Failed
    | Revoke
    | Restored
    | TokenConfirmed
    | TokenRevoked
    | Located
    | Envelopes
    | Recorded
    | DeleteData,
    Field(discriminator="op"),
]
CLIENT_MESSAGE: TypeAdapter[ClientMessage] = TypeAdapter(ClientMessage)
SERVER_MESSAGE: TypeAdapter[ServerMessage] = TypeAdapter(ServerMessage)


# --- admin API ---


class AwsKey(CustomerKey):
    """An AWS KMS key and the role by which Keylake uses it."""

    provider: Literal["aws"] = "aws"
    key_arn: str = Field(pattern=r"^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]{1,64}$")
    role_arn: str = Field(pattern=r"^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]{1,512}$")
    external_id: str = Field(min_length=2, max_length=1224, pattern=r"^[A-Za-z0-9+=,.@:/_-]+$")

    @property
    def identifier(self) -> str:
        return self.key_arn

    @property
    def principal(self) -> str:
        return self.role_arn


class GoogleKey(CustomerKey):
    """A crypto key of Google Cloud KMS and the service account as which Keylake uses it.

    Ids as Google defines them: project, `[a-z][a-z0-9-]{4,28}[a-z0-9]`; key ring and key, `[a-zA-Z0-9_-]{1,63}`. No
    version: which one wraps is the key's to say.
    """

    provider: Literal["google"] = "google"
    key_name: str = Field(
        pattern=r"^projects/[a-z][a-z0-9-]{4,28}[a-z0-9]/locations/[a-z0-9-]{1,63}"
        r"/keyRings/[a-zA-Z0-9_-]{1,63}/cryptoKeys/[a-zA-Z0-9_-]{1,63}$"
    )
    service_account: str = Field(
        pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]@[a-z][a-z0-9-]{4,28}[a-z0-9]\.iam\.gserviceaccount\.com$"
    )

    @property
    def identifier(self) -> str:
        return self.key_name

    @property
    def principal(self) -> str:
        return self.service_account


_UUID: Final = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"


class AzureKey(CustomerKey):
    """A key in Azure Key Vault and the service principal by which Keylake uses it.

    The principal is that of Keylake's application in the customer's tenant; its secret is the keymanager's setting.
    """

    provider: Literal["azure"] = "azure"
    vault_url: str = Field(
        max_length=300,
        # The vendor's clouds; or, for a simulated one: loopback, or a host name of one label. A vault's name has 3 to
        # 24 letters, digits and single hyphens, begins with a letter and does not end with a hyphen.
        pattern=r"^https://("
        r"[a-z](-?[a-z0-9]){2,23}\.(vault\.azure\.net|vault\.azure\.cn|vault\.usgovcloudapi\.net)"
        r"|([a-z0-9-]{1,63}\.){0,2}localhost(:[0-9]{1,5})?|127\.0\.0\.1(:[0-9]{1,5})?|[a-z0-9-]{1,63}(:[0-9]{1,5})?"
        r")$",
    )
    key_name: str = Field(pattern=r"^[0-9A-Za-z-]{1,127}$")
    tenant_id: str = Field(pattern=_UUID)
    client_id: str = Field(pattern=_UUID)

    @property
    def identifier(self) -> str:
        return f"{self.vault_url}/keys/{self.key_name}"

    @property
    def principal(self) -> str:
        return self.client_id


class CreateKeyConfiguration(ApiModel):
    name: str = Field(min_length=1, max_length=100, pattern=PRINTABLE)
    key: CmkKey
    outage_grace_s: float = Field(default=0.0, ge=0, le=7200)
    probe_interval_s: float = Field(default=1.0, ge=0.1, le=3600)


class ChangeKeyConfiguration(ApiModel):
    """What is given is changed, the rest stays. The key itself: `:replace`."""

    name: str | None = Field(default=None, min_length=1, max_length=100, pattern=PRINTABLE)
    outage_grace_s: float | None = Field(default=None, ge=0, le=7200)
    probe_interval_s: float | None = Field(default=None, ge=0.1, le=3600)


class NoCause(enum.StrEnum):
    """How a customer's no comes about."""

    DENIED = "denied"
    """The KMS refuses: disabled, scheduled for deletion, destroyed, policy or grant or role removed."""
    NO_ANSWER = "no_answer"
    """The KMS cannot be reached, fails (5xx), throttles, or answers what means nothing: the outage grace runs."""
    FLAPPING = "flapping"
    """Denials and missing answers in turn, and not one yes."""
    TRUST_WITHDRAWN = "trust_withdrawn"
    """The cloud gives Keylake no new session; the one that it has lives on."""
    OPERATOR = "operator"
    """`:revoke`, without the KMS."""


class WorstCase(ApiModel):
    """Upper bounds, in seconds since the KMS last could say yes, until nothing is served any more. None: not known."""

    cause: NoCause
    state: KeyState
    """What it ends in; FLAPPING in SUSPENDED as well."""
    detection_s: float | None = None
    """Nothing is issued any more."""
    reachable_s: float | None = None
    """Instances that hear the keymanager."""
    partitioned_s: float | None = None
    """Instances that are cut off, stopped, killed, started again."""
    keymanager_stalled_s: float | None = None
    """The same while the keymanager itself is stopped, cut off or killed."""


class KeyWorkKind(enum.StrEnum):
    REWRAP = "rewrap"
    """KEKs are wrapped again under the CMK's current version."""
    REPLACE = "replace"
    """KEKs are wrapped by another CMK, to which all of them change when they are done."""


class KeyWork(ApiModel):
    """Work on the KEKs of a key configuration, under way."""

    kind: KeyWorkKind
    done: int
    total: int
    """KEKs."""
    started_at: datetime
    """By this keymanager or, a replacement, by the one that was asked."""


class RestoreHold(ApiModel):
    """The KMS has taken its yes back soon after, and more than once: now it has to say nothing else for a while."""

    flaps: int
    """Times in a row that it did."""
    needed_s: float
    left_s: float
    """If it goes on saying yes; all of `needed_s` while it does not."""


class KeyConfiguration(ApiModel):
    key_configuration_id: KeyConfigurationId
    account_id: AccountId
    name: str
    key: CmkKey
    outage_grace_s: float
    probe_interval_s: float
    state: KeyState
    last_verdict: str
    last_probe_at: datetime | None
    restore_hold: RestoreHold | None = None
    """Why the KMS's first yes will not be, or was not, enough."""
    created_at: datetime
    worst_cases: list[WorstCase] = Field(default_factory=list)
    """For these settings and the keymanager's own, one for every cause."""
    work: list[KeyWork] = Field(default_factory=list)
    """What is under way on its KEKs."""


class CreateWorkspace(ApiModel):
    name: str = Field(min_length=1, max_length=100, pattern=PRINTABLE)
    key_configuration_id: KeyConfigurationId


class ChangeWorkspace(ApiModel):
    """What is given is changed, the rest stays."""

    name: str | None = Field(default=None, min_length=1, max_length=100, pattern=PRINTABLE)
    key_configuration_id: KeyConfigurationId | None = None
    """Of projects that are made from now on. Those that are there stay under the one that they have."""


class Workspace(ApiModel):
    workspace_id: WorkspaceId
    account_id: AccountId
    name: str
    key_configuration_id: KeyConfigurationId
    """Of projects that are made without one of their own."""
    created_at: datetime


class CreateProject(ApiModel):
    name: str = Field(min_length=1, max_length=100, pattern=PRINTABLE)
    key_configuration_id: KeyConfigurationId | None = None
    """It takes an account admin to say one; without, it is the workspace's of this moment."""


class MoveProject(ApiModel):
    """Another key configuration for a project."""

    key_configuration_id: KeyConfigurationId


class KekInfo(ApiModel):
    kek_id: KekId
    kek_version: int
    cmk_key_version: str
    wraps: int
    created_at: datetime
    destroyed: bool = False
    """What it wrapped can never be opened again; it is retired when nothing is left."""


class Project(ApiModel):
    project_id: ProjectId
    workspace_id: WorkspaceId
    account_id: AccountId
    key_configuration_id: KeyConfigurationId
    name: str
    state: KeyState
    state_reason: str
    keks: list[KekInfo]
    created_at: datetime


class Rewrap(ApiModel):
    """KEKs of one key configuration, wrapped again under the CMK's current version."""

    key_configuration_id: KeyConfigurationId
    cmk_key_version: str
    """The current one, in the provider's words."""
    keks: int
    outdated: int
    """Of those, wrapped by another version when this began."""
    rewrapped: int
    dry_run: bool


class ReplaceKey(ApiModel):
    """Another CMK for a key configuration, in any cloud."""

    key: CmkKey


class Replacement(ApiModel):
    """A CMK on its way in. Until it is there, the old one is in use."""

    key_configuration_id: KeyConfigurationId
    key: CmkKey
    keks: int
    staged: int
    """Of those, wrapped by the new CMK already."""
    started_at: datetime
    dry_run: bool = False
    """The new CMK was tried, and nothing was begun."""


class KmsEventsTaken(ApiModel):
    """What came of a cloud's events."""

    probed: int
    """Key configurations whose KMS is asked because of them, now or within a second."""


class KeyHolder(ApiModel):
    """A node that was given keys of a project, and what it said last that it keeps."""

    node_id: str
    kek_floor: int
    """It keeps nothing under an older KEK version."""
    reported_at: datetime | None
    """None: it has said nothing yet."""
    uses: list[KeyUse]


class KekStatus(KekInfo):
    last_unwrap_at: datetime | None
    """When the KMS last unwrapped it."""
    destroyed_at: datetime | None


class KeyStatus(ApiModel):
    """The keys of a project, and who keeps what under them."""

    project_id: ProjectId
    state: KeyState
    key_configuration_id: KeyConfigurationId
    keks: list[KekStatus]
    wraps_limit: int
    """Of one KEK. It is rotated well before."""
    next_rotation_at: datetime
    """The KEK's, by age, at the latest."""
    dek_floor: int
    """DEKs made under an older KEK version are being replaced; 0 if that was never asked for."""
    holders: list[KeyHolder]


class KekInUse(ApiModel):
    """Why a KEK version cannot be destroyed."""

    kek_version: int
    node_id: str
    reason: str


class RetiredKeks(ApiModel):
    project_id: ProjectId
    retired: list[int]
    """Versions destroyed now; in a dry run, that could be."""
    in_use: list[KekInUse]
    dry_run: bool


class InstanceSealed(ApiModel):
    """What became of one lease holder in a revocation."""

    node_id: str
    role: Role
    generation: int
    outcome: Literal["pending", "acknowledged", "fenced"]
    after_s: float | None
    """Seconds from the start of the revocation to acknowledgement, or to the end of its lease."""
    steps_s: dict[str, float]


class Revocation(ApiModel):
    revocation_id: str
    project_id: ProjectId
    state: KeyState
    reason: str
    detected_at: datetime
    keks_dropped_after_s: float | None
    sealed_after_s: float | None
    restoration_id: str | None = None
    """Of the restore that ended it; None as long as there was none."""
    instances: list[InstanceSealed]


class AuditRecord(ApiModel):
    """One link of the audit chain: `record_hash` covers every other field, `previous_hash` included."""

    sequence: int
    at: datetime
    actor: str
    action: str
    outcome: str
    project_id: ProjectId | None
    details: dict[str, str]
    previous_hash: str
    record_hash: str


class AuditVerification(ApiModel):
    intact: bool
    """Every record follows the one before, and no anchor that was read contradicts."""
    records: int
    head_hash: str
    problem: str | None
    anchors: int | None = None
    """How many agree with the chain; None when there is no object store for them."""
    anchors_problem: str | None = None
    """Why they could not be read: nothing is said about a rewritten history then."""


class RegisterToken(ApiModel):
    """A token for a person, signed by the caller. It is in force when this is answered."""

    model_config = ConfigDict(hide_input_in_errors=True)

    token: str = Field(min_length=1, max_length=4096, repr=False)


class IssuedToken(ApiModel):
    """What is known of a token for a person. Not the token: nobody keeps that."""

    token_id: TokenId
    role: PersonRole
    subject: str
    workspace_id: WorkspaceId | None
    project_id: ProjectId | None
    issued_by: str
    """The key that signed it."""
    issued_at: datetime
    expires_at: datetime
    revoked_at: datetime | None


class RevokeRequest(ApiModel):
    """An operator's own revocation, without the KMS; lifted by `:restore`."""

    reason: str = Field(min_length=1, max_length=500, pattern=PRINTABLE)


class LeaseInfo(ApiModel):
    project_id: ProjectId
    role: Role
    node_id: str
    instance_id: InstanceId
    generation: int
    remaining_s: float


class AnchoringStatus(ApiModel):
    """The newest anchor of the audit chain that this process made or found."""

    sequence: int
    at: datetime | None
    problem: str | None
    """Why the last attempt failed."""
    failures: int
    """Of attempts, since the start."""


class KeymanagerStatus(ApiModel):
    """Of the keymanager that leads; the others answer with error code `not_leader`."""

    node_id: str
    epoch: int
    """Counts leaders, over all keymanagers of this database."""
    lease_ttl_s: float
    instances: int
    leases: list[LeaseInfo]
    plaintext_keks: list[ProjectId]
    """Whose KEKs are in memory, in the clear: the project, once for each KEK."""
    anchoring: AnchoringStatus | None = None
    """None: the audit chain is not anchored."""
