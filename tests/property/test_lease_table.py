"""The keymanager's lease table against an oracle, and the safety rule that ties it to the holders' own clocks."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from keymanager.lease_table import CLOCK_DRIFT, Held, Holder, LeaseTable
from shared.api.keymanager import Grant, KeyState, Role
from shared.clock import ManualClock
from shared.ids import AccountId, InstanceId, ProjectId, WorkspaceId
from shared.lease import Lease

PROJECTS = [ProjectId(f"prj-{n:016x}") for n in range(3)]
HOLDERS = [Holder(InstanceId(f"in-{n:016x}"), f"node-{n}", Role.PAGESERVER, n) for n in range(3)]
ACCOUNT, WORKSPACE = AccountId.new(), WorkspaceId.new()
projects, holders = st.sampled_from(PROJECTS), st.sampled_from(HOLDERS)


class _SlowClock(ManualClock):
    """A holder's clock, which may tick slower than the keymanager's: by half of the drift that is allowed for."""

    def monotonic_s(self) -> float:
        return super().monotonic_s() * (1 - CLOCK_DRIFT / 2)


class LeaseTableMachine(RuleBasedStateMachine):
    """Oracle: a plain dict of expiry times. Next to it, what each holder believes of its own lease."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.clock = ManualClock()
        self.holder_clock = _SlowClock()
        self.oracle: dict[tuple[ProjectId, InstanceId], float] = {}
        self.looked: list[Held] = []
        """What was over when somebody looked, and whose rows are being deleted since."""
        self.believed: dict[tuple[ProjectId, InstanceId], Lease] = {}

    @property
    def now_s(self) -> float:
        return self.clock.monotonic_s()

    @rule(seconds=st.floats(0, 8))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.holder_clock.advance(seconds)

    @rule(project=projects, holder=holders, ttl_s=st.sampled_from([0.5, 2.0, 5.0]), on_the_way_s=st.floats(0, 6))
    def renew(self, project: ProjectId, holder: Holder, ttl_s: float, on_the_way_s: float) -> None:
        """The holder asks, the request takes its time, the keymanager grants."""
        key = (project, holder.instance_id)
        asked_at_s = self.holder_clock.monotonic_s()
        self.time_passes(on_the_way_s)
        new = self.table.grant(project, holder, ttl_s, self.now_s)
        assert new == (self.oracle.get(key, float("-inf")) <= self.now_s)
        expires = self.now_s + ttl_s * (1 + CLOCK_DRIFT)
        self.oracle[key] = max(expires, self.oracle.get(key, expires))
        lease = self.believed.setdefault(key, Lease(project, self.holder_clock))
        grant = Grant(
            project_id=project, state=KeyState.ACTIVE, ttl_s=ttl_s, account_id=ACCOUNT, workspace_id=WORKSPACE
        )
        lease.granted(grant, asked_at_s, 1)

    @rule(project=projects, holder=holders)
    def release(self, project: ProjectId, holder: Holder) -> None:
        key = (project, holder.instance_id)
        if key in self.believed:
            self.believed[key].revoked(KeyState.ACTIVE, "released")  # the holder first, then the keymanager hears of it
        released = self.table.release(project, holder.instance_id)
        assert (released is not None) == (self.oracle.pop(key, None) is not None)

    @rule(project=projects, holder=holders)
    def give_back(self, project: ProjectId, holder: Holder) -> None:
        key = (project, holder.instance_id)
        if key in self.believed:
            self.believed[key].revoked(KeyState.ACTIVE, "given back")
        over = self.table.give_back(project, holder.instance_id, self.now_s)
        assert (over is not None) == (self.oracle.get(key, float("-inf")) > self.now_s)
        if over is not None:
            self.oracle[key] = self.now_s

    @rule()
    def look(self) -> None:
        self.looked = self.table.over(self.now_s)
        over = {(held.project_id, held.holder.instance_id): held.expires_at_s for held in self.looked}
        assert over == {key: expires for key, expires in self.oracle.items() if expires <= self.now_s}

    @rule()
    def forget(self) -> None:
        """Perhaps long after the look, and perhaps again: what was granted since stays."""
        self.table.forget(self.looked)
        for held in self.looked:
            key = (held.project_id, held.holder.instance_id)
            if self.oracle.get(key) == held.expires_at_s:
                del self.oracle[key]

    @invariant()
    def agrees_with_the_oracle(self) -> None:
        for project in PROJECTS:
            live = {
                (project, holder.instance_id): self.oracle[project, holder.instance_id]
                for holder in HOLDERS
                if self.oracle.get((project, holder.instance_id), float("-inf")) > self.now_s
            }
            outstanding = self.table.outstanding(project, self.now_s)
            assert {(held.project_id, held.holder.instance_id): held.expires_at_s for held in outstanding} == live
            assert [held.expires_at_s for held in outstanding] == sorted(live.values())
            for holder in HOLDERS:
                key = (project, holder.instance_id)
                assert self.table.holds(project, holder.instance_id, self.now_s) == (key in live)

    @invariant()
    def nobody_believes_in_a_lease_that_the_keymanager_has_given_up(self) -> None:
        for (project, instance_id), lease in self.believed.items():
            if lease.live:
                assert self.table.holds(project, instance_id, self.now_s)


TestLeaseTable = LeaseTableMachine.TestCase
TestLeaseTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
