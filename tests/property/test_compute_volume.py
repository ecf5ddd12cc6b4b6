"""The lazy volume against a plain file, through whatever order of operations."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from compute.volume.fuse_wire import parse_request
from compute.volume.read_ahead import MAX_WINDOW_BLOCKS, ReadAhead
from compute.volume.sealed_blocks import BLOCK_SIZE_BYTES
from shared.errors import CorruptedError
from tests.fixtures.fuse_kernel import ROOT, FuseKernel, page

_ORIGIN_BLOCKS = 6
_MAX_BYTES = 10 * BLOCK_SIZE_BYTES

# The kernel writes pages of 4 KiB; others write what they like.
_OFFSETS = st.one_of(
    st.integers(0, 9).map(lambda n: n * BLOCK_SIZE_BYTES),
    st.integers(0, 19).map(lambda n: n * 4096),
    st.integers(0, _MAX_BYTES - 1),
)
_SIZES = st.one_of(st.sampled_from([1, 4096, 8192, 12288, 24576]), st.integers(1, 20000))


class AgainstAPlainFile(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._directory = tempfile.TemporaryDirectory()
        self.kernel = FuseKernel(Path(self._directory.name), limit_blocks=64)
        self.node = self.kernel.relation("16384", _ORIGIN_BLOCKS).node_id
        self.plain = os.open(Path(self._directory.name) / "plain", os.O_CREAT | os.O_RDWR)
        os.pwrite(self.plain, b"".join(page(block) for block in range(_ORIGIN_BLOCKS)), 0)
        self._bytes = 0

    @rule(offset=_OFFSETS, size=_SIZES)
    def write(self, offset: int, size: int) -> None:
        self._bytes = self._bytes % 255 + 1
        data = bytes([self._bytes]) * min(size, _MAX_BYTES - offset)
        if data:
            answer = self._loop.run_until_complete(self.kernel.write(self.node, offset, data))
            assert isinstance(answer, bytes)
            os.pwrite(self.plain, data, offset)

    @rule(offset=_OFFSETS, size=_SIZES)
    def read(self, offset: int, size: int) -> None:
        got = self._loop.run_until_complete(self.kernel.read(self.node, offset, size))
        assert got == os.pread(self.plain, size, offset)

    @rule(size=_OFFSETS)
    def truncate(self, size: int) -> None:
        assert isinstance(self._loop.run_until_complete(self.kernel.truncate(self.node, size)), bytes)
        os.ftruncate(self.plain, size)

    @rule(offset=_OFFSETS, size=_SIZES)
    def fallocate(self, offset: int, size: int) -> None:
        size = min(size, _MAX_BYTES - offset)
        if size:
            assert self._loop.run_until_complete(self.kernel.fallocate(self.node, offset, size)) == b""
            os.posix_fallocate(self.plain, offset, size)

    @invariant()
    def sizes_are_equal(self) -> None:
        assert self._loop.run_until_complete(self.kernel.size(self.node)) == os.fstat(self.plain).st_size
        assert not self.kernel.broken

    def teardown(self) -> None:
        whole = self._loop.run_until_complete(self.kernel.read(self.node, 0, _MAX_BYTES))
        assert whole == os.pread(self.plain, _MAX_BYTES, 0)
        # Removed and forgotten: every slot is free again.
        assert self._loop.run_until_complete(self.kernel.unlink(ROOT, "16384")) == b""
        assert self.kernel.blocks.used_blocks == 0
        self.kernel.blocks.close()
        os.close(self.plain)
        self._directory.cleanup()
        self._loop.close()


TestAgainstAPlainFile = AgainstAPlainFile.TestCase
TestAgainstAPlainFile.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(
    end=st.integers(1, 3000),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3000), st.integers(1, 32)), max_size=60),
)
@settings(deadline=None)
def test_read_ahead_stays_ahead_in_bounds_and_never_repeats_itself(
    end: int, steps: list[tuple[bool, int, int]]
) -> None:
    planner = ReadAhead()
    at, fetched = 0, set[int]()
    for sequential, jump, count in steps:
        if not sequential:
            at, fetched = jump, set()
        if at >= end:
            break
        count = min(count, end - at)
        ahead = planner.read(at, count, end)
        at += count
        assert len(ahead) <= MAX_WINDOW_BLOCKS
        if ahead:
            assert at <= ahead.start < ahead.stop <= end
            assert ahead.stop <= at + MAX_WINDOW_BLOCKS
        assert not fetched & set(ahead)
        fetched |= set(ahead)


def test_read_ahead_of_a_scan_leaves_nothing_out() -> None:
    planner = ReadAhead()
    end, ahead = 5000, set[int]()
    missed = []
    for at in range(0, end, 16):
        missed += [block for block in range(at, min(at + 16, end)) if block not in ahead]
        ahead |= set(planner.read(at, 16, end))
    assert missed == list(range(32))  # the first read, and the second, which is when a scan shows


@given(st.binary(max_size=200))
def test_requests_that_no_kernel_sends_are_refused(data: bytes) -> None:
    try:
        request = parse_request(memoryview(data))
    except CorruptedError:
        return
    assert len(request.body) == len(data) - 40


@given(opcode=st.sampled_from([1, 2, 3, 4, 8, 9, 10, 11, 12, 15, 16, 17, 26, 28, 42, 43, 45, 99]), body=st.binary())
@settings(deadline=None)
def test_bodies_that_no_kernel_sends_are_errors_of_the_documented_kinds(opcode: int, body: bytes) -> None:
    async def ask() -> None:
        with tempfile.TemporaryDirectory() as directory:
            kernel = FuseKernel(Path(directory))
            try:
                answer = await kernel.ask(opcode, ROOT, body)
                assert isinstance(answer, (bytes, int))
            except CorruptedError:
                pass
            finally:
                kernel.blocks.close()

    asyncio.run(ask())
