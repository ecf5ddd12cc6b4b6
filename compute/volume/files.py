"""The files of a volume: directories, names, attributes, and which blocks of a file are where.

A block of a file is one of three things:

    written    since boot: sealed, in a slot of the local file
    origin     not written, and below `origin_blocks`: block `origin.first_block + n` of a relation fork as it was at
               the start LSN; the pageserver has it
    hole       neither: zeros

`origin_blocks` only ever falls: what a file was cut by does not come back when it grows again.

A core: no I/O. Node ids are never used twice, so they are the identity that a block is sealed under.
"""

from __future__ import annotations

import stat
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from compute.volume.fuse_wire import ROOT_ID, Attributes
from compute.volume.read_ahead import ReadAhead
from compute.volume.sealed_blocks import BLOCK_SIZE_BYTES
from shared.keyspace import RelTag

_GONE: Final = (0, None)
_GONE_MAX: Final = 64
"""So few of a directory's names that are gone may be more than those that are there."""


@dataclass(slots=True)
class Node:
    node_id: int
    mode: int
    uid: int
    gid: int
    time_ns: int
    links: int = 1
    known: int = 0
    """How many times it was handed to the kernel and not forgotten. Without that and without links it is over."""
    atime_ns: int = 0
    mtime_ns: int = 0

    def __post_init__(self) -> None:
        self.atime_ns = self.mtime_ns = self.time_ns

    @property
    def size_bytes(self) -> int:
        return 0

    def attributes(self) -> Attributes:
        return Attributes(
            self.node_id, self.size_bytes, self.atime_ns, self.mtime_ns, self.time_ns, self.mode, self.links, self.uid,
            self.gid,
        )  # fmt: skip


@dataclass(slots=True)
class Directory(Node):
    entries: dict[bytes, tuple[int, Node]] = field(default_factory=dict)
    """By name: where a listing goes on behind it, and what it is. Positions rise and are never used twice, so a listing
    that is interrupted by changes misses nothing and repeats nothing."""
    last_position: int = 0
    parent: Directory | None = None
    _positions: list[int] = field(default_factory=list)
    """Of all entries, and of some that are gone: a database with many tables is listed in many steps, and each of them
    finds its place here. As long as `_names`, which has the name at each."""
    _names: list[bytes] = field(default_factory=list)

    def put(self, name: bytes, node: Node) -> None:
        """The name must be free."""
        self.last_position += 1
        self.entries[name] = (self.last_position, node)
        self._positions.append(self.last_position)
        self._names.append(name)

    def take(self, name: bytes) -> Node:
        """Away. The name must be there."""
        _, node = self.entries.pop(name)
        if len(self._names) > 2 * len(self.entries) + _GONE_MAX:
            self._positions = [position for position, _ in self.entries.values()]  # a dict is in the order of insertion
            self._names = list(self.entries)
        return node

    def listing(self, after: int) -> Iterator[tuple[bytes, int, Node]]:
        """(name, position, node) of those behind position `after`. Nothing may change meanwhile."""
        for at in range(bisect_right(self._positions, after), len(self._names)):
            name = self._names[at]
            position, node = self.entries.get(name, _GONE)
            if node is not None and position == self._positions[at]:
                yield name, position, node


@dataclass(frozen=True, slots=True)
class Origin:
    """What a relation's file was at the start LSN: blocks of one fork, from `first_block` on."""

    rel: RelTag
    first_block: int


@dataclass(slots=True)
class File(Node):
    size: int = 0
    """Bytes."""
    origin: Origin | None = None
    origin_blocks: int = 0
    slots: dict[int, int] = field(default_factory=dict)
    """Block → slot, of those that were written."""
    read_ahead: ReadAhead = field(default_factory=ReadAhead)

    @property
    def size_bytes(self) -> int:
        return self.size

    def is_at_origin(self, block: int) -> bool:
        """The pageserver has it, and nobody has written it since."""
        return block < self.origin_blocks and block not in self.slots

    def resize(self, size_bytes: int) -> list[int]:
        """Returns the slots of blocks that are wholly gone. A block that is cut in the middle is the caller's."""
        blocks = -(-size_bytes // BLOCK_SIZE_BYTES)
        gone = [] if size_bytes >= self.size else [block for block in self.slots if block >= blocks]
        self.size = size_bytes
        self.origin_blocks = min(self.origin_blocks, blocks)
        return [self.slots.pop(block) for block in gone]


class Tree:
    """All nodes, by id and by name."""

    def __init__(self, uid: int, gid: int, now_ns: int) -> None:
        """`uid`, `gid`: whom everything belongs to that nobody else made."""
        self._uid, self._gid = uid, gid
        self.root = Directory(ROOT_ID, stat.S_IFDIR | 0o700, uid, gid, now_ns, links=2)
        self._nodes: dict[int, Node] = {ROOT_ID: self.root}
        self._last_id = ROOT_ID

    def node(self, node_id: int) -> Node | None:
        return self._nodes.get(node_id)

    def __len__(self) -> int:
        return len(self._nodes)

    def add_file(self, directory: Directory, name: bytes, mode: int, now_ns: int) -> File:
        """The name must be free."""
        node = File(self._new_id(), stat.S_IFREG | stat.S_IMODE(mode), self._uid, self._gid, now_ns)
        self._link(directory, name, node, now_ns)
        return node

    def add_directory(self, directory: Directory, name: bytes, mode: int, now_ns: int) -> Directory:
        """The name must be free."""
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        node = Directory(self._new_id(), mode, self._uid, self._gid, now_ns, links=2, parent=directory)
        self._link(directory, name, node, now_ns)
        directory.links += 1
        return node

    def remove(self, directory: Directory, name: bytes, now_ns: int) -> Node:
        """Take away a name that is there; of a directory, an empty one's."""
        node = directory.take(name)
        directory.mtime_ns = directory.time_ns = now_ns
        node.links = 0
        if isinstance(node, Directory):
            directory.links -= 1
        return node

    def move(self, old: Directory, old_name: bytes, new: Directory, new_name: bytes, now_ns: int) -> None:
        """The old name is there and the new one is free."""
        node = old.take(old_name)
        old.mtime_ns = old.time_ns = now_ns
        if isinstance(node, Directory):
            old.links -= 1
            new.links += 1
            node.parent = new
        self._link(new, new_name, node, now_ns)

    def forget(self, node: Node) -> bool:
        """Drop a node that has neither a name nor a holder. Returns whether it was one."""
        if node.links or node.known:
            return False
        return self._nodes.pop(node.node_id, None) is not None

    def _link(self, directory: Directory, name: bytes, node: Node, now_ns: int) -> None:
        directory.put(name, node)
        directory.mtime_ns = directory.time_ns = now_ns
        self._nodes[node.node_id] = node

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id
