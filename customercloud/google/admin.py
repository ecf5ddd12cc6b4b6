"""Administration of the simulated Google Cloud: projects, service accounts, waiting periods, the audit logs.

What in the real cloud somebody does in the console or through APIs that are not simulated. Changes are in force at
once; what is changed through IAM's own API follows `Faults.propagation_delay_s`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import secrets
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from customercloud.google.auditlog import timestamp
from customercloud.google.entries import Entries
from customercloud.google.errors import GoogleError
from customercloud.google.iam import Binding
from customercloud.google.identity import AccountKey, Project, ServiceAccount
from customercloud.google.names import ACCOUNT_PATTERN, PROJECT_PATTERN, KeyName, ProjectName, ServiceAccountName
from customercloud.google.service import GoogleEndpoint
from customercloud.google.state import GoogleState
from shared.clock import Clock
from shared.errors import ConflictError, InvalidInputError, NotFoundError

_LINES_PER_CHUNK: Final = 256
TOKEN_CREATOR: Final = "roles/iam.serviceAccountTokenCreator"  # noqa: S105 - a role

ProjectId = Annotated[str, Field(pattern=f"^{PROJECT_PATTERN}$")]
AccountId = Annotated[str, Field(pattern=f"^{ACCOUNT_PATTERN}$")]
ProjectPath = Annotated[str, Path(pattern=f"^{PROJECT_PATTERN}$")]
AccountPath = Annotated[str, Path(pattern=f"^{ACCOUNT_PATTERN}$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccountCredentials(_Model):
    """A service account and the credentials file that a person would download for it."""

    email: str
    unique_id: str
    credentials_file: dict[str, Any] = Field(repr=False)


class GoogleBootstrapRequest(_Model):
    """The usual cast: a customer, its vendor, and the account through which the vendor uses the customer's keys."""

    customer_project: ProjectId = "customer-project"
    vendor_project: ProjectId = "keylake-vendor"
    admin_account: AccountId = "key-admin"
    kms_account: AccountId = "keylake-kms"
    vendor_account: AccountId = "keylake-service"


class GoogleBootstrapAnswer(_Model):
    customer_project: str
    customer: AccountCredentials
    """Owner of the customer's project."""
    vendor: AccountCredentials
    """May impersonate the account below, and nothing else."""
    service_account: str
    """Of the customer's project; has no role: what it may do with a key, the key's policy says."""


class DataAccessLogs(_Model):
    enabled: bool


class CompleteDestruction(_Model):
    key_name: str = Field(max_length=1024)


class GoogleAdmin:
    def __init__(self, state: GoogleState, clock: Clock) -> None:
        self._state = state
        self._clock = clock

    async def bootstrap(self, request: GoogleBootstrapRequest, token_uri: str) -> GoogleBootstrapAnswer:
        """Idempotent: what exists is kept, with its credentials."""
        customer = await self.put_account(request.customer_project, request.admin_account)
        kms = await self.put_account(request.customer_project, request.kms_account, with_key=False)
        vendor = await self.put_account(request.vendor_project, request.vendor_account)
        self._grant(ProjectName(request.customer_project), "roles/owner", customer)
        self._grant(ServiceAccountName(kms.project_id, kms.email), TOKEN_CREATOR, vendor)
        return GoogleBootstrapAnswer(
            customer_project=request.customer_project,
            customer=credentials(customer, token_uri),
            vendor=credentials(vendor, token_uri),
            service_account=kms.email,
        )

    async def put_account(self, project_id: str, account_id: str, *, with_key: bool = True) -> ServiceAccount:
        """The account, made if it does not exist; its project likewise."""
        if project_id not in self._state.snapshot.projects:
            number = str(10**11 + secrets.randbelow(9 * 10**11))
            self._state.put_project(Project(project_id=project_id, number=number))
        made = ServiceAccount.new(account_id, project_id)
        if existing := self._state.snapshot.accounts.get(made.email):
            return existing
        keys = (await asyncio.to_thread(AccountKey.new),) if with_key else ()
        if existing := self._state.snapshot.accounts.get(made.email):
            return existing
        account = made.model_copy(update={"keys": keys})
        self._state.put_account(account)
        return account

    def account(self, email: str) -> ServiceAccount:
        account = self._state.snapshot.accounts.get(email)
        if account is None:
            raise NotFoundError("no such service account")
        return account

    def project(self, project_id: str) -> Project:
        project = self._state.snapshot.projects.get(project_id)
        if project is None:
            raise NotFoundError("no such project")
        return project

    def _grant(self, target: ProjectName | ServiceAccountName, role: str, account: ServiceAccount) -> None:
        policy = self._state.policy(target)
        bindings = {} if policy is None else {b.role: b.members for b in policy.bindings}
        if account.member in bindings.get(role, ()):
            return
        bindings[role] = bindings.get(role, frozenset()) | {account.member}
        changed = tuple(Binding(role=r, members=m) for r, m in sorted(bindings.items()))
        self._state.put_policy(target, changed, self._clock.now(), dt.timedelta(0))


