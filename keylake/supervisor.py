"""`python -m keylake.supervisor --home DIR`: a local cluster for as long as this process lives.

Started by `keylake up`, which does not wait for its end. It starts the cluster, tells over a pipe how far it is, starts
services again that have ended, and stops everything at SIGTERM or SIGINT. Its children die with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

from keylake import link_control
from keylake.cluster import Cluster
from keylake.layout import write_secret
from keylake.pidlock import PidLock, pid_lock
from keylake.supervision import Report, ServiceState, SupervisorState, pid_file, state_file
from shared.errors import KeylakeError, UnavailableError
from shared.telemetry import configure_logging, get_logger

WATCH_INTERVAL_S: Final = 0.25
DELETED_INTERVAL_S: Final = 1.0
FIRST_RESTART_DELAY_S: Final = 0.1
MAX_RESTART_DELAY_S: Final = 30.0
STABLE_AFTER_S: Final = 30.0
"""A service that has lived this long starts over with the first delay."""

_log = get_logger(__name__)

Reporter = Callable[[Report], None]


class Supervised(Protocol):
    """What the watch needs of a `ServiceProcess`."""

    name: str

    @property
    def running(self) -> bool: ...

    @property
    def pid(self) -> int: ...

    async def start(self) -> None: ...


class Watch:
    """Starts services again that have ended, each with a backoff of its own."""

    def __init__(self, services: Mapping[str, Supervised], changed: Callable[[Mapping[str, ServiceState]], None]):
        """`changed` gets every service's state whenever one ends or is back."""
        self._services = services
        self._changed = changed
        self._restarts = dict.fromkeys(services, 0)

    async def run(self) -> None:
        """Ends only by being cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for service in self._services.values():
                tasks.create_task(self._keep(service), name=f"watch {service.name}")

    def tell(self) -> None:
        """Call `changed` now."""
        self._changed(
            {
                name: ServiceState(pid=service.pid if service.running else None, restarts=self._restarts[name])
                for name, service in self._services.items()
            }
        )

    async def _keep(self, service: Supervised) -> None:
        loop = asyncio.get_running_loop()
        delay_s, started_at = FIRST_RESTART_DELAY_S, loop.time()
        while True:
            if service.running:
                await asyncio.sleep(WATCH_INTERVAL_S)
                continue
            if loop.time() - started_at > STABLE_AFTER_S:
                delay_s = FIRST_RESTART_DELAY_S
            _log.warning("a service ended and is started again", name=service.name, delay_s=delay_s)
            self.tell()
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, MAX_RESTART_DELAY_S)
            self._restarts[service.name] += 1
            started_at = loop.time()
            try:
                await service.start()
            except UnavailableError as error:
                _log.error("a service does not start", name=service.name, reason=str(error))
            else:
                _log.info("a service is back", name=service.name, pid=service.pid)
            self.tell()


async def supervise(
    home: Path, proxy_port: int | None, keymanagers: int, report: Reporter, lock: PidLock, *, links: bool
) -> None:
    """Run the cluster until SIGTERM or SIGINT, or until the lock's file is deleted: then nobody could find us any more,
    and the data is gone with it. Raises KeylakeError when it does not start."""
    life = asyncio.create_task(_live(home, proxy_port, keymanagers, report, links=links))
    loop = asyncio.get_running_loop()
    asked_to_stop = False

    def stop() -> None:
        nonlocal asked_to_stop
        if not asked_to_stop:  # once: a second signal must not cut the graceful end short
            asked_to_stop = True
            life.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    async def stop_when_deleted() -> None:
        while lock.is_findable():  # noqa: ASYNC110 - what another process does to a file sets no event of ours
            await asyncio.sleep(DELETED_INTERVAL_S)
        _log.error("the home was deleted under a running cluster")
        stop()

    deleted = asyncio.create_task(stop_when_deleted())
    try:
        await life
    except asyncio.CancelledError:
        if not asked_to_stop:
            raise
    finally:
        deleted.cancel()


async def _live(home: Path, proxy_port: int | None, keymanagers: int, report: Reporter, *, links: bool) -> None:
    started_at = datetime.now(UTC)
    async with contextlib.AsyncExitStack() as exits:
        cluster = await exits.enter_async_context(
            Cluster(
                home,
                proxy_port=proxy_port,
                keymanagers=keymanagers,
                links=links,
                progress=lambda text: report(Report(kind="progress", text=text)),
            )
        )
        control = None
        if links:
            control = await exits.enter_async_context(link_control.serving(cluster, cluster.runtime_dir / "links"))

        def save(services: Mapping[str, ServiceState]) -> None:
            state = SupervisorState(
                started_at=started_at, proxy_port=cluster.ports.proxy, links=control, services=services
            )
            write_secret(state_file(home), state.model_dump_json())

        services = Watch(cluster.services, save)
        services.tell()
        watch = asyncio.create_task(services.run())
        report(Report(kind="ready"))
        _log.info("the cluster is ready", proxy_port=cluster.ports.proxy)
        try:
            await watch
        finally:
            _log.info("the cluster stops")
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch


def run(home: Path, proxy_port: int | None, report: Reporter, keymanagers: int = 1, *, links: bool = False) -> None:
    """As `supervise`, under the home's lock. Raises ConflictError when the home is supervised already."""
    with pid_lock(pid_file(home)) as lock:
        asyncio.run(supervise(home, proxy_port, keymanagers, report, lock, links=links))


def brief(message: str) -> str:
    """The first and the last line: a service that does not start is told of with the end of its log, a traceback
    perhaps."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["for no known reason"]
    first = lines[0].removesuffix("Traceback (most recent call last):").rstrip(" :")
    return first if len(lines) == 1 else f"{first}: {lines[-1]}"


def _pipe_reporter(descriptor: int) -> Reporter:
    """Writes to whoever started us, as long as they listen."""

    def report(line: Report) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(descriptor, line.model_dump_json().encode() + b"\n")

    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keylake.supervisor",
        description="Run a local cluster until SIGTERM. People use `keylake up`, which starts this.",
        epilog="example: python -m keylake.supervisor --home .keylake",
    )
    parser.add_argument("--home", type=Path, required=True, help="the cluster's directory")
    parser.add_argument("--proxy-port", type=int, help="where Postgres clients connect; default: a free port")
    parser.add_argument("--keymanagers", type=int, default=1, help="replicas of the keymanager")
    parser.add_argument("--links", action="store_true", help="connections between services can be cut")
    parser.add_argument("--report-fd", type=int, help="a pipe that gets one JSON object a line while it starts")
    arguments = parser.parse_args()
    configure_logging("supervisor", "supervisor")
    descriptor = arguments.report_fd
    report: Reporter = (lambda _: None) if descriptor is None else _pipe_reporter(descriptor)
    if descriptor is not None:
        os.set_inheritable(descriptor, False)
    arguments.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        run(arguments.home.resolve(), arguments.proxy_port, report, arguments.keymanagers, links=arguments.links)
    except KeylakeError as error:
        _log.error("the cluster does not start", reason=str(error), notes=getattr(error, "__notes__", []))
        report(Report(kind="failed", text=brief(str(error))))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
