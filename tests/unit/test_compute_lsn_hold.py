"""The start LSN of a lazy compute stays leased, also over a pageserver that is away."""

from __future__ import annotations

from typing import cast

import pytest

from compute import lsn_hold
from compute.lsn_hold import LsnHold
from compute.storage_clients import PageserverClient
from shared.errors import InvalidInputError, KeylakeError, UnavailableError
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn
from tests.fixtures.waiting import wait_until


class Leases:
    def __init__(self, *answers: float | KeylakeError) -> None:
        self.answers = list(answers)
        self.asked: list[Lsn] = []

    async def lease_lsn(self, project_id: ProjectId, timeline_id: TimelineId, lsn: Lsn) -> float:
        self.asked.append(lsn)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, KeylakeError):
            raise answer
        return answer


def hold(leases: Leases) -> LsnHold:
    return LsnHold(cast("PageserverClient", leases), ProjectId.new(), TimelineId.new())


async def test_it_is_renewed_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsn_hold, "_RETRY_INTERVAL_S", 0.01)
    leases = Leases(0.02, 0.02, UnavailableError("away"), UnavailableError("away"), 0.02, 600.0)
    held = hold(leases)
    await held.take(Lsn(77))
    await wait_until(lambda: leases.answers == [600.0] and len(leases.asked) == 6)
    await held.release()
    assert set(leases.asked) == {Lsn(77)}


async def test_without_a_lease_there_is_no_start() -> None:
    held = hold(Leases(InvalidInputError("not kept any more")))
    with pytest.raises(InvalidInputError):
        await held.take(Lsn(77))
    await held.release()
