"""Fetching a basebackup@LSN from the pageserver into a volume."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Protocol

from compute.agent.tar_stream import Directory, FileData, FileEnd, FileStart, TarStream
from shared.auth import Service
from shared.config import Address
from shared.errors import ConflictError, CorruptedError, UnavailableError
from shared.framed_tcp import FramedConnection, connect
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn
from shared.wal.control import ControlFile, DbState
from shared.wal.page import record_start
from shared.wire import pagestream
from shared.wire.frames import ERROR, ErrorFrame, ProtocolError

_REQUEST_ID: Final = 1


class ArchiveSink(Protocol):
    """Where the members of a basebackup go, in order. May raise OSError."""

    def directory(self, path: PurePosixPath) -> None: ...

    def start(self, path: PurePosixPath) -> None: ...

    def data(self, data: memoryview) -> None:
        """The next bytes of the file that was started last; valid during the call."""

    def end(self) -> None: ...


class DirectorySink:
    """Writes them below a directory. The volume is memory: writing does not block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None

    def directory(self, path: PurePosixPath) -> None:
        (self._directory / path).mkdir(mode=0o700, exist_ok=True)

    def start(self, path: PurePosixPath) -> None:
        self._file = (self._directory / path).open("xb", buffering=0)

    def data(self, data: memoryview) -> None:
        assert self._file is not None  # noqa: S101 - data comes after a start
        self._file.write(data)

    def end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class ArchiveReader:
    """Takes a basebackup off a connection and hands its members to a sink."""

    def __init__(self, sink: ArchiveSink) -> None:
        self._sink = sink
        self._tar = TarStream()
        self._last_path = ""
        self.size_bytes = 0

    async def take_all(self, connection: FramedConnection) -> None:
        """Until the archive is complete. Raises the pageserver's error, UnavailableError, CorruptedError.

        No time limit of its own: the pageserver bounds its wait for the LSN, and the caller bounds the whole start.
        """
        while True:
            frame = await connection.receive_one()
            if frame is None:
                raise UnavailableError("the pageserver closed the connection in the middle of a basebackup")
            kind, payload = frame
            match kind:
                case pagestream.CHUNK:
                    self._feed(pagestream.parse_request_id(payload)[1])
                case pagestream.BASEBACKUP_END:
                    if pagestream.parse_basebackup_end(payload)[1] != self.size_bytes:
                        raise CorruptedError("the basebackup has not the size that the pageserver says")
                    self._finish()
                    return
                case _ if kind == ERROR:
                    raise ErrorFrame.parse(payload).exception()
                case _:
                    raise ProtocolError(f"unexpected frame of type {kind:#x} in a basebackup")
            await asyncio.sleep(0)  # a lease may have to be renewed meanwhile

    def _feed(self, chunk: memoryview) -> None:
        self.size_bytes += len(chunk)
        try:
            for event in self._tar.feed(chunk):
                match event:
                    case Directory(path):
                        self._sink.directory(path)
                    case FileStart(path):
                        self._sink.start(path)
                    case FileData(data):
                        self._sink.data(data)
                    case FileEnd(path):
                        self._sink.end()
                        self._last_path = str(path)
        except OSError as error:
            raise UnavailableError(f"the basebackup does not fit or cannot be written: {error.strerror}") from None

    def _finish(self) -> None:
        if not self._tar.ended or self._last_path != "global/pg_control":
            raise CorruptedError("the basebackup is torn")


async def fetch_basebackup(
    address: Address,
    context: ssl.SSLContext,
    token: str,
    project_id: ProjectId,
    timeline_id: TimelineId,
    lsn: Lsn,
    directory: Path,
    start_as: pagestream.StartAs,
) -> int:
    """A full one, into a directory. Returns the size of the archive in bytes. Raises as `ArchiveReader.take_all`."""
    connection = await connect(Service.PAGESERVER, address, context, token, pagestream.MAX_FRAME_SIZE_BYTES)
    sink = DirectorySink(directory)
    try:
        kind = pagestream.BASEBACKUP_KINDS[start_as, False]
        request = pagestream.BasebackupRequest(_REQUEST_ID, lsn.value).pack(kind)
        await connection.send(pagestream.Open(project_id, timeline_id).pack() + request)
        archive = ArchiveReader(sink)
        await archive.take_all(connection)
        return archive.size_bytes
    finally:
        sink.end()
        await connection.close()


def check_control_file(
    pgdata: Path, system_identifier: int, start_lsn: Lsn, start_as: pagestream.StartAs
) -> ControlFile:
    """Is this PGDATA ours, and does it start exactly at `start_lsn`? A standby: does it take queries from there on?

    Raises ConflictError when it is another cluster's or another position's, CorruptedError when it cannot be read.
    """
    try:
        control = ControlFile.parse((pgdata / "global" / "pg_control").read_bytes())
    except OSError:
        raise CorruptedError("the basebackup has no control file") from None
    if control.system_identifier != system_identifier:
        raise ConflictError("the basebackup is of another cluster")
    if start_as is pagestream.StartAs.STANDBY:
        starts = control.state is DbState.IN_ARCHIVE_RECOVERY and control.min_recovery_lsn == start_lsn.value
    else:
        starts = control.state is DbState.SHUTDOWNED and control.checkpoint_lsn == record_start(start_lsn.value)
    if not starts:
        raise ConflictError(f"the basebackup does not start at {start_lsn}")
    return control
