/*
 * redo_page.c: one page and its records, in scratch buffers. See "How one page is redone" in walredo.c.
 */
#include "walredo.h"

#include "access/heapam_xlog.h"
#include "access/rmgr.h"
#include "access/visibilitymapdefs.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "access/xlogreader.h"
#include "access/xlogutils.h"
#include "catalog/pg_control.h"
#include "catalog/pg_tablespace_d.h"
#include "miscadmin.h"
#include "port/pg_crc32c.h"
#include "storage/bufmgr.h"
#include "storage/bufpage.h"
#include "storage/fsm_internals.h"
#include "storage/lwlock.h"
#include "storage/smgr.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

/* worker.py asks for shared_buffers=128. One record touches at most 33 blocks and a few map pages. */
#define DROP_AFTER_BUFFERS 64
#define RESIDENT_SLOTS 32

static const RelFileLocator TARGET = {GLOBALTABLESPACE_OID, InvalidOid, 1};
static const RelFileLocator OTHER = {GLOBALTABLESPACE_OID, InvalidOid, 2};

/* A page of a free space or visibility map that is in the buffer pool. */
typedef struct
{
    bool in_use;
    RelFileNumber rel;
    ForkNumber fork;
    BlockNumber block;
} Resident;

static XLogReaderState *reader;
static MemoryContext record_context; /* emptied after every record */
static SMgrRelation target_smgr;
static SMgrRelation other_smgr;
static int buffers_used; /* buffers entered since the last drop; an upper bound */
static Resident resident[RESIDENT_SLOTS];

static char *record_copy; /* the record at hand, aligned */
static size_t record_copy_size;
static DecodedXLogRecord *decoded;
static size_t decoded_size;

/* ---- scratch buffers ---- */

/* Enter a block into the buffer pool, pinned and locked. Its content is that of an earlier use, or zeros. */
static Buffer
enter_block(RelFileLocator rel, ForkNumber fork, BlockNumber block)
{
    buffers_used++;
    return ReadBufferWithoutRelcache(rel, fork, block, RBM_ZERO_AND_LOCK, NULL, true);
}

/* Empty the pool. */
static void
drop_scratch(void)
{
    ForkNumber forks[] = {MAIN_FORKNUM, FSM_FORKNUM, VISIBILITYMAP_FORKNUM};
    BlockNumber from[] = {0, 0, 0};

    DropRelationBuffers(target_smgr, forks, lengthof(forks), from);
    DropRelationBuffers(other_smgr, forks, lengthof(forks), from);
    buffers_used = 0;
    memset(resident, 0, sizeof(resident));
}

/* Make sure that redo finds a page of a free space or visibility map in the pool. What is in it does not matter. */
static void
enter_map_page(RelFileLocator rel, ForkNumber fork, BlockNumber block)
{
    Resident *slot = &resident[(block * 4 + fork * 2 + rel.relNumber) % RESIDENT_SLOTS];
    Buffer buffer;

    if (slot->in_use && slot->block == block && slot->fork == fork && slot->rel == rel.relNumber)
        return;
    buffer = enter_block(rel, fork, block);
    memset(BufferGetPage(buffer), 0, BLCKSZ);
    UnlockReleaseBuffer(buffer);
    slot->in_use = true;
    slot->rel = rel.relNumber;
    slot->fork = fork;
    slot->block = block;
}

/* The visibility map block that covers a heap block (visibilitymap.c, HEAPBLK_TO_MAPBLOCK). */
static BlockNumber
visibility_map_block(BlockNumber heap_block)
{
    const uint32 map_bytes = BLCKSZ - MAXALIGN(SizeOfPageHeaderData);

    return heap_block / (map_bytes * (BITS_PER_BYTE / BITS_PER_HEAPBLOCK));
}

/*
 * The free space map block whose leaf covers a heap block. The map is a tree stored depth first, so a leaf
 * page is preceded by all leaves before it and by every upper page on the way (freespace.c, fsm_logical_to_physical).
 */
