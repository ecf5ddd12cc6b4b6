/*
 * guard.c: what a commit means cannot be talked away. Loaded by shared_preload_libraries into a compute's stock
 * (unpatched) PostgreSQL 16, which has no other way to say these two things.
 *
 *   - synchronous_commit is `on` for everybody but the agent. Postgres lets every user ask for less, and `local` would
 *     mean the compute's memory here: a client would be told of commits that no quorum holds. Whoever asks for another
 *     value gets `on`, and SHOW says so. (remote_apply as well: safekeepers apply nothing.)
 *   - The WARNING of a cancelled wait for the quorum (SyncRepWaitForLSN in syncrep.c) always reaches the client, whatever
 *     client_min_messages is. Postgres reports success behind it; the proxy ends the session there instead
 *     (compute/proxy/backend_stream.py).
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_authid_d.h"
#include "fmgr.h"
#include "libpq/libpq-be.h"
#include "miscadmin.h"
#include "tcop/tcopprot.h"
#include "utils/elog.h"
#include "utils/guc_tables.h"

PG_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

static emit_log_hook_type next_log_hook;
static GucEnumCheckHook next_check;

static void
tell_client(ErrorData *edata)
{
	if (edata->elevel == WARNING && edata->funcname != NULL && strcmp(edata->funcname, "SyncRepWaitForLSN") == 0 &&
		whereToSendOutput == DestRemote)
		edata->output_to_client = true;
	if (next_log_hook != NULL)
		next_log_hook(edata);
}

/* The agent logs in as the bootstrap superuser, which pg_hba.conf lets nobody else do. SET ROLE does not matter here. */
static bool
is_agent(void)
{
	return MyProcPort != NULL && GetAuthenticatedUserId() == BOOTSTRAP_SUPERUSERID;
}

static bool
check_synchronous_commit(int *newval, void **extra, GucSource source)
{
	if (*newval != SYNCHRONOUS_COMMIT_REMOTE_FLUSH && !is_agent())
	{
		if (source == PGC_S_SESSION)
			ereport(NOTICE,
					(errmsg("synchronous_commit stays on: a commit is acknowledged when a quorum holds it")));
		*newval = SYNCHRONOUS_COMMIT_REMOTE_FLUSH;
	}
	return next_check == NULL || next_check(newval, extra, source);
}

void
_PG_init(void)
{
	struct config_enum *setting;

	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR, (errmsg("this library is loaded by shared_preload_libraries only")));
	setting = (struct config_enum *) find_option("synchronous_commit", false, false, ERROR);
	next_check = setting->check_hook;
	setting->check_hook = check_synchronous_commit;
	next_log_hook = emit_log_hook;
	emit_log_hook = tell_client;
}
