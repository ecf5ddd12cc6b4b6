/*
 * confine.c: what the redo process gives up before it reads its first request. See "Trust" in walredo.c.
 */
#include "walredo.h"

#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>

#define MAX_DATA_BYTES ((rlim_t) 512 * 1024 * 1024)

static void
limit(int resource, rlim_t most)
{
    struct rlimit value = {most, most};

    if (setrlimit(resource, &value) != 0)
        elog(FATAL, "could not set a resource limit: %m");
}

/*
 * Let only those system calls through that a process with open pipes and a heap needs. Everything else fails with
 * EPERM, which Postgres reports as an ERROR and we as a failed request. Returns false where the kernel has no seccomp.
 */
static bool
filter_system_calls(void)
{
#if defined(__x86_64__) || defined(__aarch64__)
#ifdef __x86_64__
    const uint32 arch = AUDIT_ARCH_X86_64;
#else
    const uint32 arch = AUDIT_ARCH_AARCH64;
#endif
#define ALLOW(call) \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##call, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, arch, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        ALLOW(read),
        ALLOW(write),
        ALLOW(brk),
        ALLOW(munmap),
        ALLOW(mremap),
        ALLOW(madvise),
        ALLOW(futex),
        ALLOW(getpid),
        ALLOW(gettid),
        ALLOW(clock_gettime),
        ALLOW(gettimeofday),
        ALLOW(rt_sigprocmask),
        ALLOW(rt_sigreturn),
        ALLOW(restart_syscall),
        ALLOW(exit),
        ALLOW(exit_group),
        /* memory, but not executable: mmap(…, prot = third argument, …), mprotect(…, …, prot) */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_mmap, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_mprotect, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 4 /* PROT_EXEC */, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
    };
#undef ALLOW
    struct sock_fprog program = {lengthof(filter), filter};

    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
#else
    return false;
#endif
}

bool
confine(void)
{
    limit(RLIMIT_DATA, MAX_DATA_BYTES);
    limit(RLIMIT_FSIZE, 0);
    limit(RLIMIT_NPROC, 0);
    limit(RLIMIT_NOFILE, 0);
    return filter_system_calls();
}

void
forbid_core_dumps(void)
{
    limit(RLIMIT_CORE, 0);
    if (prctl(PR_SET_DUMPABLE, 0) != 0)
        elog(FATAL, "could not forbid core dumps: %m");
}