static BlockNumber
free_space_map_block(BlockNumber heap_block)
{
    const int depth = SlotsPerFSMPage >= 1626 ? 3 : 4;
    BlockNumber page = heap_block / SlotsPerFSMPage;
    BlockNumber pages_before = 0;

    for (int level = 0; level < depth; level++)
    {
        pages_before += page + 1;
        page /= SlotsPerFSMPage;
    }
    return pages_before - 1;
}

/* ---- one record ---- */

/* Which records may come to redo at all. Everything else has effects beyond its registered blocks. */
static void
check_kind(const XLogRecord *record, ForkNumber fork)
{
    uint8 info = record->xl_info & ~XLR_INFO_MASK;
    uint8 heap_op = info & XLOG_HEAP_OPMASK;
    bool allowed = false;

    switch (record->xl_rmid)
    {
        case RM_XLOG_ID:
            allowed = info == XLOG_FPI || info == XLOG_FPI_FOR_HINT;
            break;
        case RM_HEAP2_ID:
            if (heap_op == XLOG_HEAP2_VISIBLE)
                allowed = fork != FSM_FORKNUM;
            else
                allowed = heap_op != XLOG_HEAP2_REWRITE && fork != FSM_FORKNUM && fork != VISIBILITYMAP_FORKNUM;
            break;
        case RM_HEAP_ID:
        case RM_BTREE_ID:
        case RM_HASH_ID:
        case RM_GIN_ID:
        case RM_GIST_ID:
        case RM_SEQ_ID:
        case RM_SPGIST_ID:
        case RM_BRIN_ID:
        case RM_GENERIC_ID:
            allowed = fork != FSM_FORKNUM && fork != VISIBILITYMAP_FORKNUM;
            break;
        default:
            break;
    }
    if (!allowed)
        CORRUPTED("a record of this kind does not change pages of this fork");
}

/* Copy the record to aligned memory and decode it. */
static void
decode(const char *bytes, uint32 length, XLogRecPtr end_lsn, bool verify_crc, ForkNumber fork)
{
    XLogRecord *record;
    char *message = NULL;
    size_t needed;

    if (record_copy_size < length)
    {
        record_copy = repalloc(record_copy, MAXALIGN(length));
        record_copy_size = MAXALIGN(length);
    }
    memcpy(record_copy, bytes, length);
    record = (XLogRecord *) record_copy;
    if (record->xl_tot_len != length)
        CORRUPTED("the record's own length is not the length sent");
    if (verify_crc)
    {
        pg_crc32c crc;

        INIT_CRC32C(crc);
        COMP_CRC32C(crc, record_copy + SizeOfXLogRecord, length - SizeOfXLogRecord);
        COMP_CRC32C(crc, record_copy, offsetof(XLogRecord, xl_crc));
        FIN_CRC32C(crc);
        if (!EQ_CRC32C(record->xl_crc, crc))
            CORRUPTED("the record's CRC is wrong");
    }
    check_kind(record, fork);

    needed = DecodeXLogRecordRequiredSpace(length);
    if (decoded_size < needed)
    {
        decoded = repalloc(decoded, needed);
        decoded_size = needed;
    }
    if (!DecodeXLogRecord(reader, decoded, record, end_lsn - MAXALIGN(length), &message))
        CORRUPTED("the record does not decode");
    for (int i = 0; i <= decoded->max_block_id; i++)
    {
        DecodedBkpBlock *block = &decoded->blocks[i];

        if (!block->in_use)
            continue;
        if (block->blkno >= MaxBlockNumber || block->forknum > INIT_FORKNUM)
            CORRUPTED("the record refers to an impossible block");
        /* DecodeXLogRecord checks that a hole exists, not where it ends; RestoreBlockImage trusts it. */
        if (block->has_image &&
            (block->bimg_len > BLCKSZ || (uint32) block->hole_offset + block->hole_length > BLCKSZ))
            CORRUPTED("the record's page image does not fit a page");
    }
    decoded->next_lsn = end_lsn;
    reader->record = decoded;
    reader->ReadRecPtr = decoded->lsn;
    reader->EndRecPtr = end_lsn;
}

