"""A project that was made for it is filled, shredded by two people, and its erasure is verified."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from keylake.client import KeylakeClient
from keylake.drill.report import Promise
from keylake.drill.stage import Stage
from shared.api.keymanager import KeyState, NoCause
from shared.api.shredding import Attestation, ErasureReport, Shred
from shared.errors import KeylakeError, ShreddedError

REASON: Final = "a drill"
_ROWS: Final = 5000
_DELETED_WITHIN_S: Final = 60.0
"""A node that could not delete is asked again after 30 s; a drill waits for that once."""
_OF_THE_CMK: Final = frozenset({"every CMK that ever wrapped one is destroyed", "a canary under the key does not open"})
"""The preconditions that cannot hold while the customer has the key."""
_ATTESTED: Final = {"backups": "no copy outside", "key-copies": "no copy of the customer's key"}
"""How the preconditions begin that hold by a person's word only, by what the word is about."""


@dataclass(frozen=True, slots=True)
class People:
    """Two, each with a token of their own. `words`: what the one who approves attests."""

    asks: KeylakeClient
    approves: KeylakeClient
    words: Sequence[Attestation] = ()


async def run(stage: Stage, people: People, hold_s: float = 3.0) -> None:
    """`hold_s`: how long clients work before, and try to get in afterwards. Destroys the project's CMK."""
    project_id = stage.project.project_id
    await _fill(stage)
    async with stage.load() as load:
        await load.wait_for_commits(1)
        await asyncio.sleep(min(2.0, hold_s))
        asked = await people.asks.ask_shred(project_id, stage.project.name, REASON)
        stage.mark("one person asks")
        await _refused(
            stage,
            "nobody approves what they asked for",
            lambda: people.asks.approve_shred(project_id, stage.project.name, asked.shred_id),
        )
        approved = await people.approves.approve_shred(project_id, stage.project.name, asked.shred_id)
        stage.mark("another one has approved: the KEKs are destroyed")

        async def done() -> Shred | None:
            found = await people.approves.shred(project_id)
            return found if found.state == "done" else None

        shred = await stage.until("every node has deleted what it stored", done, _DELETED_WITHIN_S)
        done_s = stage.mark("every instance is sealed, every node has deleted what it stored")
        await asyncio.sleep(hold_s)
    _shredded(stage, approved, shred, done_s)
    await _refused(stage, "nothing restores it", lambda: stage.client.restore(project_id))
    await _erased(stage, people)


async def _fill(stage: Stage) -> None:
    connection = await stage.connect()
    try:
        await connection.execute("CREATE TABLE doomed (n int, text text)")
        await connection.execute(
            "INSERT INTO doomed SELECT n, repeat(md5(n::text), 8) FROM generate_series(1, $1::int) n", _ROWS
        )
    finally:
        await connection.close()


async def _refused(stage: Stage, what: str, attempt: Callable[[], Awaitable[object]]) -> None:
    try:
        await attempt()
    except KeylakeError as error:
        stage.promise(what, "refused", f"refused: {error}", kept=True)
    else:
        stage.promise(what, "refused", "done", kept=False)


def _shredded(stage: Stage, approved: Shred, shred: Shred, done_s: float) -> None:
    bound = stage.bound(NoCause.OPERATOR)
    stage.promise(
        "every wrapped KEK is destroyed with the approval",
        f"{len(stage.project.keks)}",
        f"{approved.keks_destroyed}",
        kept=approved.keks_destroyed == len(stage.project.keks),
    )
    if (revocation := shred.revocation) is not None:
        stage.revocation = revocation
        fenced = [each.node_id for each in revocation.instances if each.outcome != "acknowledged"]
        stage.promise_within(
            "from the approval to the last instance sealed",
            revocation.sealed_after_s or float("inf"),
            bound.partitioned_s if fenced else bound.reachable_s,
        )
    late = [at_s for at_s in stage.answered_s() if at_s > done_s]
    stage.promise("no client has an answer after that", "0", str(len(late)), kept=not late)
    told = sorted({code for at_s, code, _ in stage.errors_s() if at_s > done_s})
    code = ShreddedError.sqlstate
    stage.promise("clients are told why", code, ", ".join(told) or "nothing", kept=told == [code])
    for node in shred.nodes:
        stage.promise(
            f"{node.node_id} had something of it, and keeps nothing",
            "> 0 deleted, 0 left",
            f"{node.deleted_objects} deleted ({node.deleted_kinds}), {node.left_objects} left",
            kept=node.done and node.deleted_objects > 0,
        )


async def _erased(stage: Stage, people: People) -> None:
    early = await people.approves.verify_erasure(stage.project.project_id, people.words)
    stage.mark("its erasure is checked while the customer has the key")
    unmet = {each.name for each in early.preconditions if each.outcome == "not met"}
    stage.promise(
        "it is not called erased while the customer has the key",
        KeyState.SHREDDED.value,
        early.state.value,
        kept=early.state is KeyState.SHREDDED and unmet == _OF_THE_CMK,
    )
    await stage.customer.schedule_deletion(stage.key_arn)
    await asyncio.to_thread(stage.customer.simulation.complete_deletion, stage.key_arn)
    stage.mark("the customer's key is destroyed")
    report = await people.approves.verify_erasure(stage.project.project_id, people.words)
    stage.mark("its erasure is checked")
    for each in judgement(report, {word.subject for word in people.words}):
        stage.promise(each.what, each.limit, each.measured, kept=each.kept)
    await stage.keep_receipt("erasure" if report.state is KeyState.ERASED else "shred")


def judgement(report: ErasureReport, said: Collection[str]) -> list[Promise]:
    """Of a check of everything, with somebody's word about `said`. What nobody gave theirs for must be *not checked*,
    and the whole must not be called ERASED then."""
    unsaid = tuple(begin for about, begin in _ATTESTED.items() if about not in said)
    promises = []
    for each in report.preconditions:
        wanted = ("not checked",) if unsaid and each.name.startswith(unsaid) else ("met", "attested")
        measured = f"{each.outcome}: {'; '.join(each.evidence)}" if each.evidence else each.outcome
        kept = each.outcome in wanted
        promises.append(Promise(what=each.name, limit=" or ".join(wanted), measured=measured, kept=kept))
    expected = KeyState.SHREDDED if unsaid else KeyState.ERASED
    kept = report.state is expected
    return [*promises, Promise(what="what it is called", limit=expected.value, measured=report.state.value, kept=kept)]
