"""The parts of the containers that need no engine: the health check, the metadata database, the customer's account."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
import pytest
from minio import Minio

from compute.guard.build import prepare_guard
from customercloud.app import create_app
from customercloud.config import load_settings
from keylake import ready
from keylake.compose import copy_objects
from keylake.layout import Layout
from keylake.metadata import METADATA_DATABASE, MetadataSettings
from keylake.provision import BUCKET, OPERATOR, make_secrets, open_account, open_objects
from keymanager.config import KeymanagerSettings
from keymanager.providers import aws as aws_kind
from pageserver.redo import build
from shared import c_library
from shared.config import Address
from shared.errors import ConflictError, InvalidInputError, UnavailableError
from shared.service import HttpServer
from shared.storage.config import open_store
from shared.tls import CertificateAuthority, CertificateFiles, server_context
from tests.fixtures.s3 import S3Server
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration


# --- the health check ---


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response({"/readyz": 200, "/waiting": 503}.get(self.path, 404))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Quiet."""


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[int]:
    authority = CertificateAuthority()
    (tmp_path / "ca.crt").write_bytes(authority.certificate_pem)
    files = authority.issue_files(tmp_path, "proxy", ["proxy.keylake"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.socket = server_context(files).wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "path", "code"),
    [
        ("proxy.keylake", "/readyz", 0),
        ("proxy.keylake", "/waiting", 1),
        ("proxy.keylake", "/nothing", 1),
        ("pageserver.keylake", "/readyz", 1),
    ],
)
def test_ready_means_200_from_the_right_service(
    tls_server: int, tmp_path: Path, name: str, path: str, code: int
) -> None:
    # As the containers run it: with nothing but the standard library.
    command = [sys.executable, "-I", "-S", ready.__file__, str(tls_server), name, "--path", path]
    done = subprocess.run([*command, "--ca", str(tmp_path / "ca.crt")], capture_output=True, timeout=30, check=False)
    assert done.returncode == code, done


def test_ready_in_plain_http_says_which_port_it_means() -> None:
    """The console answers to its own name and port only."""
    hosts: list[str | None] = []

    class Handler(_Handler):
        def do_GET(self) -> None:
            hosts.append(self.headers["Host"])
            super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.server_address[1]
        assert ready.ask(port, "127.0.0.1", "/readyz", None) == 200
        assert ready.ask(port, "127.0.0.1", "/waiting", None) == 503
        server.shutdown()
        thread.join()
    assert hosts == [f"127.0.0.1:{port}"] * 2


def test_nobody_there_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(CertificateAuthority().certificate_pem)
    with pytest.raises(OSError):  # noqa: PT011 - whatever the kernel says
        ready.ask(1, "proxy.keylake", "/readyz", str(tmp_path / "ca.crt"))


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"HTTP/1.1 200 OK\r\n", 200),
        (b"HTTP/1.0 503\r\n", None),  # RFC 9112 wants a space there, whatever follows
        (b"HTTP/1.1 503 \r\n", 503),
        (b"", None),
        (b"SSH-2.0-x 200 \r\n", None),
        (b"HTTP/1.1 2000 OK\r\n", None),
        (b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n", None),
    ],
)
def test_status_lines(line: bytes, status: int | None) -> None:
    assert ready.status_of(line) == status


# --- the metadata database ---


@pytest.fixture
def metadata(tmp_path: Path) -> Iterator[Path]:
    """A settings file. Its socket has a short path, as sockets must."""
    tmp_path.chmod(0o755)
    with TemporaryDirectory(prefix="kl-", dir="/tmp") as sockets:
        values = {
            "data_dir": str(tmp_path / "data"),
            "socket_dir": sockets,
            "ready_file": str(tmp_path / "ready"),
            "passwords": {role: secrets.token_urlsafe(24) for role in ("postgres", "keymanager", "compute")},
        }
        path = tmp_path / "metadata.json"
        path.write_text(json.dumps(values))
        yield path