def credentials(account: ServiceAccount, token_uri: str) -> AccountCredentials:
    if not account.keys:
        raise ConflictError("this service account has no key: it is there to be impersonated")
    return AccountCredentials(
        email=account.email, unique_id=account.unique_id, credentials_file=account.credentials_file(token_uri)
    )


def google_router(
    state: GoogleState, entries: Entries, endpoint: GoogleEndpoint, clock: Clock, log_delay: Callable[[], dt.timedelta]
) -> APIRouter:
    """`log_delay` is how long entries are withheld from readers."""
    router = APIRouter(prefix="/google", tags=["google"])
    admin = GoogleAdmin(state, clock)

    @router.post("/bootstrap")
    async def bootstrap(body: GoogleBootstrapRequest, request: Request) -> GoogleBootstrapAnswer:
        return await admin.bootstrap(body, _token_uri(request))

    @router.put("/projects/{project_id}/accounts/{account_id}")
    async def put_account(project_id: ProjectPath, account_id: AccountPath, request: Request) -> AccountCredentials:
        """A service account with a key; what exists is kept."""
        return credentials(await admin.put_account(project_id, account_id), _token_uri(request))

    @router.delete("/accounts/{email}", status_code=204)
    async def delete_account(email: str) -> None:
        """Its tokens stop working at once; an account made again under this name is another one."""
        state.remove_account(admin.account(email))

    @router.put("/projects/{project_id}/data-access-logs")
    async def put_data_access_logs(project_id: ProjectPath, body: DataAccessLogs) -> DataAccessLogs:
        """Whether reads and uses of keys are logged. Changes of keys always are."""
        project = admin.project(project_id)
        state.put_project(project.model_copy(update={"data_access_logs": body.enabled}))
        return body

    @router.post("/complete-destruction", status_code=204)
    async def complete_destruction(body: CompleteDestruction) -> None:
        """Let the waiting period of the key's versions that are scheduled for destruction be over now."""
        try:
            name = KeyName.parse(body.key_name)
        except GoogleError as error:
            raise InvalidInputError(error.message) from None
        key = state.key(name)
        if key is None:
            raise NotFoundError("no such key")
        endpoint.destroy_now(key)

    @router.get("/entries")
    async def read_entries(project: Annotated[str | None, Query(pattern=f"^{PROJECT_PATTERN}$")] = None) -> Response:
        """The audit logs of a project (or of all), oldest first, one LogEntry a line."""
        until = timestamp(clock.now() - log_delay())
        return StreamingResponse(_lines(entries, project, until), media_type="application/x-ndjson")

    return router


def _token_uri(request: Request) -> str:
    """Of this cloud, as whoever asks for credentials reaches it."""
    return f"{request.base_url}token"


async def _lines(entries: Entries, project: str | None, until: str) -> AsyncIterator[bytes]:
    lines = entries.of_project(project, until)
    while chunk := await asyncio.to_thread(lambda: list(islice(lines, _LINES_PER_CHUNK))):
        yield b"".join(line + b"\n" for line in chunk)
