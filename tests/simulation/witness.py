"""What must never happen, whatever fails: the simulation's judge, and its history.

It knows the truth (real time, what every KMS answers, which message left when), which no process does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from keymanager.bound import BoundSettings, worst_case
from keymanager.leadership import Term
from keymanager.state import KmsAccess
from keymanager.watch import DENIALS_TO_REVOKE
from shared.api.keymanager import KeyState, NoCause
from shared.ids import InstanceId, KeyConfigurationId, ProjectId
from tests.simulation.database import Database
from tests.simulation.kms import Mood, SimulatedCmk
from tests.simulation.loop import Process, SimulatedLoop


class BrokenPromiseError(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What the product promises, in seconds from a KMS's last possible yes to nothing served any more."""

    reachable_s: float
    """Where nothing fails, and the KMS denies."""
    partitioned_s: float
    """Whatever fails, and whatever the KMS answers instead of a yes."""

    @classmethod
    def of(cls, settings: BoundSettings) -> Bound:
        reachable_s = worst_case(NoCause.DENIED, settings).reachable_s
        partitioned_s = worst_case(NoCause.FLAPPING, settings).partitioned_s
        assert reachable_s is not None
        assert partitioned_s is not None
        return cls(reachable_s, partitioned_s)


@dataclass
class Witness:
    """Implements `database.Listener`."""

    loop: SimulatedLoop
    database: Database
    cmks: dict[KeyConfigurationId, SimulatedCmk]
    bounds: dict[KeyConfigurationId, Bound]
    key_of: dict[ProjectId, KeyConfigurationId]
    lease_ttl_s: float
    undisturbed: bool
    """Nothing fails in this run: the bound for a reachable system holds."""
    names: dict[object, str] = field(default_factory=dict)
    """Ids → what they are called in the history."""
    history: list[str] = field(default_factory=list)
    terms: Callable[[], Iterable[tuple[Process, Term]]] = lambda: ()
    live: Callable[[ProjectId], Iterable[InstanceId]] = lambda _: ()
    keymanagers_stopped: list[tuple[float, float]] = field(default_factory=list)
    """When a keymanager was stopped (SIGSTOP), from and until."""
    served: int = 0
    sealed_revocations: int = 0
    served_last: dict[tuple[str, ProjectId], float] = field(default_factory=dict)
    violation: BrokenPromiseError | None = None
    over: bool = False
    """What happens from here on is not judged: the run is being cleared away."""
    _let_go: dict[tuple[ProjectId, InstanceId], str] = field(default_factory=dict)
    _sealed: dict[ProjectId, str] = field(default_factory=dict)
    _shredded: set[ProjectId] = field(default_factory=set)
    _generations: dict[str, tuple[int, InstanceId, float]] = field(default_factory=dict)

    def note(self, text: str) -> None:
        if not self.over:
            self.history.append(f"{self.loop.time():9.4f}  {text}")

    def break_off(self, what: str) -> None:
        """The first broken promise ends the run; in a callback, an exception would only be logged."""
        if self.violation is None and not self.over:
            self.note(f"VIOLATION: {what}")
            self.violation = BrokenPromiseError(f"after {self.loop.time():.4f} s: {what}")
            if self.loop.is_running():
                self.loop.stop()

    def name(self, thing: object) -> str:
        return self.names.get(thing, str(thing))

    # --- an instance ---

    def serves(self, node_id: str, instance_id: InstanceId, project_id: ProjectId, generation: int) -> None:
        """Plaintext leaves an instance at this moment."""
        now_s, who = self.loop.time(), f"{node_id} ({self.name(instance_id)})"
        self.served += 1
        self.served_last[node_id, project_id] = now_s
        what = self.name(project_id)
        if project_id in self._sealed:
            self.break_off(f"{who} serves {what}, which was sealed by {self._sealed[project_id]}")
        elif (project_id, instance_id) in self._let_go:
            self.break_off(f"{who} serves {what}, which it has {self._let_go[project_id, instance_id]}")
        self._is_in_time(who, project_id)
        newest, newest_instance, since_s = self._generations.get(node_id, (0, instance_id, now_s))
        if generation > newest:
            self._generations[node_id] = generation, instance_id, now_s
        elif instance_id != newest_instance and generation < newest and now_s > since_s + self.lease_ttl_s * 1.02:
            self.break_off(f"{who} of generation {generation} serves {what} though generation {newest} has taken over")

    def _is_in_time(self, who: str, project_id: ProjectId) -> None:
        key = self.key_of[project_id]
        since_s, now_s = self.cmks[key].no_yes_since_s, self.loop.time()
        if since_s is None:
            return
        bound = self.bounds[key].partitioned_s
        if self.undisturbed and self.cmks[key].mood is Mood.DENIES:
            bound = self.bounds[key].reachable_s
        stopped_s = sum(
            max(0.0, min(until_s, now_s) - max(from_s, since_s)) for from_s, until_s in self.keymanagers_stopped
        )
        late_s = now_s - since_s
        if late_s > bound + stopped_s:
            self.break_off(
                f"{who} serves {self.name(project_id)} {late_s:.3f} s after its KMS said no; the bound is "
                f"{bound:.3f} s, and keymanagers were stopped for {stopped_s:.3f} s"
            )

    # --- the keymanagers ---

    def leaves(self, process: Process, term: Term, text: str) -> None:
        """A message leaves a keymanager at this moment."""
        if not term.valid:
            self.break_off(f"{process.name} lets a message out after its term {term.epoch}")
        if self.database.seat.epoch != term.epoch:
            self.break_off(f"{process.name} acts in epoch {term.epoch}; the seat is in {self.database.seat.epoch}")
        for other, its in self.terms():
            if other is not process and its.valid:
                self.break_off(f"{process.name} and {other.name} lead at the same time")
        if '"SHREDDED"' in text:
            self._end_is_told(process, json.loads(text))
        if '"renewed"' in text:
            self._grants_leave(process, json.loads(text)["grants"])

    def _end_is_told(self, process: Process, message: dict[str, Any]) -> None:
        """Who hears it believes in it for ever: it must be what the next leader finds, too."""
        for each in message.get("grants", [message]):
            project_id = ProjectId(each["project_id"])
            if each["state"] == KeyState.SHREDDED and not self.database.projects[project_id].shredded:
                self.break_off(f"{process.name} says that {self.name(project_id)} is shredded before that is stored")

    def _grants_leave(self, process: Process, grants: Iterable[dict[str, Any]]) -> None:
        """Nothing is issued on the word of the database alone: the KMS itself has said yes to whoever leads."""
        for grant in grants:
            project_id = ProjectId(grant["project_id"])
            cmk = self.cmks[self.key_of[project_id]]
            asked = any(
                at_s >= self.database.seat_taken_s and who == process.name and answer is Mood.ALLOWS
                for at_s, who, answer in reversed(cmk.answers)
            )
            if grant["state"] == KeyState.ACTIVE and not asked:
                self.break_off(f"{process.name} grants {self.name(project_id)} before {cmk.name} has said yes")

    def access_is(self, key_configuration_id: KeyConfigurationId, access: KmsAccess, by: Process) -> None:
        cmk = self.cmks[key_configuration_id]
        self.note(f"{by.name} stores that {cmk.name} is {access.value}")
        heard = [(asked_s, answer) for asked_s, who, answer in cmk.answers if who == by.name]
        if access is KmsAccess.DENIED:
            definitive = [answer for _, answer in heard if answer in (Mood.ALLOWS, Mood.DENIES)]
            if definitive[-DENIALS_TO_REVOKE:].count(Mood.DENIES) < 2:
                self.break_off(f"{by.name} revokes by {cmk.name}'s answers {[a.value for _, a in heard[-4:]]}")

    # --- what is durable ---

    def outcome(self, revocation_id: str, instance_id: InstanceId, outcome: str) -> None:
        project_id = self.database.revocations[revocation_id].project_id
        if self.database.projects[project_id].state is not KeyState.ACTIVE:
            self._let_go[project_id, instance_id] = outcome
            if instance_id in self.live(project_id):
                self.break_off(f"{self.name(instance_id)} has {outcome}, and believes in its lease")
        self.note(f"{self.name(instance_id)} has {outcome} {self.name(project_id)}")

    def sealed(self, revocation_id: str) -> None:
        project_id = self.database.revocations[revocation_id].project_id
        self.note(f"{self.name(project_id)} is sealed")
        self.sealed_revocations += 1
        self._sealed[project_id] = revocation_id
        for instance_id in self.live(project_id):
            self.break_off(f"{self.name(project_id)} is sealed, and {self.name(instance_id)} believes in its lease")

    def project_is(self, project_id: ProjectId, state: KeyState) -> None:
        self.note(f"{self.name(project_id)} is {state.value}")
        if project_id in self._shredded and not state.final:
            self.break_off(f"{self.name(project_id)} was shredded, and is {state.value}")
        if state.final:
            self._shredded.add(project_id)
            if any(kek.wrapped for (of, _), kek in self.database.keks.items() if of == project_id):
                self.break_off(f"{self.name(project_id)} is {state.value}, and its KEKs are not destroyed")
        if state is KeyState.ACTIVE:
            self._sealed.pop(project_id, None)
            for lease in [each for each in self._let_go if each[0] == project_id]:
                del self._let_go[lease]
