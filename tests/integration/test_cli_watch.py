"""The supervisor starts services again that have ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from keylake.process import ServiceProcess
from keylake.supervision import ServiceState
from keylake.supervisor import Watch
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration


class Watched:
    """Two real processes under a watch."""

    def __init__(self, directory: Path) -> None:
        self.states: list[Mapping[str, ServiceState]] = []
        self.configs = {name: directory / f"{name}.json" for name in ("one", "two")}
        self.services = {
            name: ServiceProcess(
                name,
                "tests.fixtures.sleeping_service",
                config,
                directory / "log",
                self._ready(config),
                {"PYTHONPATH": str(Path(__file__).parents[2])},
            )
            for name, config in self.configs.items()
        }

    @staticmethod
    def _ready(config: Path) -> Callable[[], Awaitable[bool]]:
        async def ready() -> bool:
            return config.with_suffix(".ready").exists()

        return ready

    @property
    def last(self) -> Mapping[str, ServiceState]:
        return self.states[-1]


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    made = Watched(tmp_path)
    for service in made.services.values():
        await service.start()
    watching = Watch(made.services, made.states.append)
    watching.tell()
    watch = asyncio.create_task(watching.run())
    try:
        yield made
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        for service in made.services.values():
            await service.stop()


async def test_all_is_well(watched: Watched) -> None:
    pids = {name: service.pid for name, service in watched.services.items()}
    assert watched.states == [{name: ServiceState(pid=pid, restarts=0) for name, pid in pids.items()}]


async def test_a_killed_service_is_back(watched: Watched) -> None:
    before = watched.last
    await watched.services["one"].kill()
    await wait_until(lambda: watched.last["one"].restarts == 1 and watched.last["one"].pid is not None)
    assert watched.last["one"].pid == watched.services["one"].pid != before["one"].pid
    assert watched.last["two"] == before["two"]
    assert [s["one"].pid is None for s in watched.states] == [False, True, False], "it was told that it was down"


async def test_one_that_does_not_start_is_tried_again_and_holds_up_nobody(watched: Watched) -> None:
    config = watched.configs["one"]
    config.with_suffix(".ready").unlink()
    config.with_suffix(".broken").touch()
    await watched.services["one"].kill()
    await wait_until(lambda: watched.last["one"].restarts >= 2)
    assert watched.last["one"].pid is None
    await watched.services["two"].kill()
    await wait_until(lambda: watched.last["two"].restarts == 1 and watched.last["two"].pid is not None)
    config.with_suffix(".broken").unlink()
    await wait_until(lambda: watched.last["one"].pid is not None)
