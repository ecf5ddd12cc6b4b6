"""The lazy volume's parts: sealed blocks, files and names, and what happens when something is not as it should be."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from compute.volume import mount
from compute.volume.base import Source, VolumeKind
from compute.volume.files import Node, Tree
from compute.volume.fill import TreeSink, add_relation
from compute.volume.fuse import FuseVolume, make_volume
from compute.volume.sealed_blocks import (
    BLOCK_SIZE_BYTES,
    SLOT_SIZE_BYTES,
    SealedBlocks,
    VolumeFullError,
    make_block_file,
)
from shared.config import Address
from shared.crypto.secret import KeyWipedError, SecretKey
from shared.errors import CorruptedError, IntegrityError, LeaseExpiredError, UnavailableError
from shared.ids import InstanceId, ProjectId, TimelineId
from shared.keyspace import Fork, RelTag
from shared.lsn import Lsn
from shared.sandbox import Isolation, Sandbox
from shared.tls import CertificateAuthority
from shared.wire.pagestream import StartAs
from tests.fixtures.fuse_kernel import ROOT, FuseKernel, page, runs

A, B = b"a" * BLOCK_SIZE_BYTES, b"b" * BLOCK_SIZE_BYTES


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    return make_block_file(tmp_path)


@pytest.fixture
def blocks(descriptor: int) -> Iterator[SealedBlocks]:
    blocks = SealedBlocks(descriptor, SecretKey.generate(), b"context", limit_blocks=8, blocks_per_key=3)
    yield blocks
    blocks.close()


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[FuseKernel]:
    kernel = FuseKernel(tmp_path)
    yield kernel
    kernel.blocks.close()


# --- sealed blocks ---


def test_blocks_come_back_as_they_were_written_over_several_keys(blocks: SealedBlocks) -> None:
    slots = [blocks.take() for _ in range(8)]
    order = [slots[i] for i in (3, 4, 0, 7, 6, 1, 2, 5)]  # runs and jumps
    content = [bytes([i]) * BLOCK_SIZE_BYTES for i in range(8)]
    blocks.write(order, 9, 100, b"".join(content))
    assert blocks.read(order, 9, 100) == b"".join(content)
    blocks.write(order[2:5], 9, 102, A + B + A)
    assert blocks.read(order, 9, 100) == b"".join([*content[:2], A, B, A, *content[5:]])
    with pytest.raises(VolumeFullError):
        blocks.take()
    blocks.give_back(slots[0])
    assert blocks.take() == slots[0]


def test_a_block_opens_only_where_and_as_it_was_written_last(blocks: SealedBlocks, descriptor: int) -> None:
    one, two = blocks.take(), blocks.take()
    blocks.write([one, two], 9, 0, A + B)
    sealed = os.pread(descriptor, 2 * SLOT_SIZE_BYTES, 0)
    assert b"aaaa" not in sealed

    def with_file(content: bytes, owner: int = 9, first: int = 0) -> bytes:
        os.pwrite(descriptor, content, 0)
        return blocks.read([one, two], owner, first)

    assert with_file(sealed) == A + B
    for position in (0, BLOCK_SIZE_BYTES - 1, BLOCK_SIZE_BYTES, SLOT_SIZE_BYTES - 1, SLOT_SIZE_BYTES):
        altered = bytearray(sealed)
        altered[position] ^= 1
        with pytest.raises(IntegrityError):
            with_file(bytes(altered))
    with pytest.raises(IntegrityError):  # swapped
        with_file(sealed[SLOT_SIZE_BYTES:] + sealed[:SLOT_SIZE_BYTES])
    with pytest.raises(IntegrityError):  # another file's, another block's
        with_file(sealed, owner=8)
    with pytest.raises(IntegrityError):
        with_file(sealed, first=1)
    with pytest.raises(IntegrityError):
        with_file(bytes(len(sealed)))
    os.ftruncate(descriptor, 100)
    with pytest.raises(IntegrityError):
        blocks.read([one], 9, 0)

    os.pwrite(descriptor, sealed, 0)
    blocks.write([one, two], 9, 0, B + B)
    with pytest.raises(IntegrityError):  # replayed: what the same place held before
        with_file(sealed)


def test_nothing_opens_once_it_is_given_back_or_wiped(blocks: SealedBlocks) -> None:
    slot, other = blocks.take(), blocks.take()
    blocks.write([slot], 9, 0, A)
    blocks.write([other], 9, 1, A)
    blocks.give_back(slot)
    with pytest.raises(IntegrityError):
        blocks.read([slot], 9, 0)
    blocks.wipe()
    with pytest.raises((IntegrityError, KeyWipedError)):
        blocks.read([other], 9, 1)


def test_the_null_cipher_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of every search for plaintext in this file."""
    monkeypatch.setenv("KEYLAKE_UNSAFE_NULL_CIPHER", "1")
    descriptor = make_block_file(tmp_path)
    blocks = SealedBlocks(descriptor, SecretKey.generate(), b"context", limit_blocks=1)
    blocks.write([blocks.take()], 9, 0, A)
    assert A in os.pread(descriptor, SLOT_SIZE_BYTES, 0)
    blocks.close()


