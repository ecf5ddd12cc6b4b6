"""The customer's KMS stops answering, for longer than the outage grace; later it answers again."""

from __future__ import annotations

import asyncio

from customercloud.faults import Faults
from keylake.drill.revocation import RESTORED_WITHIN_S
from keylake.drill.stage import Stage
from shared.api.keymanager import KeyState, NoCause


async def run(stage: Stage, hold_s: float = 3.0) -> None:
    """`hold_s`: how long the outage lasts after the last instance is sealed."""
    bound = stage.bound(NoCause.NO_ANSWER)
    known = await stage.revocations_so_far()
    grace_s = stage.configuration.outage_grace_s
    simulation = stage.customer.simulation
    before = await asyncio.to_thread(simulation.faults)
    refuse = Faults(**(before.model_dump() | {"outage": "refuse", "services": frozenset({"kms"})}))
    async with stage.load() as load:
        await asyncio.sleep(min(2.0, hold_s))
        begun_s = stage.mark("the KMS answers nobody any more")
        try:
            await asyncio.to_thread(simulation.set_faults, refuse)
            stage.revocation = await stage.until(
                "the project is suspended",
                lambda: stage.sealed_since(known, KeyState.SUSPENDED),
                bound.partitioned_s + grace_s + 10,
            )
            sealed_s = stage.mark("the keymanager has suspended the project, and every instance is sealed")
            held_s = await stage.restore_hold_s()
            await asyncio.sleep(hold_s)
            answers_s = stage.mark("the KMS answers again")
        finally:
            await asyncio.to_thread(simulation.set_faults, before)
        await load.wait_for_commits(1, timeout_s=60 + held_s)
        answered_s = stage.first_answer_after(answers_s)
        stage.mark("a client has its first answer")
        await asyncio.sleep(min(1.0, hold_s))
    # The grace counts from the last yes, which is older than the outage by a probe's interval and its time on the way.
    quiet_until_s = begun_s + grace_s - stage.configuration.probe_interval_s * 1.1 - 1.0
    early = [each for each in stage.errors_s() if begun_s <= each[0] < quiet_until_s]
    stage.promise("no client notices an outage within the grace", "0 errors", f"{len(early)} errors", kept=not early)
    stage.promise_within("from the outage to the last instance sealed", sealed_s - begun_s, bound.partitioned_s)
    late = [at_s for at_s in stage.answered_s() if sealed_s < at_s < answers_s]
    stage.promise("no client has an answer while the project is suspended", "0", str(len(late)), kept=not late)
    revoked = [
        each
        for each in await stage.client.revocations(stage.project.project_id)
        if each.revocation_id not in known and each.state is KeyState.REVOKED
    ]
    stage.promise("an outage revokes nothing", "0 revocations", f"{len(revoked)} revocations", kept=not revoked)
    restored_s = (answered_s or answers_s + 60 + held_s) - answers_s
    stage.promise_within("from the KMS's return to the first answer", restored_s, RESTORED_WITHIN_S + held_s)
    await stage.nothing_is_lost()
    await stage.keep_receipt()
