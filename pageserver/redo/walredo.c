/*
 * walredo.c: rebuilds one page at a time from WAL, inside a stock (unpatched) PostgreSQL 16.
 *
 * Loaded by shared_preload_libraries into `postgres --single`. When Postgres has made its shared memory it calls
 * shmem_startup_hook: that is ours, and it never returns. So there is no startup recovery, no catalogue, no SQL, no
 * postmaster, no port and no socket; only PG_VERSION, global/pg_control and an empty postgresql.conf are read. At
 * that point the process looks to the rest of Postgres as its startup process looks to it: recovery in progress, no
 * WAL insertion allowed, an auxiliary resource owner. One loop then reads requests from fd 0 and answers on fd 1.
 *
 * How one page is redone without touching any file:
 *   - Every block reference of a record is moved to one of two scratch relations, keeping its block number (heap
 *     redo writes it into t_ctid): the page asked for to TARGET, every other to OTHER. The init fork becomes the main
 *     fork, for redo flushes buffers of init forks.
 *   - smgr_cached_nblocks says that the scratch relations are of maximum size, so redo never asks a file for its
 *     size and never extends one. Buffers are entered with RBM_ZERO_AND_LOCK, so none is ever read, and they are
 *     dropped long before the pool is full, so none is ever written.
 *   - Blocks other than the target hold an empty page with the highest LSN: redo answers BLK_DONE for them.
 *     Blocks that a record initialises or restores need none of that; what redo makes of them is thrown away.
 *   - Heap redo touches the free space map and the visibility map on the side: their pages are entered as zeroed
 *     buffers beforehand, and thrown away as well.
 *   - The target must be an initialised page, older than the record, unless the record initialises or restores it.
 *     That is checked here, so redo never records an invalid page (a table that grows, and PANICs in the end) and
 *     never skips the record as already done. Afterwards the page's LSN must be the record's end LSN.
 *
 * Wire format, all integers little-endian. The worker greets once, then answers each request once and in order;
 * requests may be sent ahead.
 *
 *   frame     offset size field
 *   request   0      4    length of the payload, at most MAX_REQUEST_BYTES
 *             4      1    type: 'A' apply, 'M' mask, 'P' ping
 *             5      ...  payload
 *   reply     0      4    length of the payload
 *             4      1    status (enum below)
 *             5      ...  payload: OK: the page (apply, mask) or nothing (ping); else ASCII text
 *   greeting  a reply with status OK and the payload
 *             0      4    "KLWR"
 *             4      4    PROTOCOL_VERSION
 *             8      4    PG_VERSION_NUM that this file was compiled for
 *             12     4    flags: 1 = system calls are filtered
 *   apply     0      1    flags: 1 = a base page follows the header, 2 = verify each record's CRC
 *             1      1    fork: 0 main, 1 fsm, 2 vm, 3 init
 *             2      2    zero
 *             4      12   tablespace OID, database OID, relation number
 *             16     4    block number
 *             20     4    number of records, at least 1
 *             24     8192 base page, if flagged
 *             ...    ...  records: end LSN (8), length (4), the record as in WAL (without page headers)
 *   mask      0      1    resource manager id
 *             1      3    zero
 *             4      4    block number
 *             8      8192 page
 *
 * Errors. What Postgres raises as ERROR is answered and the worker goes on. PANIC (redo uses it for contradictions
 * between record and page) is answered with REPLY_PANIC and the process ends; a crash ends it without an answer; a
 * request that breaks the framing is answered and ends it. The text names the record, then what Postgres says. Messages
 * of redo are filled with LSNs, numbers of blocks and lengths, never with content of pages; detail, hint and context,
 * which may quote more, are left out.
 *
 * Trust. Redo code believes its WAL, and WAL is written by the customer: whoever can forge records can take over this
 * process. So it serves one project, holds no key, runs in namespaces of its own (worker.py), and before its first
 * request gives up opening files, sockets, processes and executable mappings (confine.c).
 */
#include "walredo.h"

#include <fcntl.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <unistd.h>

