/*
 * guard.c: what a commit means cannot be talked away. Loaded by shared_preload_libraries into a compute's stock
 * (unpatched) PostgreSQL 16, which has no other way to say these things.
 *
 *   - synchronous_commit is `on` for everybody but the agent. Postgres lets every user ask for less, and `local` would
 *     mean the compute's memory here: a client would be told of commits that no quorum holds. Whoever asks for another
 *     value gets `on`, and SHOW says so. (remote_apply as well: safekeepers apply nothing.)
 *   - A wait for the quorum (SyncRepWaitForLSN in syncrep.c) that is cancelled, or whose session is terminated, goes on.
 *     Postgres would end it and make the commit visible: others would read, and be told of, what is gone when the
 *     compute is lost before a quorum holds it.
 *   - The WARNING that says so always reaches the client, whatever client_min_messages is, and before the wait goes on.
 *     The proxy ends the client's session there (compute/proxy/backend_stream.py), so nobody has to wait.
 *   - CREATE TABLESPACE says that there are none. It would fail all the same, superusers included, as nobody may write
 *     pg_tblspc: with an error of the file system.
 *
 * Postgres logs that WARNING before it leaves the queue of those who wait, and nothing of it can be seen before it has:
 * so the hook of the log is the place to wait in.
 */
#include "postgres.h"

#include <unistd.h>

#include "access/xact.h"
#include "catalog/pg_authid_d.h"
#include "fmgr.h"
#include "libpq/libpq-be.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "replication/syncrep.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "tcop/utility.h"
#include "utils/elog.h"
#include "utils/guc_tables.h"
#include "utils/wait_event.h"

PG_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

static emit_log_hook_type next_log_hook;
static GucEnumCheckHook next_check;
static ProcessUtility_hook_type next_utility;

/* Until a quorum holds the commit. The rest of SyncRepWaitForLSN, without its ways out. */
static void
go_on_waiting(void)
{
	for (;;)
	{
		ResetLatch(MyLatch);
		if (MyProc->syncRepState == SYNC_REP_WAIT_COMPLETE)
			return;
		if (WaitLatch(MyLatch, WL_LATCH_SET | WL_POSTMASTER_DEATH, -1, WAIT_EVENT_SYNC_REP) & WL_POSTMASTER_DEATH)
			_exit(2); /* as on SIGQUIT: whoever is still there shall not see it */
	}
}

static void
guard_wait(ErrorData *edata)
{
	static bool telling = false;

	if (telling)
		edata->output_to_client = (whereToSendOutput == DestRemote);
	else if (edata->elevel == WARNING && edata->funcname != NULL && strcmp(edata->funcname, "SyncRepWaitForLSN") == 0)
	{
		/* Once more, as the one at hand goes out behind this hook only. */
		telling = true;
		ereport(WARNING,
				(errcode(edata->sqlerrcode), errmsg_internal("%s", edata->message),
				 errdetail_internal("It goes on on the server: the transaction takes effect when a quorum holds it.")));
		telling = false;
		go_on_waiting();
		edata->output_to_client = edata->output_to_server = false;
	}
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

static void
refuse_tablespaces(PlannedStmt *statement, const char *text, bool is_shared, ProcessUtilityContext context,
				   ParamListInfo parameters, QueryEnvironment *environment, DestReceiver *destination,
				   QueryCompletion *completion)
{
	ProcessUtility_hook_type go_on = next_utility != NULL ? next_utility : standard_ProcessUtility;

	if (IsA(statement->utilityStmt, CreateTableSpaceStmt))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("tablespaces are not supported: all data is kept in one place, the project's storage"),
				 errhint("Leave out CREATE TABLESPACE, and TABLESPACE where objects are made.")));
	go_on(statement, text, is_shared, context, parameters, environment, destination, completion);
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
	emit_log_hook = guard_wait;
	next_utility = ProcessUtility_hook;
	ProcessUtility_hook = refuse_tablespaces;
}
