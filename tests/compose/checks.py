"""What must hold of the containers. Each raises AssertionError, or returns what it has seen in a few words."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from keylake.console.app import KEY_HEADER
from keylake.console.container import ADDRESS_FILE
from keylake.demo.evidence import search
from keylake.provision import SERVICES
from tests.compose.engine import docker
from tests.compose.stack import Container, Stack

UID: Final = "10001"
_PSQL_TIMEOUT_S: Final = 90
_CAP_SYS_ADMIN: Final = 21  # linux/capability.h
_WELL_TIMEOUT_S: Final = 60.0
_BUILD_TOOLS: Final = ("cc", "gcc", "clang", "ld", "make", "zig")
_MAX_LAYER_SIZE_BYTES: Final = 400_000_000
"""That with the virtual environment: Postgres, the clouds' SDKs. The compiler of the build stage alone has as much."""
_LOG_IN: Final = """
import asyncio, asyncpg
async def main():
    for user in ("postgres", "keymanager", "compute", "keylake"):
        for password in ("", user, "postgres", "password", "keylake", "minioadmin"):
            try:
                await asyncpg.connect(host="/run/metadata", user=user, password=password, database="postgres")
            except asyncpg.InvalidAuthorizationSpecificationError:
                continue
            raise SystemExit(f"{user} got in")
    print("refused")
asyncio.run(main())
"""

_RUNNING_VOLUMES: Final = """
import asyncio, json, pathlib
from keylake.compose import client
async def main():
    async with client(pathlib.Path("/etc/keylake")) as keylake:
        print(json.dumps([each.volume for each in await keylake.endpoints() if each.state.value == "RUNNING"]))
asyncio.run(main())
"""


def published(stack: Stack, containers: list[Container]) -> str:
    found = {
        (each.name, binding["HostIp"], binding["HostPort"])
        for each in containers
        for bindings in (each.facts["NetworkSettings"]["Ports"] or {}).values()
        for binding in bindings or ()
    }
    assert found == {
        ("proxy", "127.0.0.1", str(stack.proxy_port)),
        ("console", "127.0.0.1", str(stack.console_port)),
    }, found
    return "the proxy's and the console's, on 127.0.0.1"


def told_where(stack: Stack, told: str) -> str:
    """What `make up` says at its end. The console's address is its last line, for whoever pipes it somewhere."""
    assert f"connect to 127.0.0.1:{stack.proxy_port}." in told, told
    assert told.splitlines()[-1] == console_address(stack), "the console's address"
    return "where the proxy is, and the console's address"


def logs(stack: Stack) -> str:
    """`make logs` follows until it is interrupted."""
    done = stack.make("logs", seconds=10, check=False)
    assert done.returncode == 124, (done.returncode, done.stderr[-1000:])
    lines = [line for line in done.stdout.splitlines() if '"level": ' in line]
    silent = [name for name in SERVICES if not any(name in line.partition("|")[0] for line in lines)]
    assert not silent, silent
    return f"{len(lines)} lines of {len(SERVICES)} services, and it goes on until it is ended"


def by_command(stack: Stack) -> str:
    """`keylake` in the operator's container is about the containers."""
    projects = json.loads(stack.operator("keylake", "project", "list", "--json").stdout)
    assert projects, "the demo's at least"
    keys = json.loads(stack.operator("keylake", "cloud", "key", "list", "--json").stdout)
    assert keys, "the customer's, which several projects may share"
    done = stack.operator("keylake", "status", "--json", check=False)
    status = json.loads(done.stdout)
    assert (done.returncode, status["healthy"]) == (0, True), status["problems"]
    assert {each["name"] for each in status["services"]} == {"customercloud", *SERVICES}
    assert len(status["projects"]) == len(projects)
    verified = stack.operator("keylake", "audit", "verify").stdout
    assert verified.startswith("intact: "), verified
    refused = stack.operator("keylake", "link", "show", check=False)
    assert refused.returncode == 1, refused.stdout
    assert "docker network disconnect" in refused.stderr, refused.stderr
    return f"{len(projects)} projects, all is healthy, the audit chain is intact"


# --- the image ---


