"""`python -m benchmarks written`: what is written for a byte of WAL, and by whom.

pgbench's TPC-B in a whole cluster. Its object store is an S3 server whose bucket keeps every version, so what was put
is all there, deleted or not; and what the services write to files then is on their own disks. Of that the kernel tells
how much they made dirty (proc_pid_io(5), write_bytes): by whole folios of its cache, again for each commit that makes
some more of one durable. Of a WAL piece they have 16 KiB (safekeeper/files.py), of which a file system may write
4 KiB: so it is what the disks get at most.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.harness import PLAINTEXT, KeylakeBench, Row, run
from keylake.cluster import Cluster
from keylake.layout import SAFEKEEPERS
from safekeeper.remote_wal import RemotePiece, project_prefix, timeline_prefix
from safekeeper.wal_segment import KEY_SUFFIX
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.postgres import find_postgres
from shared.storage.config import open_store
from shared.storage.s3 import S3ObjectStore
from tests.cluster.primary import caught_up, safekeeper_timelines
from tests.fixtures.s3 import moto
from tests.fixtures.waiting import wait_until

_CLIENTS: Final = 8
_OFFLOADED_WITHIN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes until `end_lsn`."""

    end_lsn: int
    offloaded_lsn: int
    """WAL below it is in the object store: of the segment at the end there is none yet."""
    wal_objects: int
    other_objects: int
    safekeepers_disks: int
    pageservers_disk: int


class Measured:
    """A project, and what is written for it."""

    def __init__(self, cluster: Cluster, bench: KeylakeBench, store: S3ObjectStore) -> None:
        self._cluster = cluster
        self._bench = bench
        self._store = store

    async def so_far(self) -> Written:
        """Once all of the log is in layers, and its whole segments are offloaded."""
        project = self._bench.project
        await caught_up(self._cluster, project)
        await self._cluster.client.checkpoint(project.timeline)
        found = (await safekeeper_timelines(self._cluster, project)).values()
        end_lsn = max(each.flush_lsn.value for each in found)
        whole_lsn = end_lsn // WAL_SEGMENT_SIZE_BYTES * WAL_SEGMENT_SIZE_BYTES

        async def offloaded() -> bool:
            return await self._offloaded_lsn() >= whole_lsn

        await wait_until(offloaded, _OFFLOADED_WITHIN_S)
        wal = project_prefix(project.project.project_id)
        sizes = {True: 0, False: 0}
        async for info in self._store.list():
            sizes[info.key.startswith(wal)] += info.size_bytes
        async for version in self._store.old_versions(""):
            sizes[version.key.startswith(wal)] += version.size_bytes
        return Written(
            end_lsn,
            await self._offloaded_lsn(),
            sizes[True],
            sizes[False],
            sum(self._to_disk(f"safekeeper-{n}") for n in range(1, SAFEKEEPERS + 1)),
            self._to_disk("pageserver"),
        )

    async def _offloaded_lsn(self) -> int:
        project = self._bench.project
        prefix = timeline_prefix(project.project.project_id, project.timeline.timeline_id)
        names = [info.key.removeprefix(prefix).removesuffix(KEY_SUFFIX) async for info in self._store.list(prefix)]
        return max((piece.end_lsn for name in names if (piece := RemotePiece.parse(name))), default=0)

    def _to_disk(self, service: str) -> int:
        status = Path(f"/proc/{self._cluster.service(service).pid}/io").read_text()
        found = re.search(r"^write_bytes: ([0-9]+)$", status, re.MULTILINE)
        assert found is not None
        return int(found[1])


async def measure(scale: int = 10, transactions: int = 10_000) -> list[Row]:
    """Raises RuntimeError when the temporary directory is in memory, or the transactions are too few."""
    with (
        tempfile.TemporaryDirectory(prefix="keylake-bench-") as directory,
        moto(Path(directory) / "log") as server,
        server.versioned_bucket() as (_, bucket),
    ):
        objects = server.settings(bucket)
        secrets = {"access_key_id": server.access_key, "secret_access_key": server.secret_key}
        where = {"object_store": {"url": objects.url, **secrets}}
        async with Cluster(settings=PLAINTEXT | {"pageserver": where, "safekeeper": where}) as cluster:
            store = await open_store(objects)
            assert isinstance(store, S3ObjectStore)
            bench = await KeylakeBench.create(cluster, scale)
            measured = Measured(cluster, bench, store)
            before = await measured.so_far()
            program = find_postgres().program("pgbench")
            await run(program, "-n", "-c", str(_CLIENTS), "-t", str(transactions), env=bench.proxy_env())
            after = await measured.so_far()
            await cluster.client.compact(bench.project.timeline, force=True)
            compacted = await measured.so_far()
            await store.close()
    wal, offloaded = after.end_lsn - before.end_lsn, after.offloaded_lsn - before.offloaded_lsn
    if not offloaded:
        raise RuntimeError("no segment of WAL became full: more transactions are needed")
    disks = (after.safekeepers_disks - before.safekeepers_disks) / wal
    if not disks:
        raise RuntimeError("nothing was written to a disk: set TMPDIR to a directory that is on one")
    pieces = (after.wal_objects - before.wal_objects) / offloaded
    layers = (after.other_objects - before.other_objects) / wal
    cache = (after.pageservers_disk - before.pageservers_disk) / wal
    merged = (compacted.other_objects - after.other_objects) / wal
    what = f"written per byte of WAL of pgbench's TPC-B, {wal / _CLIENTS / transactions:.0f} B a transaction"
    return [
        Row(f"{what}: {who}", f"{count:.2f} B", "-", None, "report", None)
        for who, count in (
            (f"the disks of {SAFEKEEPERS} safekeepers, at most", disks),
            ("safekeepers into the object store", pieces),
            ("the pageserver into the object store", layers),
            ("the pageserver's disk, at most", cache),
            ("all of these", disks + pieces + layers + cache),
            ("a compaction of everything, into the object store", merged),
        )
    ]
