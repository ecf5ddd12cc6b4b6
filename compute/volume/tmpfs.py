"""A volume in memory: the sandbox's private tmpfs, or a directory under /dev/shm where there is none."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Final

from compute.agent.basebackup import fetch_basebackup
from compute.volume.base import Source
from shared.api.compute import StageTiming
from shared.crypto.secret import SecretKey
from shared.errors import KeylakeError, UnavailableError
from shared.sandbox import Sandbox
from shared.tls import client_context

_MNT_DETACH: Final = 2  # sys/mount.h
_libc = ctypes.CDLL(None, use_errno=True)


class TmpfsVolume:
    """Implements `Volume`, from inside of the sandbox."""

    def __init__(self, sandbox: Sandbox, why: str = "") -> None:
        """`why` it is not something else, for people."""
        self._sandbox = sandbox
        self._why = why
        self.failed: asyncio.Future[KeylakeError] = asyncio.get_running_loop().create_future()

    @property
    def description(self) -> str:
        private = self._sandbox.isolation.private_mounts
        where = "private mount namespace" if private else "/dev/shm, not private to the compute"  # noqa: S108 - it is in memory
        why = f" ({self._why})" if self._why else ""
        return f"tmpfs, {self._sandbox.size_bytes >> 20} MiB, {where}{why}"

    @property
    def is_lazy(self) -> bool:
        return False

    @property
    def size_bytes(self) -> int:
        return self._sandbox.size_bytes

    @property
    def path(self) -> Path:
        return self._sandbox.directory / "pgdata"

    async def prepare(self) -> None:
        try:
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise UnavailableError(f"the volume cannot be prepared: {error.strerror}") from None

    async def fill(self, source: Source, boot_key: SecretKey, lease_until_s: float) -> list[StageTiming]:
        began = time.monotonic()
        await fetch_basebackup(
            source.pages,
            client_context(source.ca_certificate),
            source.token,
            source.project_id,
            source.timeline_id,
            source.start_lsn,
            self.path,
            source.start_as,
        )
        return [StageTiming(stage="basebackup", seconds=round(time.monotonic() - began, 6))]

    def lease_until(self, at_s: float) -> None:
        """It is killed when the lease ends; there is nobody to tell."""

    def token(self, token: str) -> None:
        """Nothing is fetched any more."""

    async def watch(self, timeout_s: float) -> None:
        await asyncio.get_running_loop().create_future()  # the kernel serves it

    @property
    def free_bytes(self) -> int | None:
        try:
            room = os.statvfs(self.path)
        except OSError:
            return None
        return room.f_bavail * room.f_frsize

    async def pages_fetched(self) -> int | None:
        return None

    @property
    def server_pid(self) -> int | None:
        return None

    def wipe_server(self, timeout_s: float) -> bool:
        return True

    def wipe(self) -> None:
        # Unmounting frees the whole tmpfs at once; where that is not ours to do, removing the files does.
        if self._sandbox.isolation.private_mounts and self._unmount():
            return
        shutil.rmtree(self.path, ignore_errors=False, onerror=_ignore_missing)

    def _unmount(self) -> bool:
        if _libc.umount2(os.fsencode(self._sandbox.directory), _MNT_DETACH) == 0:
            return True
        return ctypes.get_errno() == errno.EINVAL  # not a mount point (any more)


def _ignore_missing(function: object, path: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