#include "access/xlog_internal.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/pg_shmem.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

PG_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

#define PROTOCOL_VERSION 1
#define FRAME_HEADER_BYTES 5
#define APPLY_HEADER_BYTES 24
#define MASK_HEADER_BYTES 8
#define RECORD_HEADER_BYTES 12
#define MAX_RECORD_BYTES (4 * 1024 * 1024) /* 33 blocks of (64 KiB data + 8 KiB image), and main data */
#define MAX_REQUEST_BYTES (16 * 1024 * 1024)
#define KEPT_INPUT_BYTES (1024 * 1024) /* an input buffer grown past this is given back */

#define APPLY_HAS_BASE 1
#define APPLY_VERIFY_CRC 2

typedef enum
{
    REPLY_OK = 0,
    REPLY_INVALID = 1,   /* the request is malformed */
    REPLY_CORRUPTED = 2, /* a record does not parse, or does not belong to this page */
    REPLY_FAILED = 3,    /* Postgres raised an error in redo or masking */
    REPLY_PANIC = 4      /* as FAILED, and the worker is gone */
} ReplyStatus;

static shmem_startup_hook_type previous_shmem_startup_hook = NULL;
static int request_fd = -1;
static int reply_fd = -1;
static MemoryContext request_context;

/* The record at hand, for its error text. */
static XLogRecPtr record_end_lsn; /* 0: there is none */
static RmgrId record_rmid;

/* ---- pipes ---- */

static char *input;
static size_t input_size;
static size_t input_start;
static size_t input_end;

/* Fill the buffer until `wanted` bytes can be read at input + input_start. Returns false at end of file. */
static bool
fill_input(size_t wanted)
{
    if (input_size - input_start < wanted)
    {
        memmove(input, input + input_start, input_end - input_start);
        input_end -= input_start;
        input_start = 0;
        if (input_size < wanted)
        {
            char *larger = realloc(input, wanted);

            if (larger == NULL)
                return false;
            input = larger;
            input_size = wanted;
        }
    }
    while (input_end - input_start < wanted)
    {
        ssize_t got = read(request_fd, input + input_end, input_size - input_end);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        input_end += got;
    }
    return true;
}

/* A large request must not keep its memory for the life of the process. */
static void
shrink_input(void)
{
    char *smaller;

    if (input_size <= KEPT_INPUT_BYTES || input_end - input_start > KEPT_INPUT_BYTES)
        return;
    memmove(input, input + input_start, input_end - input_start);
    input_end -= input_start;
    input_start = 0;
    smaller = realloc(input, KEPT_INPUT_BYTES);
    if (smaller != NULL)
    {
        input = smaller;
        input_size = KEPT_INPUT_BYTES;
    }
}

static void
reply(ReplyStatus status, const char *payload, uint32 length)
{
    static char frame[FRAME_HEADER_BYTES + BLCKSZ];
    size_t size = FRAME_HEADER_BYTES + length;
    size_t sent = 0;

    Assert(length <= BLCKSZ);
    memcpy(frame, &length, 4);
    frame[4] = (char) status;
    if (length > 0)
        memcpy(frame + FRAME_HEADER_BYTES, payload, length);
    while (sent < size)
    {
        ssize_t put = write(reply_fd, frame + sent, size - sent);

        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            _exit(1); /* the owner is gone */
        sent += put;
    }
}

static void
reply_error(ReplyStatus status, const ErrorData *edata)
{
    char text[512];
    int length = 0;

    if (record_end_lsn != 0)
        length = snprintf(text, sizeof(text), "%s record that ends at %X/%X: ",
                          RmgrIdIsBuiltin(record_rmid) ? RmgrTable[record_rmid].rm_name : "custom",
                          LSN_FORMAT_ARGS(record_end_lsn));
    length += snprintf(text + length, sizeof(text) - length, "%s: %s (%s)", unpack_sql_state(edata->sqlerrcode),
                       edata->message ? edata->message : "no message", edata->funcname ? edata->funcname : "?");
    reply(status, text, Min(length, (int) sizeof(text) - 1));
}

