/*
 * walredo.h: what the parts of the redo extension share.
 *
 *   walredo.c   process start-up, pipe protocol, errors        (head comment: how it works, wire format, trust)
 *   redo_page.c one page and its records, in scratch buffers
 *   confine.c   what the process gives up before it reads its first request
 */
#ifndef KEYLAKE_WALREDO_H
#define KEYLAKE_WALREDO_H

#include "postgres.h"

#include "access/xlogdefs.h"
#include "common/relpath.h"
#include "storage/block.h"
#include "storage/relfilelocator.h"

#ifdef WORDS_BIGENDIAN
#error "the pipe protocol is little-endian"
#endif
#if PG_VERSION_NUM / 10000 != 16
#error "written for PostgreSQL 16"
#endif

/* Kinds of ERROR that the owner can tell apart: a malformed request, impossible records. All others: failed redo. */
#define ERRCODE_REDO_INVALID MAKE_SQLSTATE('K', 'L', 'R', '0', '1')
#define ERRCODE_REDO_CORRUPTED MAKE_SQLSTATE('K', 'L', 'R', '0', '2')

#define INVALID(text) ereport(ERROR, (errcode(ERRCODE_REDO_INVALID), errmsg_internal(text)))
#define CORRUPTED(text) ereport(ERROR, (errcode(ERRCODE_REDO_CORRUPTED), errmsg_internal(text)))

/* redo_page.c: the page that a request is about. */
typedef struct
{
    RelFileLocator rel;      /* as its records name it */
    ForkNumber fork;         /* as its records name it */
    ForkNumber scratch_fork; /* where it is in the buffer pool */
    BlockNumber block;
    XLogRecPtr last_lsn; /* end LSN of the last record, at first that of the base page */
} Target;

/* Once, when shared memory is there: opens the scratch relations' files. */
extern void redo_start(MemoryContext per_record_context);
/* Start over with this content, or zeros, as the page that target->rel, fork and block name. */
extern void redo_begin_page(Target *target, const char *content);
extern void redo_apply_record(Target *target, const char *bytes, uint32 length, XLogRecPtr end_lsn, bool verify_crc);
extern void redo_copy_page(const Target *target, char *copy);
/* After an ERROR in any of them. */
extern void redo_recover(void);

/* confine.c */
extern void forbid_core_dumps(void);
/* Give up everything but the open pipes and some memory. Returns false where system calls can not be filtered. */
extern bool confine(void);

#endif
