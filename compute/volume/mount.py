"""Mounting a FUSE file system by hand: mount(2) with a descriptor of /dev/fuse (mount(8) and libfuse do no other).

Only inside of a private mount namespace, where we are root (really, or of our own user namespace, which Linux allows
since 4.18): nobody else sees the mount, and it is gone with the last process of the namespace. So there is no set-uid
helper, and nothing to clean up after a SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from shared.errors import UnavailableError
from shared.sandbox import Sandbox, detect_isolation

DEVICE: Final = Path("/dev/fuse")
NO_NAMESPACE: Final = "no FUSE: it needs a private mount namespace"
_PROBE_TIMEOUT_S: Final = 15.0
_MS_NOSUID: Final = 2  # sys/mount.h
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MS_NOATIME: Final = 1024
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def mount(mount_point: Path) -> int:
    """Returns the descriptor on which requests come. Closing it ends the file system, for everybody who uses it.

    `allow_other`: Postgres runs as somebody else. `default_permissions`: the kernel checks modes and owners.
    Raises UnavailableError.
    """
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnavailableError(f"no FUSE here: {DEVICE} cannot be opened: {error.strerror}") from None
    options = (
        f"fd={descriptor},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},allow_other,default_permissions"
    )
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME
    if _libc.mount(b"keylake", os.fsencode(mount_point), b"fuse", flags, options.encode()) != 0:
        reason = os.strerror(ctypes.get_errno())
        os.close(descriptor)
        raise UnavailableError(f"no FUSE here: mount(2) failed: {reason}")
    return descriptor


def unmount(mount_point: Path) -> None:
    """Lazily: at once, whoever still uses it. Does nothing when it is not mounted."""
    _libc.umount2(os.fsencode(mount_point), _MNT_DETACH)


def why_not_available(scratch_dir: Path) -> str:
    """Empty when FUSE works here, found by trying, which takes a millisecond. Only in a private mount namespace."""
    probe = scratch_dir / "fuse-probe"
    try:
        probe.mkdir(mode=0o700)
        try:
            os.close(mount(probe))
        finally:
            unmount(probe)
            probe.rmdir()
    except UnavailableError as error:
        return str(error)
    except OSError as error:
        return f"no FUSE here: {error.strerror}"
    return ""


def why_not_on_this_machine() -> str:
    """The same, for who is in no such namespace: tried in a sandbox like a compute's. Blocks for some 0.2 s."""
    if not detect_isolation().private_mounts:
        return NO_NAMESPACE
    sandbox = Sandbox.create(size_bytes=1 << 20)
    try:
        argv = sandbox.command([sys.executable, "-P", "-m", "compute.volume.mount", str(sandbox.directory)])
        probe = subprocess.run(argv, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no FUSE here: it cannot be tried: {type(error).__name__}"
    finally:
        sandbox.wipe()
    return probe.stdout.decode()


if __name__ == "__main__":
    sys.stdout.write(why_not_available(Path(sys.argv[1])))
