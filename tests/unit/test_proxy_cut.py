"""Sessions whose keys are gone: what their clients hear, and what they do not get any more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compute.lease_file import LeaseFile
from compute.proxy import goodbye
from compute.proxy.cancel import CancelKeys
from compute.proxy.projects import Projects
from compute.proxy.session import ClientSide, ServerSide
from shared.api.keymanager import KeyState
from shared.api.safekeeper import ComputeAddress
from shared.auth import Service
from shared.clock import SystemClock
from shared.ids import ProjectId
from shared.tls import client_context, server_context, service_host_name
from shared.wire.pgproto import ErrorField, ErrorResponse
from tests.fixtures.keys import InMemoryKeySource
from tests.fixtures.realm import Realm
from tests.fixtures.sockets import LOOP_NAMES, LOOPS, rest_of, socket_pair, take_all
from tests.fixtures.waiting import wait_until

Run = Callable[[Coroutine[Any, Any, None]], None]
ELSEWHERE = ComputeAddress(host="elsewhere", port=5432, certificate_pem="its agent looks at the lease itself")
READY, IN_TRANSACTION = b"Z\0\0\0\5I", b"Z\0\0\0\5T"
ROW = b"D" + (4 + 1000).to_bytes(4, "big") + b"x" * 1000
loops = pytest.mark.parametrize("run", LOOPS, ids=LOOP_NAMES)


@dataclass
class Session:
    """A session that is logged in, in a proxy that has the project's lease; its Postgres is the test."""

    keys: InMemoryKeySource
    project_id: ProjectId
    projects: Projects
    client: ClientSide
    server: ServerSide

    @classmethod
    async def log_in(cls, client: ClientSide, compute: ComputeAddress = ELSEWHERE) -> Session:
        keys, project_id = InMemoryKeySource(), ProjectId.new()
        projects = Projects(keys, linger_s=0.0, drain_timeout_s=0.2)
        client.wait_for_compute()
        lease = await projects.enter(project_id, client)
        server = ServerSide(client)
        client.begin(server, READY, compute, lease)
        return cls(keys, project_id, projects, client, server)

    @property
    def read_until_s(self) -> float:
        """When the proxy will read the compute's lease again."""
        lease = self.client._compute_lease
        assert lease is not None
        return lease._until_s

    def says(self, data: bytes) -> None:
        self.client.from_server(self.server, data)


async def plain_session(compute: ComputeAddress = ELSEWHERE) -> tuple[Session, Any]:
    ours, theirs = socket_pair()
    client = ClientSide(CancelKeys())
    await asyncio.get_running_loop().connect_accepted_socket(lambda: client, ours)
    session = await Session.log_in(client, compute)
    assert await asyncio.get_running_loop().sock_recv(theirs, 100) == READY
    return session, theirs


@loops
@pytest.mark.parametrize("closing", [False, True], ids=["open", "closing"])
def test_rows_that_wait_for_a_slow_client_stay_here(run: Run, closing: bool) -> None:
    """`closing`: the session had ended, and these rows were all that was left of it."""

    async def scenario() -> None:
        session, theirs = await plain_session()
        session.says(ROW * 1000)
        if closing:
            session.client.end(goodbye.compute_stopped())
        assert 0 < len(take_all(theirs)) < 1000 * len(ROW)  # the rest waits, and there is room for it now
        await session.keys.revoke(session.project_id)
        assert await rest_of(theirs) == b""
        assert [each.loss.state for each in session.keys.acknowledgements] == [KeyState.REVOKED]
        theirs.close()

    run(scenario())


@loops
@pytest.mark.parametrize("idle", [True, False], ids=["idle", "at work"])
def test_a_client_that_has_read_everything_is_told_why(run: Run, idle: bool, tmp_path: Path) -> None:
    """Over TLS; and that the outcome of a COMMIT is not known, if there may be one under way."""
    realm = Realm.create(tmp_path)

    async def scenario() -> None:
        ours, theirs = socket_pair()
        client = ClientSide(CancelKeys())
        context = server_context(realm.identity(Service.PROXY).files)
        accepting = asyncio.create_task(
            asyncio.get_running_loop().connect_accepted_socket(lambda: client, ours, ssl=context)
        )
        reader, writer = await asyncio.open_unix_connection(
            sock=theirs,
            ssl=client_context(realm.ca_certificate),
            server_hostname=service_host_name(Service.PROXY.value),
        )
        await accepting
        session = await Session.log_in(client)
        session.says(ROW + (READY if idle else IN_TRANSACTION))
        revoking = asyncio.create_task(session.keys.revoke(session.project_id))
        async with asyncio.timeout(20):
            answer = await reader.read()
        writer.close()
        await revoking
        said = ErrorResponse.parse(answer[len(READY + ROW + READY) :][5:])
        assert (said.severity, said.sqlstate) == ("FATAL", "KL003")
        detail = said.get(ErrorField.DETAIL) or ""
        assert ("COMMIT that was under way" in detail) is not idle
        assert str(session.keys.workspace_id) in detail

    run(scenario())


@loops
@pytest.mark.parametrize("ends", ["over", "removed", "nonsense", "a link", "a pipe"])
def test_nothing_passes_of_a_compute_whose_own_lease_is_over(run: Run, ends: str, tmp_path: Path) -> None:
    """The project's is live. Renewed once, and then not; what comes behind a chunk that was dropped is dropped, too."""
    path, file, clock = tmp_path / "lease", LeaseFile(tmp_path), SystemClock()
    file.write(clock.monotonic_s() + 0.05)

    async def scenario() -> None:
        session, theirs = await plain_session(ComputeAddress(host=str(tmp_path), port=5432))
        file.write(clock.monotonic_s() + 0.3)
        await wait_until(lambda: clock.monotonic_s() > session.read_until_s)
        session.says(ROW)
        assert await asyncio.get_running_loop().sock_recv(theirs, 2000) == ROW
        await wait_until(lambda: clock.monotonic_s() > session.read_until_s)
        match ends:
            case "removed":
                file.remove()
            case "nonsense":
                path.write_bytes(b"for ever")
            case "a link":
                path.rename(tmp_path / "target")
                (tmp_path / "target").write_text("inf")
                path.symlink_to("target")
            case "a pipe":
                path.unlink()
                os.mkfifo(path)
        session.says(ROW)
        async with asyncio.timeout(20):
            await session.client.wait_server_gone()
        path.unlink(missing_ok=True)
        path.write_text("inf")
        session.says(ROW)
        assert not take_all(theirs)
        session.client.end(b"")
        theirs.close()

    run(scenario())