def image(stack: Stack) -> str:
    """No build tools, and layers that somebody pulls without a sigh."""
    look = f"for tool in {' '.join(_BUILD_TOOLS)}; do command -v $tool; done"
    look += "; find / -xdev -name 'ziglang*' 2>/dev/null; true"
    found = docker("run", "--rm", "--network", "none", stack.image, "sh", "-c", look).split()
    assert not found, found
    ours, base = (_layers(name) for name in (stack.image, stack.base))
    largest = max(ours[: len(ours) - len(base)])  # the newest one comes first
    assert largest < _MAX_LAYER_SIZE_BYTES, ours
    return f"no build tools; {sum(ours) / 1e6:,.0f} MB, of which the largest layer of ours is {largest / 1e6:,.0f} MB"


def _layers(name: str) -> list[int]:
    return list(map(int, docker("history", "--human=false", "--format", "{{.Size}}", name).split()))


# --- what runs ---


def _processes(container: Container) -> Iterator[dict[str, str]]:
    """Of each process in it, /proc/<pid>/status (proc(5)) as this machine's kernel tells it."""
    pids = [line.split()[0] for line in docker("top", container.id, "-eo", "pid").splitlines()[1:]]
    for pid in pids:
        try:
            lines = Path("/proc", pid, "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        yield {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _written(container: Container) -> list[str]:
    """Paths of its root file system that differ from the image's, but for what the engine makes to mount things on."""
    mounted = [each["Destination"] for each in container.facts["Mounts"]]
    mounted += container.facts["HostConfig"]["Tmpfs"] or {}
    mounted += ["/sbin/docker-init", "/usr/sbin/docker-init"]  # the engine's own, for `init: true`
    changed = [line.split(maxsplit=1)[1] for line in docker("diff", container.id).splitlines()]
    return [path for path in changed if not any(f"{where}/".startswith(f"{path}/") for where in mounted)]


def powerless(containers: list[Container]) -> str:
    seen = 0
    for container in containers:
        for status in _processes(container):
            seen += 1
            what = (container.name, status["Name"])
            assert set(status["Uid"].split()) == set(status["Gid"].split()) == {UID}, (what, status["Uid"])
            for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status[kind], 16) == 0, (what, kind, status[kind])
            assert status["NoNewPrivs"] == "1", what
            assert status["Seccomp"] == "2", what  # a filter
        host = container.facts["HostConfig"]
        assert host["ReadonlyRootfs"], container.name
        assert not host["Privileged"], container.name
        assert not host["Devices"], container.name
        written = _written(container)
        assert not written, (container.name, written)
    assert seen > 2 * len(containers)  # docker-init and the service at least
    return f"{seen} processes in {len(containers)} containers: uid {UID}, no capability, a read-only root"


def room_for_objects(stack: Stack) -> str:
    """What MinIO needs, as whom and where it would run: its volume, its keys, a place for what it makes in HOME."""
    [minio] = [each for each in stack.containers() if each.name == "minio"]
    script = (
        "set -e; touch /data/x; rm /data/x; "
        'test "$(wc -c < "$MINIO_ROOT_USER_FILE")" -gt 8; test "$(wc -c < "$MINIO_ROOT_PASSWORD_FILE")" -gt 24; '
        'mkdir "$HOME/.minio"; rmdir "$HOME/.minio"; id -u'
    )
    assert docker("exec", minio.id, "sh", "-c", script).strip() == UID
    return f"uid {UID} writes its volume and reads its keys"


def one_of_each(stack: Stack) -> str:
    """`--scale` of what has an identity makes no second container; from version 2 on Compose says that it does not."""
    told = []
    for scale in ("safekeeper-1=2", "safekeeper=5"):
        done = stack.compose("up", "--detach", "--no-deps", "--scale", scale, "safekeeper-1", check=False)
        assert done.returncode != 0 or stack.compose_version.startswith("1."), scale
        told += [line for line in done.stderr.splitlines() if "safekeeper" in line][-1:]
    found = sorted(each.name for each in stack.wait_until_healthy() if each.name.startswith("safekeeper"))
    assert found == ["safekeeper-1", "safekeeper-2", "safekeeper-3"], found
    return f"three safekeepers, as before ({'; '.join(told)})"


# --- secrets ---