/* Find the target among the record's blocks. */
static int
find_target(const Target *target)
{
    for (int i = 0; i <= decoded->max_block_id; i++)
    {
        const DecodedBkpBlock *block = &decoded->blocks[i];

        if (block->in_use && block->blkno == target->block && block->forknum == target->fork &&
            RelFileLocatorEquals(block->rlocator, target->rel))
            return i;
    }
    CORRUPTED("the record does not refer to the page");
    return -1; /* not reached */
}

/* Enter a block that is not the target as a page that redo takes for newer than any record. */
static void
enter_done_page(ForkNumber fork, BlockNumber block)
{
    Buffer buffer = enter_block(OTHER, fork, block);
    Page page = BufferGetPage(buffer);

    PageInit(page, BLCKSZ, 0);
    PageSetLSN(page, PG_UINT64_MAX);
    UnlockReleaseBuffer(buffer);
}

/* Point every block reference at a scratch relation and make the buffers that redo will look for. */
static void
remap_blocks(int target_id, const Target *target)
{
    bool heap = decoded->header.xl_rmid == RM_HEAP_ID || decoded->header.xl_rmid == RM_HEAP2_ID;

    for (int i = 0; i <= decoded->max_block_id; i++)
    {
        DecodedBkpBlock *block = &decoded->blocks[i];

        if (!block->in_use)
            continue;
        block->prefetch_buffer = InvalidBuffer;
        if (block->forknum == INIT_FORKNUM)
            block->forknum = MAIN_FORKNUM;
        if (i == target_id)
            block->rlocator = TARGET;
        else
        {
            block->rlocator = OTHER;
            if (block->apply_image || (block->flags & BKPBLOCK_WILL_INIT))
                buffers_used++; /* redo enters it itself */
            else
                enter_done_page(block->forknum, block->blkno);
        }
        if (heap && block->forknum == MAIN_FORKNUM)
        {
            BlockNumber fsm = free_space_map_block(block->blkno);
            BlockNumber vm = visibility_map_block(block->blkno);

            /* Redo names the maps by the relation of one of the blocks, which may be either of ours. */
            enter_map_page(OTHER, FSM_FORKNUM, fsm);
            enter_map_page(OTHER, VISIBILITYMAP_FORKNUM, vm);
            if (target->scratch_fork == MAIN_FORKNUM)
            {
                enter_map_page(TARGET, FSM_FORKNUM, fsm);
                enter_map_page(TARGET, VISIBILITYMAP_FORKNUM, vm);
            }
        }
    }
}

/* Enter the target, with this content or as zeros. */
static void
enter_target(const Target *target, const char *content)
{
    Buffer buffer = enter_block(TARGET, target->scratch_fork, target->block);

    if (content != NULL)
        memcpy(BufferGetPage(buffer), content, BLCKSZ);
    else
        memset(BufferGetPage(buffer), 0, BLCKSZ);
    UnlockReleaseBuffer(buffer);
}

void
redo_copy_page(const Target *target, char *copy)
{
    Buffer buffer = ReadBufferWithoutRelcache(TARGET, target->scratch_fork, target->block, RBM_NORMAL, NULL, true);

    memcpy(copy, BufferGetPage(buffer), BLCKSZ);
    ReleaseBuffer(buffer);
}

typedef struct
{
    XLogRecPtr lsn;
    bool is_new;
} PageState;

static PageState
target_state(const Target *target)
{
    Buffer buffer = ReadBufferWithoutRelcache(TARGET, target->scratch_fork, target->block, RBM_NORMAL, NULL, true);
    Page page = BufferGetPage(buffer);
    PageState state = {PageGetLSN(page), PageIsNew(page)};

    ReleaseBuffer(buffer);
    return state;
}

/*
 * Records that legitimately leave the LSN of a page alone that they refer to: setting a page all-visible without
 * checksums (heap_xlog_visible), and hash records that name the primary bucket page only to lock it.
 */
static bool
may_leave_lsn(const XLogRecord *record)
{
    return record->xl_rmid == RM_HASH_ID ||
           (record->xl_rmid == RM_HEAP2_ID && (record->xl_info & XLOG_HEAP_OPMASK) == XLOG_HEAP2_VISIBLE);
}

