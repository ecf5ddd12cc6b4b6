"""Images without a registry: a base from Debian packages, and an S3 server from the package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.compose.engine import docker, scratch
from tests.compose.locked import excerpt, needed

ROOT: Final = Path(__file__).resolve().parent.parent.parent
SUITE: Final = "bookworm"
CERTIFICATES: Final = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_SETTINGS: Final = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_CERT", "PIP_DEFAULT_TIMEOUT")


def make_base(tag: str, *more: str) -> None:
    """Debian with Python, its venv module, `more`, and the authorities that this machine trusts. Needs root."""
    with scratch("keylake-base-") as directory:
        root = directory / "root"
        include = f"--include={','.join(('python3', 'python3-venv', 'ca-certificates', *more))}"
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", include, SUITE, str(root)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"debootstrap failed:\n{(done.stdout + done.stderr)[-3000:]}")
        for packages in (root / "var/cache/apt/archives").glob("*.deb"):
            packages.unlink()
        # A machine behind a proxy has an authority of its own, without which pip reaches nothing.
        shutil.copyfile(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(["docker", "import", "-", tag], stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
        if tar.returncode != 0:
            raise RuntimeError("the base could not be packed")


def make_s3(tag: str, base: str) -> None:
    with tempfile.TemporaryDirectory(prefix="keylake-s3-") as directory:
        lock = (ROOT / "requirements-dev.lock").read_text()
        Path(directory, "requirements.txt").write_text(excerpt(lock, needed("moto", ["server", "s3"])))
        shutil.copy(Path(__file__).parent / "s3" / "Dockerfile", directory)
        shutil.copy(ROOT / "tests" / "fixtures" / "moto_server.py", directory)
        arguments = [
            f"BASE_IMAGE={base}",
            *(f"{name}={os.environ[name]}" for name in PIP_SETTINGS if name in os.environ),
        ]
        options = [part for argument in arguments for part in ("--build-arg", argument)]
        docker("build", "--quiet", "--network", "host", "--tag", tag, *options, directory, timeout_s=1200)