def _secrets(stack: Stack) -> dict[str, str]:
    """Where → value: what `provision` has made and nobody else may know."""
    found: dict[str, str] = {}
    words = ("password", "secret", "token", "dsn", "database_url")

    def settings(where: str, key: str, node: Any) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                settings(where, f"{key}.{name}", value)
        elif isinstance(node, str) and any(word in key for word in words):
            found[f"{where}: {key}"] = node

    for name, directory in stack.volumes().items():
        for path in directory.rglob("*") if name.endswith("-secrets") else ():
            where = f"{name}/{path.relative_to(directory)}"
            match path.parent.name, path.suffix:
                case "config", ".json":
                    settings(where, "", json.loads(path.read_text()))
                case "pki", ".key":  # PEM: the first line is the same for all
                    found[where] = path.read_text().splitlines()[1]
                case "keys", ".json" if path.name != "trust.json":
                    found[where] = json.loads(path.read_text())["private_key_pem"].splitlines()[1]
                case "keys" | "customercloud", "" | ".token" if path.is_file() and not path.name.endswith("-user"):
                    found[where] = path.read_text().strip()
    return found


def no_default_password(stack: Stack) -> str:
    made = _secrets(stack)
    assert len(made) > 30, sorted(made)
    for where, value in made.items():
        assert len(value) >= 24, where
    by_service = {each.name: each for each in stack.containers()}
    keymanager = by_service["keymanager"]  # it shares the database's socket
    told = docker("exec", keymanager.id, "python", "-c", _LOG_IN)
    assert told.strip() == "refused", told
    return f"{len(made)} secrets are long and made here; the database refuses usual ones"


def secrets_stay_where_they_are(stack: Stack) -> str:
    made = _secrets(stack)
    containers = stack.containers()
    assert all(Path(each.facts["LogPath"]).exists() for each in containers)
    looked_at = {
        "docker inspect": json.dumps([each.facts for each in containers]),
        "the image": docker("history", "--no-trunc", stack.image) + docker("inspect", stack.image),
        **{f"the log of {each.name}": Path(each.facts["LogPath"]).read_text() for each in containers},
    }
    told = console_address(stack).partition("key=")[2]
    for name, text in looked_at.items():
        shown = [where for where, value in {**made, "the console's key": told}.items() if value in text]
        assert not shown, (name, shown)
    return f"none in {len(looked_at)} places where one could look"


# --- the console ---


def console_address(stack: Stack) -> str:
    return stack.compose("exec", "-T", "console", "cat", str(ADDRESS_FILE)).stdout.strip()


def console(stack: Stack) -> str:
    parts = urlsplit(console_address(stack))
    base = f"http://{parts.netloc}"
    assert parts.netloc == f"127.0.0.1:{stack.console_port}"
    key = {KEY_HEADER: parts.fragment.removeprefix("key=")}
    with httpx.Client(base_url=base, timeout=30, trust_env=False) as client:
        assert client.get("/").status_code == 200
        assert client.get("/api/files").status_code == 401
        assert client.get("/api/files", headers={**key, "Host": "console.example"}).status_code == 401
        files = client.get("/api/files", headers=key).json()
        assert {each["name"].split("/")[0] for each in files} >= {"safekeeper-1", "safekeeper-2", "safekeeper-3"}
        with client.stream("GET", "/api/stream", params={"hat": "auditor"}, headers=key) as stream:
            deadline = time.monotonic() + _WELL_TIMEOUT_S
            for seen in (json.loads(line[len("data: ") :]) for line in stream.iter_lines() if line.startswith("data:")):
                # One look gives each part three seconds, which is not always enough on a busy machine.
                health = {each["name"]: each["health"] for each in seen.get("health", [])}
                if health and set(health.values()) <= {"ready", "standby"}:
                    break
                assert time.monotonic() < deadline, health
    assert health.keys() == {"customercloud", *SERVICES}
    assert seen["parts"]["projects"]["value"], "it shows the demo's project"
    return f"it shows {len(health)} parts and the projects, to whoever has the key"


# --- from the host, and what of it lies on disk ---


def psql(
    made: dict[str, Any], ca: Path, statement: str, password: str | None = None
) -> subprocess.CompletedProcess[str]:
    connection = (
        f"host={made['host']} port={made['port']} user={made['user']} dbname={made['database']} sslmode=verify-full "
        f"sslrootcert={ca} options={made['options']}"
    )
    return subprocess.run(
        ["psql", connection, "--no-psqlrc", "--tuples-only", "--no-align", "--command", statement],
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "PGPASSWORD": made["password"] if password is None else password},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PSQL_TIMEOUT_S,
        check=False,
    )


