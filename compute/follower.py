"""Keeps one safekeeper at one run: brought up to the run's term and streaming, for as long as the run lasts.

A safekeeper may be down, slow, restarted or new. Whatever it is, once every `poll_interval_s` its status is looked at
and the one thing that it needs is done (`proposer.need_of`). So the same code that starts a run mends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from compute.proposer import Need, Plan, need_of, reached
from compute.storage_clients import SafekeeperClient
from shared.api.safekeeper import (
    CreateTimeline,
    Donor,
    Elected,
    StreamFrom,
    TimelineStatus,
    VoteRequest,
)
from shared.errors import ConflictError, KeylakeError
from shared.failpoints import failpoint
from shared.ids import ProjectId, TimelineId
from shared.telemetry import get_logger

_log = get_logger(__name__)


@dataclass(slots=True)
class RunInfo:
    """What the followers of one run share. Mutable: the compute's address comes later, donors become more."""

    project_id: ProjectId
    timeline_id: TimelineId
    candidate: str
    create: CreateTimeline
    told: frozenset[str]
    plan: Plan
    donors: dict[str, Donor]
    """Safekeepers whose log reaches the plan's start; at first the plan's donor."""
    stream: StreamFrom | None = None
    """Set once Postgres takes replication connections."""


class Follower:
    def __init__(
        self,
        safekeeper: SafekeeperClient,
        info: RunInfo,
        *,
        poll_interval_s: float,
        before_create: Callable[[str], Awaitable[None]],
        on_deposed: Callable[[int], None],
    ) -> None:
        """`before_create` records that the safekeeper is about to be told of the timeline. `on_deposed` gets the later
        term: this run is over."""
        self._safekeeper = safekeeper
        self._info = info
        self._poll_interval_s = poll_interval_s
        self._before_create = before_create
        self._on_deposed = on_deposed
        self._nudged = asyncio.Event()
        self.reached = asyncio.Event()
        """Its log is the plan's, up to the start."""
        self.streaming = asyncio.Event()
        """It was told to stream, and has not been seen idle since."""
        self.problem = ""
        """What the last attempt failed on, for people."""

    @property
    def node_id(self) -> str:
        return self._safekeeper.node_id

    def nudge(self) -> None:
        """Look now: something has changed."""
        self._nudged.set()

    async def run(self) -> None:
        """For ever, until cancelled."""
        while True:
            pause = True
            try:
                pause = not await self._step()
                self.problem = ""
            except KeylakeError as error:
                if str(error) != self.problem:
                    _log.warning(
                        "a safekeeper cannot be brought up",
                        safekeeper=self.node_id,
                        timeline_id=str(self._info.timeline_id),
                        reason=str(error),
                    )
                self.problem = str(error)
            if pause:
                await self._pause()

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._poll_interval_s):
                await self._nudged.wait()
        except TimeoutError:
            pass
        self._nudged.clear()

    async def _step(self) -> bool:
        """Look, and do what is needed. True when it should look again at once. Raises KeylakeError."""
        info = self._info
        status = await self._safekeeper.status(info.project_id, info.timeline_id)
        self._note(status)
        need = need_of(
            status,
            info.plan,
            was_created=self.node_id in info.told,
            compute_ready=info.stream is not None,
        )
        if need is not Need.NOTHING:
            self.streaming.clear()
        match need:
            case Need.NOTHING:
                if info.stream is not None:
                    self.streaming.set()
                return False
            case Need.CREATE:
                await self._before_create(self.node_id)
                info.told |= {self.node_id}
                create = info.create.model_copy(update={"seat": info.plan.membership.seat(self.node_id)})
                await self._safekeeper.create_timeline(info.project_id, info.timeline_id, create)
                return True
            case Need.VOTE:
                membership = info.plan.membership
                request = VoteRequest(
                    term=info.plan.term,
                    candidate=info.candidate,
                    seat=membership.seat(self.node_id),
                    generation=membership.generation,
                )
                answer = await self._safekeeper.vote(info.project_id, info.timeline_id, request)
                return answer.granted
            case Need.ELECT:
                self._note(await self._elect())
                failpoint("elected-sent")
                return self.reached.is_set()
            case Need.STREAM:
                assert info.stream is not None  # noqa: S101 - need_of was told so
                await self._safekeeper.stream(info.project_id, info.timeline_id, info.stream)
                failpoint("stream-sent")
                self.streaming.set()
                return False
            case Need.DEPOSED:
                assert status is not None  # noqa: S101 - it has a term
                self._on_deposed(status.term)
                return False
            case Need.LOST_DISK:
                raise ConflictError(
                    "it does not know the timeline any more: its disk was lost (keylake safekeeper replace "
                    f"{self.node_id})"
                )

    async def _elect(self) -> TimelineStatus:
        info = self._info
        # Any safekeeper that has reached the start will do; not itself, and the original donor first.
        donor = next((d for d in info.donors.values() if d.node_id != self.node_id), info.donors[info.plan.donor])
        body = Elected(term=info.plan.term, term_history=list(info.plan.term_history), donor=donor)
        return await self._safekeeper.elect(info.project_id, info.timeline_id, body)

    def _note(self, status: TimelineStatus | None) -> None:
        if reached(status, self._info.plan):
            address = self._safekeeper.address
            self._info.donors.setdefault(self.node_id, Donor(node_id=self.node_id, address=address.wal))
            self.reached.set()