/* FATAL and PANIC are on their way to exit() or abort(): answer in their place, and leave nothing behind. */
static void
answer_before_dying(ErrorData *edata)
{
    if (edata->elevel < FATAL)
        return;
    reply_error(REPLY_PANIC, edata);
    _exit(1);
}

/* ---- requests ---- */

static uint32
load_u32(const char *bytes)
{
    uint32 value;

    memcpy(&value, bytes, 4);
    return value;
}

static void
serve_apply(const char *payload, uint32 length)
{
    const char *cursor = payload + APPLY_HEADER_BYTES;
    const char *end = payload + length;
    Target target;
    uint8 flags;
    uint32 records;
    PGAlignedBlock result;

    if (length < APPLY_HEADER_BYTES)
        INVALID("the request ends in its header");
    flags = (uint8) payload[0];
    target.fork = (uint8) payload[1];
    target.rel.spcOid = load_u32(payload + 4);
    target.rel.dbOid = load_u32(payload + 8);
    target.rel.relNumber = load_u32(payload + 12);
    target.block = load_u32(payload + 16);
    records = load_u32(payload + 20);
    if ((flags & ~(APPLY_HAS_BASE | APPLY_VERIFY_CRC)) != 0 || payload[2] != 0 || payload[3] != 0)
        INVALID("unknown flags");
    if (target.fork > INIT_FORKNUM)
        INVALID("no such fork");
    if (target.block >= MaxBlockNumber)
        INVALID("no such block");
    if (records == 0)
        INVALID("no records");
    if ((flags & APPLY_HAS_BASE) && end - cursor < BLCKSZ)
        INVALID("the request ends in its base page");
    redo_begin_page(&target, flags & APPLY_HAS_BASE ? cursor : NULL);
    if (flags & APPLY_HAS_BASE)
        cursor += BLCKSZ;

    for (uint32 i = 0; i < records; i++)
    {
        uint64 end_lsn;
        uint32 record_length;

        if (end - cursor < RECORD_HEADER_BYTES)
            INVALID("the request ends in a record's header");
        memcpy(&end_lsn, cursor, 8);
        record_length = load_u32(cursor + 8);
        cursor += RECORD_HEADER_BYTES;
        if (record_length < SizeOfXLogRecord || record_length > MAX_RECORD_BYTES)
            INVALID("a record of impossible length");
        if ((size_t) (end - cursor) < record_length)
            INVALID("the request ends in a record");
        record_end_lsn = end_lsn;
        record_rmid = (RmgrId) cursor[offsetof(XLogRecord, xl_rmid)];
        redo_apply_record(&target, cursor, record_length, end_lsn, (flags & APPLY_VERIFY_CRC) != 0);
        cursor += record_length;
    }
    if (cursor != end)
        INVALID("the request goes on after its last record");

    redo_copy_page(&target, result.data);
    reply(REPLY_OK, result.data, BLCKSZ);
}

static void
serve_mask(const char *payload, uint32 length)
{
    PGAlignedBlock page;
    uint8 rmid;

    if (length != MASK_HEADER_BYTES + BLCKSZ)
        INVALID("a mask request of impossible length");
    rmid = (uint8) payload[0];
    if (rmid > RM_MAX_BUILTIN_ID)
        INVALID("no such resource manager");
    memcpy(page.data, payload + MASK_HEADER_BYTES, BLCKSZ);
    if (GetRmgr(rmid).rm_mask != NULL)
        GetRmgr(rmid).rm_mask(page.data, load_u32(payload + 4));
    reply(REPLY_OK, page.data, BLCKSZ);
}

