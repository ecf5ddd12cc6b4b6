"""What is left in the process that serves a lazy volume when it has given up its key, and still lives.

Needs root: to read its memory, and to mount without a namespace. In CI it is not skipped.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tarfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from compute.volume.base import Source
from compute.volume.fuse import FuseVolume, why_no_fuse
from compute.volume.key_channel import KEY_LABEL
from compute.volume.sealed_blocks import BLOCK_SIZE_BYTES, block_key
from shared.auth import Principal, Scope, Service
from shared.config import Address
from shared.crypto.derive import derive_key
from shared.crypto.secret import SecretKey
from shared.errors import UnavailableError
from shared.framed_tcp import FramedConnection, FramedServer
from shared.hardening import hardened_environment
from shared.ids import InstanceId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.sandbox import Isolation, Sandbox
from shared.tls import server_context
from shared.wire import pagestream
from tests.cluster_secrecy import memory
from tests.fixtures.fuse_kernel import REL
from tests.fixtures.realm import Realm

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root reads the memory of processes that are not dumpable"),
]

FETCHED, WRITTEN = b"heron", b"gannet"
BLOCKS = 2000
_TIMEOUT_S = 30.0


async def _serve_pages(connection: FramedConnection, principal: Principal) -> None:
    """A pageserver's part: one table of BLOCKS pages full of FETCHED, and an archive with hardly anything."""
    while frames := await connection.receive():
        for kind, payload in frames:
            match kind:
                case pagestream.OPEN:
                    principal.require(Scope.STORAGE_READ, pagestream.Open.parse(payload).project_id)
                case pagestream.GET_PAGES:
                    request = pagestream.BlocksRequest.parse(payload)
                    page = (FETCHED * BLOCK_SIZE_BYTES)[:BLOCK_SIZE_BYTES]
                    await connection.send(pagestream.pack_pages(request.request_id, [page] * request.count))
                case pagestream.RELATIONS:
                    sizes = [pagestream.pack_relation_sizes(1, found) for found in ([(REL, BLOCKS)], [])]
                    await connection.send(b"".join(sizes))
                case _:
                    chunk, end = pagestream.pack_chunk(1, _ARCHIVE), pagestream.pack_basebackup_end(1, len(_ARCHIVE))
                    await connection.send(chunk + end)


def _archive() -> bytes:
    out = b""
    for name in ("base", f"base/{REL.db}", "global", "global/pg_control"):
        info = tarfile.TarInfo(name)
        is_file = name.endswith("pg_control")
        info.type, info.size = (tarfile.REGTYPE, tarfile.BLOCKSIZE) if is_file else (tarfile.DIRTYPE, 0)
        out += info.tobuf(tarfile.USTAR_FORMAT) + b"c" * info.size
    return out + bytes(2 * tarfile.BLOCKSIZE)


_ARCHIVE = _archive()


@asynccontextmanager
async def mounted(scratch: Path, boot_key: SecretKey) -> AsyncIterator[FuseVolume]:
    """A volume that is served to this very process, with a pageserver of one table."""
    (scratch / "pki").mkdir()
    realm = Realm.create(scratch / "pki")
    sandbox = Sandbox(Isolation.NAMESPACES, scratch / "volume", 1 << 20)
    sandbox.directory.mkdir()
    if why := why_no_fuse(sandbox):
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    server = FramedServer(
        Address(port=0),
        server_context(realm.identity(Service.PAGESERVER).files),
        realm.verifier(Service.PAGESERVER),
        Scope.STORAGE_READ,
        pagestream.MAX_FRAME_SIZE_BYTES,
        _serve_pages,
    )
    async with server:
        project_id = ProjectId.new()
        token = realm.issuers[Service.COMPUTE].issue(Service.PAGESERVER, [Scope.STORAGE_READ], project_id=project_id)
        source = Source(
            instance_id=InstanceId.new(),
            project_id=project_id,
            timeline_id=TimelineId.new(),
            start_lsn=Lsn(1000),
            start_as=pagestream.StartAs.PRIMARY,
            pages=Address(port=server.port),
            ca_certificate=realm.ca_certificate,
            token=token,
        )
        volume = await FuseVolume.start(sandbox, scratch, 1 << 30)
        try:
            await volume.prepare()
            await volume.fill(source, boot_key, time.monotonic() + 600)
            yield volume
        finally:
            with suppress(ProcessLookupError):
                os.kill(volume.server_pid, signal.SIGKILL)
            await volume.failed
            volume.wipe()
            await volume._server.wait()  # reaped, before the loop ends


def _use(volume: FuseVolume) -> None:
    """Pages that were fetched ahead and are still waiting, and pages that were written."""
    with (volume.path / f"base/{REL.db}/{REL.rel}").open("rb", buffering=0) as table:
        for _ in range(8):
            assert table.read(BLOCK_SIZE_BYTES).startswith(FETCHED)
    with (volume.path / "written").open("wb") as file:
        file.write(WRITTEN * 100_000)
        file.flush()
        os.fsync(file.fileno())


@pytest.fixture
def hardened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our children are started as an agent starts its own."""
    for name, value in hardened_environment(os.environ).items():
        monkeypatch.setenv(name, value)


async def test_nothing_is_left_in_a_server_that_gave_up_its_key(tmp_path: Path, hardened: None) -> None:
    boot_key = SecretKey.generate()
    volume_key = derive_key(boot_key, KEY_LABEL)
    keys = {"boot key": boot_key, "volume key": volume_key, "block key": block_key(volume_key, 0)}
    patterns = {
        (name, form): data for name, key in keys.items() for form, data in memory.forms(bytes(key.reveal())).items()
    }
    patterns["page", "fetched"] = FETCHED * 400
    patterns["page", "written"] = WRITTEN * 400
    async with mounted(tmp_path, boot_key) as volume:
        await asyncio.to_thread(_use, volume)

        async def found() -> set[tuple[str, str]]:
            # In another thread: this one serves pages.
            findings = await asyncio.to_thread(memory.search, {volume.server_pid: "compute.volume"}, patterns)
            return {(each.key, each.form) for each in findings}

        assert await found() == {
            ("volume key", "raw"),
            ("block key", "raw"),
            ("block key", "schedule"),
            ("page", "fetched"),
            ("page", "written"),
        }
        command = Path(f"/proc/{volume.server_pid}/cmdline").read_bytes()
        environ = Path(f"/proc/{volume.server_pid}/environ").read_bytes()
        assert not any(pattern in command + environ for pattern in patterns.values())

        assert volume.wipe_server(_TIMEOUT_S)
        assert await found() == set()
        assert memory.search({volume.server_pid: "compute.volume"}, {("a", "module"): b"compute.volume"}), "it lives"
        with pytest.raises(OSError, match=r"not connected|abort"):
            (volume.path / "written").read_bytes()
        assert volume.wipe_server(_TIMEOUT_S), "once is enough"


async def test_a_server_that_hangs_or_died_is_not_said_to_have_wiped_anything(tmp_path: Path, hardened: None) -> None:
    async with mounted(tmp_path, SecretKey.generate()) as volume:
        os.kill(volume.server_pid, signal.SIGSTOP)
        assert not volume.wipe_server(0.1)
        os.kill(volume.server_pid, signal.SIGKILL)
        assert isinstance(await asyncio.wait_for(asyncio.shield(volume.failed), 30), UnavailableError)
        assert not volume.wipe_server(_TIMEOUT_S)
