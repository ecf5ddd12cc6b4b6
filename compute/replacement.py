"""A new disk takes the place of one that a safekeeper has lost: one change of a timeline's membership.

Theory of operation. The members keep their names; what changes is which *disk* is the member of that name: its seat
number. A new, empty one must not vote before it holds all that may be committed, or two majorities would be possible
of which only one knows of a commit. In this order:

 1. An election without the lost one, with the votes of *all* others, which are brought to the start of its term. What
    was ever committed is on a majority of the old members, so on at least one of them, so in the log that they elect:
    from here on each of them holds it. It is an election of the *next* generation of the membership, which is reserved
    with its term: so before anything changes, all others have promised to vote in no earlier one.
 2. The new disk is told of the timeline under a number that no disk ever had, votes in that term, and copies the log
    up to the start. It is no member yet: nobody asks a disk of that number.
 3. One statement in the metadata database makes it the member, *if no later term has been reserved*. Whoever reserves
    a term reads the members in the same statement: who came before makes this fail, who comes later knows of it.

The old disk is asked for no term after that under its number, so it never gets into one. And a database that was
restored from a backup, and names it again, elects nobody: of the old generation are its own vote, and no other one
(`safekeeper.acceptor.check_member`). The same replacement, done again, brings such a database up to date. No compute
runs meanwhile: the election ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from compute.election import Candidacy, Elections, vote_request
from compute.proposer import Membership, Plan, Reservation, reached
from compute.storage_clients import SafekeeperClient
from shared.api.safekeeper import CreateTimeline, Donor, Elected
from shared.errors import ConflictError, NotFoundError, UnavailableError
from shared.failpoints import failpoint
from shared.telemetry import get_logger

_log = get_logger(__name__)

_ATTEMPTS: Final = 3
"""Each fails only when somebody else wanted to lead meanwhile."""


class Members(Protocol):
    """Of one timeline, in the metadata database."""

    async def reserve(self, at_least: int) -> Reservation:
        """In the next generation."""

    async def new_seat(self) -> int: ...

    async def change_seat(self, node_id: str, seat: int, term: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Replacer:
    """Of one timeline. `create`: how the timeline is made; its seat is filled in."""

    elections: Elections
    safekeepers: Sequence[SafekeeperClient]
    members: Members
    candidacy: Candidacy
    create: CreateTimeline
    before_change: Callable[[str], Awaitable[None]]
    """Given the node, before it becomes a member: recorded as one that has the timeline."""

    async def replace(self, node_id: str, membership: Membership) -> bool:
        """`membership`: as it was when it was decided. False: the disk that is there is the member already.

        Raises UnavailableError unless all others and the new one take part, ConflictError when the disk is an old one
        or somebody else is always elected meanwhile, KeyAccessError, IntegrityError.
        """
        new = next((each for each in self.safekeepers if each.node_id == node_id), None)
        if new is None:
            raise NotFoundError("the settings name no safekeeper of that name")
        status = await new.status(self.candidacy.project_id, self.candidacy.timeline_id)
        if status is not None and status.seat == membership.seat(node_id):
            return False
        if status is None:
            seat = await self.members.new_seat()
            failpoint("seat-given")
        elif status.seat > membership.seat(node_id):
            seat = status.seat  # of an attempt that was not finished
        else:
            raise ConflictError(
                f"{node_id} has the disk number {status.seat}, which was replaced: give it an empty one"
            )
        for _ in range(_ATTEMPTS):
            if await self._try(new, seat, membership):
                _log.info("a safekeeper was replaced", safekeeper=node_id, seat=seat)
                return True
        raise ConflictError("another compute is always elected meanwhile: stop the endpoint first")

    async def _try(self, new: SafekeeperClient, seat: int, decided: Membership) -> bool:
        plan = await self.elections.run(self.candidacy, self.members.reserve, without=new.node_id)
        if plan.membership.seat(new.node_id) != decided.seat(new.node_id):
            raise ConflictError("somebody else has replaced this safekeeper meanwhile")
        others = [each for each in self.safekeepers if each.node_id != new.node_id]
        donor = next(each for each in others if each.node_id == plan.donor)
        await asyncio.gather(*(self._bring_up(each, plan, donor) for each in others))
        failpoint("others-brought-up")
        project_id, timeline_id = self.candidacy.project_id, self.candidacy.timeline_id
        await new.create_timeline(project_id, timeline_id, self.create.model_copy(update={"seat": seat}))
        itself = Membership(plan.membership.generation, {new.node_id: seat})
        vote = await new.vote(
            project_id, timeline_id, vote_request(self.candidacy, Reservation(plan.term, itself), new.node_id)
        )
        if not vote.granted:
            return False  # of a later attempt, by somebody else
        failpoint("new-disk-voted")
        await self._bring_up(new, plan, donor)
        await self.before_change(new.node_id)
        failpoint("seat-before-change")
        changed = await self.members.change_seat(new.node_id, seat, plan.term)
        failpoint("seat-changed")
        return changed

    async def _bring_up(self, safekeeper: SafekeeperClient, plan: Plan, donor: SafekeeperClient) -> None:
        """Returns when its log is the plan's, up to the start; that it does not take part any more is an error."""
        body = Elected(
            term=plan.term,
            term_history=list(plan.term_history),
            donor=Donor(node_id=donor.node_id, address=donor.address.wal),
        )
        status = await safekeeper.elect(self.candidacy.project_id, self.candidacy.timeline_id, body)
        if not reached(status, plan):
            raise UnavailableError(f"{safekeeper.node_id} does not hold all WAL yet")