static void
serve(char type, const char *payload, uint32 length)
{
    record_end_lsn = 0;
    PG_TRY();
    {
        switch (type)
        {
            case 'A':
                serve_apply(payload, length);
                break;
            case 'M':
                serve_mask(payload, length);
                break;
            case 'P':
                reply(REPLY_OK, NULL, 0);
                break;
            default:
                INVALID("no such request");
        }
    }
    PG_CATCH();
    {
        ErrorData *edata;
        ReplyStatus status = REPLY_FAILED;

        MemoryContextSwitchTo(request_context);
        edata = CopyErrorData();
        FlushErrorState();
        redo_recover();
        if (edata->sqlerrcode == ERRCODE_REDO_INVALID)
            status = REPLY_INVALID;
        else if (edata->sqlerrcode == ERRCODE_REDO_CORRUPTED)
            status = REPLY_CORRUPTED;
        reply_error(status, edata);
    }
    PG_END_TRY();
    MemoryContextSwitchTo(request_context);
    MemoryContextReset(request_context);
}

/* ---- start-up ---- */

/*
 * Postgres marks its data directory as used with a System V segment, which outlives a SIGKILL. Nobody else will ever
 * use ours: mark the segment for removal, so that the kernel frees it with the process.
 */
static void
release_sysv_segment(void)
{
    int id = shmget((key_t) UsedShmemSegID, 0, 0);

    if (id >= 0)
        (void) shmctl(id, IPC_RMID, NULL);
}

/* Move the pipes away from 0 and 1, so that a stray read or print can not get into the protocol. */
static void
take_pipes(void)
{
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);

    request_fd = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 10);
    reply_fd = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 10);
    if (null_fd < 0 || request_fd < 0 || reply_fd < 0 || dup2(null_fd, STDIN_FILENO) < 0 ||
        dup2(null_fd, STDOUT_FILENO) < 0)
        elog(FATAL, "could not take over the pipes: %m");
}

static void
greet(bool filtered)
{
    char payload[16] = "KLWR";
    uint32 fields[3] = {PROTOCOL_VERSION, PG_VERSION_NUM, filtered ? 1 : 0};

    memcpy(payload + 4, fields, sizeof(fields));
    reply(REPLY_OK, payload, sizeof(payload));
}

/* Never returns. */
static void
serve_redo(void)
{
    if (previous_shmem_startup_hook != NULL)
        previous_shmem_startup_hook();
    release_sysv_segment();
    take_pipes();
    InitProcess();
    BaseInit();
    CreateAuxProcessResourceOwner();
    CurrentResourceOwner = AuxProcessResourceOwner;
    whereToSendOutput = DestNone;

    request_context = AllocSetContextCreate(TopMemoryContext, "one request", ALLOCSET_DEFAULT_SIZES);
    redo_start(request_context);
    MemoryContextSwitchTo(request_context);
    input_size = KEPT_INPUT_BYTES;
    input = malloc(input_size);
    if (input == NULL)
        elog(FATAL, "out of memory");

    /* From here on nothing is logged: messages could quote user data. FATAL and above go to our hook. */
    SetConfigOption("log_min_messages", "fatal", PGC_POSTMASTER, PGC_S_OVERRIDE);
    emit_log_hook = answer_before_dying;
    greet(confine());

    while (fill_input(FRAME_HEADER_BYTES))
    {
        uint32 length = load_u32(input + input_start);
        char type = input[input_start + 4];

        if (length > MAX_REQUEST_BYTES)
        {
            static const char text[] = "the request is too long";

            reply(REPLY_INVALID, text, sizeof(text) - 1);
            break; /* there is no telling where the next one starts */
        }
        if (!fill_input(FRAME_HEADER_BYTES + length))
            break;
        serve(type, input + input_start + FRAME_HEADER_BYTES, length);
        input_start += FRAME_HEADER_BYTES + length;
        if (input_start == input_end)
            input_start = input_end = 0;
        shrink_input();
    }
    _exit(0);
}

void
_PG_init(void)
{
    if (!process_shared_preload_libraries_in_progress || IsPostmasterEnvironment)
        ereport(ERROR, (errmsg("keylake's walredo is for shared_preload_libraries of a single-user Postgres only")));
    forbid_core_dumps();
    previous_shmem_startup_hook = shmem_startup_hook;
    shmem_startup_hook = serve_redo;
}
