"""The customer disables the key; later they enable it."""

from __future__ import annotations

import asyncio
from typing import Final

from keylake.drill.stage import Stage
from shared.api.keymanager import KeyState, NoCause

RESTORED_WITHIN_S: Final = 30.0
"""From the customer's yes to the first answer, the start of a compute included; `make bench-revocation` has the
distribution. A drill on a busy machine should fail for what is broken, not for what is slow."""


async def run(stage: Stage, hold_s: float = 3.0) -> None:
    """`hold_s`: how long the key stays disabled after the last instance is sealed."""
    bound = stage.bound(NoCause.DENIED)
    known = await stage.revocations_so_far()
    async with stage.load() as load:
        await asyncio.sleep(min(2.0, hold_s))
        denied_s = stage.mark("the customer disables the key")
        try:
            await stage.customer.disable(stage.key_arn)
            revocation = await stage.until(
                "the project is sealed",
                lambda: stage.sealed_since(known, KeyState.REVOKED),
                bound.partitioned_s + bound.reachable_s,
            )
            sealed_s = stage.mark("the keymanager has sealed the project")
            stage.revocation = revocation
            held_s = await stage.restore_hold_s()
            await asyncio.sleep(hold_s)
            enabled_s = stage.mark("the customer enables the key")
        finally:
            await stage.customer.enable(stage.key_arn)  # whatever happened: a drill leaves nothing revoked
        await load.wait_for_commits(1, timeout_s=60 + held_s)
        answered_s = stage.first_answer_after(enabled_s)
        stage.mark("a client has its first answer")
        await asyncio.sleep(min(1.0, hold_s))
    fenced = [each.node_id for each in revocation.instances if each.outcome != "acknowledged"]
    within_s = bound.partitioned_s if fenced else bound.reachable_s
    stage.promise_within("from the customer's no to the last instance sealed", sealed_s - denied_s, within_s)
    late = [at_s for at_s in stage.answered_s() if sealed_s < at_s < enabled_s]
    stage.promise("no client has an answer while the project is sealed", "0", str(len(late)), kept=not late)
    last_s = max((at_s for at_s in stage.answered_s() if at_s < enabled_s), default=denied_s)
    stage.promise_within("from the customer's no to the last answer", max(0.0, last_s - denied_s), within_s)
    restored_s = (answered_s or enabled_s + 60 + held_s) - enabled_s
    stage.promise_within("from the customer's yes to the first answer", restored_s, RESTORED_WITHIN_S + held_s)
    await stage.nothing_is_lost()
    await stage.keep_receipt()