@asynccontextmanager
async def running_metadata(config: Path) -> AsyncIterator[MetadataSettings]:
    settings = MetadataSettings.load(config)
    ready_file = settings.ready_file
    assert ready_file is not None
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "keylake.metadata", "--config", str(config), stderr=asyncio.subprocess.PIPE
    )
    try:
        await wait_until(lambda: ready_file.exists() or process.returncode is not None, 60)
        yield settings
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    assert not ready_file.exists()
    for password in settings.passwords.values():
        assert password.get_secret_value().encode() not in log


async def connect(
    settings: MetadataSettings, role: str, password: str | None = None
) -> asyncpg.Connection[asyncpg.Record]:
    return await asyncpg.connect(
        host=str(settings.socket_dir),
        user=role,
        password=password or settings.passwords[role].get_secret_value(),
        database=METADATA_DATABASE,
    )


async def test_each_role_has_its_own_schema_and_no_other(metadata: Path) -> None:
    async with running_metadata(metadata) as settings:
        compute = await connect(settings, "compute")
        await compute.execute("CREATE TABLE mine (n int)")
        await compute.execute("INSERT INTO mine VALUES (1)")
        await compute.close()
        keymanager = await connect(settings, "keymanager")
        for forbidden in ("SELECT * FROM compute.mine", "CREATE TABLE public.t (n int)", "CREATE ROLE more"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await keymanager.execute(forbidden)
        await keymanager.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await connect(settings, "compute", "wrong")
    # Again, over what an earlier container left: the data, and a socket's lock of a process that is somebody else here.
    (settings.socket_dir / ".s.PGSQL.5432.lock").write_text(f"{os.getppid()}\n/x\n0\n5432\n{settings.socket_dir}\n")
    async with running_metadata(metadata) as settings:
        compute = await connect(settings, "compute")
        assert await compute.fetchval("SELECT n FROM mine") == 1
        await compute.close()


async def test_an_interrupted_initdb_is_not_taken_for_a_database(metadata: Path) -> None:
    settings = MetadataSettings.load(metadata)
    unfinished = settings.data_dir.with_name("data.new")
    unfinished.mkdir()
    (unfinished / "PG_VERSION").write_text("16\n")
    async with running_metadata(metadata) as running:
        superuser = await connect(running, "postgres")
        await superuser.close()
    assert not unfinished.exists()


@pytest.mark.parametrize("password", ["", "short", "with'quote-and-more-letters", "x" * 200])
def test_a_password_that_could_be_sql_is_refused(metadata: Path, password: str) -> None:
    values = json.loads(metadata.read_text())
    values["passwords"]["compute"] = password
    metadata.write_text(json.dumps(values))
    with pytest.raises(InvalidInputError, match=r"passwords\.compute") as refused:
        MetadataSettings.load(metadata)
    assert not password or password not in str(refused.value)


def test_unknown_settings_are_refused_without_their_value(metadata: Path) -> None:
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "more": "hunter2"}))
    with pytest.raises(InvalidInputError, match="more") as refused:
        MetadataSettings.load(metadata)
    assert "hunter2" not in str(refused.value)


# --- what Postgres loads, built ahead ---


async def test_a_cache_that_the_build_filled_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    binaries = await build.prepare(tmp_path / "lib")
    guard = await prepare_guard(tmp_path / "lib")

    def none() -> list[str]:
        raise UnavailableError("no C compiler")

    monkeypatch.setattr(c_library, "find_compiler", none)
    assert await build.prepare(tmp_path / "lib") == binaries
    assert await prepare_guard(tmp_path / "lib") == guard
    with pytest.raises(UnavailableError, match="compiler"):
        await build.prepare(tmp_path / "another")


# --- the account at the customer's cloud ---


