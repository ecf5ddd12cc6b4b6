"""postgresql.conf and pg_hba.conf of a compute. A core: text in, text out.

What a commit means is decided here. The compute's disk is disposable (`fsync = off`), the safekeepers are its
durability: a commit is acknowledged when a majority of them has flushed it (`synchronous_standby_names = 'ANY n
(…)'`). User roles are not superusers, so these settings, being SIGHUP or higher, are out of their reach.
`synchronous_commit` is a USERSET, so a library holds it (compute/guard).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from compute.agent.protocol import SAFEKEEPER_ROLE, PostgresOptions
from compute.proposer import majority
from compute.sizes import MAX_CONNECTIONS
from shared.api.pageserver import ADMIN_ROLE
from shared.errors import InvalidInputError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES

POSTGRES_PORT: Final = 5432
"""Only names the socket: Postgres does not listen on TCP."""

MAX_STANDBY_DELAY_S: Final = 30
"""So long may a query of a replica hold replay up; then it is cancelled."""

Setting = str | int | bool
_STANDBY_NAME: Final = re.compile(r"[a-z0-9-]{1,63}")
_MIB: Final = 1 << 20


def synchronous_standby_names(names: list[str]) -> str:
    """`ANY majority ("a", "b", …)`; empty for no names. Raises InvalidInputError for a name that needs escaping."""
    if not names:
        return ""
    if len(set(names)) != len(names) or not all(_STANDBY_NAME.fullmatch(name) for name in names):
        raise InvalidInputError("standby names must be different, and of a-z, 0-9 and hyphens")
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"ANY {majority(len(names))} ({quoted})"


def postgres_settings(
    options: PostgresOptions, *, socket_dir: Path, volume_size_bytes: int, primary_conninfo: str = ""
) -> dict[str, Setting]:
    """Everything that differs from Postgres's defaults. `primary_conninfo`: where a replica gets its WAL from.

    Memory is the disk, so its users get fixed shares of the volume: WAL that waits for a checkpoint (max_wal_size,
    soft) 1/8, WAL kept for a safekeeper that is behind (wal_keep_size) 1/4, temporary files of one session
    (temp_file_limit) 1/4.
    """
    segment_mib = WAL_SEGMENT_SIZE_BYTES // _MIB
    eighth_mib = max(2 * segment_mib, volume_size_bytes // 8 // _MIB // segment_mib * segment_mib)
    settings: dict[str, Setting] = {
        # Where it is reached. The wheel's Postgres has no TLS: the agent's tunnel has.
        "listen_addresses": "",
        "port": POSTGRES_PORT,
        "unix_socket_directories": str(socket_dir),
        "unix_socket_permissions": "0700",
        "max_connections": options.max_connections,
        "password_encryption": "scram-sha-256",
        # Durability is the quorum's.
        "fsync": False,
        "full_page_writes": False,
        "wal_level": "replica",
        "wal_log_hints": False,
        "archive_mode": "off",
        "hot_standby": False,
        "max_wal_senders": max(4, 2 * len(options.standby_names) + 2),
        "max_replication_slots": 0,
        # Fixed: a start fails when there are more prepared transactions than this.
        "max_prepared_transactions": 64,
        "synchronous_standby_names": synchronous_standby_names(options.standby_names),
        "synchronous_commit": "on",
        "shared_preload_libraries": str(options.guard),
        "wal_keep_size": f"{2 * eighth_mib}MB",
        "max_wal_size": f"{eighth_mib}MB",
        "min_wal_size": f"{2 * segment_mib}MB",
        "wal_init_zero": False,
        "restart_after_crash": False,
        # Memory. With `mmap`, dynamic shared memory lies on the volume and not in /dev/shm, where it would stay.
        "shared_buffers": f"{options.shared_buffers_mb}MB",
        "dynamic_shared_memory_type": "mmap",
        "huge_pages": "off",
        "work_mem": f"{options.work_mem_mb}MB",
        "maintenance_work_mem": f"{options.maintenance_work_mem_mb}MB",
        # max_worker_processes stays at its default of 8: a standby may not have less than its primary had.
        "max_parallel_workers": options.max_parallel_workers,
        "max_parallel_workers_per_gather": min(2, options.max_parallel_workers),
        "temp_file_limit": f"{2 * eighth_mib}MB",
        # The log goes to the agent, which seals it. lc_messages: the proxy and the agent look for messages.
        "logging_collector": False,
        "log_destination": "stderr",
        "log_line_prefix": "%m [%p] ",
        "log_min_messages": "warning",
        "log_checkpoints": False,
        "lc_messages": "C",
        "log_timezone": "UTC",
        "timezone": "UTC",
        "autovacuum": True,
        "update_process_title": False,
    }
    if options.read_only:
        # A standby. It may not have less of these than the primary had whose parameters
        # its pg_control holds: initdb's, or a compute's of any size, with up to nine safekeepers.
        settings |= {
            "hot_standby": True,
            "max_connections": max(options.max_connections, MAX_CONNECTIONS),
            "max_wal_senders": 20,
        }
    if primary_conninfo:
        settings |= {
            "primary_conninfo": primary_conninfo,
            "wal_receiver_status_interval": "1s",
            "max_standby_streaming_delay": f"{MAX_STANDBY_DELAY_S}s",
            "wal_keep_size": 0,
        }
    return settings


def render_conf(settings: Mapping[str, Setting]) -> str:
    """A postgresql.conf. Strings are quoted as guc-file.l reads them."""
    return "".join(f"{name} = {_value(value)}\n" for name, value in settings.items())


def _value(value: Setting) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return str(value)
    if "\n" in value or "\r" in value or "\0" in value or "\\" in value:
        raise InvalidInputError("a setting holds a character that a configuration file cannot")
    return "'" + value.replace("'", "''") + "'"


def hba_conf(*, follows: bool = False) -> str:
    """Who may connect: the safekeepers to replicate, everybody else with a password; nobody without.

    The bootstrap superuser's password is random, made for one boot, and known to the agent only. In a replica
    (`follows`) it is that of a primary's boot, which nobody here knows or needs: see `opening_hba_conf`.
    """
    ours = "reject" if follows else "scram-sha-256"
    return (
        f"local replication {SAFEKEEPER_ROLE} {ours}\n"
        "local replication all reject\n"
        f"local all {SAFEKEEPER_ROLE} reject\n"
        f"local postgres {ADMIN_ROLE} {ours}\n"
        f"local all {ADMIN_ROLE} reject\n"
        "local all all scram-sha-256\n"
    )


def opening_hba_conf() -> str:
    """Of a replica that nobody but its agent knows of yet: for the one session that the agent keeps."""
    return f"local postgres {ADMIN_ROLE} trust\nlocal replication all reject\nlocal all all reject\n"