def test_the_file_has_no_name(tmp_path: Path, descriptor: int) -> None:
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(descriptor).st_nlink == 0
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    os.close(descriptor)


# --- files ---


async def test_a_relation_is_read_from_its_origin_until_it_is_written(kernel: FuseKernel) -> None:
    node = kernel.relation("16384", 4).node_id
    assert await kernel.read(node, 0, 4 * BLOCK_SIZE_BYTES) == b"".join(map(page, range(4)))
    await kernel.write(node, BLOCK_SIZE_BYTES, A)
    assert await kernel.read(node, 0, 1 << 20) == page(0) + A + page(2) + page(3)
    assert runs(kernel.pages.asked) == [(0, 4), (0, 1), (2, 4)]
    await kernel.truncate(node, 2 * BLOCK_SIZE_BYTES)
    await kernel.fallocate(node, 0, 4 * BLOCK_SIZE_BYTES)
    asked = len(kernel.pages.asked)
    assert await kernel.read(node, BLOCK_SIZE_BYTES, 1 << 20) == A + bytes(2 * BLOCK_SIZE_BYTES)
    assert len(kernel.pages.asked) == asked  # what was cut off does not come back


async def test_half_a_block_is_completed_from_its_origin_even_if_two_write_at_once(kernel: FuseKernel) -> None:
    node = kernel.relation("16384", 2).node_id
    kernel.pages.gate = asyncio.Event()
    first = asyncio.create_task(kernel.write(node, 0, A[:4096]))
    second = asyncio.create_task(kernel.write(node, 4096, B[:1000]))
    third = asyncio.create_task(kernel.write(node, 0, B[:10]))
    await asyncio.sleep(0)
    kernel.pages.gate.set()
    await asyncio.gather(first, second, third)
    expected = B[:10] + A[10:4096] + B[:1000] + page(0)[5096:]
    assert await kernel.read(node, 0, BLOCK_SIZE_BYTES) == expected