async def test_the_keymanager_gets_its_access_key_and_keeps_its_settings(tmp_path: Path) -> None:
    make_secrets(tmp_path)
    bundle = tmp_path / "customercloud"
    config = bundle / "config" / "customercloud.json"
    values = json.loads(
        config.read_text().replace("/etc/keylake", str(bundle)).replace("/var/lib", str(tmp_path / "var"))
    )
    config.write_text(json.dumps(values))
    (tmp_path / "var").mkdir()
    settings = load_settings(config)
    assert settings.tls_cert_path is not None
    assert settings.tls_key_path is not None
    files = CertificateFiles(settings.tls_cert_path, settings.tls_key_path)
    keymanager = Layout(tmp_path / "keymanager").config / "keymanager.json"
    before = json.loads(keymanager.read_text())
    app = await asyncio.to_thread(create_app, settings)
    async with HttpServer(app, Address(port=0), files) as server:
        url = f"https://127.0.0.1:{server.port}"
        await asyncio.to_thread(open_account, tmp_path, url)
        first = keymanager.read_bytes()
        await asyncio.to_thread(open_account, tmp_path, url)
        assert keymanager.read_bytes() == first
        # The role trusts one external id; another one is somebody else's stack.
        (Layout(tmp_path / OPERATOR).keys / "external-id").write_text("0" * 32)
        with pytest.raises(ConflictError):
            await asyncio.to_thread(open_account, tmp_path, url)
    assert json.loads(first).items() > before.items()
    aws = KeymanagerSettings.load(keymanager).of(aws_kind.KIND)
    assert aws.access_key_id is not None
    assert stat.S_IMODE(keymanager.stat().st_mode) == 0o600
    other = Layout(tmp_path / "keymanager-2").config / "keymanager-2.json"
    assert KeymanagerSettings.load(other).of(aws_kind.KIND) == aws


async def test_an_s3_server_without_an_admin_api_gets_the_bucket_and_no_user(
    tmp_path: Path, s3_server: S3Server
) -> None:
    """A real MinIO is not to be had here; its users' policies, in keylake.provision, have tests of their own."""
    make_secrets(tmp_path)
    keys = Layout(tmp_path / OPERATOR).keys
    (keys / "objects-user").write_text(s3_server.access_key)
    (keys / "objects-password").write_text(s3_server.secret_key)
    for _ in range(2):
        assert not await asyncio.to_thread(open_objects, tmp_path, s3_server.endpoint)
    store = await open_store(s3_server.settings(BUCKET).model_copy(update={"attempts": 1}))
    await store.close()
    with pytest.raises(UnavailableError):
        await asyncio.to_thread(open_objects, tmp_path, "http://127.0.0.1:1")


async def test_objects_that_go_while_the_demo_copies_them_are_left_out(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index's older versions are deleted at any time."""
    make_secrets(tmp_path)
    keys = Layout(tmp_path / OPERATOR).keys
    (keys / "objects-user").write_text(s3_server.access_key)
    (keys / "objects-password").write_text(s3_server.secret_key)
    bucket = s3_server.new_bucket()
    monkeypatch.setattr("keylake.compose.BUCKET", bucket)
    monkeypatch.setattr("keylake.compose.OBJECTS_URL", s3_server.endpoint)
    listed = Minio.list_objects

    def deleted_once_they_are_listed(client: Minio, *arguments: Any, **more: Any) -> Iterator[Any]:
        for entry in list(listed(client, *arguments, **more)):
            if entry.object_name == "b/goes":
                client.remove_object(bucket, entry.object_name)
            yield entry

    monkeypatch.setattr(Minio, "list_objects", deleted_once_they_are_listed)
    store = await open_store(s3_server.settings(bucket))
    for name in ("a/stays", "b/goes", "c/stays"):
        await store.put(name, b"sealed")
    await store.close()
    copies = tmp_path / "copies"
    await asyncio.to_thread(copy_objects, Layout(tmp_path / OPERATOR), copies)
    assert {str(path.relative_to(copies)) for path in copies.rglob("*") if path.is_file()} == {"a/stays", "c/stays"}
