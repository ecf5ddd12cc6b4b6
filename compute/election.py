"""Runs an election for a timeline: the shell around `proposer`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from compute.proposer import Outcome, Plan, Reservation, Tally, choose_donor, make_plan, next_term
from compute.storage_clients import SafekeeperClient
from shared.api.safekeeper import TimelineStatus, VoteRequest, VoteResponse
from shared.errors import KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn
from shared.telemetry import get_logger

_log = get_logger(__name__)

_MAX_ATTEMPTS: Final = 5
"""Each attempt loses only to somebody who asked for a higher term at the same time."""


@dataclass(frozen=True, slots=True)
class Candidacy:
    """For what, and on whose behalf."""

    project_id: ProjectId
    timeline_id: TimelineId
    timeline_start_lsn: Lsn
    candidate: str


class Elections:
    def __init__(self, safekeepers: Sequence[SafekeeperClient], vote_timeout_s: float) -> None:
        self._safekeepers = {each.node_id: each for each in safekeepers}
        self._vote_timeout_s = vote_timeout_s

    async def run(
        self,
        candidacy: Candidacy,
        reserve_term: Callable[[int], Awaitable[Reservation]],
        *,
        without: str | None = None,
    ) -> Plan:
        """Win an election. `reserve_term(at_least)` durably picks a term ≥ `at_least` that was never asked for before.

        `without`: a member that is lost. It is not asked, and all others must vote.
        Raises UnavailableError when there is no majority, IntegrityError when the logs contradict each other.
        """
        seen = await self._terms(candidacy)
        for _ in range(_MAX_ATTEMPTS):
            reserved = await reserve_term(next_term(seen))
            failpoint("term-reserved")
            tally = await self._vote(candidacy, reserved, without)
            if tally.outcome is Outcome.WON:
                failpoint("election-won")
                return await self._plan(candidacy, tally, reserved)
            if not tally.refusals:
                raise tally.lost_error()
            seen = [tally.highest_term]
        raise tally.lost_error()

    async def _terms(self, candidacy: Candidacy) -> list[int]:
        """Terms of those who answer. Only a hint that saves an attempt: the votes decide."""

        async def ask(safekeeper: SafekeeperClient) -> TimelineStatus | None:
            try:
                async with asyncio.timeout(self._vote_timeout_s):
                    return await safekeeper.status(candidacy.project_id, candidacy.timeline_id)
            except (UnavailableError, TimeoutError):
                return None

        answers = await asyncio.gather(*(ask(each) for each in self._safekeepers.values()))
        return [answer.term for answer in answers if answer is not None]

    async def _vote(self, candidacy: Candidacy, reserved: Reservation, without: str | None) -> Tally:
        """Ask everybody; return as soon as it is decided."""
        asked = {node_id: each for node_id, each in self._safekeepers.items() if node_id != without}
        tally = Tally(list(asked), reserved.term, needed=0 if without is None else len(asked))
        pending = {
            asyncio.create_task(
                each.vote(candidacy.project_id, candidacy.timeline_id, vote_request(candidacy, reserved, node_id))
            ): node_id
            for node_id, each in asked.items()
        }
        deadline = asyncio.get_running_loop().time() + self._vote_timeout_s
        try:
            while pending and tally.outcome is Outcome.PENDING:
                left_s = deadline - asyncio.get_running_loop().time()
                done, _ = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for task in done:
                    self._count(tally, pending.pop(task), task)
            for node_id in pending.values():
                tally.unreachable(node_id)
        finally:
            # A vote that arrives later is not lost: whoever gave it is of our term, and is brought up by its follower.
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return tally

    def _count(self, tally: Tally, node_id: str, task: asyncio.Task[VoteResponse]) -> None:
        error = task.exception()
        if error is None:
            tally.record(node_id, task.result())
        elif not isinstance(error, KeylakeError):
            raise error
        else:
            _log.info("a safekeeper did not vote", safekeeper=node_id, code=error.code, reason=str(error))
            tally.unreachable(node_id)

    async def _plan(self, candidacy: Candidacy, tally: Tally, reserved: Reservation) -> Plan:
        donor = choose_donor(tally.votes)
        safekeeper = self._safekeepers[donor]
        end = await safekeeper.end_of_wal(candidacy.project_id, candidacy.timeline_id)
        # Invariant: the log that is looked into is the one that voted. Another disk that turned up under the donor's
        # name since then may lack what was committed.
        status = await safekeeper.status(candidacy.project_id, candidacy.timeline_id)
        voted = reserved.term, reserved.membership.seat(donor)
        if status is None or (status.term, status.seat) != voted:
            raise UnavailableError(f"{donor} has voted again, or has another disk, since it voted: elect once more")
        return make_plan(
            tally,
            donor=donor,
            end_of_wal=end.end_lsn,
            timeline_start_lsn=candidacy.timeline_start_lsn,
            membership=reserved.membership,
        )


def vote_request(candidacy: Candidacy, reserved: Reservation, node_id: str) -> VoteRequest:
    membership = reserved.membership
    return VoteRequest(
        term=reserved.term,
        candidate=candidacy.candidate,
        seat=membership.seat(node_id),
        generation=membership.generation,
    )