async def test_a_scan_is_fetched_ahead_and_random_reads_are_not(kernel: FuseKernel) -> None:
    node = kernel.relation("16384", 100).node_id
    for block in (0, 50, 7, 99, 3):
        await kernel.read(node, block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
    assert kernel.pages.ahead == []
    for block in range(60, 64):
        await kernel.read(node, block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
    assert kernel.pages.ahead
    assert kernel.pages.ahead[0].start == 62
    assert max(each.stop for each in kernel.pages.ahead) <= 100


async def test_altered_blocks_are_io_errors_and_never_data(kernel: FuseKernel) -> None:
    node = await kernel.create(ROOT, "f")
    await kernel.write(node, 0, A + B)
    os.pwrite(kernel.descriptor, b"\0", 5)
    assert await kernel.read(node, 0, BLOCK_SIZE_BYTES) == -errno.EIO
    assert await kernel.read(node, 0, 2 * BLOCK_SIZE_BYTES) == -errno.EIO
    assert await kernel.read(node, BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES) == B
    assert not kernel.broken
    # Whoever wrote half of it has gone on long ago: nobody would hear of the error.
    assert await kernel.write(node, 0, b"x") == -errno.EIO
    assert kernel.broken


async def test_a_page_that_does_not_come_is_an_io_error(kernel: FuseKernel) -> None:
    node = kernel.relation("16384", 2).node_id
    kernel.pages.error = UnavailableError("away")
    assert await kernel.read(node, 0, BLOCK_SIZE_BYTES) == -errno.EIO
    assert not kernel.broken
    kernel.pages.error = None
    assert await kernel.read(node, 0, BLOCK_SIZE_BYTES) == page(0)


async def test_without_a_lease_no_byte_leaves_wherever_it_comes_from(tmp_path: Path) -> None:
    ended = False

    def check_lease() -> None:
        if ended:
            raise LeaseExpiredError("over")

    kernel = FuseKernel(tmp_path, check_lease=check_lease)
    relation, file = kernel.relation("16384", 2).node_id, await kernel.create(ROOT, "f")
    await kernel.write(file, 0, A)
    kernel.pages.gate = asyncio.Event()
    reading = asyncio.create_task(kernel.read(relation, 0, BLOCK_SIZE_BYTES))
    await asyncio.sleep(0)
    ended = True  # while the page is under way
    kernel.pages.gate.set()
    assert await reading == -errno.EIO
    assert await kernel.read(file, 0, BLOCK_SIZE_BYTES) == -errno.EIO
    ended = False
    assert await kernel.read(file, 0, BLOCK_SIZE_BYTES) == A
    kernel.blocks.close()


async def test_a_full_volume_ends_instead_of_losing_what_was_written(tmp_path: Path) -> None:
    kernel = FuseKernel(tmp_path, limit_blocks=2)
    node = await kernel.create(ROOT, "f")
    await kernel.write(node, 0, A + B)
    assert await kernel.write(node, 2 * BLOCK_SIZE_BYTES, A) == -errno.ENOSPC
    assert [type(each) for each in kernel.broken] == [VolumeFullError]
    kernel.blocks.close()


async def test_a_removed_file_lives_until_it_is_forgotten(kernel: FuseKernel) -> None:
    node = await kernel.create(ROOT, "f")
    await kernel.write(node, 0, A)
    assert await kernel.lookup(ROOT, "f") == node
    assert await kernel.unlink(ROOT, "f") == b""
    assert await kernel.lookup(ROOT, "f") == 0
    assert await kernel.read(node, 0, 10) == A[:10]
    await kernel.forget(node)
    assert kernel.blocks.used_blocks == 1
    await kernel.forget(node)
    assert kernel.blocks.used_blocks == 0
    assert await kernel.read(node, 0, 10) == -errno.ESTALE
    assert await kernel.create(ROOT, "f") != node  # an identity is used once


async def test_names_behave_as_posix_says(kernel: FuseKernel) -> None:
    one, two = await kernel.mkdir(ROOT, "one"), await kernel.mkdir(ROOT, "two")
    inner = await kernel.mkdir(one, "inner")
    file = await kernel.create(one, "f")
    await kernel.write(file, 0, A)
    assert await kernel.create(one, "f") == -errno.EEXIST
    assert await kernel.create(ROOT, "device", mode=0o20600) == -errno.EPERM
    assert await kernel.mkdir(file, "x") == -errno.ENOTDIR
    assert await kernel.unlink(one, "inner") == -errno.EISDIR
    assert await kernel.rmdir(one, "f") == -errno.ENOTDIR
    assert await kernel.rmdir(ROOT, "one") == -errno.ENOTEMPTY
    assert await kernel.unlink(one, "nothing") == -errno.ENOENT
    assert await kernel.rename(ROOT, "one", inner, "x") == -errno.EINVAL  # into itself
    other = await kernel.create(two, "g")
    await kernel.forget(other)
    assert await kernel.rename(one, "f", two, "g") == b""  # over another one
    assert await kernel.names(two) == ["g"]
    assert await kernel.lookup(two, "g") == file
    assert await kernel.rename(one, "inner", two, "g") == -errno.ENOTDIR
    assert await kernel.rename(one, "inner", two, "inner") == b""
    assert await kernel.rmdir(ROOT, "one") == b""
    assert sorted(await kernel.names(ROOT)) == ["two"]
    assert await kernel.ask(5, ROOT) == -errno.ENOSYS  # no symbolic links


async def test_a_listing_is_exact_while_what_it_has_shown_is_removed(kernel: FuseKernel) -> None:
    """As Postgres clears a directory."""
    wanted = {f"pgsql_tmp{i}" for i in range(300)}
    for name in wanted:
        await kernel.create(ROOT, name)
    assert set(await kernel.names(ROOT)) == wanted
    shown = await kernel.names(ROOT, size=100)
    assert len(shown) == len(wanted)
    assert set(shown) == wanted


class Counted(dict[bytes, tuple[int, Node]]):
    """Counts what is looked at."""

    seen = 0

    def get(self, *arguments: Any) -> Any:
        Counted.seen += 1
        return super().get(*arguments)


@pytest.mark.parametrize("seed", range(5))
def test_a_long_listing_goes_on_where_it_was_whatever_comes_and_goes_meanwhile(seed: int) -> None:
    """What is there all the time is shown once, what is gone is not; and no step begins at the beginning."""
    luck = random.Random(seed)
    tree, size = Tree(0, 0, 0), 1000
    root = tree.root
    for number in range(size):
        tree.add_file(root, b"%d" % number, 0o600, 0)
    root.entries = Counted(root.entries)
    Counted.seen = 0
    always, again, shown, position = set(root.entries), set[bytes](), list[bytes](), 0
    while step := list(itertools.islice(root.listing(position), 10)):
        assert all(root.entries[name] == (at, node) for name, at, node in step)
        shown += [name for name, _, _ in step]
        position = step[-1][1]
        for _ in range(luck.randrange(30)):
            name = luck.choice(list(root.entries))
            tree.remove(root, name, 0)
            always.discard(name)
            if not luck.randrange(3):
                tree.add_file(root, name, 0o600, 0)  # another one of the same name
                again.add(name)
    once = [name for name in shown if name not in again]
    assert always <= set(once)
    assert len(once) == len(set(once))
    assert again
    assert Counted.seen < 3 * size
    assert [name for name, _, _ in root.listing(0)] == list(root.entries)


async def test_a_kernel_without_what_the_volume_relies_on_is_refused(kernel: FuseKernel) -> None:
    """FUSE_INIT; FUSE_WRITEBACK_CACHE, FUSE_NO_OPEN_SUPPORT and FUSE_NO_OPENDIR_SUPPORT of linux/fuse.h."""
    writeback_cache, no_open, no_opendir = needed = (1 << 16, 1 << 17, 1 << 24)
    everything = (1 << 32) - 1
    taken = await kernel.init(everything)
    for flag in needed:
        assert taken & flag
        assert await kernel.init(everything & ~flag) == -errno.EPROTO
    # Nothing that this kernel has not, and nothing that was not thought of: splice, POSIX locks, atomic truncation.
    assert await kernel.init(writeback_cache | no_open | no_opendir) == writeback_cache | no_open | no_opendir
    assert not taken & (0b111 << 7 | 1 << 1 | 1 << 3)
    for version in ((7, 30), (6, 38), (8, 0)):
        assert await kernel.init(everything, version=version) == -errno.EPROTO


# --- filling ---


def test_relations_become_files_of_one_gib_and_init_forks_main_forks_too(kernel: FuseKernel) -> None:
    tree, sink = kernel.files.tree, TreeSink(kernel.files)
    for name in ("base", "global", "base/5"):
        sink.directory(PurePosixPath(name))
    segment = (1 << 30) // BLOCK_SIZE_BYTES
    add_relation(tree, RelTag(1663, 5, 100, Fork.MAIN), 2 * segment + 3, 0)
    add_relation(tree, RelTag(1663, 5, 100, Fork.VISIBILITY_MAP), 1, 0)
    add_relation(tree, RelTag(1663, 5, 200, Fork.INIT), 2, 0)
    add_relation(tree, RelTag(1664, 0, 300, Fork.MAIN), 0, 0)
    base = tree.root.entries[b"base"][1].entries[b"5"][1]  # type: ignore[attr-defined]
    sizes = {name.decode(): node.size_bytes // BLOCK_SIZE_BYTES for name, _, node in base.listing(0)}
    assert sizes == {"100": segment, "100.1": segment, "100.2": 3, "100_vm": 1, "200_init": 2, "200": 2}
    assert base.entries[b"100.2"][1].origin.first_block == 2 * segment
    assert base.entries[b"200"][1].origin.rel.fork is Fork.INIT
    assert [name for name, _, _ in tree.root.entries[b"global"][1].listing(0)] == [b"300"]  # type: ignore[attr-defined]
    with pytest.raises(CorruptedError):  # twice
        add_relation(tree, RelTag(1664, 0, 300, Fork.MAIN), 0, 0)
    with pytest.raises(CorruptedError):  # of a database that the basebackup does not have
        add_relation(tree, RelTag(1663, 6, 1, Fork.MAIN), 0, 0)


# --- its server ---


async def test_a_server_that_hangs_is_noticed(tmp_path: Path) -> None:
    """While it waits for a pageserver that says nothing, which is no reason to give it up."""
    silent = socket.create_server(("127.0.0.1", 0))  # nobody ever accepts
    volume = await FuseVolume.start(Sandbox(Isolation.NONE, tmp_path, 1 << 20), tmp_path, 1 << 20)
    certificate = CertificateAuthority().issue_files(tmp_path, "ca", ["localhost"]).certificate
    source = Source(
        instance_id=InstanceId.new(),
        project_id=ProjectId.new(),
        timeline_id=TimelineId.new(),
        start_lsn=Lsn(1 << 24),
        start_as=StartAs.PRIMARY,
        pages=Address(port=silent.getsockname()[1]),
        ca_certificate=certificate,
        token="",
    )
    filling = asyncio.create_task(volume.fill(source, SecretKey.generate(), 0.0))
    await asyncio.sleep(0)  # that is said first
    try:
        assert await volume.pages_fetched() == 0
        watching = asyncio.create_task(volume.watch(0.9))
        assert await volume.pages_fetched() == 0
        assert not volume.failed.done()
        os.kill(volume._server.pid, signal.SIGSTOP)
        assert "has not answered" in str(await asyncio.wait_for(asyncio.shield(volume.failed), 20))
        await watching
    finally:
        volume._server.kill()
        await asyncio.gather(filling, return_exceptions=True)
        await volume._server.wait()
        volume.wipe()
        silent.close()


# --- where there is no FUSE ---


async def test_without_fuse_auto_is_tmpfs_and_fuse_is_no_compute_and_both_say_why(tmp_path: Path) -> None:
    sandbox = Sandbox(Isolation.NONE, tmp_path, 1 << 20)
    volume = await make_volume(VolumeKind.AUTO, sandbox, tmp_path, 1 << 20)
    await volume.prepare()
    assert not volume.is_lazy
    assert volume.description.startswith("tmpfs, 1 MiB")
    assert "no FUSE: it needs a private mount namespace" in volume.description
    refused = await make_volume(VolumeKind.FUSE, sandbox, tmp_path, 1 << 20)
    with pytest.raises(UnavailableError, match="no FUSE"):
        await refused.prepare()
    asked_for = await make_volume(VolumeKind.TMPFS, sandbox, tmp_path, 1 << 20)
    assert "FUSE" not in asked_for.description


def test_a_device_that_cannot_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "DEVICE", tmp_path / "nothing")
    assert "cannot be opened" in mount.why_not_available(tmp_path)
    assert list(tmp_path.iterdir()) == []
