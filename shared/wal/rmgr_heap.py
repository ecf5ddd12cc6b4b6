"""What heap records do to the visibility map (Postgres `access/heapam_xlog.h`, the redo routines of heapam.c).

Heap blocks themselves are in the block references. A cleared bit of the visibility map is not: redo finds the map page
from the heap block, and so must ingest. Setting bits (XLOG_HEAP2_VISIBLE) names the map page as a block.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from shared.errors import CorruptedError
from shared.wal.record import Block, Rel
from shared.wal.rmgr import RmgrId

OPCODE_MASK: Final = 0x70
INIT_PAGE: Final = 0x80

ALL_VISIBLE: Final = 0x01
ALL_FROZEN: Final = 0x02
VALID_BITS: Final = ALL_VISIBLE | ALL_FROZEN
"""VISIBILITYMAP_VALID_BITS (`access/visibilitymapdefs.h`)."""

HEAP_BLOCKS_PER_MAP_PAGE: Final = (8192 - 24) * 4
"""Two bits per heap block behind the page header (visibilitymap.c)."""


class HeapOp(IntEnum):
    INSERT = 0x00
    DELETE = 0x10
    UPDATE = 0x20
    TRUNCATE = 0x30
    HOT_UPDATE = 0x40
    CONFIRM = 0x50
    LOCK = 0x60
    INPLACE = 0x70


class Heap2Op(IntEnum):
    REWRITE = 0x00
    PRUNE = 0x10
    VACUUM = 0x20
    FREEZE_PAGE = 0x30
    VISIBLE = 0x40
    MULTI_INSERT = 0x50
    LOCK_UPDATED = 0x60
    NEW_CID = 0x70


class VisibilityClear(NamedTuple):
    """Clear `bits` of heap block `heap_block` in the visibility map of `rel`."""

    rel: Rel
    heap_block: int
    bits: int


_OLD_CLEARED = _CLEARED = 1
_NEW_CLEARED = 2

# (rmgr << 8 | opcode) → (offset of the flags byte, size of the struct, bits of the map that its bit 0 clears)
_FLAGS: Final[dict[int, tuple[int, int, int]]] = {
    RmgrId.HEAP << 8 | HeapOp.INSERT: (2, 3, VALID_BITS),
    RmgrId.HEAP << 8 | HeapOp.DELETE: (7, 8, VALID_BITS),
    RmgrId.HEAP << 8 | HeapOp.UPDATE: (7, 14, VALID_BITS),
    RmgrId.HEAP << 8 | HeapOp.HOT_UPDATE: (7, 14, VALID_BITS),
    RmgrId.HEAP << 8 | HeapOp.LOCK: (7, 8, ALL_FROZEN),
    RmgrId.HEAP2 << 8 | Heap2Op.MULTI_INSERT: (0, 4, VALID_BITS),
    RmgrId.HEAP2 << 8 | Heap2Op.LOCK_UPDATED: (7, 8, ALL_FROZEN),
}
CLEAR_FLAGS: Final = {operation: (offset, size) for operation, (offset, size, _) in _FLAGS.items()}
"""rmgr << 8 | opcode → offset and size, in the main data, of what `visibility_clears` looks at. When neither of the two
lowest bits there is set, it has nothing to say."""
_UPDATES: Final = frozenset({RmgrId.HEAP << 8 | HeapOp.UPDATE, RmgrId.HEAP << 8 | HeapOp.HOT_UPDATE})


def visibility_clears(
    rmgr_id: int, info: int, blocks: tuple[Block, ...], record: bytes, main_start: int
) -> tuple[VisibilityClear, ...]:
    """Map bits that a record of RM_HEAP or RM_HEAP2 clears; mostly none. `blocks`, `main_start`: see `parse_blocks`.

    An update names up to two blocks, the old one first; both may lie on one map page.
    Raises CorruptedError.
    """
    operation = rmgr_id << 8 | info & OPCODE_MASK
    layout = _FLAGS.get(operation)
    if layout is None:
        return ()
    offset, size_bytes, bits = layout
    if len(record) < main_start + size_bytes or not blocks or blocks[0].block_id != 0:
        raise CorruptedError(f"heap record with opcode {info & OPCODE_MASK:#04x} is too short or has no block 0")
    flags = record[main_start + offset]
    if operation not in _UPDATES:
        if not flags & _CLEARED:
            return ()
        block = blocks[0]
        return (VisibilityClear(block.rel, block.block_number, bits),)
    if not flags & (_OLD_CLEARED | _NEW_CLEARED):
        return ()
    new = blocks[0]
    old = blocks[1] if len(blocks) > 1 and blocks[1].block_id == 1 else new
    clears = []
    if flags & _OLD_CLEARED:
        clears.append(VisibilityClear(old.rel, old.block_number, bits))
    if flags & _NEW_CLEARED:
        clears.append(VisibilityClear(new.rel, new.block_number, bits))
    return tuple(clears)


def map_position(heap_block: int) -> tuple[int, int, int]:
    """(map block, byte in that page, shift in that byte) of the two bits of a heap block (visibilitymap.c)."""
    map_block, in_page = divmod(heap_block, HEAP_BLOCKS_PER_MAP_PAGE)
    return map_block, 24 + in_page // 4, in_page % 4 * 2