def postgres(stack: Stack, directory: Path) -> tuple[str, str, str]:
    """A project by hand, as docs/compose.md says. Returns (its name, a canary that lies in it, what was seen)."""
    name, canary = f"shop-{secrets.token_hex(6)}", f"canary-{secrets.token_hex(12)}"
    made = json.loads(stack.operator("python", "-m", "keylake.compose", "project", name).stdout)
    assert made["port"] == stack.proxy_port
    ca = directory / "ca.crt"
    ca.write_text(made["ca_certificate"])
    (directory / "shop.json").write_text(json.dumps(made))
    for password in ("", "app", "postgres", "password", "keylake"):
        refused = psql(made, ca, "SELECT 1", password)
        assert refused.returncode != 0, password
        assert "password" in refused.stderr, refused.stderr
    fill = "CREATE TABLE t AS SELECT '%s-' || n AS word FROM generate_series(1, 1000) n"
    written = psql(made, ca, fill % canary)
    assert written.returncode == 0, written.stderr
    read = psql(made, ca, "SELECT count(*), min(word) FROM t")
    assert read.stdout.strip() == f"1000|{canary}-1", read.stdout + read.stderr
    command = ("keylake", "psql", name, "--", "--no-psqlrc", "-At", "-c", "SELECT max(word) FROM t")
    within = stack.operator(*command, password=made["password"], check=False)
    assert (within.returncode, within.stdout.strip()) == (0, f"{canary}-999"), within.stdout + within.stderr
    refused = stack.operator(*command, check=False)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "-e PGPASSWORD operator" in refused.stderr, refused.stderr
    return name, canary, "psql, with the certificate verified, and in the operator's container; not without a password"


def lazy_volumes(stack: Stack, directory: Path, canary: str) -> str:
    """docker-compose.fuse.yml on top: the project of `postgres`, its pages on demand, and nobody with more power."""
    made, ca = json.loads((directory / "shop.json").read_text()), directory / "ca.crt"
    files = [argument for name in ("docker-compose.yml", "docker-compose.fuse.yml") for argument in ("-f", name)]
    node = directory / "fuse"
    os.mknod(node, stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    node.chmod(0o666)  # as udev makes it, where there is one
    stack.fuse_device = str(node)
    stack.compose(*files, "up", "--detach", "--no-deps", "compute")
    stack.wait_until_healthy()
    written = psql(made, ca, "INSERT INTO t SELECT word || '+' FROM t; CREATE INDEX ON t (word)")
    assert written.returncode == 0, written.stderr
    read = psql(made, ca, "SELECT count(*), min(word) FROM t")
    assert read.stdout.strip() == f"2000|{canary}-1", read.stdout + read.stderr
    volumes = json.loads(stack.operator("python", "-c", _RUNNING_VOLUMES).stdout)
    assert [volume for volume in volumes if volume.startswith("FUSE, pages on demand")], volumes
    [compute] = [each for each in stack.containers() if each.name == "compute"]
    of_ours = os.stat("/proc/self/ns/user").st_ino
    outside = 0
    for status in _processes(compute):
        try:
            within = os.stat(f"/proc/{status['Pid']}/ns/user").st_ino != of_ours
        except OSError:
            continue  # ended meanwhile
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        if not within:
            outside += 1
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, status["Name"]
            assert int(status["CapBnd"], 16) == 1 << _CAP_SYS_ADMIN, status["Name"]
    assert outside >= 2  # docker-init and the manager
    return f"{volumes.pop()}; {outside} processes outside of user namespaces have no capability"


def no_plaintext(stack: Stack, name: str, canary: str) -> str:
    """In volumes and logs. `name`, the project's, is no secret: that it is found shows that the search finds things."""
    roots = [*stack.volumes().values(), *(Path(each.facts["LogPath"]) for each in stack.containers())]
    words = [canary, base64.b64encode(canary.encode()).decode()[:-4], name]
    findings = asyncio.run(search(roots, words))
    assert not [found for found in findings.found if found[1] != name], findings.found
    assert [found for found in findings.found if found[1] == name], "not even the project's name was found"
    return (
        f"{findings.size_bytes / 1e6:,.0f} MB in {findings.files} files of {len(stack.volumes())} volumes and the logs"
    )
