"""Agents that are started ahead of their endpoints."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import compute.launcher
from compute.launcher import AgentProcess, Launcher
from shared.errors import UnavailableError
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration


async def test_a_spare_is_replaced_when_nothing_starts_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 0
    spawn = AgentProcess.spawn

    async def counted(**options: Any) -> AgentProcess:
        nonlocal begun
        begun += 1
        return await spawn(**options)

    monkeypatch.setattr(AgentProcess, "spawn", counted)
    monkeypatch.setattr(compute.launcher, "_FIRST_ANSWER_S", 0.0)
    async with Launcher(volume_size_bytes=64 << 20, spares=1) as launcher:
        await wait_until(lambda: begun == 1)
        first, second = await launcher.take(), await launcher.take()
        assert begun == 2  # the second is no spare, and none is made while both start
        await _end(first)
        assert begun == 2
        await _end(second)
        assert begun == 3


async def _end(agent: AgentProcess) -> None:
    """And let whatever its end sets off begin."""
    agent.kill()
    await agent.close()
    with pytest.raises(UnavailableError):
        await agent.running
    await asyncio.sleep(0.05)
