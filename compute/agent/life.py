"""The life of one compute, from boot key to wipe.

    boot key → leases → volume (Prepared) → Start: basebackup → roles → Postgres → tunnel (Running) → … → end

A read replica has the log's roles, and WAL to replay, instead (replica.py).

It ends for one of these reasons, and every one of them ends the same way (`_clean_up`): the keys of a lazy volume wiped
by its server, all processes killed, boot key wiped, volume gone, socket gone.

    keys lost     revoked, suspended, shredded, lease ran out, or a newer instance took our name
    stop          graceful first: a shutdown checkpoint, streamed to the safekeepers
    end of file   the manager is gone, or kills us: nothing graceful. Nothing is lost by that: durability is the
    quorum's Postgres      ended by itself, or could not be started

On key loss nothing is awaited between the news and the dead processes: `on_loss` kills, wipes and unmounts before it
returns, and the keymanager gets its acknowledgement after that. The lease's clock is watched inside of KeyClient,
which needs no network for it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from compute.agent import idle
from compute.agent.basebackup import check_control_file
from compute.agent.control_pipe import ControlPipe
from compute.agent.login_roles import held_login_roles
from compute.agent.postgres import ComputePostgres, CrashedError
from compute.agent.postgres_conf import (
    POSTGRES_PORT,
    hba_conf,
    opening_hba_conf,
    postgres_settings,
    render_conf,
)
from compute.agent.processes import kill_descendants, stop_descendants
from compute.agent.protocol import (
    BEATS_PER_TIMEOUT,
    MAX_LOG_CONTENT_SIZE_BYTES,
    Alive,
    Boot,
    Cleared,
    Ended,
    Idle,
    InUse,
    LogContent,
    LoginRoles,
    Prepared,
    ReadLog,
    Running,
    Start,
    Stop,
    Tokens,
    ancestor_node_id,
    role_digest,
)
from compute.agent.roles import bootstrap_sql, ensure_database
from compute.agent.steps import Steps
from compute.agent.tunnel import Tunnel
from compute.lease_file import LeaseFile
from compute.sealed_log import KEY_LABEL, SealedLog
from compute.volume.base import Source, Volume
from shared.api.compute import StageTiming
from shared.api.keymanager import KeyState, Role
from shared.api.safekeeper import ComputeAddress
from shared.crypto.aead import AeadKey, default_suite
from shared.crypto.derive import derive_key
from shared.crypto.secret import SecretKey
from shared.errors import IntegrityError, KeyAccessError, KeylakeError
from shared.ids import ProjectId
from shared.keyclient import KeyClient
from shared.lease import KeyLoss, Lease
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.postgres import find_postgres, unprivileged
from shared.telemetry import get_logger
from shared.wal.control import ControlFile
from shared.wire.pagestream import StartAs
from shared.wire.scram import SALT_LENGTH_BYTES, ScramVerifier

if TYPE_CHECKING:
    from compute.agent.replica import Replica

_log = get_logger(__name__)
_POSTGRES_START_TIMEOUT_S: Final = 60.0
_VOLUME_WIPE_TIMEOUT_S: Final = 0.5
"""It takes milliseconds. Nothing leaves meanwhile: who could use the volume is stopped. The manager's patience with
us is not longer than a second."""
_LEASE_NEWS_INTERVAL_S: Final = (0.05, 0.5)
"""How often who lets data out hears until when it may: at least, at most. A lease is renewed with most of it left; of
what is left, the news may take a tenth."""


def _verifier(password: str) -> str:
    return ScramVerifier.compute(password, secrets.token_bytes(SALT_LENGTH_BYTES)).serialize()


class Agent:
    def __init__(self, boot: Boot, tokens: Tokens, pipe: ControlPipe, volume: Volume, *, no_network: bool) -> None:
        """`no_network`: Postgres gets a network namespace of its own with nothing in it (we are allowed to make
        one).
        """
        self._boot = boot
        self._tokens = tokens
        self._pipe = pipe
        self._volume = volume
        self._no_network = no_network
        self._boot_key = SecretKey.generate()
        self._boot_key_made_at = datetime.now(UTC)
        self._log_key = AeadKey(derive_key(self._boot_key, KEY_LABEL), default_suite())
        self._sealed_log = SealedLog(boot.sealed_log, self._log_key, boot.instance_id, boot.log_size_bytes)
        self._admin_password = secrets.token_urlsafe(32)
        self._postgres: ComputePostgres | None = None
        self._mock_nonce = b""
        self._login_roles: LoginRoles | None = None
        self._replica: Replica | None = None
        self._tunnel: Tunnel | None = None
        self._lease_file = LeaseFile(boot.socket_dir)
        self._start: asyncio.Future[Start] = asyncio.get_running_loop().create_future()
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[KeyLoss] = asyncio.get_running_loop().create_future()
        self._work: asyncio.Task[None] | None = None
        self._lease_news: asyncio.Task[None] | None = None
        self._replay_news: asyncio.Task[None] | None = None
        self._stages: list[StageTiming] = []
        self._steps = Steps(
            **({} if volume.server_pid is None else {"wipe_volume_keys": self._wipe_volume_server}),
            kill_postgres=self._kill,
            wipe_boot_key=self._wipe_boot_key,
            remove_volume=volume.wipe,
            remove_log_and_socket=self._remove_files,
        )

    async def run(self) -> Ended:
        """Returns when nothing of the project is left."""
        boot = self._boot
        client = KeyClient(
            boot.keymanager,
            boot.ca_certificate,
            lambda: self._tokens.keymanager,
            role=Role.COMPUTE,
            node_id=str(boot.endpoint_id),
            instance_id=boot.instance_id,
        )
        clients = {boot.project_id: client} | {each: self._client_of(each) for each in boot.ancestor_projects}
        async with AsyncExitStack() as entered:
            for each in clients.values():
                await entered.enter_async_context(each)
            self._work = asyncio.create_task(self._bring_up(clients))
            waiting: set[asyncio.Future[Any]] = {
                self._work,
                asyncio.create_task(self._listen()),
                *(asyncio.create_task(each.wait_replaced()) for each in clients.values()),
                self._lost,
                self._stop,
                self._volume.failed,
            }
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                reason, asked_for, crashed = await self._why()
            finally:
                try:
                    self._clean_up()
                finally:
                    for task in waiting:
                        task.cancel()
                    await asyncio.gather(*waiting, return_exceptions=True)
                kill_descendants()  # a process that was being started while we cleaned up
                if self._postgres is not None:
                    await self._postgres.close()
            # Before the key sessions close, each with a handshake: whoever waits for us waits for what is done by now.
            await self._pipe.send(Cleared())
        loss = self._lost.result() if self._lost.done() and not self._lost.cancelled() else None
        return Ended(
            reason=reason,
            asked_for=asked_for,
            crashed=crashed,
            key_state=None if loss is None else loss.state,
            steps_s=self._clean_up(),
            login_roles=self._login_roles,
        )

    def _client_of(self, ancestor: ProjectId) -> KeyClient:
        """For the keys of a project that the timeline was branched off."""
        boot = self._boot
        return KeyClient(
            boot.keymanager,
            boot.ca_certificate,
            lambda: self._tokens.ancestors[ancestor],
            role=Role.COMPUTE,
            node_id=ancestor_node_id(boot.endpoint_id, ancestor),
        )

    async def _why(self) -> tuple[str, bool, bool]:
        """What ended the wait, in order of importance (a graceful stop happens in here); whether that was asked for;
        whether it was a crash."""
        assert self._work is not None  # noqa: S101 - run() made it
        if self._lost.done():
            loss = self._lost.result()
            return f"stopped when the keys were lost ({loss.state.value}): {loss.reason}", False, False
        if self._stop.done():
            return await self._stop_gracefully(self._stop.result()), True, False
        if self._work.done():
            error = self._work.exception()
            if error is None or isinstance(error, CrashedError):
                return f"{error or 'Postgres ended by itself'}{self._failed_volume()}", False, True
            if isinstance(error, KeylakeError):
                if isinstance(error, KeyAccessError):
                    self._lost.set_result(KeyLoss(self._boot.project_id, _state_of(error), str(error), None))
                return str(error), False, False
            _log.error("bringing up the compute failed", exc_info=error)
            return f"unexpected {type(error).__name__}; the log has the details", False, True
        if self._volume.failed.done():
            return f"the volume failed: {self._volume.failed.result()}", False, True
        return "the manager is gone, or a newer instance took over", False, False

    def _failed_volume(self) -> str:
        """What explains a crash, if it does: Postgres ends when there is no room for WAL, or for what it replays. Does
        not touch the files: who serves them may hang, and whoever waits for them could not kill it."""
        if self._volume.failed.done():
            return f": the volume failed: {self._volume.failed.result()}"
        free_bytes = self._volume.free_bytes
        if free_bytes is not None and free_bytes < WAL_SEGMENT_SIZE_BYTES:
            return f": its volume of {self._volume.size_bytes >> 20} MiB is full"
        return ""

    async def _listen(self) -> None:
        """Take messages until there is no more manager."""
        while (message := await self._pipe.receive()) is not None:
            match message:
                case Tokens():
                    self._tokens = message
                    self._volume.token(message.pageserver)
                case Start():
                    if not self._start.done():
                        self._start.set_result(message)
                case Stop():
                    if message.unused_for_s is not None and await self._is_used(message.unused_for_s):
                        await self._pipe.send(InUse())
                    elif not self._stop.done():
                        self._stop.set_result(message)
                case ReadLog():
                    await self._pipe.send(self._log_content())
                case Boot():
                    return

    def _log_content(self) -> LogContent:
        try:
            tail = self._sealed_log.tail(MAX_LOG_CONTENT_SIZE_BYTES)
        except IntegrityError as error:
            return LogContent(text="", problem=str(error))
        except OSError as error:
            return LogContent(text="", problem=f"the log cannot be read: {error.strerror}")
        return LogContent(text=tail.decode(errors="replace"))

    # --- up ---

    async def _bring_up(self, clients: Mapping[ProjectId, KeyClient]) -> None:
        """Returns when Postgres has ended. Raises KeylakeError."""
        lap = _Stopwatch(self._stages)
        leases = [await keys.acquire(project_id, self._on_loss) for project_id, keys in clients.items()]

        def check_leases() -> None:
            for lease in leases:
                lease.check()

        lap("lease")
        await self._volume.prepare()
        lap("volume")
        prepared = Prepared(
            boot_key_made_at=self._boot_key_made_at,
            volume=self._volume.description,
            lazy=self._volume.is_lazy,
            stages=self._stages,
        )
        await self._pipe.send(prepared)
        start = await self._start
        self._lease_news = asyncio.create_task(self._tell_lease(leases), name="lease news")
        control = await self._fill_volume(start, leases)
        lap.skip()
        check_leases()
        if self._boot.follow is not None:
            from compute.agent.replica import Replica  # other computes start without all that it imports

            self._replica = Replica(
                self._boot,
                self._boot.follow,
                self._volume.path.with_name("wal"),
                lambda: self._tokens.safekeeper,
                check_leases,
            )
            self._replay_news = asyncio.create_task(self._replica.report(self._pipe.send), name="replay news")
        self._postgres = await self._set_up_postgres(control)
        lap("roles")
        if self._replica is None:
            await self._postgres.start(_POSTGRES_START_TIMEOUT_S)
            lap("postgres")
        else:
            await self._replica.start(self._postgres, self._volume.path, start.start_lsn)
            lap("replay")
        if not self._boot.postgres.read_only:
            await ensure_database(self._boot.socket_dir, self._admin_password, self._boot.owner, self._boot.database)
            lap("database")
        address = await self._address(check_leases)
        pages = await self._volume.pages_fetched()
        check_leases()
        await self._pipe.send(Running(compute=address, pages_fetched=pages, stages=self._stages))
        await self._watch(self._postgres)

    async def _watch(self, postgres: ComputePostgres) -> None:
        """Until it has ended. Raises CrashedError when it does not answer. Meanwhile the volume is watched, and the
        manager hears that we do not hang."""
        boot = self._boot
        watch = idle.watch(self._look, boot.idle_poll_interval_s, boot.liveness_timeout_s, self._report_idle)
        ending = asyncio.create_task(postgres.wait(), name="postgres end")
        watching = asyncio.create_task(watch, name="idle watch")
        volume = asyncio.create_task(self._volume.watch(boot.liveness_timeout_s), name="volume watch")
        beating = asyncio.create_task(self._beat(boot.liveness_timeout_s / BEATS_PER_TIMEOUT), name="heartbeat")
        try:
            await asyncio.wait({watching, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                watching.result()  # raises: it does not answer
        finally:
            tasks: tuple[asyncio.Task[Any], ...] = (watching, ending, volume, beating)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, timeout_s: float) -> float | None:
        """`idle.Look`"""
        if self._replica is None:
            return await idle.look(self._boot.socket_dir, self._admin_password, timeout_s)
        return await self._replica.look(timeout_s)

    async def _is_used(self, within_s: float) -> bool:
        """Or it cannot be seen."""
        try:
            idle_s = await self._look(idle.TIMEOUT_S)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            return True
        return idle_s is not None and idle_s < within_s

    async def _beat(self, interval_s: float) -> None:
        while True:
            await self._pipe.send(Alive())
            await asyncio.sleep(interval_s)

    async def _report_idle(self, idle_s: float) -> None:
        await self._pipe.send(Idle(idle_s=idle_s))

    async def _fill_volume(self, start: Start, leases: Sequence[Lease]) -> ControlFile:
        boot = self._boot
        if boot.follow is not None:
            start_as = StartAs.STANDBY
        else:
            start_as = StartAs.READ_ONLY if boot.postgres.read_only else StartAs.PRIMARY
        source = Source(
            instance_id=boot.instance_id,
            project_id=boot.project_id,
            timeline_id=boot.timeline_id,
            start_lsn=start.start_lsn,
            start_as=start_as,
            pages=boot.pages,
            ca_certificate=boot.ca_certificate,
            token=self._tokens.pageserver,
        )
        self._stages += await self._volume.fill(source, self._boot_key, _lease_until_s(leases))
        control = check_control_file(self._volume.path, boot.system_identifier, start.start_lsn, start_as)
        self._mock_nonce = control.mock_authentication_nonce
        _log.info("volume filled", lsn=str(start.start_lsn), term=start.term)
        return control

    async def _tell_lease(self, leases: Sequence[Lease]) -> None:
        """Until cancelled. Who hears nothing lets nothing out: a lazy volume, and a proxy at our socket."""
        while True:
            until_s = _lease_until_s(leases)
            self._volume.lease_until(until_s)
            try:
                self._lease_file.write(until_s)
            except OSError as error:
                _log.error("the proxy cannot be told of the lease, and will end sessions", reason=error.strerror)
            left_s = min(lease.remaining_s for lease in leases)
            shortest_s, longest_s = _LEASE_NEWS_INTERVAL_S
            await asyncio.sleep(min(max(left_s / 10, shortest_s), longest_s))

    async def _set_up_postgres(self, control: ControlFile) -> ComputePostgres:
        boot, pgdata, replica = self._boot, self._volume.path, self._replica
        options = boot.postgres
        if options.read_only and options.max_connections < control.max_connections:
            # A standby may not have less than its primary had, which may have run with other settings than ours.
            options = options.model_copy(update={"max_connections": control.max_connections})
        installation = find_postgres()
        user = unprivileged(installation)
        settings = postgres_settings(
            options,
            socket_dir=boot.socket_dir,
            volume_size_bytes=self._volume.size_bytes,
            primary_conninfo="" if replica is None else replica.conninfo,
        )
        (pgdata / "postgresql.conf").write_text(render_conf(settings))
        (pgdata / "pg_hba.conf").write_text(hba_conf() if replica is None else opening_hba_conf())
        for name in ("pg_ident.conf", "postgresql.auto.conf"):
            (pgdata / name).write_text("")
        user.give(pgdata)
        # Nobody makes a tablespace, superusers included: its link has no place, so its record is never written.
        (pgdata / "pg_tblspc").chmod(0o500)
        user.give(boot.socket_dir)
        prefix = ("unshare", "--net", "--") if self._no_network else ()
        postgres = ComputePostgres(pgdata, installation, self._sealed_log, prefix)
        if replica is None:
            await postgres.run_single_user(
                bootstrap_sql(
                    admin_verifier=_verifier(self._admin_password),
                    safekeeper_verifier=_verifier(boot.safekeeper_password),
                    owner=boot.owner,
                    owner_verifier=boot.owner_verifier,
                    endpoint_id=boot.endpoint_id,
                    superuser_owner=boot.postgres.superuser_owner,
                )
            )
        if options.read_only:
            # What was just written is in this volume only, and from here on nothing else is. After the single-user
            # step, which refuses to run on a standby.
            signal_file = pgdata / "standby.signal"
            signal_file.touch(mode=0o600)
            user.give(signal_file)
        return postgres

    async def _address(self, check_leases: Callable[[], None]) -> ComputeAddress:
        boot = self._boot
        if boot.tunnel is None:
            return ComputeAddress(host=str(boot.socket_dir), port=POSTGRES_PORT)
        socket_path = boot.socket_dir / f".s.PGSQL.{POSTGRES_PORT}"
        max_connections = 2 * boot.postgres.max_connections
        self._tunnel = Tunnel(boot.tunnel, socket_path, self._volume.path, max_connections, check_leases)
        port = await self._tunnel.start()
        host = boot.tunnel_advertised_host or boot.tunnel.host
        return ComputeAddress(host=host, port=port, certificate_pem=self._tunnel.certificate_pem)

    # --- down ---

    async def _stop_gracefully(self, stop: Stop) -> str:
        if self._postgres is None:
            return "stopped before Postgres was up"
        stopping = asyncio.create_task(self._shut_down(self._postgres, stop.timeout_s))
        either: set[asyncio.Future[Any]] = {stopping, self._lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._lost.done():
            stopping.cancel()
            return f"the keys were lost while it stopped: {self._lost.result().reason}"
        return "stopped" if stopping.result() else "stopped, after its graceful shutdown took too long"

    async def _shut_down(self, postgres: ComputePostgres, timeout_s: float) -> bool:
        """False when it took too long."""
        boot = self._boot
        if boot.postgres.read_only:
            return await postgres.stop(timeout_s)
        async with held_login_roles(boot.socket_dir, self._admin_password, boot.owner, boot.owner_verifier) as roles:
            in_time = await postgres.stop(timeout_s)
        if in_time and roles is not None:
            digests = {role_digest(self._mock_nonce, name.encode()): role for name, role in roles.items()}
            self._login_roles = LoginRoles(roles=digests, mock_nonce=self._mock_nonce.hex())
        return in_time

    async def _on_loss(self, loss: KeyLoss) -> dict[str, float]:
        try:
            return self._clean_up()
        finally:  # if it failed, this process ends unacknowledged, and its sandbox with it
            if not self._lost.done():
                self._lost.set_result(loss)

    def _clean_up(self) -> dict[str, float]:
        """Nothing of the project is left when this returns: seconds per step. Raises as `Steps.run`. No await here."""
        for task in (self._work, self._lease_news, self._replay_news):
            if task is not None:
                task.cancel()
        return self._steps.run()

    def _cut_off(self) -> None:
        self._lease_file.remove()
        if self._tunnel is not None:
            self._tunnel.close()
        if self._replica is not None:
            self._replica.close()

    def _wipe_volume_server(self) -> str | None:
        self._cut_off()
        # Postgres goes afterwards: who waits for a page that does not come cannot be killed before the mount is dead.
        # But nobody may live to be told of an I/O error (processes.py).
        assert self._volume.server_pid is not None  # noqa: S101 - there is no such step then
        stop_descendants(self._volume.server_pid)
        return None if self._volume.wipe_server(_VOLUME_WIPE_TIMEOUT_S) else "volume_server_did_not_answer"

    def _kill(self) -> None:
        self._cut_off()
        kill_descendants()

    def _wipe_boot_key(self) -> None:
        self._log_key.wipe()
        self._boot_key.wipe()

    def _remove_files(self) -> None:
        self._sealed_log.close()
        with suppress(FileNotFoundError):
            for path in Path(self._boot.socket_dir).iterdir():
                path.unlink(missing_ok=True)


def _lease_until_s(leases: Sequence[Lease]) -> float:
    """When the first of them ends, unless it is renewed."""
    return min(lease.expires_at_s for lease in leases)


class _Stopwatch:
    """Appends one StageTiming per call: the time since the last one."""

    def __init__(self, stages: list[StageTiming], clock: Callable[[], float] = time.monotonic) -> None:
        self._stages = stages
        self._clock = clock
        self._last = clock()

    def __call__(self, stage: str) -> None:
        now = self._clock()
        self._stages.append(StageTiming(stage=stage, seconds=round(now - self._last, 6)))
        self._last = now

    def skip(self) -> None:
        """The time since the last stage was somebody else's."""
        self._last = self._clock()


def _state_of(error: KeyAccessError) -> KeyState:
    match error.code:
        case "key_suspended":
            return KeyState.SUSPENDED
        case "key_revoked":
            return KeyState.REVOKED
        case "key_shredded":
            return KeyState.SHREDDED
        case _:
            return KeyState.ACTIVE