void
redo_apply_record(Target *target, const char *bytes, uint32 length, XLogRecPtr end_lsn, bool verify_crc)
{
    DecodedBkpBlock *block;
    PageState before;
    PageState after;
    bool initialises;
    bool restores;
    int target_id;

    if (end_lsn <= target->last_lsn)
        INVALID("end LSNs do not ascend from that of the page");
    target->last_lsn = end_lsn;
    decode(bytes, length, end_lsn, verify_crc, target->fork);
    target_id = find_target(target);
    block = &decoded->blocks[target_id];
    restores = block->apply_image;
    initialises = restores || (block->flags & BKPBLOCK_WILL_INIT);

    if (decoded->header.xl_rmid == RM_XLOG_ID)
    {
        if (!restores)
            return; /* an XLOG_FPI_FOR_HINT under full_page_writes=off */
        /* Its blocks do not depend on each other: do not restore the rest. */
        if (target_id != 0)
            decoded->blocks[0] = *block;
        decoded->max_block_id = 0;
        target_id = 0;
    }

    if (buffers_used > DROP_AFTER_BUFFERS)
    {
        PGAlignedBlock saved;

        redo_copy_page(target, saved.data);
        drop_scratch();
        enter_target(target, saved.data);
    }

    before = target_state(target);
    /* Redo of a visibility map page initialises it when needed (RBM_ZERO_ON_ERROR). */
    if (before.is_new && !initialises && target->fork != VISIBILITYMAP_FORKNUM)
        CORRUPTED("the record needs a page to change and there is none");

    remap_blocks(target_id, target);
    GetRmgr(decoded->header.xl_rmid).rm_redo(reader);

    after = target_state(target);
    /* An image of a page that is all zeros stays so. */
    if (after.lsn != end_lsn && !(after.lsn == before.lsn && may_leave_lsn(&decoded->header)) &&
        !(restores && after.is_new))
        CORRUPTED("redo did not bring the page to the record's end LSN");
    MemoryContextReset(record_context);
}

/* ---- a page, a process ---- */

void
redo_begin_page(Target *target, const char *content)
{
    target->scratch_fork = target->fork == INIT_FORKNUM ? MAIN_FORKNUM : target->fork;
    if (buffers_used > DROP_AFTER_BUFFERS)
        drop_scratch();
    enter_target(target, content);
    target->last_lsn = target_state(target).lsn;
}

/* Open the files of a scratch relation, all empty, and make it look as large as a relation can be. */
static SMgrRelation
make_scratch(RelFileLocator rel)
{
    SMgrRelation smgr = smgropen(rel, InvalidBackendId);

    for (ForkNumber fork = MAIN_FORKNUM; fork <= VISIBILITYMAP_FORKNUM; fork++)
    {
        smgrcreate(smgr, fork, true);
        smgr->smgr_cached_nblocks[fork] = MaxBlockNumber;
    }
    return smgr;
}

void
redo_start(MemoryContext per_record_context)
{
    record_context = per_record_context;
    InRecovery = true;
    RmgrStartup();
    target_smgr = make_scratch(TARGET);
    other_smgr = make_scratch(OTHER);
    reader = XLogReaderAllocate(wal_segment_size, NULL, XL_ROUTINE(.page_read = NULL), NULL);
    if (reader == NULL)
        elog(FATAL, "out of memory");
    record_copy_size = BLCKSZ;
    record_copy = MemoryContextAlloc(TopMemoryContext, record_copy_size);
    decoded_size = DecodeXLogRecordRequiredSpace(BLCKSZ);
    decoded = MemoryContextAlloc(TopMemoryContext, decoded_size);
}

/* The owner pointer may lie in memory of a redo routine that did not get to its end. */
static void
disown(SMgrRelation smgr)
{
    if (smgr->smgr_owner != NULL)
        smgrclearowner(smgr->smgr_owner, smgr);
}

/* After an ERROR: give back what the interrupted redo held, as the background writer does (bgwriter.c). */
void
redo_recover(void)
{
    HOLD_INTERRUPTS();
    error_context_stack = NULL;
    LWLockReleaseAll();
    UnlockBuffers();
    disown(target_smgr);
    disown(other_smgr);
    ReleaseAuxProcessResources(false);
    drop_scratch();
    reader->record = NULL;
    RESUME_INTERRUPTS();
}
